// The selective scan over whole sequences in chunks of at most 64 tokens (Dao and Gu, 2024, "SSD"), all in f32. With D_t the
// cumulative dt·A within a chunk: the chunk's own contribution to the state is `Σ_t exp(D_end − D_t)·dt_t·x_t ⊗ B_t`; states are
// passed from chunk to chunk; and `y_t = exp(D_t)·S·C_t + Σ_{s≤t} (C_t·B_s)·exp(D_t − D_s)·dt_s·x_s + D·x_t`, S the state at the
// chunk's beginning.
#include "device.cuh"

namespace {

constexpr int CHUNK = 64;
constexpr int DEPTH = 32;   // of the inner dimension that is in shared memory at a time
constexpr int PITCH = CHUNK + 1;


// Thread (tx, ty) of 16 x 16 holds elements (ty + 16 i, tx + 16 j) of a 64 x 64 tile.
DEVICE int tile_row(int i) { return threadIdx.x / 16 + 16 * i; }
DEVICE int tile_col(int j) { return threadIdx.x % 16 + 16 * j; }

// sums += aᵀ b with a, b `[depth, 64]` in shared memory.
DEVICE void accumulate(float (&sums)[4][4], const float (*a)[PITCH], const float (*b)[PITCH], int depth) {
#pragma unroll 8
    for (int k = 0; k < depth; ++k) {
        float left[4], right[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = a[k][tile_row(i)], right[i] = b[k][tile_col(i)];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
    }
}

// Fills `tile[k][line] = value(line, k)` for 64 lines and DEPTH inner indices, the inner ones next to each other in memory.
template <class F> DEVICE void fill(float (*tile)[PITCH], F value) {
    for (int i = threadIdx.x; i < CHUNK * DEPTH; i += blockDim.x) tile[i % DEPTH][i / DEPTH] = value(i / DEPTH, i % DEPTH);
}

}  // namespace

KERNEL(32, ssd_decay, (const float* projected, int stride, int dt_offset, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, const int* chunks, float* dt, float* decay)) {
    const int head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= heads) return;
    float sum = 0.0f;
    for (int t = chunks[2 * blockIdx.y]; t < chunks[2 * blockIdx.y + 1]; ++t) {
        const float raw = projected[static_cast<i64>(t) * stride + dt_offset + head];
        const float own = fminf(fmaxf(softplus(raw + dt_bias[head]), dt_min), dt_max);
        sum += own * a[head];
        dt[static_cast<i64>(t) * heads + head] = own;
        decay[static_cast<i64>(t) * heads + head] = sum;
    }
}

KERNEL(256, ssd_state, (const float* xbc, const float* dt, const float* decay, const int* chunks, int heads, int head_dim, int groups, int state_size, float* states)) {
    SHARED_ROWS(float, left, DEPTH, PITCH);
    SHARED_ROWS(float, right, DEPTH, PITCH);
    SHARED(float, share, CHUNK);
    const int head = blockIdx.x, chunk = blockIdx.y, begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin;
    const int inner = heads * head_dim, channels = inner + 2 * groups * state_size, b_offset = inner + head / (heads / groups) * state_size;
    const float* rows = xbc + static_cast<i64>(begin) * channels;
    if (threadIdx.x < length) {
        const i64 at = static_cast<i64>(begin + threadIdx.x) * heads + head, end = static_cast<i64>(begin + length - 1) * heads + head;
        share[threadIdx.x] = expf(decay[end] - decay[at]) * dt[at];
    }
    __syncthreads();
    float* own = states + (static_cast<i64>(chunk) * heads + head) * head_dim * state_size;
    for (int p0 = 0; p0 < head_dim; p0 += CHUNK)
        for (int n0 = 0; n0 < state_size; n0 += CHUNK) {
            float sums[4][4] = {};
            for (int t0 = 0; t0 < length; t0 += DEPTH) {
                for (int i = threadIdx.x; i < CHUNK * DEPTH; i += blockDim.x) {
                    const int k = i / CHUNK, line = i % CHUNK, t = t0 + k;
                    const float* row = rows + static_cast<i64>(t) * channels;
                    left[k][line] = t < length && p0 + line < head_dim ? row[head * head_dim + p0 + line] * share[t] : 0.0f;
                    right[k][line] = t < length && n0 + line < state_size ? row[b_offset + n0 + line] : 0.0f;
                }
                __syncthreads();
                accumulate(sums, left, right, DEPTH);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int p = p0 + tile_row(i), n = n0 + tile_col(j);
                    if (p < head_dim && n < state_size) own[static_cast<i64>(p) * state_size + n] = sums[i][j];
                }
        }
}

