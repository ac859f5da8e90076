// Statistics of activations.
#include "device.cuh"

namespace {

constexpr int SIDE = 64;
constexpr int DEPTH = 16;
constexpr int TOKENS = 256;  // whose products are summed in f32 before they go into the f64 sum

}  // namespace

// out += xᵀ x; tiles above the diagonal are computed and mirrored.
KERNEL(256, gram, (const float* x, int tokens, int cols, double* out)) {
    depend();
    SHARED_ROWS(float, left, DEPTH, SIDE);
    SHARED_ROWS(float, right, DEPTH, SIDE);
    if (blockIdx.x < blockIdx.y) return;
    const int first_row = blockIdx.y * SIDE, first_col = blockIdx.x * SIDE, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    double totals[4][4] = {};
    for (int begin = 0; begin < tokens; begin += TOKENS) {
        float sums[4][4] = {};
        for (int start = begin; start < minimum(begin + TOKENS, tokens); start += DEPTH) {
            __syncthreads();
            for (int i = threadIdx.x; i < DEPTH * SIDE; i += blockDim.x) {
                const int t = start + i / SIDE, c = i % SIDE;
                left[i / SIDE][c] = t < tokens && first_row + c < cols ? x[static_cast<i64>(t) * cols + first_row + c] : 0.0f;
                right[i / SIDE][c] = t < tokens && first_col + c < cols ? x[static_cast<i64>(t) * cols + first_col + c] : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < DEPTH; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(left[k][ty + 16 * i], right[k][tx + 16 * j], sums[i][j]);
        }
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) totals[i][j] += static_cast<double>(sums[i][j]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int row = first_row + ty + 16 * i, col = first_col + tx + 16 * j;
            if (row >= cols || col >= cols) continue;
            out[static_cast<i64>(row) * cols + col] += totals[i][j];
            if (blockIdx.x != blockIdx.y) out[static_cast<i64>(col) * cols + row] += totals[i][j];
        }
}

KERNEL(128, abs_max, (const float* x, int tokens, int cols, float* out)) {
    depend();
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    float largest = out[c];
    for (int t = 0; t < tokens; ++t) largest = fmaxf(largest, fabsf(x[static_cast<i64>(t) * cols + c]));
    out[c] = largest;
}

// Counts of |x| in `bins` equal bins from 0 to `limit`; the last one also has what lies beyond.
KERNEL(256, histogram, (const float* x, int count, float limit, int bins, unsigned* out)) {
    depend();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        atomicAdd(out + minimum(static_cast<int>(fminf(__fdiv_rn(fabsf(x[i]), limit), 1.0f) * static_cast<float>(bins)), bins - 1), 1u);
}
