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

KERNEL(256, gram_diagonal, (const double* sum, int n, double* out)) {
    depend();
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < n) out[c] = sum[static_cast<i64>(c) * (n + 1)];
}

KERNEL(128, abs_max, (const float* x, int tokens, int cols, float* out)) {
    depend();
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    // Magnitudes compare like their bits, NaN above all.
    u32 largest = float_bits(out[c]);
#pragma unroll 8
    for (int t = 0; t < tokens; ++t) {
        const u32 bits = float_bits(x[static_cast<i64>(t) * cols + c]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    out[c] = bits_float(largest);
}

// Counts of |x| in `bins` equal bins from 0 to `limit`; the last one also has what lies beyond.
KERNEL(256, histogram, (const float* x, int count, float limit, int bins, unsigned* out)) {
    depend();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        atomicAdd(out + minimum(static_cast<int>(fminf(__fdiv_rn(fabsf(x[i]), limit), 1.0f) * static_cast<float>(bins)), bins - 1), 1u);
}

// Every value as two bf16, high + low, for products on the tensor cores.
KERNEL(256, split_halves, (const float* x, i64 count, bf16* high, bf16* low)) {
    depend();
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        high[i] = narrow<bf16>(x[i]);
        low[i] = narrow<bf16>(x[i] - widen(high[i]));
    }
}

// out += own + cross + crossᵀ, own symmetric: xᵀx from the products of its halves, high·high and high·low.
KERNEL(256, gram_add, (const float* own, const float* cross, int n, double* out)) {
    depend();
    constexpr int TILE = 32;
    SHARED_ROWS(float, turned, TILE, TILE + 1);
    const int tx = threadIdx.x % TILE, ty = threadIdx.x / TILE, row0 = blockIdx.y * TILE, col0 = blockIdx.x * TILE;
    for (int i = ty; i < TILE; i += 8) turned[i][tx] = col0 + i < n && row0 + tx < n ? cross[static_cast<i64>(col0 + i) * n + row0 + tx] : 0.0f;
    __syncthreads();
    for (int i = ty; i < TILE; i += 8) {
        if (row0 + i >= n || col0 + tx >= n) continue;
        const i64 at = static_cast<i64>(row0 + i) * n + col0 + tx;
        // The halves' sum is the same at (i, j) and (j, i), so that the result is symmetric to the bit.
        out[at] += static_cast<double>(own[at]) + (static_cast<double>(cross[at]) + static_cast<double>(turned[tx][i]));
    }
}

// Σ (a − b)² and Σ a² of each row.
KERNEL(256, squared_difference, (const float* a, const float* b, int cols, double* out)) {
    depend();
    SHARED_ROWS(double, partial, 8, 2);
    const i64 row = blockIdx.x;
    double difference = 0.0, norm = 0.0;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        const float x = a[row * cols + c], d = x - b[row * cols + c];
        difference += static_cast<double>(d) * static_cast<double>(d);
        norm += static_cast<double>(x) * static_cast<double>(x);
    }
    difference = warp_sum(difference), norm = warp_sum(norm);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][0] = difference, partial[threadIdx.x / 32][1] = norm;
    __syncthreads();
    if (threadIdx.x > 1) return;
    double total = 0.0;
    for (int warp = 0; warp < 8; ++warp) total += partial[warp][threadIdx.x];
    out[2 * row + threadIdx.x] = total;
}

// Four sums over all values, each of a mixture of the value's bits and its place: what tells two tensors apart. Sums of integers do not
// depend on the order. `fault` becomes 1 where a value is not finite.
KERNEL(256, digest, (const float* x, i64 count, u64* out, int* fault)) {
    depend();
    u64 sums[4] = {};
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += static_cast<i64>(gridDim.x) * blockDim.x) {
        if (!(fabsf(x[i]) < INFINITY)) *fault = 1;
        u64 mixed = static_cast<u64>(i) << 32 | float_bits(x[i]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            // SplitMix64's finalizer (Steele, Lea and Flood, 2014).
            mixed += 0x9e3779b97f4a7c15ull;
            mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9ull;
            mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebull;
            mixed ^= mixed >> 31;
            sums[k] += mixed;
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) atomicAdd(out + k, sums[k]);
}
