// Linears of one token where there is a copy engine (sm_90 and later), bound by reading the weights once: four warps, of int4 weights three, bring tiles of 16 rows
// through a ring (`ring.cuh`), sixteen multiply. bf16 and int8: each has a row of a tile, and needs neither tensor cores nor another warp's
// sums; int4: each has the same inputs of all 16 rows, tensor cores multiply, and one warp more adds up. The norm or relu² in front of
// the linear is computed here, too (`front.cuh`), while the ring fills. Integer results are those of `linear_few.cu` to the bit. This
// file is empty where there is no copy engine.
#include "front.cuh"
#include "ring.cuh"

#ifdef BULK_COPIES

namespace {

constexpr int WORKING = 32 * ROWS;  // threads that multiply
constexpr int THREADS = WORKING + 32 * BRINGING;
constexpr int ADDING = 32;          // threads that add up products of int4 weights
// With them three warps that bring are twenty in all, five for each quarter of a multiprocessor, and 24 is what bounds their registers to 80: beside
// six warps, or more registers, there is no room for a block of the small launch behind, which would begin only when this one ends.
constexpr int BRINGING_INT4 = 3;
constexpr int BOUND_INT4 = 32 * 24;
constexpr int HANDED = WINDOW + 4;  // from one row's products of a stage to the next's: eight lanes that read sixteen bytes meet all banks

DEVICE u32 word(const uint4& words, int k) { return k == 0 ? words.x : k == 1 ? words.y : k == 2 ? words.z : words.w; }

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

// Sixteen inputs a lane at a time. Behind the last input codes are zeros, so that what stages hold there is multiplied as well.
DEVICE void multiply_int8(Stages& ring, Tiles tiles, const i8* x, float x_scale, const float* w_scales, int rows, int width, TAIL_PARAMETERS) {
    constexpr int STEPS = PIECE / 512;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (; tiles.more(); tiles.next()) {
        const Own own(tiles, rows, TAIL_ARGUMENTS);
        const float scale = own.stores ? __fmul_rn(x_scale, w_scales[own.row]) : 0.0f;
        int first_sum = 0, second_sum = 0;
        for (int at = 0; at < width; at += PIECE) {
            const i8* inputs = x + at + lane * 16;
            ring.wait_full();
            const u8* weights = ring.stage() + warp * PITCH + lane * 16;
            uint4 w[STEPS], v[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; ++i) w[i] = load(weights + i * 512), v[i] = load(inputs + i * 512);
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

// Multiplies int4 weights on the tensor cores, PARTS groups in a segment of 128 inputs, and leaves acc_g·s_w[g] of each row with the stage. A warp
// has the same segments of all 16 rows, so that each weight and each input is read from shared memory once. The product's eight columns are
// one token's inputs, with zeros where a column's group is another's.
template <int PARTS> DEVICE void multiply_int4(Stages& ring, Tiles tiles, const i8* x, float* products, int rows, int cols) {
    constexpr int SPAN = PIECE * 2 / PARTS, SEGMENTS = PARTS == 1 ? 2 : 1;  // inputs of a row in a stage, and segments of a warp
    const int warp = threadIdx.x / 32, line = threadIdx.x % 32 / 4, quad = threadIdx.x % 4, width = ld(cols), groups = cols / (128 / PARTS);
    const bool works = warp * SEGMENTS * 128 < SPAN, mine = PARTS == 1 || line % PARTS == quad * PARTS / 4;
    // What a lane hands over: row `own`'s product with the group at `place` of the window, and with PARTS = 4 the one behind.
    const int lower = quad / 2, own = line + 8 * lower, place = PARTS == 4 ? warp * 4 + quad % 2 * 2 : warp * 2 + quad % 2;
    uint4 low[SEGMENTS], high[SEGMENTS];
    const auto fetch = [&](int at) {
#pragma unroll
        for (int i = 0; i < SEGMENTS; ++i) {
            const i8* inputs = x + at + (warp * SEGMENTS + i) * 128 + quad * 32;
            low[i] = works && mine ? load(inputs) : zero(), high[i] = works && mine ? load(inputs + 16) : zero();
        }
    };
    fetch(0);
    for (; tiles.more(); tiles.next()) {
        i64 group = static_cast<i64>(minimum(tiles.row() + own, rows - 1)) * groups;
        for (int at = 0; at < width; at += SPAN, group += WINDOW) {
            ring.wait_full();
            if (works) {
                const u8* upper = ring.stage() + line * PITCH + warp * SEGMENTS * 64 + quad * 16;
                const bf16* scales = scales_of(ring.stage(), own, group) + place;
                uint4 a[SEGMENTS], b[SEGMENTS];
                int sums[SEGMENTS][4] = {};
#pragma unroll
                for (int i = 0; i < SEGMENTS; ++i) a[i] = load(upper + i * 64), b[i] = load(upper + 8 * PITCH + i * 64);
                const float scale = widen(scales[0]), next = PARTS == 4 ? widen(scales[1]) : 0.0f;
                // Codes in the high half of a byte are 16 times themselves, which is divided out below.
#pragma unroll
                for (int k = 0; k < 4; ++k)
#pragma unroll
                    for (int i = 0; i < SEGMENTS; ++i) {
                        const u32 above = word(a[i], k), below = word(b[i], k);
                        mma_s8(sums[i], above << 4 & 0xf0f0f0f0u, below << 4 & 0xf0f0f0f0u, above & 0xf0f0f0f0u, below & 0xf0f0f0f0u, word(low[i], k), word(high[i], k));
                    }
                const int(&last)[4] = sums[SEGMENTS - 1];
                const int first = lower ? sums[0][2] : sums[0][0], second = SEGMENTS == 2 ? (lower ? last[2] : last[0]) : (lower ? last[3] : last[1]);
                const auto scaled = [](int sum, float by) { return __fmul_rn(static_cast<float>(sum >> 4), by); };
                // Nobody adds up what lies behind the last group.
                float* to = products + (ring.at * ROWS + own) * HANDED + place;
                to[0] = scaled(PARTS < 4 && quad % 2 ? second : first, scale);
                if (PARTS == 4) to[1] = scaled(second, next);
            }
            ring.release();
            if (width > SPAN) fetch(at + SPAN < width ? at + SPAN : 0);
        }
    }
}

// Adds up in ascending order what `multiply_int4` leaves, a lane a row.
DEVICE void add_int4(Stages& ring, Tiles tiles, const float* products, const float* x_scale, int rows, int groups, TAIL_PARAMETERS) {
    const int lane = threadIdx.x % 32;
    for (; tiles.more(); tiles.next()) {
        const int row = tiles.row() + lane;
        const bool stores = lane < ROWS && row < rows;
        const Result to = result(stores, 0, row, TAIL_ARGUMENTS);
        float total = 0.0f;
        for (int left = groups; left > 0; left -= WINDOW) {
            ring.wait_released();
            const float4* fours = reinterpret_cast<const float4*>(products + (ring.at * ROWS + lane % ROWS) * HANDED);
            if (left >= WINDOW) {
                float4 held[WINDOW / 4];
#pragma unroll
                for (int i = 0; i < WINDOW / 4; ++i) held[i] = fours[i];
#pragma unroll
                for (int i = 0; i < WINDOW / 4; ++i) total = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(total, held[i].x), held[i].y), held[i].z), held[i].w);
            } else {
                for (int i = 0; i < left; ++i) total = __fadd_rn(total, reinterpret_cast<const float*>(fours)[i]);
            }
            ring.hand_back();
        }
        if (stores) finish(__fmul_rn(total, *x_scale), to, TAIL_ARGUMENTS);
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
    const Codes x = front_codes<WORKING>(ring.behind(), cols, CODES_ARGUMENTS, FRONT_ARGUMENTS);
    multiply_int8(ring, tiles, x.codes, x.scale, w_scales, rows, ld(cols), TAIL_ARGUMENTS);
}

// A linear of two parts, `rows` int4 rows in front of `other_rows` int8 rows, of which there may be none: int8 tiles are the first.
RESIDENT_KERNEL(BOUND_INT4, 1, one_w4a8, (const u8* w, const bf16* w_scales, int group_size, int rows, const i8* other_w, const float* other_scales, int other_rows, int cols, int stages, CODES_PARAMETERS, FRONT_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    DYNAMIC_SHARED(u8, shared);
    const Tiles others = tiles_of_block(0, other_rows), tiles = tiles_of_block(divide_up(other_rows, ROWS), rows);
    Stages ring(shared, stages, ROWS, ADDING);
    float* products = reinterpret_cast<float*>(ring.behind());
    u8* front = ring.behind() + stages * ROWS * HANDED * sizeof(float);
    const int groups = cols / group_size;
    if (threadIdx.x >= WORKING + ADDING) {
        Bringing bringing(ring, weight || square ? UNDER_WAY_FULLER : UNDER_WAY);
        if (other_rows > 0) bring<BRINGING_INT4>(bringing, others, other_w, nullptr, 0, other_rows, ld(cols), PIECE);
        bring<BRINGING_INT4>(bringing, tiles, w, w_scales, groups, rows, ld(cols) / 2, PIECE / 128 * group_size);
        return;
    }
    if (threadIdx.x >= WORKING) {
        for (Stages first = ring; first.parity == ring.parity;) first.hand_back();
        wait_previous();
        for (Tiles left = others; left.more(); left.next())
            for (int at = 0; at < ld(cols); at += PIECE) ring.wait_released(), ring.hand_back();
        add_int4(ring, tiles, products, Scratch(front).scale, rows, groups, TAIL_ARGUMENTS);
        return;
    }
    const Codes x = front_codes<WORKING>(front, cols, CODES_ARGUMENTS, FRONT_ARGUMENTS);
    if (other_rows > 0)
        multiply_int8(ring, others, x.codes, x.scale, other_scales, other_rows, ld(cols), bias ? bias + rows : nullptr, residual ? residual + rows : nullptr, out + rows, out_stride);
    if (group_size == 128) multiply_int4<1>(ring, tiles, x.codes, products, rows, cols);
    if (group_size == 64) multiply_int4<2>(ring, tiles, x.codes, products, rows, cols);
    if (group_size == 32) multiply_int4<4>(ring, tiles, x.codes, products, rows, cols);
}

#endif
