// Integer linears for few tokens where there is a copy engine (sm_90 and later), bound by reading the weights once. A block is persistent: it
// takes tile after tile of 16 outputs. Four warps, the producers, have the copy engine bring the tiles' rows, a piece of each at a time, into
// a ring in shared memory. They do not wait for the launch in front, for weights are what no launch writes: while that launch still
// works the rings of all multiprocessors fill, and the memory never rests. Eight warps multiply as in `linear_few.cu`; four add up what
// they leave, in ascending order, and store it, while the next piece is multiplied. Results are those of `linear_few.cu` to
// the bit. Of one token the norm or relu² in front is computed here, too, and bf16 weights are multiplied without tensor cores: sixteen warps
// have a row of a tile each. This file is empty where there is no copy engine.
#include "few.cuh"
#include "front.cuh"

#ifdef BULK_COPIES

namespace {

constexpr int PIECE = 2048;        // bytes of a row in a stage
constexpr int PITCH = PIECE + 64;  // from one row to the next: two rows that a quarter of a warp reads meet different banks
constexpr int WINDOW = 32;         // groups of int4 weights in a stage, which are handed over at once
constexpr int SCALES = 2 * WINDOW + 16;  // bytes from one row's scales to the next: they come in whole pieces of 16
constexpr int STAGE = ROWS * (PITCH + SCALES);
constexpr int ADDING = OUTPUTS / 32;
constexpr int BRINGING = 4;  // a warp asks for copies one by one, some hundred cycles each
constexpr int WORKING = 32 * (WARPS + ADDING);  // threads that do not bring
constexpr int THREADS = WORKING + 32 * BRINGING;
constexpr int FLOAT_WORKING = 32 * ROWS;  // the same where weights are bf16
constexpr int FLOAT_STAGE = ROWS * PITCH;

// Stages of a ring as one of the block's roles sees them: the next to be filled, or to be read.
struct Stages {
    u64 *full, *empty;
    int count, at, parity;

    void wait_full() const { barrier_wait(full + at, parity); }
    void wait_empty() const { barrier_wait(empty + at, parity ^ 1); }
    void next() {
        if (++at == count) at = 0, parity ^= 1;
    }
    // By each warp that has read one.
    void release() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + at);
        next();
    }
};

// Two slots for what warps hand over to those that add up: one is filled while the other is read. All meet once for every slot: then the
// one is full, and whoever adds up has done with the other.
struct Slots {
    int at = 0;

    void meet() const {
        __syncwarp();
        group_wait(1, WORKING);
    }
    void next() { at ^= 1; }
};

struct Rings {
    u8* pieces;
    int size;         // of a stage
    float* products;  // of each output, `entries` in a slot
    int entries;
    u8* front;  // what the front leaves
    Stages stages;
    Slots slots;

    // `count` stages of `size` bytes, each of which `readers` warps read.
    Rings(int count, int size, int readers, int entries) : size(size), entries(entries) {
        DYNAMIC_SHARED(u8, shared);
        pieces = shared;
        products = reinterpret_cast<float*>(shared + count * size);
        u64* barriers = reinterpret_cast<u64*>(products + 2 * entries * OUTPUTS);
        stages = {barriers, barriers + count, count, 0, 0};
        front = reinterpret_cast<u8*>(barriers + 2 * count);
        if (threadIdx.x == 0) {
            for (int i = 0; i < count; ++i) {
                barrier_start(stages.full + i, 2 * ROWS);  // for a row's weights and for its scales
                barrier_start(stages.empty + i, readers);
            }
            barriers_ready();
        }
        __syncthreads();
    }

    u8* stage() const { return pieces + stages.at * size; }
    float* slot() const { return products + slots.at * entries * OUTPUTS; }
};

// What a block has of a matrix: tiles `at`, at + step and so on below `end`, the matrix's first being `first`.
struct Tiles {
    int at, end, step, first;

    bool more() const { return at < end; }
    void next() { at += step; }
    int row() const { return (at - first) * ROWS; }
};

// Where a row's scales lie in a stage. They came from the 16 bytes in which the first of them is.
DEVICE const bf16* scales_of(const u8* stage, int row, i64 first) { return reinterpret_cast<const bf16*>(stage + ROWS * PITCH + row * SCALES) + first % 8; }

