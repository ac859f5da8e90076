// GPTQ (Frantar et al., 2023) by blocks of columns, to the bit as the CPU does it: columns are in rounding order already, every
// error is made up for in ascending order of the columns it comes from, product and difference rounded apart. The CPU's search
// for a group's scale is here too: the clipping that loses least under diag(H).
#include "device.cuh"

namespace {

constexpr int WIDTH = 128;  // columns of a block
constexpr int WARPS = 4;    // rows of a thread block
constexpr int STEPS = 26;   // clipping ratios from 1 down to 0.5

DEVICE float stored(float scale, int grouped) { return grouped ? widen(narrow<bf16>(scale)) : scale; }

DEVICE float code_of(float value, float scale, float low, float high) {
    const float ratio = __fdiv_rn(value, scale);
    return fminf(fmaxf(static_cast<float>(round_even(fminf(fmaxf(ratio, -1e6f), 1e6f))), low), high);
}

// Σ (importance + tiny)·(value − code·scale)² in f64.
DEVICE double loss(const float* values, const double* importance, int count, float scale, float low, float high) {
    if (!(scale > 0.0f)) return INFINITY;
    double sum = 0.0;
    for (int i = 0; i < count; ++i) {
        const double error = static_cast<double>(__fsub_rn(values[i], __fmul_rn(code_of(values[i], scale, low, high), scale)));
        sum += (importance[i] + 2.2250738585072014e-308) * (error * error);
    }
    return sum;
}

// The scale of `count` values for the whole warp, which has `lane` of 32.
DEVICE float search(const float* values, const double* importance, int count, int grouped, float low, float high) {
    const int lane = threadIdx.x % 32;
    float absmax = 0.0f;
    for (int i = lane; i < count; i += 32) absmax = fmaxf(absmax, fabsf(values[i]));
    absmax = warp_max(absmax);
    float best = stored(__fdiv_rn(absmax, high), grouped);
    double least = INFINITY;
    int index = 2 * STEPS;
    for (int candidate = lane; candidate < (grouped ? 2 : 1) * STEPS; candidate += 32) {
        const float ratio = __fsub_rn(1.0f, __fdiv_rn(__fmul_rn(0.5f, static_cast<float>(candidate % STEPS)), static_cast<float>(STEPS - 1)));
        const float scale = stored(__fdiv_rn(__fmul_rn(absmax, ratio), candidate < STEPS ? high : -low), grouped);
        const double found = loss(values, importance, count, scale, low, high);
        if (found < least) least = found, best = scale, index = candidate;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        const double other = shuffle_xor(least, mask);
        const float other_best = shuffle_xor(best, mask);
        const int other_index = shuffle_xor(index, mask);
        if (other < least || (other == least && other_index < index)) least = other, best = other_best, index = other_index;
    }
    return best;
}

}  // namespace

// One scale for whole rows (int8): `scales[row]`. A warp a row; grid (⌈rows/4⌉).
KERNEL(128, gptq_row_scales, (const float* w, const double* importance, int rows, int cols, float low, float high, float* scales)) {
    depend();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const float scale = search(w + static_cast<i64>(row) * cols, importance, cols, 0, low, high);
    if (threadIdx.x % 32 == 0) scales[row] = scale;
}

// Rounds columns first…first + width − 1 (width ≤ 128) of w `[rows, cols]`, which holds what earlier blocks have left of them.
// `group` > 0: scales `[rows, cols / group]` are found here; 0: scales `[rows]` are given. Codes go to their own columns
// `order[column]` of `codes` `[rows, cols]`; errors to `errors` `[rows, 128]`. `factor` null: rounding only. A warp a row.
KERNEL(128, gptq_block, (const float* w, const float* factor, const double* importance, const int* order, int rows, int cols, int first, int width, int group, float low, float high, float* scales, i8* codes, float* errors)) {
    depend();
    SHARED_ROWS(float, values, WARPS, WIDTH);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.x * WARPS + warp;
    if (row >= rows) return;
    float held[WIDTH / 32];  // columns lane, lane + 32 …
#pragma unroll
    for (int i = 0; i < WIDTH / 32; ++i) held[i] = lane + 32 * i < width ? w[static_cast<i64>(row) * cols + first + lane + 32 * i] : 0.0f;
    float scale = group > 0 ? 0.0f : scales[row];
#pragma unroll
    for (int part = 0; part < WIDTH / 32; ++part) {
        for (int source = 0; source < 32; ++source) {
            const int column = part * 32 + source;
            if (column >= width) break;
            if (group > 0 && column % group == 0) {
#pragma unroll
                for (int i = 0; i < WIDTH / 32; ++i) values[warp][lane + 32 * i] = held[i];
                __syncwarp();
                scale = search(values[warp] + column, importance + first + column, group, 1, low, high);
                __syncwarp();
                if (lane == 0) scales[static_cast<i64>(row) * (cols / group) + (first + column) / group] = scale;
            }
            const float value = shuffle(held[part], source);
            const float code = scale > 0.0f ? code_of(value, scale, low, high) : 0.0f;
            const float error = __fsub_rn(value, __fmul_rn(code, scale));
            if (lane == 0) {
                codes[static_cast<i64>(row) * cols + order[first + column]] = static_cast<i8>(static_cast<int>(code));
                errors[static_cast<i64>(row) * WIDTH + column] = error;
            }
            if (!factor) continue;
            const float* shares = factor + static_cast<i64>(first + column) * cols + first;
#pragma unroll
            for (int i = 0; i < WIDTH / 32; ++i)
                if (lane + 32 * i > column && lane + 32 * i < width) held[i] = __fsub_rn(held[i], __fmul_rn(error, shares[lane + 32 * i]));
        }
    }
}

