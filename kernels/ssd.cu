// The selective scan over whole sequences in chunks of at most 64 tokens (Dao and Gu, 2024, "SSD"). With D_t the cumulative
// dt·A within a chunk: the chunk's own contribution to the state is `Σ_t exp(D_end − D_t)·dt_t·x_t ⊗ B_t`; states are passed from
// chunk to chunk; and `y_t = exp(D_t)·S·C_t + Σ_{s≤t} (C_t·B_s)·exp(D_t − D_s)·dt_s·x_s + D·x_t`, S the state at the chunk's
// beginning. Products run on the tensor cores with halves (`halves.cuh`), C·B of codes in integers. What heads of a group share (B, C
// and C·B) is loaded and computed once for up to four of them.
#include "device.cuh"
#include "halves.cuh"

namespace {

constexpr int CHUNK = 64;
constexpr int SLAB = 128;   // states in shared memory at a time
constexpr int SHARING = 4;  // heads of a block
constexpr int AHEAD = 8;
constexpr int WIDE = 256;   // threads of `ssd_output`
constexpr int LINE = 128;   // bytes that memory hands out at once

// Heads of this block: as many as divide those of a group; the blocks of the others have nothing to do.
DEVICE int heads_of_block(int heads, int groups) {
    const int ratio = heads / groups, sharing = ratio % SHARING == 0 ? SHARING : 1;
    return blockIdx.x % sharing == 0 ? sharing : 0;
}

// x | B | C of some tokens, `channels` to a row: floats, or codes with a scale a token and span (a head, a group of B, one of C) or
// `fixed` ones a channel.
struct Floats {
    const float* rows;
    int channels;
    Floats from(int token) const { return {rows + static_cast<i64>(token) * channels, channels}; }
    float at(int t, int c, int) const { return rows[static_cast<i64>(t) * channels + c]; }
    const void* place(int t, int c) const { return rows + static_cast<i64>(t) * channels + c; }
};

struct Codes {
    const i8* rows;
    int channels;
    const float* scales;
    int spans;
    const float* fixed;
    Codes from(int token) const { return {rows + static_cast<i64>(token) * channels, channels, fixed ? nullptr : scales + static_cast<i64>(token) * spans, spans, fixed}; }
    const void* place(int t, int c) const { return rows + static_cast<i64>(t) * channels + c; }
    float scale(int t, int c, int span) const { return fixed ? fixed[c] : scales[t * spans + span]; }
    float at(int t, int c, int span) const { return __fmul_rn(static_cast<float>(rows[static_cast<i64>(t) * channels + c]), scale(t, c, span)); }
};

// Where B or C of a group begins, and its span.
struct Matrix {
    int offset, span;
};

DEVICE Matrix matrix(int heads, int head_dim, int state_size, int index) { return {heads * head_dim + index * state_size, heads + index}; }

// x of 64 channels of `head` from p0 on, [channel][token], each token times `weight(t)`; zeros behind `length` tokens.
template <int THREADS, class Source, class Weight> DEVICE void load_inputs(Halves<64, CHUNK>& to, const Source& rows, int head, int head_dim, int p0, int length, Weight weight) {
    transfer<64 * CHUNK / 2, THREADS>(
        [&](int i) -> Pair {
            const int p = p0 + i % 64, t = i / 64 * 2, c = head * head_dim + p;
            return {p < head_dim && t < length ? rows.at(t, c, head) : 0.0f, p < head_dim && t + 1 < length ? rows.at(t + 1, c, head) : 0.0f};
        },
        [&](int i, Pair x) {
            const int t = i / 64 * 2;
            put(to, i % 64, t, x.first * weight(t), x.second * weight(t + 1));
        });
}

DEVICE void decays(float raw, int t, int head, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, float& sum, float* dt, float* decay) {
    const float own = fminf(fmaxf(softplus(raw + dt_bias[head]), dt_min), dt_max);
    sum += own * a[head];
    dt[static_cast<i64>(t) * heads + head] = own;
    decay[static_cast<i64>(t) * heads + head] = sum;
}

}  // namespace

