// Linears for many tokens: tiles of 128 tokens by 128 rows on the tensor cores, inputs brought to shared memory some stages
// ahead. 8 warps, each 64 tokens by 32 rows. Rows of a stage are 64 bytes of activations; 16-byte chunks of a row are
// permuted by its number so that the eight rows that a matrix load reads lie in different banks.
#include "experts.cuh"

namespace {

constexpr int TILE = 128;
constexpr int THREADS = 256;

// Byte of chunk `chunk` (of four) in row `row` of a stage with 64-byte rows.
DEVICE int place(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }

// Rows of a tile that a thread brings to shared memory, a chunk of each at a time.
constexpr int LINES = TILE * 4 / THREADS;

// A matrix with rows of `row_bytes` bytes: where the thread's chunks of `rows` are, null outside.
struct Lines {
    const u8* matrix;
    i64 row_bytes;
    const u8* at[LINES];
};

DEVICE Lines lines(const void* matrix, i64 row_bytes, const Rows& rows, const int* x_rows) {
    Lines own = {static_cast<const u8*>(matrix), row_bytes, {}};
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
        const int index = i * THREADS + threadIdx.x, row = index / 4, chunk = index % 4;
        own.at[i] = row < rows.count ? own.matrix + x_row(rows.first + row, x_rows) * row_bytes + chunk * 16 : nullptr;
    }
    return own;
}

// Brings 64 bytes of each row from byte `at` on to a stage; zeros outside.
DEVICE void fetch_rows(u8* stage, const Lines& from, i64 at) {
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
        const int index = i * THREADS + threadIdx.x, row = index / 4, chunk = index % 4;
        const bool valid = from.at[i] && at + chunk * 16 < from.row_bytes;
        copy_async(stage + place(row, chunk), valid ? from.at[i] + at : from.matrix, valid);
    }
}

// Rows of the weights that a block multiplies.
DEVICE Rows outputs_of_block(int rows) {
    const int first = blockIdx.y * TILE;
    return {first, minimum(TILE, rows - first)};
}

// Where a lane points for a matrix load of 16 rows by 32 bytes: words are (rows 0-7, low), (8-15, low), (0-7, high), (8-15, high).
DEVICE const u8* token_place(const u8* stage, int row, int half) {
    const int lane = threadIdx.x % 32;
    return stage + place(row + lane % 16, half * 2 + lane / 16);
}

// The same with words (0-7, low), (0-7, high), (8-15, low), (8-15, high): the operands of two column tiles.
DEVICE const u8* row_place(const u8* stage, int row, int half) {
    const int lane = threadIdx.x % 32;
    return stage + place(row + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2);
}

DEVICE void finish(float product, int token, int row, TAIL_PARAMETERS) {
    const i64 at = static_cast<i64>(token) * out_stride + row;
    if (bias) product = product + bias[row];
    if (residual) product = residual[at] + product;
    out[at] = product;
}

DEVICE void multiply(int (&d)[4], const u32* a, const u32* b) { mma_s8(d, a[0], a[1], a[2], a[3], b[0], b[1]); }
DEVICE void multiply(float (&d)[4], const u32* a, const u32* b) { mma_bf16(d, a[0], a[1], a[2], a[3], b[0], b[1]); }

// Calls `use(step)` for every step in order, when what `fetch(step)` asked for STAGES − 1 steps before has come for all threads.
template <int STAGES, class Fetch, class Use> DEVICE void pipeline(int steps, Fetch fetch, Use use) {
    const auto ask = [&](int step) {
        if (step < steps) fetch(step);
        copy_commit();
    };
    for (int step = 0; step < STAGES - 1; ++step) ask(step);
    for (int step = 0; step < steps; ++step) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        ask(step + STAGES - 1);
        use(step);
    }
}

