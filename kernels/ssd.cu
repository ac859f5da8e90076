// The selective scan over whole sequences in chunks of at most 64 tokens (Dao and Gu, 2024, "SSD"). With D_t the cumulative
// dt·A within a chunk: the chunk's own contribution to the state is `Σ_t exp(D_end − D_t)·dt_t·x_t ⊗ B_t`; states are passed from
// chunk to chunk; and `y_t = exp(D_t)·S·C_t + Σ_{s≤t} (C_t·B_s)·exp(D_t − D_s)·dt_s·x_s + D·x_t`, S the state at the chunk's
// beginning. Products run on the tensor cores with halves (`halves.cuh`). What heads of a group share (B, C and C·B) is loaded and computed once for up to four of them.
#include "device.cuh"
#include "halves.cuh"

namespace {

constexpr int CHUNK = 64;
constexpr int SLAB = 128;   // states in shared memory at a time
constexpr int SHARING = 4;  // heads of a block
constexpr int AHEAD = 8;

// Heads of this block: as many as divide those of a group; the blocks of the others have nothing to do.
DEVICE int heads_of_block(int heads, int groups) {
    const int ratio = heads / groups, sharing = ratio % SHARING == 0 ? SHARING : 1;
    return blockIdx.x % sharing == 0 ? sharing : 0;
}

}  // namespace

KERNEL(32, ssd_decay, (const float* projected, int stride, int dt_offset, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, const int* chunks, float* dt, float* decay)) {
    depend();
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

// states[chunk, head] = Σ_t exp(D_end − D_t)·dt_t·x_t ⊗ B_t: warp w has the channels from 16 w on, of 64 at a time.
KERNEL(128, ssd_state, (const float* xbc, const float* dt, const float* decay, const int* chunks, int heads, int head_dim, int groups, int state_size, float* states)) {
    depend();
    DYNAMIC_SHARED(u8, shared);
    auto& inputs = *reinterpret_cast<Halves<64, CHUNK>*>(shared);                       // [channel][token]
    auto& b = *reinterpret_cast<Halves<SLAB, CHUNK>*>(shared + sizeof(Halves<64, CHUNK>));  // [state][token]
    float* const share = reinterpret_cast<float*>(shared + sizeof(Halves<64, CHUNK>) + sizeof(Halves<SLAB, CHUNK>));
    const int count = heads_of_block(heads, groups);
    if (count == 0) return;
    const int chunk = blockIdx.y, begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int inner = heads * head_dim, channels = inner + 2 * groups * state_size, b_offset = inner + blockIdx.x / (heads / groups) * state_size;
    const float* rows = xbc + static_cast<i64>(begin) * channels;
    // x of channel p0 + i % 64 and tokens 2·(i / 64) and the next.
    const auto input_of = [&](int head, int p0) {
        return [=](int i) -> Pair {
            const int p = p0 + i % 64, t = i / 64 * 2;
            const float* at = rows + static_cast<i64>(t) * channels + head * head_dim + p;
            return {p < head_dim && t < length ? at[0] : 0.0f, p < head_dim && t + 1 < length ? at[channels] : 0.0f};
        };
    };
    for (int n0 = 0; n0 < state_size; n0 += SLAB) {
        const int slab = minimum(SLAB, state_size - n0);
        __syncthreads();
        transfer<SLAB * CHUNK / 2>(
            [&](int i) -> Pair {
                const int n = i % SLAB, t = i / SLAB * 2;
                const float* at = rows + static_cast<i64>(t) * channels + b_offset + n0 + n;
                return {n < slab && t < length ? at[0] : 0.0f, n < slab && t + 1 < length ? at[channels] : 0.0f};
            },
            [&](int i, Pair x) { put(b, i % SLAB, i / SLAB * 2, x.first, x.second); });
        for (int head = blockIdx.x; head < static_cast<int>(blockIdx.x) + count; ++head) {
            __syncthreads();
            if (threadIdx.x < CHUNK) {
                const i64 end = static_cast<i64>(begin + length - 1) * heads + head, at = static_cast<i64>(begin + threadIdx.x) * heads + head;
                share[threadIdx.x] = static_cast<int>(threadIdx.x) < length ? expf(decay[end] - decay[at]) * dt[at] : 0.0f;
            }
            float* own = states + (static_cast<i64>(chunk) * heads + head) * head_dim * state_size;
            for (int p0 = 0; p0 < head_dim; p0 += 64) {
                __syncthreads();
                transfer<64 * CHUNK / 2>(input_of(head, p0), [&](int i, Pair x) {
                    const int t = i / 64 * 2;
                    put(inputs, i % 64, t, x.first * share[t], x.second * share[t + 1]);
                });
                __syncthreads();
                u32 high[CHUNK / 16][4], low[CHUNK / 16][4];
#pragma unroll
                for (int k = 0; k < CHUNK / 16; ++k) {
                    load_left<CHUNK>(high[k], inputs.high, warp * 16, k * 16);
                    load_left<CHUNK>(low[k], inputs.low, warp * 16, k * 16);
                }
                for (int n = 0; n < slab; n += 16) {
                    float sums[2][4] = {};
#pragma unroll
                    for (int k = 0; k < CHUNK / 16; ++k) accumulate(sums, high[k], low[k], b, n, k * 16);
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int p = p0 + warp * 16 + lane / 4 + i / 2 * 8, col = n + j * 8 + lane % 4 * 2 + i % 2;
                            if (p < head_dim && col < slab) own[static_cast<i64>(p) * state_size + n0 + col] = sums[j][i];
                        }
                }
            }
        }
    }
}