KERNEL(32, ssd_decay, (const float* projected, int stride, int dt_offset, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, const int* chunks, float* dt, float* decay)) {
    depend();
    const int head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= heads) return;
    const int end = chunks[2 * blockIdx.y + 1];
    float sum = 0.0f;
    for (int start = chunks[2 * blockIdx.y]; start < end; start += AHEAD) {
        float raw[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < end) raw[i] = projected[static_cast<i64>(start + i) * stride + dt_offset + head];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < end) decays(raw[i], start + i, head, a, dt_bias, dt_min, dt_max, heads, sum, dt, decay);
    }
}

// The same from codes: `scales` has a token's scale of dt every `scale_stride`, `fixed` one a head.
KERNEL(32, ssd_decay_i8, (const i8* projected, int stride, int dt_offset, const float* scales, int scale_stride, const float* fixed, const float* a, const float* dt_bias, float dt_min, float dt_max, int heads, const int* chunks, float* dt, float* decay)) {
    depend();
    const int head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= heads) return;
    const int end = chunks[2 * blockIdx.y + 1];
    float sum = 0.0f;
    for (int start = chunks[2 * blockIdx.y]; start < end; start += AHEAD) {
        float raw[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= end) break;
            const float scale = fixed ? fixed[head] : scales[static_cast<i64>(start + i) * scale_stride];
            raw[i] = __fmul_rn(static_cast<float>(projected[static_cast<i64>(start + i) * stride + dt_offset + head]), scale);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < end) decays(raw[i], start + i, head, a, dt_bias, dt_min, dt_max, heads, sum, dt, decay);
    }
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

// B or C of 128 states from n0 on, [token][state].
template <class Source> DEVICE void load_tokens(Halves<CHUNK, SLAB>& to, const Source& rows, Matrix from, int n0, int state_size, int length) {
    transfer<CHUNK * SLAB / 2, WIDE>(
        [&](int i) -> Pair {
            const int t = i / (SLAB / 2), n = n0 + i % (SLAB / 2) * 2, c = from.offset + n;
            return {t < length && n < state_size ? rows.at(t, c, from.span) : 0.0f, t < length && n + 1 < state_size ? rows.at(t, c + 1, from.span) : 0.0f};
        },
        [&](int i, Pair x) { put(to, i / (SLAB / 2), i % (SLAB / 2) * 2, x.first, x.second); });
}

// C_t · B_s for the 16 tokens t of a warp (modulo 4) and all s up to them, and C as it was last loaded in `c`; `right` is scratch.
DEVICE void multiply_tokens(float (&products)[CHUNK / 8][4], const Floats& rows, Matrix from_c, Matrix from_b, int state_size, int length, Halves<CHUNK, SLAB>& c, Halves<CHUNK, SLAB>& right) {
    const int warp = threadIdx.x / 32 % 4;
    for (int n0 = 0; n0 < state_size; n0 += SLAB) {
        __syncthreads();
        load_tokens(c, rows, from_c, n0, state_size, length);
        load_tokens(right, rows, from_b, n0, state_size, length);
        __syncthreads();
#pragma unroll 1
        for (int k = 0; k < minimum(SLAB, state_size - n0); k += 16) {
            u32 high[4], low[4];
            load_left<SLAB>(high, c.high, warp * 16, k);
            load_left<SLAB>(low, c.low, warp * 16, k);
#pragma unroll
            for (int n = 0; n < CHUNK / 16; ++n)
                if (n <= warp) accumulate(products + 2 * n, high, low, right, n * 16, k);
        }
    }
}