// x wᵀ of two matrices with rows of `row_bytes` bytes: int8 with sums in int, or bf16 with sums in float. Leaves
// sums[m][n][i] = token 16 m + 8 (i / 2) + lane / 4, row 8 n + lane % 4 · 2 + i % 2 of the warp's tile.
template <class Sum> DEVICE void product_tile(u8* shared, const void* w, const void* x, const Rows& tokens, const int* x_rows, int rows, int row_bytes, Sum (&sums)[4][4][4]) {
    constexpr int STAGES = 4, STAGE = 2 * TILE * 64;
    const Lines activations = lines(x, row_bytes, tokens, x_rows), weights = lines(w, row_bytes, outputs_of_block(rows), nullptr);
    const int steps = row_bytes / 64, warp = threadIdx.x / 32, warp_token = warp / 4 * 64, warp_row = warp % 4 * 32;
    const auto fetch = [&](int step) {
        u8* stage = shared + step % STAGES * STAGE;
        fetch_rows(stage, activations, static_cast<i64>(step) * 64);
        fetch_rows(stage + TILE * 64, weights, static_cast<i64>(step) * 64);
    };
    pipeline<STAGES>(steps, fetch, [&](int step) {
        const u8* stage = shared + step % STAGES * STAGE;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) load_matrices(a[m], token_place(stage, warp_token + m * 16, half));
#pragma unroll
            for (int n = 0; n < 2; ++n) load_matrices(b[n], row_place(stage + TILE * 64, warp_row + n * 16, half));
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply(sums[m][n], a[m], b[n / 2] + n % 2 * 2);
        }
    });
}

// Calls `value(sum, token, row)` for each of the thread's results inside the output and stores what it returns.
template <class Sum, class F> DEVICE void store_tile(const Sum (&sums)[4][4][4], const Rows& tokens, int rows, F value, TAIL_PARAMETERS) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_token = warp / 4 * 64 + lane / 4, first_row = blockIdx.y * TILE + warp % 4 * 32 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = first_token + m * 16 + i / 2 * 8, token = tokens.first + at, row = first_row + n * 8 + i % 2;
                if (at < tokens.count && row < rows) finish(value(sums[m][n][i], token, row), token, row, TAIL_ARGUMENTS);
            }
}

}  // namespace

KERNEL(256, gemm_w8a8, (const i8* w, const float* w_scales, const i8* x, const float* x_scales, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    DYNAMIC_SHARED(u8, shared);
    const Rows own = rows_of_tile(blockIdx.x, TILE, tokens, experts, tiles, w, w_scales, bias);
    if (own.count <= 0) return;
    int sums[4][4][4] = {};
    product_tile(shared, w, x, own, x_rows, rows, ld(cols), sums);
    store_tile(sums, own, rows, [&](int sum, int token, int row) {
        return __fmul_rn(static_cast<float>(sum), __fmul_rn(x_scales[x_row(token, x_rows)], w_scales[row]));
    }, TAIL_ARGUMENTS);
}

KERNEL(256, gemm_bf16, (const bf16* w, const bf16* x, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    DYNAMIC_SHARED(u8, shared);
    const float* none = nullptr;
    const Rows own = rows_of_tile(blockIdx.x, TILE, tokens, experts, tiles, w, none, bias);
    if (own.count <= 0) return;
    float sums[4][4][4] = {};
    product_tile(shared, w, x, own, x_rows, rows, ld(cols) * 2, sums);
    store_tile(sums, own, rows, [](float sum, int, int) { return sum; }, TAIL_ARGUMENTS);
}

namespace {

// int4 weights: a stage is 128 inputs, activations as two halves of 64 and weights as rows of 64 bytes. PARTS groups in a stage.
template <int PARTS> DEVICE void int4_tile(u8* shared, const u8* w, const bf16* w_scales, const i8* x, const Rows& tokens, const int* x_rows, int rows, int cols, float (&totals)[4][4][4]) {
    constexpr int STAGES = 3, STAGE = 3 * TILE * 64, CHUNKS = 4 / PARTS;
    const int width = ld(cols), groups = cols / (128 / PARTS), steps = divide_up(width, 128);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_token = warp / 4 * 64, warp_row = warp % 4 * 32;
    const int first_row = blockIdx.y * TILE;
    const Lines activations = lines(x, width, tokens, x_rows), weights = lines(w, width / 2, outputs_of_block(rows), nullptr);
    const auto fetch = [&](int step) {
        u8* stage = shared + step % STAGES * STAGE;
        fetch_rows(stage, activations, static_cast<i64>(step) * 128);
        fetch_rows(stage + TILE * 64, activations, static_cast<i64>(step) * 128 + 64);
        fetch_rows(stage + 2 * TILE * 64, weights, static_cast<i64>(step) * 64);
    };
    pipeline<STAGES>(steps, fetch, [&](int step) {
        const u8* stage = shared + step % STAGES * STAGE;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int group = step * PARTS + part;
            if (group >= groups) break;
            // b[chunk][n]: the codes of 32 inputs for rows 8 n + lane / 4, four bytes of two codes each.
            u32 b[CHUNKS][4];
            float scales[4][2];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) load_matrices(b[chunk], stage + 2 * TILE * 64 + place(warp_row + lane, part * CHUNKS + chunk));
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row = first_row + warp_row + n * 8 + lane % 4 * 2 + i;
                    scales[n][i] = row < rows ? widen(w_scales[static_cast<i64>(row) * groups + group]) : 0.0f;
                }
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                u32 a[CHUNKS][4];
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                    const int at = part * CHUNKS + chunk;
                    load_matrices(a[chunk], token_place(stage + at / 2 * TILE * 64, warp_token + m * 16, at % 2));
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    int sum[4] = {0, 0, 0, 0};
                    // Codes in the high half of a byte are 16 times themselves.
#pragma unroll
                    for (int chunk = 0; chunk < CHUNKS; ++chunk)
                        mma_s8(sum, a[chunk][0], a[chunk][1], a[chunk][2], a[chunk][3], b[chunk][n] << 4 & 0xf0f0f0f0u, b[chunk][n] & 0xf0f0f0f0u);
#pragma unroll
                    for (int i = 0; i < 4; ++i) totals[m][n][i] = __fadd_rn(totals[m][n][i], __fmul_rn(static_cast<float>(sum[i] >> 4), scales[n][i % 2]));
                }
            }
        }
    });
}

}  // namespace

