// Norms and relu², and the forms in which they hand a row on: floats, int8 codes with a scale, either after a block-Hadamard
// transform. One block a token; the row stays in shared memory, so that it is read and written once.
#include "device.cuh"

#define EMIT_PARAMETERS float *out, i8 *codes, float *scales, const float *static_scale, int hadamard
#define EMIT_ARGUMENTS out, codes, scales, static_scale, hadamard

// Sum (or maximum) over the block's threads; every thread gets it.
DEVICE float block_sum(float x, float* partial) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += partial[warp];
    return total;
}

DEVICE int block_max(int x, int* partial) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    int largest = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) largest = maximum(largest, partial[warp]);
    return largest;
}

// Orthonormal Hadamard transform of each `size` values of the row, Sylvester's order.
DEVICE void transform(float* row, int cols, int size) {
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(size)));
    for (int half = 1; half < size; half *= 2) {
        for (int pair = threadIdx.x; pair < cols / 2; pair += blockDim.x) {
            const int at = pair / half * 2 * half + pair % half;
            const float a = row[at], b = row[at + half];
            row[at] = a + b;
            row[at + half] = a - b;
        }
        __syncthreads();
    }
    for (int c = threadIdx.x; c < cols; c += blockDim.x) row[c] = __fmul_rn(row[c], scale);
    __syncthreads();
}

// Hands on the block's row, which all threads have written: scale = absmax / 127, code = round-half-even(x / scale). A row of
// zeros has scale 0 and codes 0; a row with a NaN has a NaN for its scale.
DEVICE void emit_row(float* row, int cols, EMIT_PARAMETERS) {
    SHARED(int, partial, 16);
    const i64 token = blockIdx.x;
    __syncthreads();
    if (hadamard > 0) transform(row, cols, hadamard);
    if (out) for (int c = threadIdx.x; c < cols; c += blockDim.x) out[token * cols + c] = row[c];
    if (!codes) return;
    float scale;
    if (static_scale) {
        scale = *static_scale;
    } else {
        // Magnitudes compare like their bits, NaN above all.
        int largest = 0;
        for (int c = threadIdx.x; c < cols; c += blockDim.x) largest = maximum(largest, static_cast<int>(float_bits(row[c]) & 0x7fffffff));
        scale = __fdiv_rn(bits_float(static_cast<u32>(block_max(largest, partial))), 127.0f);
    }
    if (threadIdx.x == 0) scales[token] = scale;
    const int width = ld(cols);
    const auto code = [&](int c) -> u32 {
        if (c >= cols || !(scale > 0.0f)) return 0;
        return static_cast<u32>(round_even(fminf(fmaxf(__fdiv_rn(row[c], scale), -127.0f), 127.0f))) & 0xff;
    };
    u32* words = reinterpret_cast<u32*>(codes + token * width);
    for (int word = threadIdx.x; word < width / 4; word += blockDim.x)
        words[word] = code(4 * word) | code(4 * word + 1) << 8 | code(4 * word + 2) << 16 | code(4 * word + 3) << 24;
}

KERNEL(512, rms_norm, (const float* x, const float* weight, float eps, int cols, EMIT_PARAMETERS)) {
    DYNAMIC_SHARED(float, row);
    SHARED(float, partial, 16);
    x += static_cast<i64>(blockIdx.x) * cols;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        const float value = x[c];
        row[c] = value;
        sum = fmaf(value, value, sum);
    }
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(block_sum(sum, partial) / static_cast<float>(cols) + eps));
    for (int c = threadIdx.x; c < cols; c += blockDim.x) row[c] = row[c] * scale * weight[c];
    emit_row(row, cols, EMIT_ARGUMENTS);
}

KERNEL(512, gated_norm, (const float* y, const float* projected, int projected_stride, const float* weight, float eps, int cols, int group, EMIT_PARAMETERS)) {
    DYNAMIC_SHARED(float, row);
    y += static_cast<i64>(blockIdx.x) * cols;
    projected += static_cast<i64>(blockIdx.x) * projected_stride;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) row[c] = y[c] * silu(projected[c]);
    __syncthreads();
    for (int first = static_cast<int>(threadIdx.x) / 32 * group; first < cols; first += static_cast<int>(blockDim.x) / 32 * group) {
        float sum = 0.0f;
        for (int c = threadIdx.x % 32; c < group; c += 32) sum = fmaf(row[first + c], row[first + c], sum);
        const float scale = __fdiv_rn(1.0f, __fsqrt_rn(warp_sum(sum) / static_cast<float>(group) + eps));
        for (int c = threadIdx.x % 32; c < group; c += 32) row[first + c] = row[first + c] * scale * weight[first + c];
    }
    emit_row(row, cols, EMIT_ARGUMENTS);
}

KERNEL(512, relu2, (const float* x, int cols, EMIT_PARAMETERS)) {
    DYNAMIC_SHARED(float, row);
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        const float positive = fmaxf(x[static_cast<i64>(blockIdx.x) * cols + c], 0.0f);
        row[c] = positive * positive;
    }
    emit_row(row, cols, EMIT_ARGUMENTS);
}

KERNEL(512, emit, (const float* x, int cols, EMIT_PARAMETERS)) {
    DYNAMIC_SHARED(float, row);
    for (int c = threadIdx.x; c < cols; c += blockDim.x) row[c] = x[static_cast<i64>(blockIdx.x) * cols + c];
    emit_row(row, cols, EMIT_ARGUMENTS);
}