// The same from codes: sums in int32, each scaled by C's scale times B's.
DEVICE void multiply_tokens(float (&products)[CHUNK / 8][4], const Codes& rows, Matrix from_c, Matrix from_b, int state_size, int length, Halves<CHUNK, SLAB>& c, Halves<CHUNK, SLAB>& right) {
    constexpr int PITCH = SLAB + 16;  // bytes of a row, so that the eight rows that a warp reads lie in different banks
    static_assert(CHUNK * PITCH <= static_cast<int>(sizeof(Halves<CHUNK, SLAB>)), "codes fit where their halves go");
    i8 *const left_codes = reinterpret_cast<i8*>(&c), *const right_codes = reinterpret_cast<i8*>(&right);
    const int warp = threadIdx.x / 32 % 4, line = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    int sums[CHUNK / 8][4] = {};
    for (int n0 = 0; n0 < state_size; n0 += SLAB) {
        __syncthreads();
        // Words of four codes: states, heads and their channels come in fours.
#pragma unroll 4
        for (int i = threadIdx.x; i < CHUNK * SLAB / 4; i += blockDim.x) {
            const int t = i / (SLAB / 4), n = i % (SLAB / 4) * 4;
            const bool inside = t < length && n0 + n < state_size;
            const i8* own = rows.rows + static_cast<i64>(t) * rows.channels + n0 + n;
            *reinterpret_cast<u32*>(left_codes + t * PITCH + n) = inside ? *reinterpret_cast<const u32*>(own + from_c.offset) : 0;
            *reinterpret_cast<u32*>(right_codes + t * PITCH + n) = inside ? *reinterpret_cast<const u32*>(own + from_b.offset) : 0;
        }
        __syncthreads();
        const auto word = [&](const i8* codes, int row, int k) { return *reinterpret_cast<const u32*>(codes + row * PITCH + k + 4 * quad); };
        for (int k = 0; k < minimum(SLAB, state_size - n0); k += 32) {
            const int row = warp * 16 + line;
            const u32 a0 = word(left_codes, row, k), a1 = word(left_codes, row + 8, k), a2 = word(left_codes, row, k + 16), a3 = word(left_codes, row + 8, k + 16);
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
                if (n / 2 <= warp) mma_s8(sums[n], a0, a1, a2, a3, word(right_codes, n * 8 + line, k), word(right_codes, n * 8 + line, k + 16));
        }
    }
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int t = warp * 16 + line + i / 2 * 8, s = n * 8 + quad * 2 + i % 2;
            products[n][i] = t < length && s < length ? static_cast<float>(sums[n][i]) * (rows.scale(t, from_c.offset, from_c.span) * rows.scale(s, from_b.offset, from_b.span)) : 0.0f;
        }
    if (state_size > SLAB) return;
    __syncthreads();
    load_tokens(c, rows, from_c, 0, state_size, length);
}

// Warp w has 16 tokens, from 16 (w % 4) on, and 32 of the 64 channels that are computed at a time, from 32 (w / 4) on. `products` stay in
// registers for all heads of the block, the same in two warps; with a head's decays they are the left side of the product with x as
// they lie.
template <class Source> DEVICE void chunk_output(const Source& xbc, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, float* y, float* sum_decay, float* step) {
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
            if (static_cast<int>(threadIdx.x) < length) prefetch(rows.place(threadIdx.x, (head + 1) * head_dim));
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
                        if (p0 + column + n * 16 < head_dim) accumulate(sums + 2 * n, high, low, right, column + n * 16, k);
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
                    if (p0 + column + n * 16 < head_dim) accumulate(sums + 2 * n, high, low, inputs, column + n * 16, k * 16);
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
            each([&](float& sum, int t, int p) { sum += skip * rows.at(t, head * head_dim + p, head); });
            each([&](float& sum, int t, int p) { y[static_cast<i64>(begin + t) * inner + head * head_dim + p] = sum; });
        }
    }
}

}  // namespace

RESIDENT_KERNEL(256, 2, ssd_output, (const float* xbc, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, float* y)) {
    depend();
    SHARED(float, sum_decay, CHUNK);
    SHARED(float, step, CHUNK);
    chunk_output(Floats{xbc, heads * head_dim + 2 * groups * state_size}, dt, decay, states, d, chunks, heads, head_dim, groups, state_size, y, sum_decay, step);
}

RESIDENT_KERNEL(256, 2, ssd_output_i8, (const i8* xbc, const float* scales, const float* fixed, const float* dt, const float* decay, const float* states, const float* d, const int* chunks, int heads, int head_dim, int groups, int state_size, float* y)) {
    depend();
    SHARED(float, sum_decay, CHUNK);
    SHARED(float, step, CHUNK);
    chunk_output(Codes{xbc, heads * head_dim + 2 * groups * state_size, scales, heads + 2 * groups, fixed}, dt, decay, states, d, chunks, heads, head_dim, groups, state_size, y, sum_decay, step);
}