KERNEL(256, gemm_w4a8, (const u8* w, const bf16* w_scales, int group, const i8* x, const float* x_scales, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    DYNAMIC_SHARED(u8, shared);
    const Rows own = rows_of_tile(blockIdx.x, TILE, tokens, experts, tiles, w, w_scales, bias);
    if (own.count <= 0) return;
    float totals[4][4][4] = {};
    if (group == 128) int4_tile<1>(shared, w, w_scales, x, own, x_rows, rows, cols, totals);
    if (group == 64) int4_tile<2>(shared, w, w_scales, x, own, x_rows, rows, cols, totals);
    if (group == 32) int4_tile<4>(shared, w, w_scales, x, own, x_rows, rows, cols, totals);
    store_tile(totals, own, rows, [&](float total, int token, int) { return __fmul_rn(total, x_scales[x_row(token, x_rows)]); }, TAIL_ARGUMENTS);
}

namespace {

// int8 or int4 weights by bf16 activations: a stage is 32 inputs; codes become bf16 on their way to the products. int4: the
// group's scale goes into the weight, rounded to bf16; int8: codes are exact, the row's scale comes last.
template <bool INT4> DEVICE void widening_tile(u8* shared, const u8* w, const bf16* w_scales, int group, const bf16* x, const Rows& tokens, const int* x_rows, int rows, int cols, float (&sums)[4][4][4]) {
    constexpr int STAGES = 4, ROW = INT4 ? 16 : 32, STAGE = TILE * 64 + TILE * ROW;
    const int width = ld(cols), steps = width / 32, groups = INT4 ? cols / group : 1;
    const i64 row_bytes = INT4 ? width / 2 : width;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_token = warp / 4 * 64, warp_row = warp % 4 * 32;
    const int first_row = blockIdx.y * TILE;
    const Lines activations = lines(x, width * 2, tokens, x_rows);
    const auto fetch = [&](int step) {
        u8* stage = shared + step % STAGES * STAGE;
        fetch_rows(stage, activations, static_cast<i64>(step) * 64);
        const int row = threadIdx.x / (ROW / 16), chunk = threadIdx.x % (ROW / 16);
        if (row < TILE) {
            const bool valid = first_row + row < rows;
            copy_async(stage + TILE * 64 + row * ROW + chunk * 16, valid ? w + (first_row + row) * row_bytes + step * ROW + chunk * 16 : w, valid);
        }
    };
    pipeline<STAGES>(steps, fetch, [&](int step) {
        const u8* stage = shared + step % STAGES * STAGE;
        const u8* codes = stage + TILE * 64;
        float scales[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int row = first_row + warp_row + n * 8 + lane / 4;
            scales[n] = INT4 && row < rows && step * 32 < cols ? widen(w_scales[static_cast<i64>(row) * groups + step * 32 / group]) : 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 a[4][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 4; ++m) load_matrices(a[m], token_place(stage, warp_token + m * 16, half));
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const u8* row = codes + (warp_row + n * 8 + lane / 4) * ROW + i * 8 + lane % 4 * 2;
                    if (INT4) {
                        const int first = static_cast<i8>(half == 0 ? row[0] << 4 : row[0] & 0xf0) >> 4, second = static_cast<i8>(half == 0 ? row[1] << 4 : row[1] & 0xf0) >> 4;
                        b[n][i] = pack_bf16(static_cast<float>(first) * scales[n], static_cast<float>(second) * scales[n]);
                    } else {
                        b[n][i] = pack_bf16(static_cast<float>(static_cast<i8>(row[half * 16])), static_cast<float>(static_cast<i8>(row[half * 16 + 1])));
                    }
                }
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply(sums[m][n], a[m], b[n]);
        }
    });
}

}  // namespace