KERNEL(256, ssd_pass, (float* states, const float* decay, const int* chunks, const int* sequence_chunks, int heads, int head_dim, int state_size, float* cache)) {
    depend();
    const int at = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, size = head_dim * state_size;
    if (at >= size) return;
    const int* own = sequence_chunks + 4 * blockIdx.z;
    float state = own[2] < 0 ? 0.0f : cache[(static_cast<i64>(own[2]) * heads + head) * size + at];
    // A few chunks are read before the first is replaced: the state waits for them only once.
    for (int start = own[0]; start < own[1]; start += AHEAD) {
        float contribution[AHEAD], factor[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= own[1]) break;
            contribution[i] = states[(static_cast<i64>(start + i) * heads + head) * size + at];
            factor[i] = expf(decay[static_cast<i64>(chunks[2 * (start + i) + 1] - 1) * heads + head]);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= own[1]) break;
            states[(static_cast<i64>(start + i) * heads + head) * size + at] = state;
            state = fmaf(state, factor[i], contribution[i]);
        }
    }
    if (own[3] >= 0) cache[(static_cast<i64>(own[3]) * heads + head) * size + at] = state;
}

// Warp w has the tokens from 16 w on. `products` stay in registers for all heads of the block; with a head's decays they are the
// left side of the product with x as they lie.
KERNEL(128, ssd_output, (const float* xbc, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, float* y)) {
    depend();
    DYNAMIC_SHARED(u8, shared);
    auto& c = *reinterpret_cast<Halves<CHUNK, SLAB>*>(shared);                             // [token][state]
    auto& right = *reinterpret_cast<Halves<CHUNK, SLAB>*>(shared + sizeof(Halves<CHUNK, SLAB>));  // B [token][state], then S [channel][state]
    auto& inputs = *reinterpret_cast<Halves<64, CHUNK>*>(shared + 2 * sizeof(Halves<CHUNK, SLAB>));  // [channel][token]
    SHARED(float, sum_decay, CHUNK);
    SHARED(float, step, CHUNK);
    const int count = heads_of_block(heads, groups);
    if (count == 0) return;
    const int chunk = blockIdx.y, begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int inner = heads * head_dim, channels = inner + 2 * groups * state_size, group = blockIdx.x / (heads / groups);
    const int b_offset = inner + group * state_size, c_offset = inner + (groups + group) * state_size;
    const float* rows = xbc + static_cast<i64>(begin) * channels;
    // x of channel p0 + i % 64 and tokens 2·(i / 64) and the next.
    const auto input_of = [&](int head, int p0) {
        return [=](int i) -> Pair {
            const int p = p0 + i % 64, t = i / 64 * 2;
            const float* at = rows + static_cast<i64>(t) * channels + head * head_dim + p;
            return {p < head_dim && t < length ? at[0] : 0.0f, p < head_dim && t + 1 < length ? at[channels] : 0.0f};
        };
    };
    const auto fill_tokens = [&](Halves<CHUNK, SLAB>& to, int offset, int n0) {
        transfer<CHUNK * SLAB / 2>(
            [&](int i) -> Pair {
                const int t = i / (SLAB / 2), n = n0 + i % (SLAB / 2) * 2;
                const float* at = rows + static_cast<i64>(t) * channels + offset + n;
                return {t < length && n < state_size ? at[0] : 0.0f, t < length && n + 1 < state_size ? at[1] : 0.0f};
            },
            [&](int i, Pair x) { put(to, i / (SLAB / 2), i % (SLAB / 2) * 2, x.first, x.second); });
    };
    float products[CHUNK / 8][4] = {};
    for (int n0 = 0; n0 < state_size; n0 += SLAB) {
        __syncthreads();
        fill_tokens(c, c_offset, n0);
        fill_tokens(right, b_offset, n0);
        __syncthreads();
        for (int k = 0; k < minimum(SLAB, state_size - n0); k += 16) {
            u32 high[4], low[4];
            load_left<SLAB>(high, c.high, warp * 16, k);
            load_left<SLAB>(low, c.low, warp * 16, k);
#pragma unroll
            for (int n = 0; n < CHUNK / 16; ++n)
                if (n <= warp) accumulate(products + 2 * n, high, low, right, n * 16, k);
        }
    }
    for (int head = blockIdx.x; head < static_cast<int>(blockIdx.x) + count; ++head) {
        const float* state = states + (static_cast<i64>(chunk) * heads + head) * head_dim * state_size;
        __syncthreads();
        if (threadIdx.x < CHUNK) {
            const i64 at = static_cast<i64>(begin + threadIdx.x) * heads + head;
            sum_decay[threadIdx.x] = static_cast<int>(threadIdx.x) < length ? decay[at] : 0.0f;
            step[threadIdx.x] = static_cast<int>(threadIdx.x) < length ? dt[at] : 0.0f;
        }
        __syncthreads();
        const int first = warp * 16 + lane / 4;  // this lane's tokens: first and first + 8
        for (int p0 = 0; p0 < head_dim; p0 += 64) {
            float sums[8][4] = {};
            for (int n0 = 0; n0 < state_size; n0 += SLAB) {
                __syncthreads();
                if (state_size > SLAB) fill_tokens(c, c_offset, n0);
                transfer<CHUNK * SLAB / 2>(
                    [&](int i) -> Pair {
                        const int p = p0 + i / (SLAB / 2), n = n0 + i % (SLAB / 2) * 2;
                        const float* at = state + static_cast<i64>(p) * state_size + n;
                        return {p < head_dim && n < state_size ? at[0] : 0.0f, p < head_dim && n + 1 < state_size ? at[1] : 0.0f};
                    },
                    [&](int i, Pair x) { put(right, i / (SLAB / 2), i % (SLAB / 2) * 2, x.first, x.second); });
                if (n0 == 0) transfer<64 * CHUNK / 2>(input_of(head, p0), [&](int i, Pair x) { put(inputs, i % 64, i / 64 * 2, x.first, x.second); });
                __syncthreads();
                for (int k = 0; k < minimum(SLAB, state_size - n0); k += 16) {
                    u32 high[4], low[4];
                    load_left<SLAB>(high, c.high, warp * 16, k);
                    load_left<SLAB>(low, c.low, warp * 16, k);
#pragma unroll
                    for (int n = 0; n < 4; ++n)
                        if (p0 + n * 16 < head_dim) accumulate(sums + 2 * n, high, low, right, n * 16, k);
                }
            }
            const float upper = expf(sum_decay[first]), lower = expf(sum_decay[first + 8]);
#pragma unroll
            for (int n = 0; n < 8; ++n) sums[n][0] *= upper, sums[n][1] *= upper, sums[n][2] *= lower, sums[n][3] *= lower;
#pragma unroll
            for (int k = 0; k < CHUNK / 16; ++k) {
                if (k > warp) break;
                // The left side's words are, in this order: (first, s), (first + 8, s), (first, s + 8), (first + 8, s + 8).
                u32 high[4], low[4];
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    const int t = first + word % 2 * 8, s = k * 16 + word / 2 * 8 + lane % 4 * 2;
                    const float* from = products[2 * k + word / 2] + word % 2 * 2;
                    const float one = s <= t ? from[0] * expf(sum_decay[t] - sum_decay[s]) * step[s] : 0.0f;
                    const float two = s + 1 <= t ? from[1] * expf(sum_decay[t] - sum_decay[s + 1]) * step[s + 1] : 0.0f;
                    halve(one, two, high[word], low[word]);
                }
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    if (p0 + n * 16 < head_dim) accumulate(sums + 2 * n, high, low, inputs, n * 16, k * 16);
            }
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int t = first + i / 2 * 8, p = p0 + n * 8 + lane % 4 * 2 + i % 2;
                    if (t < length && p < head_dim)
                        y[static_cast<i64>(begin + t) * inner + head * head_dim + p] = sums[n][i] + d[head] * rows[static_cast<i64>(t) * channels + head * head_dim + p];
                }
        }
    }
}
