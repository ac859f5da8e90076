// What the kernels of the scan share: where x | B | C come from, and products of C and B.
#pragma once
#include "halves.cuh"

namespace {

constexpr int CHUNK = 64;
constexpr int SLAB = 128;   // states in shared memory at a time
constexpr int WIDE = 256;   // threads of the kernels that load tokens

// x | B | C of some tokens, `channels` to a row: floats, or codes with a scale a token and span (a head, a group of B, one of C) or
// `fixed` ones a channel.
struct Floats {
    const float* rows;
    int channels;
    Floats from(int token) const { return {rows + static_cast<i64>(token) * channels, channels}; }
    float at(int t, int c, int) const { return rows[static_cast<i64>(t) * channels + c]; }
    // Channels c and c + 1, of an even c where rows have an even number.
    float2 pair(int t, int c, int) const { return *reinterpret_cast<const float2*>(rows + static_cast<i64>(t) * channels + c); }
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
    float2 pair(int t, int c, int span) const { return make_float2(at(t, c, span), at(t, c + 1, span)); }
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
                if (n <= warp) accumulate<1>(products + 2 * n, high, low, right, n * 16, k);
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

}  // namespace
