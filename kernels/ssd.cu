// The selective scan over whole sequences in chunks of at most 64 tokens (Dao and Gu, 2024, "SSD"). With D_t the cumulative
// dt·A within a chunk: the chunk's own contribution to the state is `Σ_t exp(D_end − D_t)·dt_t·x_t ⊗ B_t`; states are passed from
// chunk to chunk; and `y_t = exp(D_t)·S·C_t + Σ_{s≤t} (C_t·B_s)·exp(D_t − D_s)·dt_s·x_s + D·x_t`, S the state at the chunk's
// beginning. Products run on the tensor cores with halves (`halves.cuh`), C·B of codes in integers. What heads of a group share (B, C
// and C·B) is loaded and computed once for up to four of them. What is stored is y times its gate.
#include "gate.cuh"
#include "ssd.cuh"

namespace {

constexpr int SHARING = 4;  // heads of a block
constexpr int AHEAD = 8;
constexpr int DECAY_WARPS = 4;
constexpr int LINE = 128;   // bytes that memory hands out at once

// Heads of this block: as many as divide those of a group; the blocks of the others have nothing to do.
DEVICE int heads_of_block(int heads, int groups) {
    const int ratio = heads / groups, sharing = ratio % SHARING == 0 ? SHARING : 1;
    return blockIdx.x % sharing == 0 ? sharing : 0;
}

// dt and the cumulative dt·A of a chunk's tokens for 32 heads, `raw(t, head)` being what the projection says of dt. A warp has all heads of
// a token; the sums, which go on from token to token, are one warp's.
template <class F> DEVICE void decays(float (*terms)[32], F raw, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, const int* chunks, float* dt, float* decay) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x * 32 + lane, begin = chunks[2 * blockIdx.y], length = chunks[2 * blockIdx.y + 1] - begin;
    const bool present = head < heads;
    const float own_a = present ? a[head] : 0.0f, bias = present ? dt_bias[head] : 0.0f;
    for (int start = warp; start < length; start += DECAY_WARPS * AHEAD) {
        float held[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) held[i] = present && start + i * DECAY_WARPS < length ? raw(begin + start + i * DECAY_WARPS, head) : 0.0f;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int t = start + i * DECAY_WARPS;
            if (!present || t >= length) continue;
            const float own = fminf(fmaxf(softplus(held[i] + bias), dt_min), dt_max);
            dt[static_cast<i64>(begin + t) * heads + head] = own;
            terms[t][lane] = own * own_a;
        }
    }
    __syncthreads();
    if (warp == 0 && present) {
        float sum = 0.0f;
        for (int start = 0; start < length; start += AHEAD) {
            float held[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) held[i] = start + i < length ? terms[start + i][lane] : 0.0f;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                sum += held[i];
                if (start + i < length) terms[start + i][lane] = sum;
            }
        }
    }
    __syncthreads();
    if (!present) return;
    for (int t = warp; t < length; t += DECAY_WARPS) decay[static_cast<i64>(begin + t) * heads + head] = terms[t][lane];
}

}  // namespace

KERNEL(128, ssd_decay, (const float* projected, int stride, int dt_offset, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, const int* chunks, float* dt, float* decay)) {
    depend();
    SHARED_ROWS(float, terms, CHUNK, 32);
    decays(terms, [&](int t, int head) { return projected[static_cast<i64>(t) * stride + dt_offset + head]; }, a, dt_bias, dt_min, dt_max, heads, chunks, dt, decay);
}

// The same from codes: `scales` has a token's scale of dt every `scale_stride`, `fixed` one a head.
KERNEL(128, ssd_decay_i8, (const i8* projected, int stride, int dt_offset, const float* scales, int scale_stride, const float* fixed, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, const int* chunks, float* dt, float* decay)) {
    depend();
    SHARED_ROWS(float, terms, CHUNK, 32);
    const auto raw = [&](int t, int head) {
        const float scale = fixed ? fixed[head] : scales[static_cast<i64>(t) * scale_stride];
        return __fmul_rn(static_cast<float>(projected[static_cast<i64>(t) * stride + dt_offset + head]), scale);
    };
    decays(terms, raw, a, dt_bias, dt_min, dt_max, heads, chunks, dt, decay);
}

