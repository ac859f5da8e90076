// Integer linears for many tokens on Hopper (sm_90a): products of a warpgroup, `wgmma` m64nNk32, both sides from shared memory.
// A block is persistent. Its last warpgroup, the producer, fills a ring of stages of 128 inputs in shared memory; the warpgroups in
// front of it, the consumers, multiply 64 rows of the weights by TOKENS tokens each. Barriers in shared memory say which stages are
// full and which are empty, so that the next tile's stages arrive while this tile's results are stored. int8 weights and activations
// are brought by the copy engine, which one thread asks. int4 weights are brought and unpacked by the producer's other three warps,
// each a whole stage at a time, in turn: what one of them waits for does not hold up the others. Other architectures use `gemm.cu`;
// results are the same to the bit. This file is empty where there is no `wgmma`.
#include "device.cuh"

#ifdef HOPPER

#define TAIL_PARAMETERS const float *bias, const float *residual, float *out, int out_stride
#define TAIL_ARGUMENTS bias, residual, out, out_stride

namespace {

constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int DEPTH = 128;  // inputs of a stage: a row of it is 128 bytes, its eight 16-byte chunks permuted by the row's number
constexpr int BOX = 64;     // rows that a copy brings
constexpr int NARROW = 64;  // tokens of the tiles that end a launch

// A tile of rows of 128 bytes for a product: 1024 bytes from eight rows to the next eight, chunks permuted (128-byte swizzle). An
// advance of 32 inputs adds 2.
DEVICE u64 describe(const u8* tile) { return static_cast<u64>((address(tile) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

// A block: CONSUMERS warpgroups with 64 rows each by TOKENS tokens, a ring of STAGES. PARTS: groups of int4 weights in a stage, 0 for
// int8 weights.
template <int CONSUMERS_, int TOKENS_, int STAGES_, int PARTS_> struct Shape {
    static constexpr int CONSUMERS = CONSUMERS_, TOKENS = TOKENS_, STAGES = STAGES_, PARTS = PARTS_, ROWS = 64 * CONSUMERS;
    static constexpr int WEIGHTS = ROWS * DEPTH, STAGE = WEIGHTS + TOKENS * DEPTH;
    // Warps that unpack, and stages of packed weights that each of them has on the way.
    static constexpr int UNPACKERS = PARTS > 0 ? 3 : 0, AHEAD = 2, PACKED = WEIGHTS / 2;
    // Registers of a producer's and a consumer's thread: 504 or 512 for a thread of each warpgroup that a multiprocessor holds. 0: as
    // launched.
    static constexpr int PRODUCING = CONSUMERS == 2 ? (PARTS > 0 ? 56 : 40) : PARTS > 0 ? 88 : 0;
    static constexpr int CONSUMING = CONSUMERS == 2 ? (PARTS > 0 ? 224 : 232) : PARTS > 0 ? 168 : 0;
};

// Goes through a block's tiles, tokens first. Where the launch's last round would leave half of the blocks idle, its tiles are taken
// in pieces of 64 tokens: half a round or less in place of a whole one.
template <class S> struct Walk {
    static constexpr int PIECES = S::TOKENS / NARROW;
    int tokens, across, whole, end, at;
    int first_token, first_row;
    bool narrow;

    Walk(int tokens, int rows) : tokens(tokens), across(divide_up(tokens, S::TOKENS)), at(blockIdx.x), narrow(false) {
        const int blocks = gridDim.x, count = across * divide_up(rows, S::ROWS), rest = PIECES > 1 && count % blocks * 2 <= blocks ? count % blocks : 0;
        whole = count - rest, end = whole + rest * PIECES;
    }

    bool next() {
        for (; at < end; at += gridDim.x) {
            narrow = at >= whole;
            const int tile = narrow ? whole + (at - whole) / PIECES : at;
            first_token = tile % across * S::TOKENS + (narrow ? (at - whole) % PIECES * NARROW : 0);
            first_row = tile / across * S::ROWS;
            if (first_token < tokens) {
                at += gridDim.x;
                return true;
            }
        }
        return false;
    }
};

// A block's steps in order, or every so many of them.
template <class S> struct Steps {
    Walk<S> walk;
    int count, step;  // steps of a tile
    bool more;

    Steps(int tokens, int rows, int count, int first) : walk(tokens, rows), count(count), step(0), more(walk.next()) { advance(first); }

    void advance(int by) {
        for (step += by; more && step >= count; step -= count) more = walk.next();
    }
};

struct Ring {
    u8 *stages, *packed;
    u64 *full, *empty;
};

// Asks the copy engine for stage after stage: activations, and weights where they are int8.
template <class S> DEVICE void request(const Ring& ring, const TensorMap* w, const TensorMap& x, int tokens, int rows, int steps) {
    int index = 0;
    for (Steps<S> at(tokens, rows, steps, 0); at.more; at.advance(1), ++index) {
        const int slot = index % S::STAGES, inputs = at.walk.narrow ? NARROW : S::TOKENS;
        u8* const stage = ring.stages + slot * S::STAGE;
        u64* const full = ring.full + slot;
        barrier_wait(ring.empty + slot, (index / S::STAGES & 1) ^ 1);
        barrier_expect(full, inputs * DEPTH + (S::PARTS > 0 ? 0 : S::WEIGHTS));
        if constexpr (S::PARTS == 0)
            for (int i = 0; i < S::ROWS; i += BOX) copy_box(stage + i * DEPTH, *w, at.step * DEPTH, at.walk.first_row + i, full);
        for (int i = 0; i < inputs; i += BOX) copy_box(stage + S::WEIGHTS + i * DEPTH, x, at.step * DEPTH, at.walk.first_token + i, full);
    }
}

// Brings and unpacks the stages of one warp, `own` of UNPACKERS. A lane unpacks what it has brought itself, so that nothing but its own
// copies stands between bringing and unpacking.
template <class S> DEVICE void unpack(const Ring& ring, const u8* w, int own, int tokens, int rows, int cols, int steps) {
    constexpr int LINES = 8;  // rows that a warp takes at once, 16 bytes a lane
    const int lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2, row_bytes = ld(cols) / 2;
    u8* const packed = ring.packed + own * S::AHEAD * S::PACKED + lane * 16;
    const int first = line * DEPTH + ((pair ^ line) << 4), second = line * DEPTH + (((pair + 1) ^ line) << 4);
    Steps<S> ahead(tokens, rows, steps, own);
    int asked = 0;
    const auto ask = [&] {
        if (ahead.more) {
            const int at = ahead.step * (DEPTH / 2) + lane % 4 * 16, row = ahead.walk.first_row + line;
            const u8* from = w + static_cast<i64>(row) * row_bytes + at;
            u8* const to = packed + asked % S::AHEAD * S::PACKED;
            // Outside the matrix nothing is read.
#pragma unroll
            for (int i = 0; i < S::ROWS / LINES; ++i, from += LINES * row_bytes) copy_async(to + i * LINES * (DEPTH / 2), from, row + i * LINES < rows && at < row_bytes);
            ++asked;
            ahead.advance(S::UNPACKERS);
        }
        copy_commit();  // a group even where nothing is left, for they are counted
    };
    for (int i = 0; i < S::AHEAD; ++i) ask();
    for (int done = 0; done < asked; ++done) {
        const int index = own + done * S::UNPACKERS, slot = index % S::STAGES;
        const u8* const from = packed + done % S::AHEAD * S::PACKED;
        u8* const stage = ring.stages + slot * S::STAGE;
        copy_wait<S::AHEAD - 1>();
        barrier_wait(ring.empty + slot, (index / S::STAGES & 1) ^ 1);
#pragma unroll
        for (int i = 0; i < S::ROWS / LINES; i += 4) {
            uint4 q[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) q[j] = *reinterpret_cast<const uint4*>(from + (i + j) * LINES * (DEPTH / 2));
            // Codes in the high half of a byte are 16 times themselves, which the scale takes out again.
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u8* const to = stage + (i + j) * LINES * DEPTH;
                *reinterpret_cast<uint4*>(to + first) = make_uint4(q[j].x << 4 & 0xf0f0f0f0u, q[j].y << 4 & 0xf0f0f0f0u, q[j].z << 4 & 0xf0f0f0f0u, q[j].w << 4 & 0xf0f0f0f0u);
                *reinterpret_cast<uint4*>(to + second) = make_uint4(q[j].x & 0xf0f0f0f0u, q[j].y & 0xf0f0f0f0u, q[j].z & 0xf0f0f0f0u, q[j].w & 0xf0f0f0f0u);
            }
        }
        // Each lane for its own stores.
        fence_async();
        barrier_arrive(ring.full + slot);
        ask();
    }
}

// What a consumer knows of its place.
struct Place {
    int token, row;  // the lane's first of each
    int tokens, rows;
    bool whole;  // no part of the tile lies outside
};

// Stores value(sums[4 j + i], scale of the token, i / 2) for each of the lane's results. Loads go ahead of the stores, which the compiler
// cannot do on its own: it does not know that they lie elsewhere.
template <bool WHOLE, bool ADDED, int COUNT, class Sum, class F> DEVICE void store_as(const Sum (&sums)[COUNT], const Place& at, const float* x_scales, F value, TAIL_PARAMETERS) {
    constexpr int AHEAD = 4;
    const bool upper = WHOLE || at.row < at.rows, lower = WHOLE || at.row + 8 < at.rows;
    const float upper_bias = bias && upper ? bias[at.row] : 0.0f, lower_bias = bias && lower ? bias[at.row + 8] : 0.0f;
    const i64 first = static_cast<i64>(at.token) * out_stride + at.row;
    float* to = out + first;
    const float* from = residual + first;
    x_scales += at.token;
#pragma unroll
    for (int start = 0; start < COUNT / 4; start += AHEAD) {
        float scales[AHEAD][2], before[AHEAD][4];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool inside = WHOLE || at.token + (start + j) * 8 + i < at.tokens;
                scales[j][i] = inside ? __ldg(x_scales + (start + j) * 8 + i) : 0.0f;
                if (!ADDED) continue;
                const float* own = from + j * 8 * out_stride + i * out_stride;
                before[j][i] = inside && upper ? own[0] : 0.0f;
                before[j][2 + i] = inside && lower ? own[8] : 0.0f;
            }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const bool inside = WHOLE || at.token + (start + j) * 8 + i < at.tokens;
                float* own = to + j * 8 * out_stride + i * out_stride;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float result = value(sums[(start + j) * 4 + half * 2 + i], scales[j][i], half);
                    if (bias) result = result + (half ? lower_bias : upper_bias);
                    if (ADDED) result = before[j][half * 2 + i] + result;
                    if (inside && (half ? lower : upper)) own[half * 8] = result;
                }
            }
        to += AHEAD * 8 * out_stride;
        from += AHEAD * 8 * out_stride;
    }
}

