// Sums, copies and changes of type.
#include "device.cuh"

KERNEL(256, add, (const float* a, const float* b, int count, float* out)) {
    depend();
    const int first = (blockIdx.x * 256 + threadIdx.x) * 4;
    for (int i = first; i < minimum(first + 4, count); ++i) out[i] = a[i] + b[i];
}

KERNEL(256, to_bf16, (const float* x, int cols, bf16* out)) {
    depend();
    const int width = ld(cols);
    for (int c = threadIdx.x; c < width; c += blockDim.x)
        out[static_cast<i64>(blockIdx.x) * width + c] = narrow<bf16>(c < cols ? x[static_cast<i64>(blockIdx.x) * cols + c] : 0.0f);
}

KERNEL(256, gather_rows, (const float* x, const int* rows, int cols, float* out)) {
    depend();
    const float* row = x + static_cast<i64>(rows[blockIdx.x]) * cols;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) out[static_cast<i64>(blockIdx.x) * cols + c] = row[c];
}

KERNEL(256, gather_codes, (const i8* codes, const float* scales, const int* rows, int cols, i8* out_codes, float* out_scales)) {
    depend();
    const int words = ld(cols) / 16;
    const uint4* row = reinterpret_cast<const uint4*>(codes) + static_cast<i64>(rows[blockIdx.x]) * words;
    uint4* to = reinterpret_cast<uint4*>(out_codes) + static_cast<i64>(blockIdx.x) * words;
    for (int w = threadIdx.x; w < words; w += blockDim.x) to[w] = row[w];
    if (threadIdx.x == 0) out_scales[blockIdx.x] = scales[rows[blockIdx.x]];
}

// One thread a column, so that the rows are added in the order given whichever they are.
KERNEL(256, scatter_add, (float* into, const float* x, const int* rows, const float* weights, int count, int cols)) {
    depend();
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    for (int i = 0; i < count; ++i) {
        float* to = into + static_cast<i64>(rows[i]) * cols + c;
        *to = __fadd_rn(*to, __fmul_rn(weights[i], x[static_cast<i64>(i) * cols + c]));
    }
}
