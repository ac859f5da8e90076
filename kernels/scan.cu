// The selective scan over whole sequences where shared memory holds what a chunk needs twice (227 KiB: data-centre GPUs from sm_90 on),
// for up to 128 states, an even number of channels a head and in each row: `ssd_share` computes for every chunk what the heads of a
// group have in common, `ssd_scan` goes through a sequence's chunks with the state of 64 channels in registers. No state comes to
// memory between chunks, and what is common is computed once in place of once for every four heads. Others use `ssd.cu`, which has the
// equations.
#include "gate.cuh"
#include "ssd.cuh"

#ifdef BULK_COPIES

namespace {

constexpr int CHANNELS = 64;  // of a block

// What the heads of a group share of a chunk, as `ssd_scan` reads it.
struct Shared {
    Halves<CHUNK, SLAB> c;                  // [token][state]
    Halves<SLAB, CHUNK> b;                  // [state][token]
    float4 products[4][CHUNK / 8][32];      // C_t · B_s as the lanes of four warps hold them
};

template <class Source> DEVICE void share(const Source& xbc, const int* chunks, int heads, int head_dim, int groups, int state_size, Shared* shared_chunks) {
    DYNAMIC_SHARED(u8, shared);
    Shared& own = *reinterpret_cast<Shared*>(shared);
    auto& right = *reinterpret_cast<Halves<CHUNK, SLAB>*>(shared + sizeof(Shared));  // B [token][state]
    const int group = blockIdx.x, chunk = blockIdx.y, begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Matrix from_b = matrix(heads, head_dim, state_size, group), from_c = matrix(heads, head_dim, state_size, groups + group);
    const Source rows = xbc.from(begin);
    float products[CHUNK / 8][4] = {};
    multiply_tokens(products, rows, from_c, from_b, state_size, length, own.c, right);
    // Two warps have the same: each leaves a half.
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
        if (n / 4 == warp / 4) own.products[warp % 4][n][lane] = make_float4(products[n][0], products[n][1], products[n][2], products[n][3]);
    transfer<SLAB * CHUNK / 2, WIDE>(
        [&](int i) -> Pair {
            const int n = i % SLAB, t = i / SLAB * 2, c = from_b.offset + n;
            return {n < state_size && t < length ? rows.at(t, c, from_b.span) : 0.0f, n < state_size && t + 1 < length ? rows.at(t + 1, c, from_b.span) : 0.0f};
        },
        [&](int i, Pair x) { put(own.b, i % SLAB, i / SLAB * 2, x.first, x.second); });
    __syncthreads();
    uint4* const to = reinterpret_cast<uint4*>(shared_chunks + static_cast<i64>(chunk) * groups + group);
#pragma unroll 4
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Shared) / 16); i += WIDE) to[i] = reinterpret_cast<const uint4*>(shared)[i];
}