template <int COUNT, class Sum, class F> DEVICE void store(const Sum (&sums)[COUNT], const Place& at, const float* x_scales, F value, TAIL_PARAMETERS) {
    if (at.whole && residual) store_as<true, true>(sums, at, x_scales, value, TAIL_ARGUMENTS);
    else if (at.whole) store_as<true, false>(sums, at, x_scales, value, TAIL_ARGUMENTS);
    else if (residual) store_as<false, true>(sums, at, x_scales, value, TAIL_ARGUMENTS);
    else store_as<false, false>(sums, at, x_scales, value, TAIL_ARGUMENTS);
}

// A tile of int8 weights.
template <class S, int TOKENS> DEVICE void consume_int8(const Ring& ring, int& used, int steps, const float* w_scales, const float* x_scales, const Place& at, TAIL_PARAMETERS) {
    const int own = threadIdx.x / GROUP, lane = threadIdx.x % 32;
    int sums[TOKENS / 2];
    for (int step = 0; step < steps; ++step, ++used) {
        const int slot = used % S::STAGES;
        barrier_wait(ring.full + slot, used / S::STAGES & 1);
        const u64 a = describe(ring.stages + slot * S::STAGE + own * 64 * DEPTH), b = describe(ring.stages + slot * S::STAGE + S::WEIGHTS);
        products_begin();
#pragma unroll
        for (int k = 0; k < DEPTH / 32; ++k) product(sums, a + 2 * k, b + 2 * k, step + k > 0);
        products_commit();
        if (step > 0) {
            products_wait<1>();
            if (lane == 0) barrier_arrive(ring.empty + (used - 1) % S::STAGES);
        }
    }
    products_wait<0>();
    if (lane == 0) barrier_arrive(ring.empty + (used - 1) % S::STAGES);
    const float upper = at.row < at.rows ? w_scales[at.row] : 0.0f, lower = at.row + 8 < at.rows ? w_scales[at.row + 8] : 0.0f;
    store(sums, at, x_scales, [&](int sum, float scale, int half) { return __fmul_rn(static_cast<float>(sum), __fmul_rn(scale, half ? lower : upper)); }, TAIL_ARGUMENTS);
}

