// One token's convolution of x | B | C, which a launch of its own computes or whoever reads it.
#pragma once
#include "device.cuh"

namespace {

constexpr int MAX_KERNEL = 8;

// Channel c of it, `window` being its inputs of the tokens before, oldest first, in rows of `channels`. Calls `keep(k, value)` with what the
// window holds when it has moved on.
template <class F> DEVICE float convolve_step(const float* weight, const float* bias, int kernel, const float* window, int channels, float input, int c, F keep) {
    float values[MAX_KERNEL], taps[MAX_KERNEL];
#pragma unroll
    for (int k = 0; k < MAX_KERNEL; ++k) {
        if (k >= kernel) break;
        taps[k] = weight[c * kernel + k];
        values[k] = k < kernel - 1 ? window[static_cast<i64>(k) * channels] : input;
    }
    float sum = bias[c];
#pragma unroll
    for (int k = 0; k < MAX_KERNEL; ++k) {
        if (k >= kernel) break;
        sum = fmaf(taps[k], values[k], sum);
        if (k > 0) keep(k - 1, values[k]);
    }
    return silu(sum);
}

}  // namespace