// Warps as in `chunk_output` of `ssd.cu` for y: 16 tokens by 32 channels; for the state 16 channels, from 16 (w % 4) on, by 64 states, from
// 64 (w / 4) on.
template <class Source> DEVICE void scan(const Source& xbc, const float* dt, const float* decay, const Shared* shared_chunks, const float* d, const int* chunks, const int* sequence_chunks, int heads, int head_dim, int groups, int state_size, float* cache, const Gate& gate, float* y) {
    DYNAMIC_SHARED(u8, shared);
    Shared* const ring = reinterpret_cast<Shared*>(shared);  // this chunk's and the next one's
    auto& state = *reinterpret_cast<Halves<CHANNELS, SLAB>*>(ring + 2);     // [channel][state]
    auto& inputs = *reinterpret_cast<Halves<CHANNELS, CHUNK>*>(&state + 1);  // x [channel][token]
    auto& weighted = *(&inputs + 1);                                         // and each token by its share in the state
    float* const sum_decay = reinterpret_cast<float*>(&inputs + 2);
    float* const step = sum_decay + CHUNK;
    float* const share = step + CHUNK;
    u64* const full = reinterpret_cast<u64*>(share + CHUNK);
    const int slabs = divide_up(head_dim, CHANNELS), head = blockIdx.x / slabs, p0 = blockIdx.x % slabs * CHANNELS, group = head / (heads / groups);
    const int warp = threadIdx.x / 32 % 4, half = threadIdx.x / 128, lane = threadIdx.x % 32, inner = heads * head_dim;
    const int first_chunk = sequence_chunks[4 * blockIdx.y], end_chunk = sequence_chunks[4 * blockIdx.y + 1];
    const int from_slot = sequence_chunks[4 * blockIdx.y + 2], to_slot = sequence_chunks[4 * blockIdx.y + 3];
    if (threadIdx.x == 0) {
        barrier_start(full, 1);
        barrier_start(full + 1, 1);
        barriers_ready();
    }
    __syncthreads();
    const auto ask = [&](int chunk) {
        if (threadIdx.x != 0 || chunk >= end_chunk) return;
        const int slot = (chunk - first_chunk) % 2;
        barrier_expect(full + slot, sizeof(Shared));
        copy_bulk(ring + slot, shared_chunks + static_cast<i64>(chunk) * groups + group, sizeof(Shared), full + slot);
    };
    // What is read of a chunk ahead of its turn: x in pairs of tokens, and of its first threads' token the decay, dt and the decay at the end.
    constexpr int PAIRS = CHANNELS * CHUNK / 2 / WIDE;
    Pair held[PAIRS];
    float own_decay = 0.0f, own_step = 0.0f, end_decay = 0.0f;
    const auto fetch = [&](int chunk) {
        if (chunk >= end_chunk) return;
        const int begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin;
        const Source rows = xbc.from(begin);
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int at = threadIdx.x + i * WIDE, p = p0 + at % CHANNELS, t = at / CHANNELS * 2, c = head * head_dim + p;
            held[i] = {p < head_dim && t < length ? rows.at(t, c, head) : 0.0f, p < head_dim && t + 1 < length ? rows.at(t + 1, c, head) : 0.0f};
        }
        if (threadIdx.x >= CHUNK) return;
        const bool inside = static_cast<int>(threadIdx.x) < length;
        const i64 at = static_cast<i64>(begin + threadIdx.x) * heads + head;
        own_decay = inside ? decay[at] : 0.0f;
        own_step = inside ? dt[at] : 0.0f;
        end_decay = decay[static_cast<i64>(begin + length - 1) * heads + head];
    };
    // The state: channels p and p + 8, states n + 8 j and the next.
    const int p = warp * 16 + lane / 4, n = half * 64 + lane % 4 * 2;
    float sums[8][4];
    const auto each_state = [&](float* from, auto use) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = p0 + p + i / 2 * 8, col = n + j * 8 + i % 2;
                if (row < head_dim && col < state_size) use(sums[j][i], from[static_cast<i64>(row) * state_size + col]);
                else sums[j][i] = 0.0f;
            }
    };
    const auto slot = [&](int index) { return cache + (static_cast<i64>(index) * heads + head) * head_dim * state_size; };
    ask(first_chunk);
    fetch(first_chunk);
    if (from_slot >= 0) each_state(slot(from_slot), [](float& sum, float& kept) { sum = kept; });
    else
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
    const float skip = d[head];
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
        const int begin = chunks[2 * chunk], length = chunks[2 * chunk + 1] - begin, index = chunk - first_chunk;
        if (threadIdx.x < CHUNK) {
            sum_decay[threadIdx.x] = own_decay;
            step[threadIdx.x] = own_step;
            share[threadIdx.x] = expf(end_decay - own_decay) * own_step;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) {
            const int at = threadIdx.x + i * WIDE, row = at % CHANNELS, t = at / CHANNELS * 2;
            put(inputs, row, t, held[i].first, held[i].second);
            put(weighted, row, t, held[i].first * share[t], held[i].second * share[t + 1]);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            put(state, p, n + j * 8, sums[j][0], sums[j][1]);
            put(state, p + 8, n + j * 8, sums[j][2], sums[j][3]);
        }
        ask(chunk + 1);
        fetch(chunk + 1);
        const int first = warp * 16 + lane / 4, column = half * 32;  // this lane's tokens: first and first + 8
        const Source rows = xbc.from(begin);
        // Pairs of channels: the m-th of the lane's first or second token.
        const auto each = [&](auto use) {
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int t = first + i * 8, channel = p0 + column + m * 8 + lane % 4 * 2;
                    if (t < length && channel < head_dim) use(m, i, t, head * head_dim + channel);
                }
        };
        // What y takes beside products is on its way while these are made: behind them each chunk would wait for it.
        float2 inputs_of_y[4][2], gates[4][2];
        each([&](int m, int i, int t, int c) { inputs_of_y[m][i] = rows.pair(t, c, head), gates[m][i] = gate.pair(begin + t, c); });
        barrier_wait(full + index % 2, index / 2 & 1);
        __syncthreads();
        const Shared& own = ring[index % 2];

        float results[4][4] = {};
