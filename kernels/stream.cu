// Integer linears for few tokens where there is a copy engine (sm_90 and later), bound by reading the weights once. A block is persistent: it
// takes tile after tile of 16 outputs, whose weights four warps bring through a ring (`ring.cuh`). Eight warps multiply as in
// `linear_few.cu`; four add up what they leave, in ascending order, and store it, while the next piece is multiplied. Results are those of
// `linear_few.cu` to the bit. This file is empty where there is no copy engine.
#include "ring.cuh"

#ifdef BULK_COPIES

namespace {

constexpr int ADDING = OUTPUTS / 32;
constexpr int THREADS = 32 * (WARPS + ADDING + BRINGING);

// Two slots for what warps hand over to those that add up: one is filled while the other is read. All meet once for every slot: then the
// one is full, and whoever adds up has done with the other.
struct Slots {
    int at = 0;

    void meet() const {
        __syncwarp();
        group_wait(1, 32 * (WARPS + ADDING));
    }
    void next() { at ^= 1; }
};

struct Rings {
    Stages stages;
    Bringing bringing;
    float* products;  // of each output, `entries` in a slot
    int entries;
    Slots slots;

    Rings(u8* shared, int count, int entries) : stages(shared, count, WARPS), bringing(stages), products(reinterpret_cast<float*>(stages.behind())), entries(entries) {}

    float* slot() const { return products + slots.at * entries * OUTPUTS; }
};

// A lane's place in a warp's fragments.
struct Lane {
    int warp, line, quad;

    Lane() : warp(threadIdx.x / 32), line(threadIdx.x % 32 / 4), quad(threadIdx.x % 4) {}
};

// The sums of two outputs of a lane's two tokens, at own[token][output].
template <class T> DEVICE void leave(T* own, const Lane& lane, int count, T a, T b, T c, T d) {
    if (lane.quad * 2 >= count) return;
    own += lane.quad * 2 * ROWS + lane.line;
    own[0] = a, own[ROWS] = b, own[8] = c, own[ROWS + 8] = d;
}

DEVICE void multiply_int8(Rings& rings, Tiles tiles, const i8* x, int count, int width) {
    constexpr int STEPS = PIECE / 64 / WARPS;
    const Lane lane;
    const bool present = lane.line < count;
    const i8* input = x + static_cast<i64>(present ? lane.line : 0) * width + lane.warp * 64 + lane.quad * 16;
    uint4 held[STEPS];
    const auto fetch = [&](int at) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int offset = at + i * WARPS * 64;
            held[i] = present && offset + lane.warp * 64 < width ? load(input + offset) : zero();
        }
    };
    fetch(0);
    for (; tiles.more(); tiles.next()) {
        int sum[4] = {0, 0, 0, 0};
        for (int at = 0; at < width; at += PIECE) {
            rings.stages.wait_full();
            const u8* upper = rings.stages.stage() + lane.line * PITCH + lane.warp * 64 + lane.quad * 16;
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                if (at + (i * WARPS + lane.warp) * 64 >= width) break;
                const uint4 a = load(upper + i * WARPS * 64), b = load(upper + 8 * PITCH + i * WARPS * 64);
                mma_s8(sum, a.x, b.x, a.y, b.y, held[i].x, held[i].y);
                mma_s8(sum, a.z, b.z, a.w, b.w, held[i].z, held[i].w);
            }
            rings.stages.release();
            fetch(at + PIECE < width ? at + PIECE : 0);
        }
        leave(reinterpret_cast<int*>(rings.slot()) + lane.warp * OUTPUTS, lane, count, sum[0], sum[1], sum[2], sum[3]);
        rings.slots.meet();
        rings.slots.next();
    }
}

