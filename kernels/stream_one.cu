// Linears of one token where there is a copy engine (sm_90 and later), bound by reading the weights once: four warps bring tiles of 16 rows
// through a ring (`ring.cuh`), sixteen have a row of each tile. Nobody needs tensor cores for one token, nor another warp's sums. The
// norm or relu² in front of the linear is computed here, too (`front.cuh`), while the ring fills. Integer results are those of
// `linear_few.cu` to the bit. This file is empty where there is no copy engine.
#include "front.cuh"
#include "ring.cuh"

#ifdef BULK_COPIES

namespace {

constexpr int WORKING = 32 * ROWS;  // threads that do not bring
constexpr int THREADS = WORKING + 32 * BRINGING;

// A warp's row of a tile, whose result its first lane stores.
struct Own {
    int row;
    bool stores;
    Result to;

    Own(const Tiles& tiles, int rows, TAIL_PARAMETERS) : row(tiles.row() + static_cast<int>(threadIdx.x) / 32), stores(threadIdx.x % 32 == 0 && row < rows), to(result(stores, 0, row, TAIL_ARGUMENTS)) {}
};

// Eight inputs a lane at a time.
DEVICE void multiply_bf16(Stages& ring, Tiles tiles, const float* x, int rows, int width, TAIL_PARAMETERS) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (; tiles.more(); tiles.next()) {
        const Own own(tiles, rows, TAIL_ARGUMENTS);
        float even = 0.0f, odd = 0.0f;
        for (int at = 0; at < width; at += PIECE / 2) {
            ring.wait_full();
            const u8* weights = ring.stage() + warp * PITCH + lane * 16;
#pragma unroll
            for (int i = 0; i < PIECE / 512; ++i) {
                const int first = at + i * 256;
                if (first + lane * 8 >= width) break;
                const uint4 w = load(weights + i * 512);
                const float4 low = *reinterpret_cast<const float4*>(x + first + lane * 4), high = *reinterpret_cast<const float4*>(x + first + 128 + lane * 4);
                even = fmaf(bits_float(w.x << 16), low.x, even), odd = fmaf(bits_float(w.x & 0xffff0000u), low.y, odd);
                even = fmaf(bits_float(w.y << 16), low.z, even), odd = fmaf(bits_float(w.y & 0xffff0000u), low.w, odd);
                even = fmaf(bits_float(w.z << 16), high.x, even), odd = fmaf(bits_float(w.z & 0xffff0000u), high.y, odd);
                even = fmaf(bits_float(w.w << 16), high.z, even), odd = fmaf(bits_float(w.w & 0xffff0000u), high.w, odd);
            }
            ring.release();
        }
        const float sum = warp_sum(even + odd);
        if (own.stores) finish(sum, own.to, TAIL_ARGUMENTS);
    }
}

// Sixteen inputs a lane at a time. PAIRED: as the codes lie.
template <bool PAIRED> DEVICE void multiply_int8(Stages& ring, Tiles tiles, const i8* x, float x_scale, const float* w_scales, int rows, int width, TAIL_PARAMETERS) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (; tiles.more(); tiles.next()) {
        const Own own(tiles, rows, TAIL_ARGUMENTS);
        const float scale = own.stores ? __fmul_rn(x_scale, w_scales[own.row]) : 0.0f;
        int first_sum = 0, second_sum = 0;
        for (int at = 0; at < width; at += PIECE) {
            ring.wait_full();
            const u8* weights = ring.stage() + warp * PITCH + lane * 16;
#pragma unroll
            for (int i = 0; i < PIECE / 512; ++i) {
                const int first = at + i * 512 + lane * 16;
                if (first >= width) break;
                const uint4 w = load(weights + i * 512), v = load(x + code_place<PAIRED>(first));
                first_sum = dot4(w.x, v.x, first_sum), second_sum = dot4(w.y, v.y, second_sum);
                first_sum = dot4(w.z, v.z, first_sum), second_sum = dot4(w.w, v.w, second_sum);
            }
            ring.release();
        }
        const int sum = warp_sum(first_sum + second_sum);
        if (own.stores) finish(__fmul_rn(static_cast<float>(sum), scale), own.to, TAIL_ARGUMENTS);
    }
}