namespace {

// states[chunk, head] = Σ_t exp(D_end − D_t)·dt_t·x_t ⊗ B_t: warp w has the channels from 16 w on, of 64 at a time.
template <class Source> DEVICE void chunk_states(const Source& xbc, const float* dt, const float* decay, const int* chunks, int heads, int head_dim, int groups, int state_size, float* states) {
    DYNAMIC_SHARED(u8, shared);
    auto& inputs = *reinterpret_cast<Halves<64, CHUNK>*>(shared);                       // [channel][token]
    auto& b = *reinterpret_cast<Halves<SLAB, CHUNK>*>(shared + sizeof(Halves<64, CHUNK>));  // [state][token]
    float* const share = reinterpret_cast<float*>(shared + sizeof(Halves<64, CHUNK>) + sizeof(Halves<SLAB, CHUNK>));
    const int count = heads_of_block(heads, groups);
    if (count == 0) return;
    const int chunk = blockIdx.y, begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix from = matrix(heads, head_dim, state_size, blockIdx.x / (heads / groups));
    const Source rows = xbc.from(begin);
    for (int n0 = 0; n0 < state_size; n0 += SLAB) {
        const int slab = minimum(SLAB, state_size - n0);
        __syncthreads();
        transfer<SLAB * CHUNK / 2>(
            [&](int i) -> Pair {
                const int n = i % SLAB, t = i / SLAB * 2;
                const int c = from.offset + n0 + n;
                return {n < slab && t < length ? rows.at(t, c, from.span) : 0.0f, n < slab && t + 1 < length ? rows.at(t + 1, c, from.span) : 0.0f};
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
                load_inputs<128>(inputs, rows, head, head_dim, p0, length, [&](int t) { return share[t]; });
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
                    for (int k = 0; k < CHUNK / 16; ++k) accumulate<1>(sums, high[k], low[k], b, n, k * 16);
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

}  // namespace

KERNEL(128, ssd_state, (const float* xbc, const float* dt, const float* decay, const int* chunks, int heads, int head_dim, int groups, int state_size, float* states)) {
    depend();
    chunk_states(Floats{xbc, heads * head_dim + 2 * groups * state_size}, dt, decay, chunks, heads, head_dim, groups, state_size, states);
}

KERNEL(128, ssd_state_i8, (const i8* xbc, const float* scales, const float* fixed, const float* dt, const float* decay, const int* chunks, int heads, int head_dim, int groups, int state_size, float* states)) {
    depend();
    chunk_states(Codes{xbc, heads * head_dim + 2 * groups * state_size, scales, heads + 2 * groups, fixed}, dt, decay, chunks, heads, head_dim, groups, state_size, states);
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

namespace {

// Warp w has 16 tokens, from 16 (w % 4) on, and 32 of the 64 channels that are computed at a time, from 32 (w / 4) on. `products` stay in
// registers for all heads of the block, the same in two warps; with a head's decays they are the left side of the product with x as
// they lie.
template <class Source> DEVICE void chunk_output(const Source& xbc, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, const Gate& gate, float* y, float* sum_decay, float* step) {
    DYNAMIC_SHARED(u8, shared);
    auto& c = *reinterpret_cast<Halves<CHUNK, SLAB>*>(shared);                             // [token][state]
    auto& right = *reinterpret_cast<Halves<CHUNK, SLAB>*>(shared + sizeof(Halves<CHUNK, SLAB>));  // B [token][state], then S [channel][state]
    auto& inputs = *reinterpret_cast<Halves<64, CHUNK>*>(shared + 2 * sizeof(Halves<CHUNK, SLAB>));  // [channel][token]
    const int count = heads_of_block(heads, groups);
    if (count == 0) return;
    const int chunk = blockIdx.y, begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int column = threadIdx.x / 128 * 32;  // this warp's first of 64 channels
    const int inner = heads * head_dim, group = blockIdx.x / (heads / groups);
    const Matrix from_b = matrix(heads, head_dim, state_size, group), from_c = matrix(heads, head_dim, state_size, groups + group);
    const Source rows = xbc.from(begin);
    float products[CHUNK / 8][4] = {};
    multiply_tokens(products, rows, from_c, from_b, state_size, length, c, right);
    for (int head = blockIdx.x; head < static_cast<int>(blockIdx.x) + count; ++head) {
        const float* state = states + (static_cast<i64>(chunk) * heads + head) * head_dim * state_size;
        __syncthreads();
        if (threadIdx.x < CHUNK) {
            const i64 at = static_cast<i64>(begin + threadIdx.x) * heads + head;
            sum_decay[threadIdx.x] = static_cast<int>(threadIdx.x) < length ? decay[at] : 0.0f;
            step[threadIdx.x] = static_cast<int>(threadIdx.x) < length ? dt[at] : 0.0f;
        }
        // What the next head reads comes to the cache while this one is computed.
        if (head + 1 < static_cast<int>(blockIdx.x) + count) {
            for (int i = threadIdx.x; i * LINE < head_dim * state_size * 4; i += WIDE) prefetch(state + head_dim * state_size + i * (LINE / 4));
            if (static_cast<int>(threadIdx.x) < length) {
                prefetch(rows.place(threadIdx.x, (head + 1) * head_dim));
                gate.ask(begin + threadIdx.x, (head + 1) * head_dim);
            }
        }
        __syncthreads();
        const int first = warp * 16 + lane / 4;  // this lane's tokens: first and first + 8
        for (int p0 = 0; p0 < head_dim; p0 += 64) {
            float sums[4][4] = {};
            for (int n0 = 0; n0 < state_size; n0 += SLAB) {
                __syncthreads();
                if (state_size > SLAB) load_tokens(c, rows, from_c, n0, state_size, length);
                transfer<CHUNK * SLAB / 2, WIDE>(
                    [&](int i) -> Pair {
                        const int p = p0 + i / (SLAB / 2), n = n0 + i % (SLAB / 2) * 2;
                        const float* at = state + static_cast<i64>(p) * state_size + n;
                        return {p < head_dim && n < state_size ? at[0] : 0.0f, p < head_dim && n + 1 < state_size ? at[1] : 0.0f};
                    },
                    [&](int i, Pair x) { put(right, i / (SLAB / 2), i % (SLAB / 2) * 2, x.first, x.second); });
                if (n0 == 0) load_inputs<WIDE>(inputs, rows, head, head_dim, p0, length, [](int) { return 1.0f; });
                __syncthreads();
#pragma unroll 1
                for (int k = 0; k < minimum(SLAB, state_size - n0); k += 16) {
                    u32 high[4], low[4];
                    load_left<SLAB>(high, c.high, warp * 16, k);
                    load_left<SLAB>(low, c.low, warp * 16, k);
#pragma unroll
                    for (int n = 0; n < 2; ++n)
                        if (p0 + column + n * 16 < head_dim) accumulate<1>(sums + 2 * n, high, low, right, column + n * 16, k);
                }
            }
            const float upper = expf(sum_decay[first]), lower = expf(sum_decay[first + 8]);
#pragma unroll
            for (int n = 0; n < 4; ++n) sums[n][0] *= upper, sums[n][1] *= upper, sums[n][2] *= lower, sums[n][3] *= lower;
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
                for (int n = 0; n < 2; ++n)
                    if (p0 + column + n * 16 < head_dim) accumulate<1>(sums + 2 * n, high, low, inputs, column + n * 16, k * 16);
            }
            // All loads ahead of the stores: the compiler does not know that they lie elsewhere.
            const float skip = d[head];
            const auto each = [&](auto use) {
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int t = first + i / 2 * 8, p = p0 + column + n * 8 + lane % 4 * 2 + i % 2;
                        if (t < length && p < head_dim) use(sums[n][i], t, p);
                    }
            };
            each([&](float& sum, int t, int p) {
                const int c = head * head_dim + p;
                sum = (sum + skip * rows.at(t, c, head)) * gate.at(begin + t, c);
            });
            each([&](float& sum, int t, int p) { y[static_cast<i64>(begin + t) * inner + head * head_dim + p] = sum; });
        }
    }
}

}  // namespace

RESIDENT_KERNEL(256, 2, ssd_output, (const float* xbc, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, GATE_PARAMETERS, float* y)) {
    depend();
    SHARED(float, sum_decay, CHUNK);
    SHARED(float, step, CHUNK);
    chunk_output(Floats{xbc, heads * head_dim + 2 * groups * state_size}, dt, decay, states, d, chunks, heads, head_dim, groups, state_size, {GATE_ARGUMENTS}, y, sum_decay, step);
}

RESIDENT_KERNEL(256, 2, ssd_output_i8, (const i8* xbc, const float* scales, const float* fixed, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, GATE_PARAMETERS, float* y)) {
    depend();
    SHARED(float, sum_decay, CHUNK);
    SHARED(float, step, CHUNK);
    chunk_output(Codes{xbc, heads * head_dim + 2 * groups * state_size, scales, heads + 2 * groups, fixed}, dt, decay, states, d, chunks, heads, head_dim, groups, state_size, {GATE_ARGUMENTS}, y, sum_decay, step);
}
