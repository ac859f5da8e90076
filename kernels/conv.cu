// Depthwise causal convolution over x | B | C with SiLU: `silu(bias + Σ_k weight[c, k] · input[t − kernel + 1 + k, c])`.
// Inputs in front of a sequence come from its slot's window `[kernel − 1, channels]`, oldest first, or are zeros.
#include "device.cuh"

namespace {

constexpr int TOKENS = 16;      // of a block
constexpr int MAX_KERNEL = 8;

struct Sequence {
    int begin, end, from, to;
};

DEVICE Sequence sequence(const int* sequences, int index) {
    return {sequences[4 * index], sequences[4 * index + 1], sequences[4 * index + 2], sequences[4 * index + 3]};
}

// Input `at` of channel `c`, counted from the sequence's first token; negative ones lie in the window.
DEVICE float input(const float* tokens, int stride, const float* window, int channels, int kernel, int c, int at) {
    if (at >= 0) return tokens[static_cast<i64>(at) * stride + c];
    return window ? window[static_cast<i64>(kernel - 1 + at) * channels + c] : 0.0f;
}

}  // namespace

KERNEL(128, conv, (const float* projected, int stride, int inner, const float* weight, const float* bias, int channels, int kernel, const int* sequences, const float* windows, float* out)) {
    depend();
    const Sequence own = sequence(sequences, blockIdx.z);
    const int c = blockIdx.x * blockDim.x + threadIdx.x, length = own.end - own.begin, first = blockIdx.y * TOKENS;
    if (c >= channels || first >= length) return;
    const float* tokens = projected + static_cast<i64>(own.begin) * stride + inner;
    const float* window = own.from < 0 ? nullptr : windows + static_cast<i64>(own.from) * (kernel - 1) * channels;
    float taps[MAX_KERNEL], held[MAX_KERNEL];
#pragma unroll
    for (int k = 0; k < MAX_KERNEL; ++k) {
        taps[k] = k < kernel ? weight[c * kernel + k] : 0.0f;
        held[k] = k < kernel - 1 ? input(tokens, stride, window, channels, kernel, c, first - kernel + 1 + k) : 0.0f;
    }
    float inputs[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
        if (first + i < length) inputs[i] = tokens[static_cast<i64>(first + i) * stride + c];
    const float start = bias[c];
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
        if (first + i >= length) break;
        float sum = start;
#pragma unroll
        for (int k = 0; k < MAX_KERNEL; ++k) {
            if (k == kernel - 1) held[k] = inputs[i];
            if (k < kernel) sum = fmaf(taps[k], held[k], sum);
        }
        out[static_cast<i64>(own.begin + first + i) * channels + c] = silu(sum);
#pragma unroll
        for (int k = 0; k + 1 < MAX_KERNEL; ++k) held[k] = held[k + 1];
    }
}

KERNEL(128, conv_window, (const float* projected, int stride, int inner, int channels, int kernel, const int* sequences, float* windows)) {
    depend();
    const Sequence own = sequence(sequences, blockIdx.y);
    const int c = blockIdx.x * blockDim.x + threadIdx.x, length = own.end - own.begin;
    if (c >= channels || own.to < 0) return;
    const float* tokens = projected + static_cast<i64>(own.begin) * stride + inner;
    const i64 size = static_cast<i64>(kernel - 1) * channels;
    const float* window = own.from < 0 ? nullptr : windows + own.from * size;
    float kept[MAX_KERNEL];
#pragma unroll
    for (int k = 0; k < MAX_KERNEL; ++k) kept[k] = k < kernel - 1 ? input(tokens, stride, window, channels, kernel, c, length - kernel + 1 + k) : 0.0f;
#pragma unroll
    for (int k = 0; k < MAX_KERNEL; ++k) if (k < kernel - 1) windows[own.to * size + static_cast<i64>(k) * channels + c] = kept[k];
}

KERNEL(128, conv_step, (const float* projected, int stride, int inner, const float* weight, const float* bias, int channels, int kernel, float* windows, float* out)) {
    // In this order: `ssm_step_*` reads ahead what is written before this launch.
    wait_previous();
    launch_next();
    const int c = blockIdx.x * blockDim.x + threadIdx.x, slot = blockIdx.y;
    if (c >= channels) return;
    float* window = windows + static_cast<i64>(slot) * (kernel - 1) * channels + c;
    float values[MAX_KERNEL], taps[MAX_KERNEL];
#pragma unroll
    for (int k = 0; k < MAX_KERNEL; ++k) {
        if (k >= kernel) break;
        taps[k] = weight[c * kernel + k];
        values[k] = k < kernel - 1 ? window[static_cast<i64>(k) * channels] : projected[static_cast<i64>(slot) * stride + inner + c];
    }
    float sum = bias[c];
#pragma unroll
    for (int k = 0; k < MAX_KERNEL; ++k) {
        if (k >= kernel) break;
        sum = fmaf(taps[k], values[k], sum);
        if (k > 0) window[static_cast<i64>(k - 1) * channels] = values[k];
    }
    out[static_cast<i64>(slot) * channels + c] = silu(sum);
}
