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

// Sixteen inputs a lane at a time. PAIRED: as the codes lie. Behind the last input codes are zeros, so that what stages hold there is
// multiplied as well.
template <bool PAIRED> DEVICE void multiply_int8(Stages& ring, Tiles tiles, const i8* x, float x_scale, const float* w_scales, int rows, int width, TAIL_PARAMETERS) {
    constexpr int STEPS = PIECE / 512;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (; tiles.more(); tiles.next()) {
        const Own own(tiles, rows, TAIL_ARGUMENTS);
        const float scale = own.stores ? __fmul_rn(x_scale, w_scales[own.row]) : 0.0f;
        int first_sum = 0, second_sum = 0;
        for (int at = 0; at < width; at += PIECE) {
            const i8* inputs = x + at;
            ring.wait_full();
            const u8* weights = ring.stage() + warp * PITCH + lane * 16;
            uint4 w[STEPS], v[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; ++i) w[i] = load(weights + i * 512), v[i] = load(inputs + code_place<PAIRED>(i * 512 + lane * 16));
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                first_sum = dot4(w[i].x, v[i].x, first_sum), second_sum = dot4(w[i].y, v[i].y, second_sum);
                first_sum = dot4(w[i].z, v[i].z, first_sum), second_sum = dot4(w[i].w, v[i].w, second_sum);
            }
            ring.release();
        }
        const int sum = warp_sum(first_sum + second_sum);
        if (own.stores) finish(__fmul_rn(static_cast<float>(sum), scale), own.to, TAIL_ARGUMENTS);
    }
}

// Of COUNT sums of each of COUNT lanes next to each other: lane i gets the i-th sum over them.
template <int COUNT> DEVICE int exchange_sums(int (&sums)[COUNT], int lane) {
#pragma unroll
    for (int half = COUNT / 2; half > 0; half /= 2) {
        const bool upper = lane & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const int kept = upper ? sums[i + half] : sums[i], given = upper ? sums[i] : sums[i + half];
            sums[i] = kept + shuffle_xor(given, half);
        }
    }
    return sums[0];
}

// Adds the products of a window to `total` in ascending order; all lanes do the same.
DEVICE void add_window(float& total, const float* products, int count) {
    const float4* fours = reinterpret_cast<const float4*>(products);
    if (count >= WINDOW) {
        float4 held[WINDOW / 4];
#pragma unroll
        for (int i = 0; i < WINDOW / 4; ++i) held[i] = fours[i];
#pragma unroll
        for (int i = 0; i < WINDOW / 4; ++i) total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, held[i].x), held[i].y), held[i].z), held[i].w);
    } else {
        for (int i = 0; i < count; ++i) total = __fadd_rn(total, products[i]);
    }
}

// 32 inputs a lane at a time, PARTS groups in 128; `products`: room for acc_g·s_w[g] of two windows of each warp. A window is added up while the
// next is multiplied.
template <int PARTS> DEVICE void multiply_int4(Stages& ring, Tiles tiles, const i8* x, float x_scale, float* products, int rows, int cols, TAIL_PARAMETERS) {
    constexpr int STEPS = 4 / PARTS;  // of a lane in a stage, and lanes that share a group
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = ld(cols), groups = cols / (128 / PARTS);
    products += warp * 2 * WINDOW;
    int slot = 0;
    for (; tiles.more(); tiles.next()) {
        const Own own(tiles, rows, TAIL_ARGUMENTS);
        i64 group = static_cast<i64>(minimum(own.row, rows - 1)) * groups;
        float total = 0.0f;
        int handed = 0, left = groups;  // groups of the window before, and from this one on
        for (int at = 0; at < width; at += STEPS * 1024, left -= WINDOW, group += WINDOW, slot ^= 1) {
            const i8* inputs = x + at + lane * 16;
            ring.wait_full();
            const u8* weights = ring.stage() + warp * PITCH + lane * 16;
            uint4 w[STEPS], low[STEPS], high[STEPS];
            int sums[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; ++i) w[i] = load(weights + i * 512), low[i] = load(inputs + i * 1024), high[i] = load(inputs + i * 1024 + 512);
            // After the exchange a lane has the group with this place in the window.
            const int place = lane % STEPS * (32 / STEPS) + lane / STEPS;
            const float scale = widen(scales_of(ring.stage(), warp, group)[place]);
            add_window(total, products + (slot ^ 1) * WINDOW, handed);
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                // Codes in the high half of a byte are 16 times themselves, which is divided out below.
                int low_sum = dot4(w[i].x << 4 & 0xf0f0f0f0u, low[i].x, 0), high_sum = dot4(w[i].x & 0xf0f0f0f0u, high[i].x, 0);
                low_sum = dot4(w[i].y << 4 & 0xf0f0f0f0u, low[i].y, low_sum), high_sum = dot4(w[i].y & 0xf0f0f0f0u, high[i].y, high_sum);
                low_sum = dot4(w[i].z << 4 & 0xf0f0f0f0u, low[i].z, low_sum), high_sum = dot4(w[i].z & 0xf0f0f0f0u, high[i].z, high_sum);
                low_sum = dot4(w[i].w << 4 & 0xf0f0f0f0u, low[i].w, low_sum), high_sum = dot4(w[i].w & 0xf0f0f0f0u, high[i].w, high_sum);
                sums[i] = low_sum + high_sum;
            }
            // Nobody adds up what lies behind the last group.
            products[slot * WINDOW + place] = __fmul_rn(static_cast<float>(exchange_sums(sums, lane) >> 4), scale);
            ring.release();
            handed = minimum(WINDOW, left);
        }
        add_window(total, products + (slot ^ 1) * WINDOW, handed);
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
        Bringing bringing(ring);
        bring(bringing, tiles, w, nullptr, 0, rows, 2 * ld(cols), PIECE);
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
        Bringing bringing(ring);
        bring(bringing, tiles, w, nullptr, 0, rows, ld(cols), PIECE);
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
        Bringing bringing(ring);
        if (other_rows > 0) bring(bringing, others, other_w, nullptr, 0, other_rows, ld(cols), PIECE);
        bring(bringing, tiles, w, w_scales, cols / group_size, rows, ld(cols) / 2, PIECE / 128 * group_size);
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
