// The upper factor U of H⁻¹ = Uᵀ U, which GPTQ divides errors by, in f64 by blocks of 64. With P the reversal of order,
// P H P = L Lᵀ gives H⁻¹ = (P L⁻¹ P)ᵀ (P L⁻¹ P), and P L⁻¹ P is upper triangular: one factorization and one triangular inverse.
// Matrices are `[n, n]` with n a multiple of 64; step k works on block column k.
#include "device.cuh"

namespace {

constexpr int SIDE = 64;
constexpr int DEPTH = 16;

// Thread (tx, ty) of 16 x 16 holds elements (ty + 16 i, tx + 16 j) of a tile.
DEVICE int tile_row(int i) { return threadIdx.x / 16 + 16 * i; }
DEVICE int tile_col(int j) { return threadIdx.x % 16 + 16 * j; }

// sums += a bᵀ over `depth` inner indices (a multiple of 16), a and b rows of `a_stride` and `b_stride`; with `TRANSPOSED`, b is
// `[depth, 64]` instead.
template <bool TRANSPOSED> DEVICE void multiply(double (&sums)[4][4], const double* a, i64 a_stride, const double* b, i64 b_stride, int depth) {
    SHARED_ROWS(double, left, DEPTH, SIDE + 1);
    SHARED_ROWS(double, right, DEPTH, SIDE + 1);
    for (int start = 0; start < depth; start += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < SIDE * DEPTH; i += blockDim.x) {
            left[i % DEPTH][i / DEPTH] = a[i / DEPTH * a_stride + start + i % DEPTH];
            if (TRANSPOSED) right[i / SIDE][i % SIDE] = b[(start + i / SIDE) * b_stride + i % SIDE];
            else right[i % DEPTH][i / DEPTH] = b[i / DEPTH * b_stride + start + i % DEPTH];
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < DEPTH; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] = fma(left[k][tile_row(i)], right[k][tile_col(j)], sums[i][j]);
    }
    __syncthreads();
}

template <class F> DEVICE void each(F f) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) f(tile_row(i), tile_col(j), i, j);
}

}  // namespace

// out = P (H[order, order] + damping·1) P for the first `size` rows and columns, the identity behind.
KERNEL(256, cholesky_load, (const double* hessian, const int* order, const double* damping, int size, int n, double* out)) {
    depend();
    const int col = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (col >= n) return;
    double value = row == col ? 1.0 : 0.0;
    if (row < size && col < size) value = hessian[static_cast<i64>(order[size - 1 - row]) * size + order[size - 1 - col]] + (row == col ? *damping : 0.0);
    out[static_cast<i64>(row) * n + col] = value;
}