// A tile of int4 weights. A group's sums become floats by their bits: below 2^22 in magnitude they are the last ones of
// 1.5·2^23 + sum, which takes two full-rate instructions where a conversion takes a slow one.
template <class S, int TOKENS> DEVICE void consume_int4(const Ring& ring, int& used, int steps, const bf16* w_scales, const float* x_scales, int groups, const Place& at, TAIL_PARAMETERS) {
    constexpr int PARTS = S::PARTS, PRODUCTS = DEPTH / 32 / PARTS;
    const int own = threadIdx.x / GROUP, lane = threadIdx.x % 32;
    const bf16* upper_scales = w_scales + static_cast<i64>(minimum(at.row, at.rows - 1)) * groups;
    const bf16* lower_scales = w_scales + static_cast<i64>(minimum(at.row + 8, at.rows - 1)) * groups;
    // A group's scales, asked for two stages ahead: they take longer to come than a stage takes. 0 behind the last group, where the
    // stage has no inputs.
    struct Scales { bf16 upper[PARTS], lower[PARTS]; };
    const auto read = [&](int step) {
        Scales scales;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int group = step * PARTS + part;
            scales.upper[part] = group < groups ? upper_scales[group] : bf16{0};
            scales.lower[part] = group < groups ? lower_scales[group] : bf16{0};
        }
        return scales;
    };
    Scales even = read(0), odd = read(1);
    float totals[TOKENS / 2] = {};
    int sums[TOKENS / 2];
    const auto multiply = [&](int step, Scales& scales) {
        const int slot = used % S::STAGES;
        barrier_wait(ring.full + slot, used / S::STAGES & 1);
        const u64 a = describe(ring.stages + slot * S::STAGE + own * 64 * DEPTH), b = describe(ring.stages + slot * S::STAGE + S::WEIGHTS);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            products_begin();
#pragma unroll
            for (int k = 0; k < PRODUCTS; ++k) product(sums, a + 2 * (part * PRODUCTS + k), b + 2 * (part * PRODUCTS + k), k > 0);
            products_commit();
            // Codes are 16 times themselves.
            const float upper = widen(scales.upper[part]) * 0.0625f, lower = widen(scales.lower[part]) * 0.0625f;
            const float upper_base = -12582912.0f * upper, lower_base = -12582912.0f * lower;
            products_wait<0>();
            if (part == PARTS - 1) {
                if (lane == 0) barrier_arrive(ring.empty + slot);
                scales = read(step + 2);
            }
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) {
                const float sum = bits_float(static_cast<u32>(sums[i] + 0x4b400000));
                totals[i] = __fadd_rn(totals[i], i % 4 < 2 ? fmaf(sum, upper, upper_base) : fmaf(sum, lower, lower_base));
            }
        }
        ++used;
    };
    int step = 0;
    for (; step + 1 < steps; step += 2) {
        multiply(step, even);
        multiply(step + 1, odd);
    }
    if (step < steps) multiply(step, even);
    store(totals, at, x_scales, [](float total, float scale, int) { return __fmul_rn(total, scale); }, TAIL_ARGUMENTS);
}