// PARTS groups in a segment of 128 inputs. A stage has a window of groups, each of which leaves acc_g·s_w[g].
template <int PARTS> DEVICE void multiply_groups(Rings& rings, Tiles tiles, const i8* x, int count, int rows, int cols) {
    constexpr int STEPS = WINDOW / PARTS / WARPS, STRIDE = WARPS * 128;  // inputs from a warp's segment to its next
    const Lane lane;
    const int width = ld(cols), groups = cols / (128 / PARTS);
    const bool present = lane.line < count;
    const i8* input = x + static_cast<i64>(present ? lane.line : 0) * width;
    const int own = lane.warp * 128 + lane.quad * 32;  // a lane's first input in a stage
    uint4 low_held[STEPS], high_held[STEPS];
    const auto fetch = [&](int at) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int from = at + i * STRIDE + own;
            const bool inside = present && from < width;
            low_held[i] = inside ? load(input + from) : zero();
            high_held[i] = inside ? load(input + from + 16) : zero();
        }
    };
    fetch(0);
    for (; tiles.more(); tiles.next()) {
        i64 upper_group = static_cast<i64>(minimum(tiles.row() + lane.line, rows - 1)) * groups, lower_group = static_cast<i64>(minimum(tiles.row() + lane.line + 8, rows - 1)) * groups;
        for (int at = 0; at < width; at += STEPS * STRIDE, upper_group += WINDOW, lower_group += WINDOW) {
            rings.stages.wait_full();
            const u8* upper = rings.stages.stage() + lane.line * PITCH + own / 2;
            const bf16* upper_scales = scales_of(rings.stages.stage(), lane.line, upper_group) + lane.warp * PARTS;
            const bf16* lower_scales = scales_of(rings.stages.stage(), lane.line + 8, lower_group) + lane.warp * PARTS;
            uint4 a[STEPS], b[STEPS];
            int sums[STEPS][PARTS][4] = {};
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                const bool inside = at + i * STRIDE + own < width;
                a[i] = inside ? load(upper + i * STRIDE / 2) : zero();
                b[i] = inside ? load(upper + 8 * PITCH + i * STRIDE / 2) : zero();
            }
            // Codes in the high half of a byte are 16 times themselves, which is divided out below. Products that follow each other belong to
            // different sums, so that none waits for the one before.
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int i = 0; i < STEPS; ++i) {
                        const bool mine = lane.quad * PARTS / 4 == part;
                        const u32 above = k == 0 ? a[i].x : k == 1 ? a[i].y : k == 2 ? a[i].z : a[i].w, below = k == 0 ? b[i].x : k == 1 ? b[i].y : k == 2 ? b[i].z : b[i].w;
                        const u32 low = k == 0 ? low_held[i].x : k == 1 ? low_held[i].y : k == 2 ? low_held[i].z : low_held[i].w;
                        const u32 high = k == 0 ? high_held[i].x : k == 1 ? high_held[i].y : k == 2 ? high_held[i].z : high_held[i].w;
                        mma_s8(sums[i][part], above << 4 & 0xf0f0f0f0u, below << 4 & 0xf0f0f0f0u, above & 0xf0f0f0f0u, below & 0xf0f0f0f0u, mine ? low : 0, mine ? high : 0);
                    }
            float upper_factors[STEPS][PARTS], lower_factors[STEPS][PARTS];
#pragma unroll
            for (int i = 0; i < STEPS; ++i)
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    // Nobody adds up what lies behind the last group.
                    upper_factors[i][part] = widen(upper_scales[i * WARPS * PARTS + part]);
                    lower_factors[i][part] = widen(lower_scales[i * WARPS * PARTS + part]);
                }
            rings.stages.release();
            fetch(at + STEPS * STRIDE < width ? at + STEPS * STRIDE : 0);
            float* products = rings.slot() + lane.warp * PARTS * OUTPUTS;
#pragma unroll
            for (int i = 0; i < STEPS; ++i)
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const auto scaled = [&](int j) { return __fmul_rn(static_cast<float>(sums[i][part][j] >> 4), j < 2 ? upper_factors[i][part] : lower_factors[i][part]); };
                    leave(products + (i * WARPS * PARTS + part) * OUTPUTS, lane, count, scaled(0), scaled(1), scaled(2), scaled(3));
                }
            rings.slots.meet();
            rings.slots.next();
        }
    }
}

// Adds up what the warps left, `counted` products of each output, in slot after slot of a tile, and stores the sum by the scales of token
// and output. T: int or float.
template <class T> DEVICE void add(Rings& rings, Tiles tiles, int counted, const float* w_scales, const float* x_scales, int first, int count, int rows, TAIL_PARAMETERS) {
    const int index = threadIdx.x - 32 * WARPS, token = index / ROWS;
    const float x_scale = token < count ? x_scales[first + token] : 0.0f;
    for (; tiles.more(); tiles.next()) {
        const int row = tiles.row() + index % ROWS;
        const bool stores = token < count && row < rows;
        const float scale = w_scales && stores ? __fmul_rn(x_scale, w_scales[row]) : x_scale;
        const Result to = result(stores, first + token, row, TAIL_ARGUMENTS);
        T total = 0;
        for (int left = counted; left > 0; left -= rings.entries) {
            rings.slots.meet();
            const T* own = reinterpret_cast<const T*>(rings.slot()) + index;
            // Several are read before the first is added.
            constexpr int AHEAD = 8;
            const int entries = token < count ? minimum(left, rings.entries) : 0;
            int i = 0;
            for (; i + AHEAD <= entries; i += AHEAD) {
                T held[AHEAD];
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) held[j] = own[(i + j) * OUTPUTS];
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) total = total + held[j];
            }
            for (; i < entries; ++i) total = total + own[i * OUTPUTS];
            rings.slots.next();
        }
        if (stores) finish(__fmul_rn(static_cast<float>(total), scale), to, TAIL_ARGUMENTS);
    }
}