// 32 inputs a lane at a time, PARTS groups in 128; `products`: room for acc_g·s_w[g] of two windows of each warp.
template <int PARTS> DEVICE void multiply_int4(Stages& ring, Tiles tiles, const i8* x, float x_scale, float* products, int rows, int cols, TAIL_PARAMETERS) {
    constexpr int STEPS = 4 / PARTS, SHARING = 4 / PARTS;  // lanes that share a group
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = ld(cols), groups = cols / (128 / PARTS);
    products += warp * 2 * WINDOW;
    int slot = 0;
    for (; tiles.more(); tiles.next()) {
        const Own own(tiles, rows, TAIL_ARGUMENTS);
        i64 group = static_cast<i64>(minimum(own.row, rows - 1)) * groups;
        float total = 0.0f;
        for (int at = 0, left = groups; at < width; at += STEPS * 1024, left -= WINDOW, group += WINDOW, slot ^= 1) {
            ring.wait_full();
            const u8* weights = ring.stage() + warp * PITCH + lane * 16;
            const bf16* scales = scales_of(ring.stage(), warp, group);
            float* handed = products + slot * WINDOW;
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                const int first = at + i * 1024;
                int low_sum = 0, high_sum = 0;
                if (first + lane * 32 < width) {
                    // Codes in the high half of a byte are 16 times themselves, which is divided out below.
                    const uint4 w = load(weights + i * 512), low = load(x + first + lane * 16), high = load(x + first + 512 + lane * 16);
                    low_sum = dot4(w.x << 4 & 0xf0f0f0f0u, low.x, low_sum), high_sum = dot4(w.x & 0xf0f0f0f0u, high.x, high_sum);
                    low_sum = dot4(w.y << 4 & 0xf0f0f0f0u, low.y, low_sum), high_sum = dot4(w.y & 0xf0f0f0f0u, high.y, high_sum);
                    low_sum = dot4(w.z << 4 & 0xf0f0f0f0u, low.z, low_sum), high_sum = dot4(w.z & 0xf0f0f0f0u, high.z, high_sum);
                    low_sum = dot4(w.w << 4 & 0xf0f0f0f0u, low.w, low_sum), high_sum = dot4(w.w & 0xf0f0f0f0u, high.w, high_sum);
                }
                int sum = low_sum + high_sum;
#pragma unroll
                for (int mask = 1; mask < SHARING; mask *= 2) sum += shuffle_xor(sum, mask);
                // Nobody adds up what lies behind the last group.
                const int index = i * (32 / SHARING) + lane / SHARING;
                if (lane % SHARING == 0) handed[index] = __fmul_rn(static_cast<float>(sum >> 4), widen(scales[index]));
            }
            ring.release();
            if (lane > 0) continue;
            // In ascending order; what is read here is overwritten two windows later, behind the next release.
            const float4* fours = reinterpret_cast<const float4*>(handed);
            if (left >= WINDOW) {
                float4 held[WINDOW / 4];
#pragma unroll
                for (int i = 0; i < WINDOW / 4; ++i) held[i] = fours[i];
#pragma unroll
                for (int i = 0; i < WINDOW / 4; ++i) total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, held[i].x), held[i].y), held[i].z), held[i].w);
            } else {
                for (int i = 0; i < left; ++i) total = __fadd_rn(total, handed[i]);
            }
        }
        if (own.stores) finish(__fmul_rn(total, x_scale), own.to, TAIL_ARGUMENTS);
    }
}

}  // namespace

RESIDENT_KERNEL(THREADS, 1, one_bf16, (const bf16* w, int rows, int cols, int stages, FRONT_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    DYNAMIC_SHARED(u8, shared);
    const Tiles tiles = tiles_of_block(0, rows);
    Stages ring(shared, stages, ROWS);
    if (threadIdx.x >= WORKING) {
        bring(ring, tiles, w, nullptr, 0, rows, 2 * ld(cols), PIECE);
        return;
    }
    const float* x = front_floats<WORKING>(ring.behind(), cols, FRONT_ARGUMENTS);
    multiply_bf16(ring, tiles, x, rows, ld(cols), TAIL_ARGUMENTS);
}

RESIDENT_KERNEL(THREADS, 1, one_w8a8, (const i8* w, const float* w_scales, int rows, int cols, int stages, CODES_PARAMETERS, FRONT_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    DYNAMIC_SHARED(u8, shared);
    const Tiles tiles = tiles_of_block(0, rows);
    Stages ring(shared, stages, ROWS);
    if (threadIdx.x >= WORKING) {
        bring(ring, tiles, w, nullptr, 0, rows, ld(cols), PIECE);
        return;
    }
    const Codes x = front_codes<WORKING, false>(ring.behind(), cols, CODES_ARGUMENTS, FRONT_ARGUMENTS);
    multiply_int8<false>(ring, tiles, x.codes, x.scale, w_scales, rows, ld(cols), TAIL_ARGUMENTS);
}

// A linear of two parts, `rows` int4 rows in front of `other_rows` int8 rows, of which there may be none: int8 tiles are the first.
RESIDENT_KERNEL(THREADS, 1, one_w4a8, (const u8* w, const bf16* w_scales, int group_size, int rows, const i8* other_w, const float* other_scales, int other_rows, int cols, int stages, CODES_PARAMETERS, FRONT_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    DYNAMIC_SHARED(u8, shared);
    const Tiles others = tiles_of_block(0, other_rows), tiles = tiles_of_block(divide_up(other_rows, ROWS), rows);
    Stages ring(shared, stages, ROWS);
    if (threadIdx.x >= WORKING) {
        if (other_rows > 0) bring(ring, others, other_w, nullptr, 0, other_rows, ld(cols), PIECE);
        bring(ring, tiles, w, w_scales, cols / group_size, rows, ld(cols) / 2, PIECE / 128 * group_size);
        return;
    }
    float* products = reinterpret_cast<float*>(ring.behind());
    const Codes x = front_codes<WORKING, true>(ring.behind() + ROWS * 2 * WINDOW * sizeof(float), cols, CODES_ARGUMENTS, FRONT_ARGUMENTS);
    if (other_rows > 0)
        multiply_int8<true>(ring, others, x.codes, x.scale, other_scales, other_rows, ld(cols), bias ? bias + rows : nullptr, residual ? residual + rows : nullptr, out + rows, out_stride);
    if (group_size == 128) multiply_int4<1>(ring, tiles, x.codes, x.scale, products, rows, cols, TAIL_ARGUMENTS);
    if (group_size == 64) multiply_int4<2>(ring, tiles, x.codes, x.scale, products, rows, cols, TAIL_ARGUMENTS);
    if (group_size == 32) multiply_int4<4>(ring, tiles, x.codes, x.scale, products, rows, cols, TAIL_ARGUMENTS);
}

#endif
