// Integer linears for many tokens on Hopper (sm_90a): products of a warpgroup, `wgmma` m64nNk32, both sides from shared memory.
// A block is persistent. Its last warps, the producer, have the copy engine bring stages of 128 inputs to a ring in shared memory
// (and unpack int4 to int8 on the way); its first warpgroups, the consumers, multiply 64 rows of the weights by TOKENS tokens each.
// Barriers in shared memory say which stages are full and which are empty, so that the next tile's stages arrive while this tile's
// results are stored. Other architectures use `gemm.cu`; results are the same to the bit. This file is empty where there is no
// `wgmma`, emulation included: `bench --verify` on a Hopper GPU is its test.
#include "device.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define TAIL_PARAMETERS const float *bias, const float *residual, float *out, int out_stride
#define TAIL_ARGUMENTS bias, residual, out, out_stride

namespace {

// How the copy engine sees a matrix: rows of bytes, taken in boxes of 64 rows; zeros outside.
struct __align__(64) TensorMap { u64 words[16]; };

constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int DEPTH = 128;  // inputs of a stage: a row of it is 128 bytes, its eight 16-byte chunks permuted by the row's number
constexpr int BOX = 64;     // rows that a copy brings
constexpr int NARROW = 64;  // tokens of the tiles that end a launch

DEVICE u32 address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }

DEVICE void barrier_start(u64* barrier, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory"); }
DEVICE void barrier_arrive(u64* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory"); }
// Waits until the phase of this parity has ended.
DEVICE void barrier_wait(u64* barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(address(barrier)), "r"(parity) : "memory");
}
// Arrives, and promises that many bytes of copies.
DEVICE void barrier_expect(u64* barrier, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory"); }
// Has the copy engine bring the box at byte `at` of row `row`.
DEVICE void copy_box(u8* to, const TensorMap& map, int at, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(address(to)), "l"(&map), "r"(at), "r"(row), "r"(address(barrier)) : "memory");
}
// What this thread wrote to shared memory is seen by products.
DEVICE void fence_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A tile of rows of 128 bytes for a product: 1024 bytes from eight rows to the next eight, chunks permuted (128-byte swizzle). An
// advance of 32 inputs adds 2.
DEVICE u64 describe(const u8* tile) { return static_cast<u64>((address(tile) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// d = a b, added to d where `add`: 64 rows by 64, 128 or 256 tokens by 32 inputs. d[4 j + i] of a lane is row
// 16 (warp % 4) + lane / 4 + 8 (i / 2), token 8 j + lane % 4 * 2 + i % 2.
#define D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define D32(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12), D4(i + 16), D4(i + 20), D4(i + 24), D4(i + 28)
DEVICE void product(int (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, %32, %33, added;\n}" : D32(0) : "l"(a), "l"(b), "r"(add));
}
DEVICE void product(int (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, %64, %65, added;\n}" : D32(0), D32(32) : "l"(a), "l"(b), "r"(add));
}
DEVICE void product(int (&d)[128], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
        "}, %128, %129, added;\n}" : D32(0), D32(32), D32(64), D32(96) : "l"(a), "l"(b), "r"(add));
}

// A block: CONSUMERS warpgroups with 64 rows each by TOKENS tokens, a ring of STAGES. PARTS: groups of int4 weights in a stage, 0 for
// int8 weights.
template <int CONSUMERS_, int TOKENS_, int STAGES_, int PARTS_> struct Shape {
    static constexpr int CONSUMERS = CONSUMERS_, TOKENS = TOKENS_, STAGES = STAGES_, PARTS = PARTS_, ROWS = 64 * CONSUMERS;
    static constexpr int WEIGHTS = ROWS * DEPTH, STAGE = WEIGHTS + TOKENS * DEPTH, PACKED = PARTS > 0 ? WEIGHTS / 2 : 0;
    static constexpr int UNPACKERS = PARTS > 0 ? GROUP : 0;
};

// Goes through a block's tiles, tokens first. Where the launch's last round would leave most blocks idle, its tiles are taken in
// pieces of 64 tokens.
template <class S> struct Walk {
    static constexpr int PIECES = S::TOKENS / NARROW;
    int tokens, across, whole, end, at;
    int first_token, first_row;
    bool narrow;

    __device__ __forceinline__ Walk(int tokens, int rows) : tokens(tokens), across(divide_up(tokens, S::TOKENS)), at(blockIdx.x), narrow(false) {
        const int blocks = gridDim.x, count = across * divide_up(rows, S::ROWS), rest = PIECES > 1 && count % blocks * PIECES <= 2 * blocks ? count % blocks : 0;
        whole = count - rest, end = whole + rest * PIECES;
    }

    __device__ __forceinline__ bool next() {
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

struct Ring {
    u8 *stages, *packed;
    u64 *full, *empty, *arrived;  // arrived: packed weights
};

// Asks for stage after stage.
template <class S> struct Supply {
    const Ring& ring;
    const TensorMap &w, &x;
    Walk<S> walk;
    int steps, step, issued;
    bool more;

    __device__ __forceinline__ Supply(const Ring& ring, const TensorMap& w, const TensorMap& x, int tokens, int rows, int steps) : ring(ring), w(w), x(x), walk(tokens, rows), steps(steps), step(0), issued(0) { more = walk.next(); }

    // The next stage, once its place is empty; nothing behind the last.
    __device__ __forceinline__ void issue() {
        if (!more) return;
        const int slot = issued % S::STAGES, inputs = walk.narrow ? NARROW : S::TOKENS;
        barrier_wait(ring.empty + slot, (issued / S::STAGES & 1) ^ 1);
        u8* const stage = ring.stages + slot * S::STAGE;
        u64* const full = ring.full + slot;
        barrier_expect(full, inputs * DEPTH + (S::PARTS > 0 ? 0 : S::WEIGHTS));
        if constexpr (S::PARTS > 0) {
            u64* const arrived = ring.arrived + slot;
            barrier_expect(arrived, S::PACKED);
            for (int i = 0; i < S::ROWS; i += BOX) copy_box(ring.packed + slot * S::PACKED + i * DEPTH / 2, w, step * DEPTH / 2, walk.first_row + i, arrived);
        } else {
            for (int i = 0; i < S::ROWS; i += BOX) copy_box(stage + i * DEPTH, w, step * DEPTH, walk.first_row + i, full);
        }
        for (int i = 0; i < inputs; i += BOX) copy_box(stage + S::WEIGHTS + i * DEPTH, x, step * DEPTH, walk.first_token + i, full);
        ++issued;
        if (++step == steps) step = 0, more = walk.next();
    }
};

template <class S> DEVICE void produce(const Ring& ring, const TensorMap& w, const TensorMap& x, int tokens, int rows, int steps) {
    const int t = threadIdx.x - S::CONSUMERS * GROUP;
    if constexpr (S::PARTS == 0) {
        if (t > 0) return;
        Supply<S> supply(ring, w, x, tokens, rows, steps);
        while (supply.more) supply.issue();
        return;
    }
    // All unpack; the first also asks for stages, two less than there are ahead, so that it waits for none that is still in use.
    constexpr int AHEAD = S::STAGES - 2;
    Supply<S> supply(ring, w, x, tokens, rows, steps);
    if (t == 0)
        for (int i = 0; i < AHEAD; ++i) supply.issue();
    Walk<S> walk(tokens, rows);
    const int pair = t % 4 * 2;
    for (int index = 0; walk.next();)
        for (int step = 0; step < steps; ++step, ++index) {
            if (t == 0) supply.issue();
            const int slot = index % S::STAGES;
            barrier_wait(ring.arrived + slot, index / S::STAGES & 1);
            const u8* from = ring.packed + slot * S::PACKED + t * 16;
#pragma unroll
            for (int i = 0; i < S::ROWS / 32; ++i) {
                const int row = t / 4 + 32 * i;
                u8* to = ring.stages + slot * S::STAGE + row * DEPTH;
                const uint4 q = *reinterpret_cast<const uint4*>(from + i * GROUP * 16);
                // Codes in the high half of a byte are 16 times themselves, which the scale takes out again.
                *reinterpret_cast<uint4*>(to + ((pair ^ (row & 7)) << 4)) = make_uint4(q.x << 4 & 0xf0f0f0f0u, q.y << 4 & 0xf0f0f0f0u, q.z << 4 & 0xf0f0f0f0u, q.w << 4 & 0xf0f0f0f0u);
                *reinterpret_cast<uint4*>(to + ((pair + 1 ^ (row & 7)) << 4)) = make_uint4(q.x & 0xf0f0f0f0u, q.y & 0xf0f0f0f0u, q.z & 0xf0f0f0f0u, q.w & 0xf0f0f0f0u);
            }
            fence_products();
            barrier_arrive(ring.full + slot);
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
            products_wait<0>();
            if (part == PARTS - 1) {
                if (lane == 0) barrier_arrive(ring.empty + slot);
                scales = read(step + 2);
            }
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) {
                const float sum = bits_float(static_cast<u32>(sums[i] + 0x4b400000)) - 12582912.0f;
                totals[i] = __fadd_rn(totals[i], __fmul_rn(sum, i % 4 < 2 ? upper : lower));
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

template <class S> DEVICE void run(const TensorMap& w, const void* w_scales, const TensorMap& x, const float* x_scales, int tokens, int rows, int cols, TAIL_PARAMETERS) {
    DYNAMIC_SHARED(u8, shared);
    Ring ring;
    ring.stages = shared + (1024 - address(shared) % 1024) % 1024;
    ring.packed = ring.stages + S::STAGES * S::STAGE;
    ring.full = reinterpret_cast<u64*>(ring.packed + S::STAGES * S::PACKED);
    ring.empty = ring.full + S::STAGES;
    ring.arrived = ring.empty + S::STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; ++i) {
            barrier_start(ring.full + i, 1 + S::UNPACKERS);
            barrier_start(ring.empty + i, 4 * S::CONSUMERS);  // a lane of each consuming warp
            barrier_start(ring.arrived + i, 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int steps = divide_up(ld(cols), DEPTH);
    // Registers go from the producer to the consumers.
    constexpr bool SHARES = S::CONSUMERS == 2;
    if (threadIdx.x >= S::CONSUMERS * GROUP) {
        if constexpr (SHARES) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        produce<S>(ring, w, x, tokens, rows, steps);
    } else {
        if constexpr (SHARES) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int lane = threadIdx.x % 32, in_tile = threadIdx.x / 32 * 16 + lane / 4;
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

#define WGMMA_KERNEL(threads, blocks, name, parameters) extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters
#define MAP const __grid_constant__ TensorMap
#define W8A8(name, blocks, CONSUMERS, TOKENS, STAGES)                                                                                              \
    WGMMA_KERNEL(128 * CONSUMERS + 128, blocks, name, (MAP w, const float* w_scales, MAP x, const float* x_scales, int tokens, int rows, int cols, TAIL_PARAMETERS)) { \
        depend();                                                                                                                                  \
        run<Shape<CONSUMERS, TOKENS, STAGES, 0>>(w, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);                                    \
    }
#define W4A8(name, blocks, CONSUMERS, TOKENS, STAGES)                                                                                              \
    WGMMA_KERNEL(128 * CONSUMERS + 128, blocks, name, (MAP w, const bf16* w_scales, int group, MAP x, const float* x_scales, int tokens, int rows, int cols, TAIL_PARAMETERS)) { \
        depend();                                                                                                                                  \
        if (group == 128) run<Shape<CONSUMERS, TOKENS, STAGES, 1>>(w, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);                  \
        if (group == 64) run<Shape<CONSUMERS, TOKENS, STAGES, 2>>(w, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);                   \
        if (group == 32) run<Shape<CONSUMERS, TOKENS, STAGES, 4>>(w, w_scales, x, x_scales, tokens, rows, cols, TAIL_ARGUMENTS);                   \
    }

W8A8(wgmma_w8a8, 1, 2, 256, 4)
W8A8(wgmma_w8a8_64, 2, 1, 64, 6)
W4A8(wgmma_w4a8, 1, 2, 128, 5)
W4A8(wgmma_w4a8_64, 2, 1, 64, 5)

#endif