template <class S, int TOKENS>
DEVICE void consume(const Ring& ring, int& used, int steps, const void* w_scales, const float* x_scales, int cols, const Place& at, TAIL_PARAMETERS) {
    if constexpr (S::PARTS > 0) consume_int4<S, TOKENS>(ring, used, steps, static_cast<const bf16*>(w_scales), x_scales, cols / (DEPTH / S::PARTS), at, TAIL_ARGUMENTS);
    else consume_int8<S, TOKENS>(ring, used, steps, static_cast<const float*>(w_scales), x_scales, at, TAIL_ARGUMENTS);
}

template <class S> DEVICE void run(const TensorMap* w_map, const u8* w, const void* w_scales, const TensorMap& x, const float* x_scales, int tokens, int rows, int cols, TAIL_PARAMETERS) {
    DYNAMIC_SHARED(u8, shared);
    Ring ring;
    ring.stages = shared + (1024 - address(shared) % 1024) % 1024;
    ring.packed = ring.stages + S::STAGES * S::STAGE;
    ring.full = reinterpret_cast<u64*>(ring.packed + S::UNPACKERS * S::AHEAD * S::PACKED);
    ring.empty = ring.full + S::STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; ++i) {
            barrier_start(ring.full + i, S::PARTS > 0 ? 33 : 1);  // who asks for copies, and the lanes of the warp that unpacks
            barrier_start(ring.empty + i, 4 * S::CONSUMERS);     // a lane of each consuming warp
        }
        barriers_ready();
    }
    __syncthreads();
    const int steps = divide_up(ld(cols), DEPTH), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= 4 * S::CONSUMERS) {
        if constexpr (S::PRODUCING > 0) give_registers<S::PRODUCING>();
        const int own = warp - 4 * S::CONSUMERS;
        if (own == 0 && lane == 0) request<S>(ring, w_map, x, tokens, rows, steps);
        if constexpr (S::PARTS > 0)
            if (own > 0) unpack<S>(ring, w, own - 1, tokens, rows, cols, steps);
    } else {
        if constexpr (S::CONSUMING > 0) take_registers<S::CONSUMING>();
        const int in_tile = warp * 16 + lane / 4;
        int used = 0;
        for (Walk<S> walk(tokens, rows); walk.next();) {
            const bool whole = walk.first_token + (walk.narrow ? NARROW : S::TOKENS) <= tokens && walk.first_row + S::ROWS <= rows;
            const Place at = {walk.first_token + lane % 4 * 2, walk.first_row + in_tile, tokens, rows, whole};
            if (S::TOKENS > NARROW && walk.narrow) consume<S, NARROW>(ring, used, steps, w_scales, x_scales, cols, at, TAIL_ARGUMENTS);
            else consume<S, S::TOKENS>(ring, used, steps, w_scales, x_scales, cols, at, TAIL_ARGUMENTS);
        }
    }
}

}  // namespace