DEVICE void int8_tiles(Rings& rings, const Tiles& tiles, const i8* w, const float* w_scales, const i8* x, const float* x_scales, int first, int count, int rows, int cols, TAIL_PARAMETERS) {
    const int warp = threadIdx.x / 32, width = ld(cols);
    if (warp >= WARPS + ADDING) {
        bring(rings.bringing, tiles, w, nullptr, 0, rows, width, PIECE);
    } else if (warp < WARPS) {
        wait_previous();
        multiply_int8(rings, tiles, x + static_cast<i64>(first) * width, count, width);
    } else {
        wait_previous();
        add<int>(rings, tiles, WARPS, w_scales, x_scales, first, count, rows, TAIL_ARGUMENTS);
    }
}

template <int PARTS>
DEVICE void int4_tiles(Rings& rings, const Tiles& tiles, const u8* w, const bf16* w_scales, const i8* x, const float* x_scales, int first, int count, int rows, int cols, TAIL_PARAMETERS) {
    const int warp = threadIdx.x / 32, width = ld(cols);
    if (warp >= WARPS + ADDING) {
        bring(rings.bringing, tiles, w, w_scales, cols / (128 / PARTS), rows, width / 2, PIECE / PARTS);
    } else if (warp < WARPS) {
        wait_previous();
        multiply_groups<PARTS>(rings, tiles, x + static_cast<i64>(first) * width, count, rows, cols);
    } else {
        wait_previous();
        add<float>(rings, tiles, cols / (128 / PARTS), nullptr, x_scales, first, count, rows, TAIL_ARGUMENTS);
    }
}

}  // namespace

RESIDENT_KERNEL(THREADS, 1, stream_w8a8, (const i8* w, const float* w_scales, int rows, const i8* x, const float* x_scales, int tokens, int cols, int stages, TAIL_PARAMETERS)) {
    launch_next();
    const Tiles tiles = tiles_of_block(0, rows);
    DYNAMIC_SHARED(u8, shared);
    Rings rings(shared, stages, WARPS);
    const int first = blockIdx.y * TOKENS;
    int8_tiles(rings, tiles, w, w_scales, x, x_scales, first, minimum(TOKENS, tokens - first), rows, cols, TAIL_ARGUMENTS);
}

// A linear of two parts, `rows` int4 rows in front of `other_rows` int8 rows, of which there may be none: int8 tiles are the first.
RESIDENT_KERNEL(THREADS, 1, stream_w4a8, (const u8* w, const bf16* w_scales, int group, int rows, const i8* other_w, const float* other_scales, int other_rows, const i8* x, const float* x_scales, int tokens, int cols, int stages, TAIL_PARAMETERS)) {
    launch_next();
    const Tiles others = tiles_of_block(0, other_rows), tiles = tiles_of_block(divide_up(other_rows, ROWS), rows);
    DYNAMIC_SHARED(u8, shared);
    Rings rings(shared, stages, WINDOW);
    const int first = blockIdx.y * TOKENS, count = minimum(TOKENS, tokens - first);
    if (other_rows > 0)
        int8_tiles(rings, others, other_w, other_scales, x, x_scales, first, count, other_rows, cols, bias ? bias + rows : nullptr, residual ? residual + rows : nullptr, out + rows, out_stride);
    if (group == 128) int4_tiles<1>(rings, tiles, w, w_scales, x, x_scales, first, count, rows, cols, TAIL_ARGUMENTS);
    if (group == 64) int4_tiles<2>(rings, tiles, w, w_scales, x, x_scales, first, count, rows, cols, TAIL_ARGUMENTS);
    if (group == 32) int4_tiles<4>(rings, tiles, w, w_scales, x, x_scales, first, count, rows, cols, TAIL_ARGUMENTS);
}

#endif