// Brings the rows of `tiles`, `piece` bytes of each at a time, and with them a window of the scales of int4 weights, `groups` a row. By the last
// BRINGING warps of the block.
DEVICE void bring(Rings& rings, Tiles tiles, const void* w, const bf16* w_scales, int groups, int rows, int row_bytes, int piece) {
    // A warp has four rows, a lane one's weights or scales.
    const int lane = threadIdx.x % 32, warp = (threadIdx.x - (blockDim.x - 32 * BRINGING)) / 32, line = warp * (ROWS / BRINGING) + lane % (ROWS / BRINGING), part = lane / (ROWS / BRINGING);
    for (; tiles.more(); tiles.next()) {
        const int count = minimum(ROWS, rows - tiles.row()), row = tiles.row() + minimum(line, count - 1);
        const u8* weights = static_cast<const u8*>(w) + static_cast<i64>(row) * row_bytes;
        i64 group = static_cast<i64>(row) * groups;
        const i64 end = group + groups;
        for (int at = 0; at < row_bytes; at += piece, group += WINDOW, rings.stages.next()) {
            u64* const full = rings.stages.full + rings.stages.at;
            const i64 first = group / 8 * 8, behind = (minimum(WINDOW, static_cast<int>(end - group)) + group + 7) / 8 * 8;
            const int own = part == 0 ? minimum(piece, row_bytes - at) : part == 1 && groups > 0 ? static_cast<int>(behind - first) * 2 : 0;
            const int bytes = line < count ? own : 0;
            rings.stages.wait_empty();
            if (part < 2) barrier_expect(full, bytes);
            if (bytes == 0) continue;
            if (part == 0) copy_bulk(rings.stage() + line * PITCH, weights + at, bytes, full);
            else copy_bulk(rings.stage() + ROWS * PITCH + line * SCALES, w_scales + first, bytes, full);
        }
    }
}

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
            const u8* upper = rings.stage() + lane.line * PITCH + lane.warp * 64 + lane.quad * 16;
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
            const u8* upper = rings.stage() + lane.line * PITCH + own / 2;
            const bf16* upper_scales = scales_of(rings.stage(), lane.line, upper_group) + lane.warp * PARTS;
            const bf16* lower_scales = scales_of(rings.stage(), lane.line + 8, lower_group) + lane.warp * PARTS;
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
        bring(rings, tiles, w, nullptr, 0, rows, width, PIECE);
    } else if (warp < WARPS) {
        multiply_int8(rings, tiles, x + static_cast<i64>(first) * width, count, width);
    } else {
        add<int>(rings, tiles, WARPS, w_scales, x_scales, first, count, rows, TAIL_ARGUMENTS);
    }
}

template <int PARTS>
DEVICE void int4_tiles(Rings& rings, const Tiles& tiles, const u8* w, const bf16* w_scales, const i8* x, const float* x_scales, int first, int count, int rows, int cols, TAIL_PARAMETERS) {
    const int warp = threadIdx.x / 32, width = ld(cols);
    if (warp >= WARPS + ADDING) {
        bring(rings, tiles, w, w_scales, cols / (128 / PARTS), rows, width / 2, PIECE / PARTS);
    } else if (warp < WARPS) {
        multiply_groups<PARTS>(rings, tiles, x + static_cast<i64>(first) * width, count, rows, cols);
    } else {
        add<float>(rings, tiles, cols / (128 / PARTS), nullptr, x_scales, first, count, rows, TAIL_ARGUMENTS);
    }
}

// The tiles of this block among those from `first` on of a matrix of so many rows, in a launch whose blocks take turns.
DEVICE Tiles tiles_of_block(int first, int rows) {
    const int own = blockIdx.x, step = gridDim.x;
    return {own + (first - own + step - 1) / step * step, first + divide_up(rows, ROWS), step, first};
}

// What the products of int8 activations read: codes and scales as they were handed over, or those that the front makes.
struct Inputs {
    const i8* codes;
    const float* scales;
};

DEVICE Inputs inputs_of_block(const Rings& rings, const i8* x, const float* x_scales, int cols, FRONT_PARAMETERS) {
    if (threadIdx.x >= WORKING) return {x, x_scales};
    if (row) {
        front_codes<WORKING>(rings.front, cols, FRONT_ARGUMENTS);
        return {reinterpret_cast<const i8*>(rings.front + SCRATCH), Scratch(rings.front).scale};
    }
    wait_previous();
    return {x, x_scales};
}

