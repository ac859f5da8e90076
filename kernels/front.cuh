// What stands in front of a linear of one token, a norm or relu², as each block of the linear computes it for itself while its weights
// are still on the way: the row comes from the second-level cache, and what the products read is left in shared memory. A kernel of
// its own would be one block that everyone waits for.
#pragma once
#include "rows.cuh"

// `row` null: codes are given. With a `weight` the norm of the row over each `group` values; otherwise the row, or with `square` the
// squares of its positive values. Codes have the scale `static_scale`, or absmax / 127.
#define FRONT_PARAMETERS const float *row, const float *weight, float eps, int group, int square, const float *static_scale
#define FRONT_ARGUMENTS row, weight, eps, group, square, static_scale
#define CODES_PARAMETERS const i8 *codes, const float *scales
#define CODES_ARGUMENTS codes, scales

namespace {

constexpr int FRONT_BARRIER = 2;
constexpr int HELD = 5;        // vectors of four of a norm's row that a thread holds
constexpr int PLAIN_HELD = 11;  // the same of a row without norm
constexpr int SEGMENT = 128;   // a warp's values of one of them
constexpr int SCRATCH = 1024;  // bytes of its own

// Shared memory of a front.
struct Scratch {
    float* partial;  // sums of segments, of which there are at most 80
    float* factors;  // of groups, likewise
    int* largest;    // maxima of warps
    float* scale;    // of the codes, for others than those who compute the front

    explicit Scratch(u8* at) : partial(reinterpret_cast<float*>(at)), factors(partial + 80), largest(reinterpret_cast<int*>(partial + 160)), scale(partial + 192) {}
};

DEVICE float dot(const float4& a) { return fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, a.w * a.w))); }
DEVICE int magnitude_of(const float4& a) { return maximum(maximum(magnitude(a.x), magnitude(a.y)), maximum(magnitude(a.z), magnitude(a.w))); }
DEVICE float square_of(float x) { const float positive = fmaxf(x, 0.0f); return positive * positive; }

// The norm of a row of at most 4·HELD·THREADS values, SEGMENT · n in a group: held[i] are the four from 4·(thread + i·THREADS) on.
template <int THREADS> DEVICE void norm_row(float4 (&held)[HELD], const Scratch& scratch, int cols, FRONT_PARAMETERS) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const float4 *values = reinterpret_cast<const float4*>(row), *weights = reinterpret_cast<const float4*>(weight);
    float4 own[HELD];
    // Weights, which no launch writes, are asked for before the launch in front is done.
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        if (thread + i * THREADS < cols / 4) own[i] = weights[thread + i * THREADS];
    wait_previous();
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = thread + i * THREADS < cols / 4 ? values[thread + i * THREADS] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        if (i * THREADS >= cols / 4) break;
        const float sum = warp_sum(dot(held[i]));
        if (lane == 0) scratch.partial[i * (THREADS / 32) + warp] = sum;
    }
    group_wait(FRONT_BARRIER, THREADS);
    // Each group's factor once, in a loop: a division and a root for each vector, and the code for them, took longer than a barrier.
    const int segments = group / SEGMENT;
#pragma unroll 1
    for (int own_group = warp; own_group * group < cols; own_group += THREADS / 32) {
        float sum = 0.0f;
#pragma unroll 1
        for (int segment = lane; segment < segments; segment += 32) sum += scratch.partial[own_group * segments + segment];
        sum = warp_sum(sum);
        if (lane == 0) scratch.factors[own_group] = __fdiv_rn(1.0f, __fsqrt_rn(sum / static_cast<float>(group) + eps));
    }
    group_wait(FRONT_BARRIER, THREADS);
    // segment · inverse >> 16 is segment / segments for all that there are.
    const int inverse = 65535 / segments + 1;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int segment = i * (THREADS / 32) + warp;
        if (segment * SEGMENT >= cols) break;
        const float factor = scratch.factors[segment * inverse >> 16];
        held[i] = make_float4(held[i].x * factor * own[i].x, held[i].y * factor * own[i].y, held[i].z * factor * own[i].z, held[i].w * factor * own[i].w);
    }
}