// w[:, from…] −= errors · factor[first…, from…], the errors of a block one after another. Grid (⌈(cols − from)/64⌉, ⌈rows/64⌉).
KERNEL(256, gptq_update, (float* w, const float* factor, const float* errors, int rows, int cols, int first, int width, int from)) {
    depend();
    constexpr int SIDE = 64, DEPTH = 32;
    SHARED_ROWS(float, left, DEPTH, SIDE + 1);
    SHARED_ROWS(float, right, DEPTH, SIDE);
    const int first_row = blockIdx.y * SIDE, first_col = from + blockIdx.x * SIDE, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float held[4][4];
    const auto inside = [&](int i, int j) { return first_row + ty + 16 * i < rows && first_col + tx + 16 * j < cols; };
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) held[i][j] = inside(i, j) ? w[static_cast<i64>(first_row + ty + 16 * i) * cols + first_col + tx + 16 * j] : 0.0f;
    for (int start = 0; start < width; start += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < SIDE * DEPTH; i += blockDim.x) {
            const int row = first_row + i / DEPTH, k = start + i % DEPTH;
            left[i % DEPTH][i / DEPTH] = row < rows && k < width ? errors[static_cast<i64>(row) * WIDTH + k] : 0.0f;
            const int col = first_col + i % SIDE, source = start + i / SIDE;
            right[i / SIDE][i % SIDE] = col < cols && source < width ? factor[static_cast<i64>(first + source) * cols + col] : 0.0f;
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < DEPTH; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) held[i][j] = __fsub_rn(held[i][j], __fmul_rn(left[k][ty + 16 * i], right[k][tx + 16 * j]));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (inside(i, j)) w[static_cast<i64>(first_row + ty + 16 * i) * cols + first_col + tx + 16 * j] = held[i][j];
}

// Columns into rounding order: out[row, j] = w[row, order[j]]. Grid (rows, ⌈cols/256⌉).
KERNEL(256, gptq_permute, (const float* w, const int* order, int cols, float* out)) {
    depend();
    const int col = blockIdx.y * blockDim.x + threadIdx.x;
    if (col < cols) out[static_cast<i64>(blockIdx.x) * cols + col] = w[static_cast<i64>(blockIdx.x) * cols + order[col]];
}

// The Hessian in f32 with `damping` on its diagonal. Grid (⌈cols/256⌉, cols).
KERNEL(256, gptq_damped, (const double* hessian, const double* damping, int cols, float* out)) {
    depend();
    const int col = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (col < cols) out[static_cast<i64>(row) * cols + col] = static_cast<float>(hessian[static_cast<i64>(row) * cols + col] + (row == col ? *damping : 0.0));
}

// errors[row, k] = −(w − code·scale) of column first + k, what `gptq_update` makes H (w − ŵ) of. `group` 0: a scale a row. A warp a row.
KERNEL(128, gptq_residual, (const float* w, const i8* codes, const float* scales, int rows, int cols, int first, int width, int group, float* errors)) {
    depend();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    for (int k = threadIdx.x % 32; k < width; k += 32) {
        const int col = first + k;
        const float scale = scales[group > 0 ? static_cast<i64>(row) * (cols / group) + col / group : row];
        const i64 at = static_cast<i64>(row) * cols + col;
        errors[static_cast<i64>(row) * WIDTH + k] = -__fsub_rn(w[at], __fmul_rn(static_cast<float>(codes[at]), scale));
    }
}

// Coordinate descent (QuantEase, Behdin et al., 2023) through columns first…first + width − 1 in their own order: each code becomes the
// one that loses least while the others stay. `slope` is H (w − ŵ) `[rows, cols]` as it was in front of the block, `steps` `[rows, 128]`
// what each column's value changed by, for `gptq_update`. `changed` becomes 1 where a code did. A warp a row.
KERNEL(128, gptq_descend, (const float* slope, const float* hessian, int rows, int cols, int first, int width, int group, float low, float high, const float* scales, i8* codes, float* steps, int* changed)) {
    depend();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float held[WIDTH / 32];
#pragma unroll
    for (int i = 0; i < WIDTH / 32; ++i) held[i] = lane + 32 * i < width ? slope[static_cast<i64>(row) * cols + first + lane + 32 * i] : 0.0f;
#pragma unroll
    for (int part = 0; part < WIDTH / 32; ++part) {
        for (int source = 0; source < 32; ++source) {
            const int k = part * 32 + source, col = first + k;
            if (k >= width) break;
            const float value = shuffle(held[part], source);
            const float scale = scales[group > 0 ? static_cast<i64>(row) * (cols / group) + col / group : row];
            const float* own = hessian + static_cast<i64>(col) * cols + first;
            const float code = static_cast<float>(codes[static_cast<i64>(row) * cols + col]);
            float step = 0.0f;
            if (scale > 0.0f) {
                const float best = code_of(__fadd_rn(code, __fdiv_rn(value, __fmul_rn(scale, own[k]))), 1.0f, low, high);
                if (best != code) {
                    step = __fmul_rn(__fsub_rn(best, code), scale);
#pragma unroll
                    for (int i = 0; i < WIDTH / 32; ++i)
                        if (lane + 32 * i < width) held[i] = __fsub_rn(held[i], __fmul_rn(step, own[lane + 32 * i]));
                    __syncwarp();
                    if (lane == 0) codes[static_cast<i64>(row) * cols + col] = static_cast<i8>(static_cast<int>(best)), *changed = 1;
                }
            }
            if (lane == 0) steps[static_cast<i64>(row) * WIDTH + k] = step;
        }
    }
}