// A row of a tile is a warp's, eight inputs a lane at a time.
DEVICE void multiply_bf16(Rings& rings, Tiles tiles, const float* x, int rows, int width, TAIL_PARAMETERS) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (; tiles.more(); tiles.next()) {
        const int row = tiles.row() + warp;
        const bool stores = lane == 0 && row < rows;
        const Result to = result(stores, 0, row, TAIL_ARGUMENTS);
        float even = 0.0f, odd = 0.0f;
        for (int at = 0; at < width; at += PIECE / 2) {
            rings.stages.wait_full();
            const u8* weights = rings.stage() + warp * PITCH + lane * 16;
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
            rings.stages.release();
        }
        const float sum = warp_sum(even + odd);
        if (stores) finish(sum, to, TAIL_ARGUMENTS);
    }
}

}  // namespace

RESIDENT_KERNEL(THREADS, 1, stream_w8a8, (const i8* w, const float* w_scales, int rows, const i8* x, const float* x_scales, int tokens, int cols, int stages, FRONT_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    const Tiles tiles = tiles_of_block(0, rows);
    Rings rings(stages, STAGE, WARPS, WARPS);
    const Inputs inputs = inputs_of_block(rings, x, x_scales, cols, FRONT_ARGUMENTS);
    const int first = blockIdx.y * TOKENS;
    int8_tiles(rings, tiles, w, w_scales, inputs.codes, inputs.scales, first, minimum(TOKENS, tokens - first), rows, cols, TAIL_ARGUMENTS);
}

// A linear of two parts, `rows` int4 rows in front of `other_rows` int8 rows, of which there may be none: int8 tiles are the first.
RESIDENT_KERNEL(THREADS, 1, stream_w4a8, (const u8* w, const bf16* w_scales, int group_size, int rows, const i8* other_w, const float* other_scales, int other_rows, const i8* x, const float* x_scales, int tokens, int cols, int stages, FRONT_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    const Tiles others = tiles_of_block(0, other_rows), tiles = tiles_of_block(divide_up(other_rows, ROWS), rows);
    Rings rings(stages, STAGE, WARPS, WINDOW);
    const Inputs inputs = inputs_of_block(rings, x, x_scales, cols, FRONT_ARGUMENTS);
    const int first = blockIdx.y * TOKENS, count = minimum(TOKENS, tokens - first);
    if (other_rows > 0)
        int8_tiles(rings, others, other_w, other_scales, inputs.codes, inputs.scales, first, count, other_rows, cols, bias ? bias + rows : nullptr, residual ? residual + rows : nullptr, out + rows, out_stride);
    if (group_size == 128) int4_tiles<1>(rings, tiles, w, w_scales, inputs.codes, inputs.scales, first, count, rows, cols, TAIL_ARGUMENTS);
    if (group_size == 64) int4_tiles<2>(rings, tiles, w, w_scales, inputs.codes, inputs.scales, first, count, rows, cols, TAIL_ARGUMENTS);
    if (group_size == 32) int4_tiles<4>(rings, tiles, w, w_scales, inputs.codes, inputs.scales, first, count, rows, cols, TAIL_ARGUMENTS);
}

// bf16 weights, one token of floats: always with a front, which copies the row if it does nothing else.
RESIDENT_KERNEL(FLOAT_WORKING + 32 * BRINGING, 1, stream_bf16, (const bf16* w, int rows, int cols, int stages, FRONT_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    const Tiles tiles = tiles_of_block(0, rows);
    Rings rings(stages, FLOAT_STAGE, ROWS, 0);
    if (threadIdx.x >= FLOAT_WORKING) {
        bring(rings, tiles, w, nullptr, 0, rows, 2 * ld(cols), PIECE);
        return;
    }
    front_floats<FLOAT_WORKING>(rings.front, cols, FRONT_ARGUMENTS);
    multiply_bf16(rings, tiles, reinterpret_cast<const float*>(rings.front + SCRATCH), rows, ld(cols), TAIL_ARGUMENTS);
}

#endif
