// Hadamard transforms, Sylvester's order, of channels that a warp holds.
#pragma once
#include "device.cuh"

namespace {

constexpr int COUNT = 8;  // channels of a lane at most: spans have up to 256

// What a transform of `size` values is multiplied by to be orthonormal.
DEVICE float turn_scale(int size) { return __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(size))); }

// Orthonormal transform of each `block` of `width` channels, of which lane l holds l, l + 32, ….
DEVICE void rotate(float (&v)[COUNT], int width, int block) {
    const int lane = threadIdx.x % 32;
    for (int half = 1; half < minimum(block, 32); half *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (32 * i >= width) break;
            const float other = shuffle_xor(v[i], half);
            v[i] = lane & half ? other - v[i] : v[i] + other;
        }
#pragma unroll
    for (int step = 1; step < COUNT; step *= 2) {
        if (32 * step >= block) break;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (32 * i >= width) break;
            if (i & step) continue;
            const float a = v[i], b = v[i + step];
            v[i] = a + b;
            v[i + step] = a - b;
        }
    }
    const float scale = turn_scale(block);
    if (block > 1)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) v[i] = __fmul_rn(v[i], scale);
}

// The stages of a transform of each `size` values that are within 128, of which a lane holds four behind one another, not scaled. No lane's size is larger
// than `largest`.
DEVICE float4 turn_four(float4 v, int size, int largest) {
    if (size > 1) v = make_float4(v.x + v.y, v.x - v.y, v.z + v.w, v.z - v.w);
    if (size > 2) v = make_float4(v.x + v.z, v.y + v.w, v.x - v.z, v.y - v.w);
    for (int mask = 1; mask < 32 && 4 * mask < largest; mask *= 2) {
        const float4 other = make_float4(shuffle_xor(v.x, mask), shuffle_xor(v.y, mask), shuffle_xor(v.z, mask), shuffle_xor(v.w, mask));
        if (4 * mask >= size) continue;
        if (threadIdx.x & mask) v = make_float4(other.x - v.x, other.y - v.y, other.z - v.z, other.w - v.w);
        else v = make_float4(v.x + other.x, v.y + other.y, v.z + other.z, v.w + other.w);
    }
    return v;
}

DEVICE float4 times(const float4& v, float scale) { return make_float4(__fmul_rn(v.x, scale), __fmul_rn(v.y, scale), __fmul_rn(v.z, scale), __fmul_rn(v.w, scale)); }

}  // namespace