KERNEL(256, gemm_w8a16, (const i8* w, const float* w_scales, const bf16* x, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    DYNAMIC_SHARED(u8, shared);
    const Rows own = rows_of_tile(blockIdx.x, TILE, tokens, experts, tiles, w, w_scales, bias);
    if (own.count <= 0) return;
    float sums[4][4][4] = {};
    widening_tile<false>(shared, reinterpret_cast<const u8*>(w), nullptr, 1, x, own, x_rows, rows, cols, sums);
    store_tile(sums, own, rows, [&](float sum, int, int row) { return sum * w_scales[row]; }, TAIL_ARGUMENTS);
}

KERNEL(256, gemm_w4a16, (const u8* w, const bf16* w_scales, int group, const bf16* x, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    DYNAMIC_SHARED(u8, shared);
    const Rows own = rows_of_tile(blockIdx.x, TILE, tokens, experts, tiles, w, w_scales, bias);
    if (own.count <= 0) return;
    float sums[4][4][4] = {};
    widening_tile<true>(shared, w, w_scales, group, x, own, x_rows, rows, cols, sums);
    store_tile(sums, own, rows, [](float sum, int, int) { return sum; }, TAIL_ARGUMENTS);
}

// f32 without tensor cores: 64 tokens by 64 rows, each thread 4 by 4.
KERNEL(256, gemm_f32, (const float* w, const float* x, int x_stride, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    constexpr int SIDE = 64, DEPTH = 16;
    SHARED_ROWS(float, inputs, DEPTH, SIDE + 4);
    SHARED_ROWS(float, weights, DEPTH, SIDE + 4);
    const float* none = nullptr;
    const Rows own = rows_of_tile(blockIdx.x, SIDE, tokens, experts, tiles, w, none, bias);
    if (own.count <= 0) return;
    const int first_row = blockIdx.y * SIDE, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sums[4][4] = {};
    for (int start = 0; start < cols; start += DEPTH) {
        for (int i = threadIdx.x; i < SIDE * DEPTH; i += THREADS) {
            const int line = i / DEPTH, k = i % DEPTH;
            const bool inside = start + k < cols;
            inputs[k][line] = inside && line < own.count ? x[static_cast<i64>(x_row(own.first + line, x_rows)) * x_stride + start + k] : 0.0f;
            weights[k][line] = inside && first_row + line < rows ? w[static_cast<i64>(first_row + line) * cols + start + k] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(inputs[k][ty * 4 + i], weights[k][tx + j * 16], sums[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int at = ty * 4 + i, row = first_row + tx + j * 16;
            if (at < own.count && row < rows) finish(sums[i][j], own.first + at, row, TAIL_ARGUMENTS);
        }
}