#define W8A8(name, blocks, CONSUMERS, TOKENS, STAGES)                                                                                              \
    RESIDENT_KERNEL(128 * CONSUMERS + 128, blocks, name, (MAP w, const float* w_scales, MAP x, const float* x_scales, int tokens, int rows, int cols, TAIL_PARAMETERS)) { \
        depend();                                                                                                                                  \
        run<Shape<CONSUMERS, TOKENS, STAGES, 0>>(&w, nullptr, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);                          \
    }
#define W4A8(name, blocks, CONSUMERS, TOKENS, STAGES)                                                                                              \
    RESIDENT_KERNEL(128 * CONSUMERS + 128, blocks, name, (const u8* w, const bf16* w_scales, int group, MAP x, const float* x_scales, int tokens, int rows, int cols, TAIL_PARAMETERS)) { \
        depend();                                                                                                                                  \
        if (group == 128) run<Shape<CONSUMERS, TOKENS, STAGES, 1>>(nullptr, w, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);         \
        if (group == 64) run<Shape<CONSUMERS, TOKENS, STAGES, 2>>(nullptr, w, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);          \
        if (group == 32) run<Shape<CONSUMERS, TOKENS, STAGES, 4>>(nullptr, w, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);          \
    }

W8A8(wgmma_w8a8, 1, 2, 256, 4)
W8A8(wgmma_w8a8_64, 2, 1, 64, 6)
W4A8(wgmma_w4a8, 1, 2, 128, 5)
W4A8(wgmma_w4a8_64, 2, 1, 64, 5)

#endif
