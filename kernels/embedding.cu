// Rows of an embedding table as floats. One block a token.
#include "device.cuh"

KERNEL(256, embed_f32, (const float* table, const int* ids, int cols, float* out)) {
    depend();
    const float* row = table + static_cast<i64>(ids[blockIdx.x]) * cols;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) out[static_cast<i64>(blockIdx.x) * cols + c] = row[c];
}

KERNEL(256, embed_bf16, (const bf16* table, const int* ids, int cols, float* out)) {
    depend();
    const bf16* row = table + static_cast<i64>(ids[blockIdx.x]) * ld(cols);
    for (int c = threadIdx.x; c < cols; c += blockDim.x) out[static_cast<i64>(blockIdx.x) * cols + c] = widen(row[c]);
}

KERNEL(256, embed_int8, (const i8* table, const float* table_scales, const int* ids, int cols, float* out)) {
    depend();
    const int id = ids[blockIdx.x];
    const i8* row = table + static_cast<i64>(id) * ld(cols);
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
        out[static_cast<i64>(blockIdx.x) * cols + c] = __fmul_rn(static_cast<float>(row[c]), table_scales[id]);
}

KERNEL(256, embed_int4, (const u8* table, const bf16* table_scales, int group, const int* ids, int cols, float* out)) {
    depend();
    const int id = ids[blockIdx.x];
    const u8* row = table + static_cast<i64>(id) * (ld(cols) / 2);
    const bf16* scales = table_scales + static_cast<i64>(id) * (cols / group);
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        const u8 pair = row[c / 32 * 16 + c % 16];
        const int code = static_cast<i8>(c % 32 < 16 ? pair << 4 : pair & 0xf0) >> 4;
        out[static_cast<i64>(blockIdx.x) * cols + c] = __fmul_rn(static_cast<float>(code), widen(scales[c / group]));
    }
}