KERNEL(256, ssd_pass, (float* states, const float* decay, const int* chunks, const int* sequence_chunks, int heads, int head_dim, int state_size, float* cache)) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, size = head_dim * state_size;
    if (at >= size) return;
    const int* own = sequence_chunks + 4 * blockIdx.z;
    float state = own[2] < 0 ? 0.0f : cache[(static_cast<i64>(own[2]) * heads + head) * size + at];
    for (int chunk = own[0]; chunk < own[1]; ++chunk) {
        float* place = states + (static_cast<i64>(chunk) * heads + head) * size + at;
        const float contribution = *place;
        *place = state;
        state = fmaf(state, expf(decay[static_cast<i64>(chunks[2 * chunk + 1] - 1) * heads + head]), contribution);
    }
    if (own[3] >= 0) cache[(static_cast<i64>(own[3]) * heads + head) * size + at] = state;
}

KERNEL(256, ssd_output, (const float* xbc, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, float* y)) {
    SHARED_ROWS(float, left, DEPTH, PITCH);
    SHARED_ROWS(float, right, DEPTH, PITCH);
    SHARED_ROWS(float, weights, CHUNK, PITCH);  // [s][t]
    SHARED(float, sum_decay, CHUNK);
    SHARED(float, step, CHUNK);
    const int head = blockIdx.x, chunk = blockIdx.y, begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin;
    const int inner = heads * head_dim, channels = inner + 2 * groups * state_size, group = head / (heads / groups);
    const int b_offset = inner + group * state_size, c_offset = inner + (groups + group) * state_size;
    const float* rows = xbc + static_cast<i64>(begin) * channels;
    const float* state = states + (static_cast<i64>(chunk) * heads + head) * head_dim * state_size;
    if (threadIdx.x < CHUNK) {
        const i64 at = static_cast<i64>(begin + threadIdx.x) * heads + head;
        sum_decay[threadIdx.x] = threadIdx.x < length ? decay[at] : 0.0f;
        step[threadIdx.x] = threadIdx.x < length ? dt[at] : 0.0f;
    }
    const auto slice = [&](int offset, int n0) {
        return [=](int line, int k) { return line < length && n0 + k < state_size ? rows[static_cast<i64>(line) * channels + offset + n0 + k] : 0.0f; };
    };
    float sums[4][4] = {};
    for (int n0 = 0; n0 < state_size; n0 += DEPTH) {
        __syncthreads();
        fill(left, slice(c_offset, n0));
        fill(right, slice(b_offset, n0));
        __syncthreads();
        accumulate(sums, left, right, DEPTH);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int t = tile_row(i), s = tile_col(j);
            weights[s][t] = s <= t ? sums[i][j] * expf(sum_decay[t] - sum_decay[s]) * step[s] : 0.0f;
        }
    for (int p0 = 0; p0 < head_dim; p0 += CHUNK) {
        float out[4][4] = {};
        for (int n0 = 0; n0 < state_size; n0 += DEPTH) {
            __syncthreads();
            fill(left, slice(c_offset, n0));
            fill(right, [&](int line, int k) {
                return p0 + line < head_dim && n0 + k < state_size ? state[static_cast<i64>(p0 + line) * state_size + n0 + k] : 0.0f;
            });
            __syncthreads();
            accumulate(out, left, right, DEPTH);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] *= expf(sum_decay[tile_row(i)]);
        for (int s0 = 0; s0 < length; s0 += DEPTH) {
            __syncthreads();
            for (int i = threadIdx.x; i < CHUNK * DEPTH; i += blockDim.x) {
                const int k = i / CHUNK, line = i % CHUNK;
                right[k][line] = s0 + k < length && p0 + line < head_dim ? rows[static_cast<i64>(s0 + k) * channels + head * head_dim + p0 + line] : 0.0f;
            }
            __syncthreads();
            accumulate(out, weights + s0, right, DEPTH);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int t = tile_row(i), p = p0 + tile_col(j);
                if (t < length && p < head_dim)
                    y[static_cast<i64>(begin + t) * inner + head * head_dim + p] = out[i][j] + d[head] * rows[static_cast<i64>(t) * channels + head * head_dim + p];
            }
    }
}