#pragma unroll 2
        for (int k = 0; k < state_size; k += 16) {
            u32 high[4], low[4];
            load_left<SLAB>(high, own.c.high, warp * 16, k);
            load_left<SLAB>(low, own.c.low, warp * 16, k);
            accumulate<2>(results, high, low, state, column, k);
        }
        const float upper = expf(sum_decay[first]), lower = expf(sum_decay[first + 8]);
#pragma unroll
        for (int m = 0; m < 4; ++m) results[m][0] *= upper, results[m][1] *= upper, results[m][2] *= lower, results[m][3] *= lower;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; ++k) {
            if (k > warp) break;
            // The left side's words are, in this order: (first, s), (first + 8, s), (first, s + 8), (first + 8, s + 8).
            u32 high[4], low[4];
#pragma unroll
            for (int word = 0; word < 4; word += 2) {
                const float4 products = own.products[warp][2 * k + word / 2][lane];
                const int s = k * 16 + word / 2 * 8 + lane % 4 * 2;
                const float early = sum_decay[s], late = sum_decay[s + 1], early_step = step[s], late_step = step[s + 1];
                const auto factor = [&](int t, int s, float decay, float step) { return s <= t ? expf(sum_decay[t] - decay) * step : 0.0f; };
                halve(products.x * factor(first, s, early, early_step), products.y * factor(first, s + 1, late, late_step), high[word], low[word]);
                halve(products.z * factor(first + 8, s, early, early_step), products.w * factor(first + 8, s + 1, late, late_step), high[word + 1], low[word + 1]);
            }
            accumulate<2>(results, high, low, inputs, column, k * 16);
        }
        each([&](int m, int i, int t, int c) {
            const float2 x = inputs_of_y[m][i], z = gates[m][i];
            *reinterpret_cast<float2*>(y + static_cast<i64>(begin + t) * inner + c) =
                make_float2((results[m][2 * i] + skip * x.x) * gate.factor(z.x), (results[m][2 * i + 1] + skip * x.y) * gate.factor(z.y));
        });

        const float factor = expf(sum_decay[length - 1]);
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j][0] *= factor, sums[j][1] *= factor, sums[j][2] *= factor, sums[j][3] *= factor;
#pragma unroll
        for (int k = 0; k < CHUNK; k += 16) {
            u32 high[4], low[4];
            load_left<CHUNK>(high, weighted.high, warp * 16, k);
            load_left<CHUNK>(low, weighted.low, warp * 16, k);
            accumulate<4>(sums, high, low, own.b, half * 64, k);
        }
        // The copy engine writes there next.
        fence_async();
        __syncthreads();
    }
    if (to_slot >= 0) each_state(slot(to_slot), [](float& sum, float& kept) { kept = sum; });
}

}  // namespace

RESIDENT_KERNEL(256, 1, ssd_share, (const float* xbc, const int* chunks, int heads, int head_dim, int groups, int state_size, Shared* shared)) {
    depend();
    share(Floats{xbc, heads * head_dim + 2 * groups * state_size}, chunks, heads, head_dim, groups, state_size, shared);
}

RESIDENT_KERNEL(256, 1, ssd_share_i8, (const i8* xbc, const float* scales, const float* fixed, const int* chunks, int heads, int head_dim, int groups, int state_size, Shared* shared)) {
    depend();
    share(Codes{xbc, heads * head_dim + 2 * groups * state_size, scales, heads + 2 * groups, fixed}, chunks, heads, head_dim, groups, state_size, shared);
}

RESIDENT_KERNEL(256, 1, ssd_scan, (const float* xbc, const float* dt, const float* decay, const Shared* shared, const float* d, const int* chunks, const int* sequence_chunks, int heads, int head_dim, int groups, int state_size, float* cache, GATE_PARAMETERS, float* y)) {
    depend();
    scan(Floats{xbc, heads * head_dim + 2 * groups * state_size}, dt, decay, shared, d, chunks, sequence_chunks, heads, head_dim, groups, state_size, cache, {GATE_ARGUMENTS}, y);
}

RESIDENT_KERNEL(256, 1, ssd_scan_i8, (const i8* xbc, const float* scales, const float* fixed, const float* dt, const float* decay, const Shared* shared, const float* d, const int* chunks, const int* sequence_chunks, int heads, int head_dim, int groups, int state_size, float* cache, GATE_PARAMETERS, float* y)) {
    depend();
    scan(Codes{xbc, heads * head_dim + 2 * groups * state_size, scales, heads + 2 * groups, fixed}, dt, decay, shared, d, chunks, sequence_chunks, heads, head_dim, groups, state_size, cache, {GATE_ARGUMENTS}, y);
}

#endif
