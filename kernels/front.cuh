// What stands in front of a linear of one token, a norm or relu², as each block of the linear computes it for itself while its weights
// are still on the way: the row comes from the second-level cache, and what the products read is left in shared memory. A kernel of
// its own would be one block that everyone waits for.
#pragma once
#include "rows.cuh"

// `row` null: there is nothing in front. With a `weight` a norm over each `group` values, of row · silu(gate) where there is a `gate`; otherwise
// the row, or with `square` the squares of its positive values. Codes have the scale `static_scale`, or absmax / 127.
#define FRONT_PARAMETERS const float *row, const float *gate, const float *weight, float eps, int group, int square, const float *static_scale
#define FRONT_ARGUMENTS row, gate, weight, eps, group, square, static_scale

namespace {

constexpr int FRONT_BARRIER = 2;
constexpr int HELD = 6;        // vectors of four of a norm's row that a thread holds
constexpr int SEGMENT = 128;   // a warp's values of one of them
constexpr int SCRATCH = 1024;  // bytes in front of what the products read

// Shared memory of a front: the scale of the codes, sums of segments (or maxima of warps), and factors of groups.
struct Scratch {
    float* scale;
    float* partial;
    float* factors;

    explicit Scratch(u8* at) : scale(reinterpret_cast<float*>(at)), partial(scale + 4), factors(partial + 128) {}
};

DEVICE float dot(const float4& a) { return fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, a.w * a.w))); }
DEVICE int magnitude_of(const float4& a) { return maximum(maximum(magnitude(a.x), magnitude(a.y)), maximum(magnitude(a.z), magnitude(a.w))); }
DEVICE float square_of(float x) { const float positive = fmaxf(x, 0.0f); return positive * positive; }

// The norm of a row of at most 4·HELD·THREADS values, SEGMENT · n in a group: held[i] are the four from 4·(thread + i·THREADS) on.
template <int THREADS> DEVICE void norm_row(float4 (&held)[HELD], const Scratch& scratch, int cols, FRONT_PARAMETERS) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const float4 *values = reinterpret_cast<const float4*>(row), *gates = reinterpret_cast<const float4*>(gate), *weights = reinterpret_cast<const float4*>(weight);
    float4 own[HELD], gated[HELD];
    // Weights, which no launch writes, are asked for before the launch in front is done.
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        if (thread + i * THREADS < cols / 4) own[i] = weights[thread + i * THREADS];
    wait_previous();
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const bool inside = thread + i * THREADS < cols / 4;
        held[i] = inside ? values[thread + i * THREADS] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        gated[i] = inside && gate ? gates[thread + i * THREADS] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (gate) held[i] = make_float4(held[i].x * silu(gated[i].x), held[i].y * silu(gated[i].y), held[i].z * silu(gated[i].z), held[i].w * silu(gated[i].w));
        const float sum = warp_sum(dot(held[i]));
        if (lane == 0) scratch.partial[i * (THREADS / 32) + warp] = sum;
    }
    group_wait(FRONT_BARRIER, THREADS);
    const int segments = group / SEGMENT;
    for (int index = warp; index < cols / group; index += THREADS / 32) {
        float sum = 0.0f;
        for (int segment = lane; segment < segments; segment += 32) sum += scratch.partial[index * segments + segment];
        sum = warp_sum(sum);
        if (lane == 0) scratch.factors[index] = __fdiv_rn(1.0f, __fsqrt_rn(sum / static_cast<float>(group) + eps));
    }
    group_wait(FRONT_BARRIER, THREADS);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (thread + i * THREADS >= cols / 4) continue;
        const float factor = scratch.factors[(i * (THREADS / 32) + warp) / segments];
        held[i] = make_float4(held[i].x * factor * own[i].x, held[i].y * factor * own[i].y, held[i].z * factor * own[i].z, held[i].w * factor * own[i].w);
    }
}

// Calls use(at, four) for each four values of a row without norm that are this thread's, at 4·at.
template <int THREADS, class F> DEVICE void each_four(const float* row, int square, int cols, F use) {
    constexpr int AHEAD = 6;
    const float4* values = reinterpret_cast<const float4*>(row);
    for (int start = threadIdx.x; start < cols / 4; start += AHEAD * THREADS) {
        float4 held[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i * THREADS < cols / 4) held[i] = values[start + i * THREADS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i * THREADS >= cols / 4) break;
            if (square) held[i] = make_float4(square_of(held[i].x), square_of(held[i].y), square_of(held[i].z), square_of(held[i].w));
            use(start + i * THREADS, held[i]);
        }
    }
}