// Factors the diagonal block and inverts its factor into `inverses[k]`; `failed` becomes 1 where a pivot is not positive.
KERNEL(256, cholesky_diagonal, (double* a, int n, int k, double* inverses, int* failed)) {
    depend();
    SHARED_ROWS(double, l, SIDE, SIDE + 1);
    double* block = a + static_cast<i64>(k) * SIDE * n + k * SIDE;
    for (int i = threadIdx.x; i < SIDE * SIDE; i += blockDim.x) l[i / SIDE][i % SIDE] = block[static_cast<i64>(i / SIDE) * n + i % SIDE];
    __syncthreads();
    for (int j = 0; j < SIDE; ++j) {
        const double pivot = l[j][j];
        __syncthreads();
        if (!(pivot > 0.0)) {
            if (threadIdx.x == 0) *failed = 1;
            return;
        }
        const double root = sqrt(pivot);
        for (int i = j + threadIdx.x; i < SIDE; i += blockDim.x) l[i][j] = i == j ? root : l[i][j] / root;
        __syncthreads();
        for (int i = threadIdx.x; i < SIDE * SIDE; i += blockDim.x) {
            const int row = i / SIDE, col = i % SIDE;
            if (col > j && row >= col) l[row][col] -= l[row][j] * l[col][j];
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < SIDE * SIDE; i += blockDim.x)
        if (i / SIDE >= i % SIDE) block[static_cast<i64>(i / SIDE) * n + i % SIDE] = l[i / SIDE][i % SIDE];
    // A thread a column of the inverse, by forward substitution; the column lies where only this thread reads it.
    double* inverse = inverses + static_cast<i64>(k) * SIDE * SIDE;
    const int col = threadIdx.x;
    if (col >= SIDE) return;
    for (int row = 0; row < SIDE; ++row) {
        double sum = row == col ? 1.0 : 0.0;
        for (int j = col; j < row; ++j) sum -= l[row][j] * inverse[j * SIDE + col];
        inverse[row * SIDE + col] = row < col ? 0.0 : sum / l[row][row];
    }
}

// Blocks below the diagonal one: a ← a·L⁻ᵀ. Grid: the blocks below.
KERNEL(256, cholesky_panel, (double* a, int n, int k, const double* inverses)) {
    depend();
    double* block = a + static_cast<i64>(k + 1 + blockIdx.x) * SIDE * n + k * SIDE;
    double sums[4][4] = {};
    multiply<false>(sums, block, n, inverses + static_cast<i64>(k) * SIDE * SIDE, SIDE, SIDE);
    each([&](int row, int col, int i, int j) { block[static_cast<i64>(row) * n + col] = sums[i][j]; });
}

// What is right of and below the panel: a ← a − P Pᵀ, lower blocks only. Grid: (blocks below, blocks below).
KERNEL(256, cholesky_update, (double* a, int n, int k)) {
    depend();
    if (blockIdx.x > blockIdx.y) return;
    const double* left = a + static_cast<i64>(k + 1 + blockIdx.y) * SIDE * n + k * SIDE;
    const double* right = a + static_cast<i64>(k + 1 + blockIdx.x) * SIDE * n + k * SIDE;
    double* block = a + static_cast<i64>(k + 1 + blockIdx.y) * SIDE * n + static_cast<i64>(k + 1 + blockIdx.x) * SIDE;
    double sums[4][4] = {};
    multiply<false>(sums, left, n, right, n, SIDE);
    each([&](int row, int col, int i, int j) { block[static_cast<i64>(row) * n + col] -= sums[i][j]; });
}

// Block row k of X = L⁻¹, from the rows above: X_kc = −L_kk⁻¹ Σ_j L_kj X_jc. Grid: (k + 1).
KERNEL(256, triangular_inverse, (const double* l, const double* inverses, int n, int k, double* x)) {
    depend();
    const int c = blockIdx.x;
    const double* inverse = inverses + static_cast<i64>(k) * SIDE * SIDE;
    double* block = x + static_cast<i64>(k) * SIDE * n + c * SIDE;
    if (c == k) {
        for (int i = threadIdx.x; i < SIDE * SIDE; i += blockDim.x) block[static_cast<i64>(i / SIDE) * n + i % SIDE] = inverse[i];
        return;
    }
    double sums[4][4] = {};
    multiply<true>(sums, l + static_cast<i64>(k) * SIDE * n + c * SIDE, n, x + static_cast<i64>(c) * SIDE * n + c * SIDE, n, (k - c) * SIDE);
    // The sum lies in the block itself until all have read it.
    each([&](int row, int col, int i, int j) { block[static_cast<i64>(row) * n + col] = sums[i][j]; });
    __syncthreads();
    double out[4][4] = {};
    for (int k0 = 0; k0 < SIDE; ++k0)
        each([&](int row, int col, int i, int j) { out[i][j] = fma(inverse[row * SIDE + k0], block[static_cast<i64>(k0) * n + col], out[i][j]); });
    __syncthreads();
    each([&](int row, int col, int i, int j) { block[static_cast<i64>(row) * n + col] = -out[i][j]; });
}

// Rows of U = P X P in f32, each divided by its diagonal element, which stays; zeros below the diagonal. Grid: (⌈size/256⌉, size).
KERNEL(256, cholesky_factor, (const double* x, int size, int n, float* factor)) {
    depend();
    const int col = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (col >= size) return;
    const double* own = x + static_cast<i64>(size - 1 - row) * n;
    const double pivot = own[size - 1 - row], value = own[size - 1 - col];
    factor[static_cast<i64>(row) * size + col] = static_cast<float>(col < row ? 0.0 : col == row ? pivot : value / pivot);
}