// The row without norm: held[i] are the four from 4·(thread + i·THREADS) on, zeros outside.
template <int THREADS> DEVICE void plain_row(float4 (&held)[PLAIN_HELD], const float* row, int square, int cols) {
    const float4* values = reinterpret_cast<const float4*>(row);
    wait_previous();
#pragma unroll
    for (int i = 0; i < PLAIN_HELD; ++i) {
        const int at = threadIdx.x + i * THREADS;
        held[i] = at < cols / 4 ? values[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < PLAIN_HELD; ++i)
        if (square) held[i] = make_float4(square_of(held[i].x), square_of(held[i].y), square_of(held[i].z), square_of(held[i].w));
}

// The largest magnitude of the threads' own, as bits.
template <int THREADS> DEVICE int front_max(int own, const Scratch& scratch) {
    own = warp_max(own);
    if (threadIdx.x % 32 == 0) scratch.largest[threadIdx.x / 32] = own;
    group_wait(FRONT_BARRIER, THREADS);
    return warp_max(scratch.largest[threadIdx.x % (THREADS / 32)]);
}

constexpr int ROW_CODES = 4096;  // what rows of codes are filled up to a multiple of, with zeros

// Codes in shared memory, and their scale.
struct Codes {
    const i8* codes;
    float scale;
};

// Rounds what threads hold of a row to codes.
template <int THREADS, int COUNT> DEVICE float round_row(float4 (&held)[COUNT], u8* to, const Scratch& scratch, int cols, const float* static_scale) {
    int largest = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) largest = maximum(largest, magnitude_of(held[i]));
    const float scale = static_scale ? *static_scale : __fdiv_rn(bits_float(static_cast<u32>(front_max<THREADS>(largest, scratch))), 127.0f);
    const Rounding rounding(scale);
    if (static_scale || scale < SMALLEST_NORMAL)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) held[i] = make_float4(rounding.within(held[i].x), rounding.within(held[i].y), rounding.within(held[i].z), rounding.within(held[i].w));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if (at >= cols / 4) break;
        const u32 word = rounding.codes(held[i].x, held[i].y, held[i].z, held[i].w);
        *reinterpret_cast<u32*>(to + 4 * at) = scale > 0.0f ? word : 0;
    }
    return scale;
}

// By the first THREADS threads, into `shared`, whose first SCRATCH bytes are for its own use.
template <int THREADS> DEVICE Codes front_codes(u8* shared, int cols, CODES_PARAMETERS, FRONT_PARAMETERS) {
    const Scratch scratch(shared);
    u8* to = shared + SCRATCH;
    const int words = (row ? cols : ld(cols)) / 4;
    for (int at = threadIdx.x + words; at < divide_up(cols, ROW_CODES) * (ROW_CODES / 4); at += THREADS) *reinterpret_cast<u32*>(to + 4 * at) = 0;
    float scale;
    if (weight) {
        float4 held[HELD];
        norm_row<THREADS>(held, scratch, cols, FRONT_ARGUMENTS);
        scale = round_row<THREADS>(held, to, scratch, cols, static_scale);
    } else if (row) {
        float4 held[PLAIN_HELD];
        plain_row<THREADS>(held, row, square, cols);
        scale = round_row<THREADS>(held, to, scratch, cols, static_scale);
    } else {
        wait_previous();
        scale = *scales;
        for (int at = threadIdx.x; at < words; at += THREADS)
            *reinterpret_cast<u32*>(to + 4 * at) = *reinterpret_cast<const u32*>(codes + 4 * at);
    }
    if (threadIdx.x == 0) *scratch.scale = scale;
    group_wait(FRONT_BARRIER, THREADS);
    return {reinterpret_cast<const i8*>(to), scale};
}

// Where input k of a row of floats lies: of each 256 the first four of every eight come first, so that a warp
// which reads eight a lane, four at a time, meets all banks.
DEVICE int float_place(int k) { return k / 256 * 256 + k % 8 / 4 * 128 + k / 8 % 32 * 4 + k % 4; }

// The same as floats, by `float_place`.
template <int THREADS> DEVICE const float* front_floats(u8* shared, int cols, FRONT_PARAMETERS) {
    const Scratch scratch(shared);
    float* floats = reinterpret_cast<float*>(shared + SCRATCH);
    const auto store = [&](int i, const float4& x) {
        const int at = threadIdx.x + i * THREADS;
        if (at < ld(cols) / 4) *reinterpret_cast<float4*>(floats + float_place(4 * at)) = x;
    };
    if (weight) {
        float4 held[HELD];
        norm_row<THREADS>(held, scratch, cols, FRONT_ARGUMENTS);
#pragma unroll
        for (int i = 0; i < HELD; ++i) store(i, held[i]);
    } else {
        float4 held[PLAIN_HELD];
        plain_row<THREADS>(held, row, square, cols);
#pragma unroll
        for (int i = 0; i < PLAIN_HELD; ++i) store(i, held[i]);
    }
    group_wait(FRONT_BARRIER, THREADS);
    return floats;
}

}  // namespace