// The largest magnitude of the threads' own, as bits.
template <int THREADS> DEVICE int front_max(int own, const Scratch& scratch) {
    int* partial = reinterpret_cast<int*>(scratch.partial);
    own = warp_max(own);
    // What the norm left there has been read: its last barrier lies behind.
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = own;
    group_wait(FRONT_BARRIER, THREADS);
    int largest = 0;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) largest = maximum(largest, partial[warp]);
    return largest;
}

// Codes of the row, with zeros up to ld(cols), behind the scratch memory at `shared`; their scale in front. By the first THREADS threads.
template <int THREADS> DEVICE void front_codes(u8* shared, int cols, FRONT_PARAMETERS) {
    const Scratch scratch(shared);
    u32* words = reinterpret_cast<u32*>(shared + SCRATCH);
    const auto scale_of = [&](int largest) {
        const float scale = static_scale ? *static_scale : __fdiv_rn(bits_float(static_cast<u32>(front_max<THREADS>(largest, scratch))), 127.0f);
        if (threadIdx.x == 0) *scratch.scale = scale;
        return scale;
    };
    const auto pack = [&](const float4& x, float scale, float reciprocal) {
        if (!(scale > 0.0f)) return 0u;
        return code_of(x.x, scale, reciprocal) | code_of(x.y, scale, reciprocal) << 8 | code_of(x.z, scale, reciprocal) << 16 | code_of(x.w, scale, reciprocal) << 24;
    };
    int largest = 0;
    if (weight) {
        float4 held[HELD];
        norm_row<THREADS>(held, scratch, cols, FRONT_ARGUMENTS);
#pragma unroll
        for (int i = 0; i < HELD; ++i) largest = maximum(largest, magnitude_of(held[i]));
        const float scale = scale_of(largest), reciprocal = __fdiv_rn(1.0f, scale);
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (static_cast<int>(threadIdx.x) + i * THREADS < cols / 4) words[threadIdx.x + i * THREADS] = pack(held[i], scale, reciprocal);
    } else {
        wait_previous();
        if (!static_scale) each_four<THREADS>(row, square, cols, [&](int, const float4& x) { largest = maximum(largest, magnitude_of(x)); });
        const float scale = scale_of(largest), reciprocal = __fdiv_rn(1.0f, scale);
        each_four<THREADS>(row, square, cols, [&](int at, const float4& x) { words[at] = pack(x, scale, reciprocal); });
    }
    for (int at = cols / 4 + threadIdx.x; at < ld(cols) / 4; at += THREADS) words[at] = 0;
    group_wait(FRONT_BARRIER, THREADS);
}

// Where input k of a row of floats lies: of each 256 the first four of every eight come first, so that a warp which reads eight inputs a
// lane, four at a time, meets all banks.
DEVICE int float_place(int k) { return k / 256 * 256 + k % 8 / 4 * 128 + k / 8 % 32 * 4 + k % 4; }

// The same as floats, by `float_place`, at `shared` + SCRATCH.
template <int THREADS> DEVICE void front_floats(u8* shared, int cols, FRONT_PARAMETERS) {
    const Scratch scratch(shared);
    float* floats = reinterpret_cast<float*>(shared + SCRATCH);
    const auto store = [&](int at, const float4& x) { *reinterpret_cast<float4*>(floats + float_place(4 * at)) = x; };
    if (weight) {
        float4 held[HELD];
        norm_row<THREADS>(held, scratch, cols, FRONT_ARGUMENTS);
#pragma unroll
        for (int i = 0; i < HELD; ++i)
            if (static_cast<int>(threadIdx.x) + i * THREADS < cols / 4) store(threadIdx.x + i * THREADS, held[i]);
    } else {
        wait_previous();
        each_four<THREADS>(row, square, cols, store);
    }
    for (int at = cols / 4 + threadIdx.x; at < ld(cols) / 4; at += THREADS) store(at, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    group_wait(FRONT_BARRIER, THREADS);
}

}  // namespace
