// Causal grouped-query attention without positions, softmax in f32. Whole sequences run on the tensor cores with halves
// (`halves.cuh`). Caches are rows of `kv_heads·head_dim` in f32, bf16, f16, or int8 with a scale a row and head.
#include "device.cuh"
#include "halves.cuh"

namespace {

constexpr int QUERIES = 64;
constexpr int KEYS = 32;
constexpr int STEP_KEYS = 8;  // that a warp of a decoding step takes at a time
constexpr int STEP_WARPS = 4;
constexpr int MAX_DIM = 128;
constexpr float NONE = -1e30f;  // the largest score of no keys at all: finite, so that differences are numbers

// Keys or values in a cache; `scales` `[rows, kv_heads]` are int8's.
template <class C> struct Rows {
    C* values;
    float* scales;
    int kv_heads, d;
    float scale(i64, int) const { return 1.0f; }
    float at(i64 row, int head, int c) const { return widen(values[(row * kv_heads + head) * d + c]); }
};

template <> struct Rows<i8> {
    i8* values;
    float* scales;
    int kv_heads, d;
    float scale(i64 row, int head) const { return scales[row * kv_heads + head]; }
    float at(i64 row, int head, int c) const { return __fmul_rn(static_cast<float>(values[(row * kv_heads + head) * d + c]), scale(row, head)); }
};

template <class C> DEVICE void keep(C& to, float x) { to = narrow<C>(x); }
DEVICE void keep(f16& to, float x) { to = narrow_f16(x); }

// A head's keys or values of one token, by a warp: all is read before the first is written.
struct Head {
    static constexpr int OWN = MAX_DIM / 32;
    float held[OWN];

    Head(const float* from, int d) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int c = i * 32 + threadIdx.x % 32;
            held[i] = c < d ? from[c] : 0.0f;
        }
    }

    template <class F> void each(int d, F use) const {
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if (i * 32 + static_cast<int>(threadIdx.x) % 32 < d) use(i * 32 + threadIdx.x % 32, held[i]);
    }
};

template <class C> DEVICE void keep_head(const Rows<C>& to, i64 row, int head, const Head& from) {
    from.each(to.d, [&](int c, float x) { keep(to.values[(row * to.kv_heads + head) * to.d + c], x); });
}

DEVICE void keep_head(const Rows<i8>& to, i64 row, int head, const Head& from) {
    float largest = 0.0f;
    from.each(to.d, [&](int, float x) { largest = fmaxf(largest, fabsf(x)); });
    const float scale = __fdiv_rn(warp_max(largest), 127.0f);
    from.each(to.d, [&](int c, float x) {
        to.values[(row * to.kv_heads + head) * to.d + c] = scale > 0.0f ? static_cast<i8>(round_even(fminf(fmaxf(__fdiv_rn(x, scale), -127.0f), 127.0f))) : static_cast<i8>(0);
    });
    if (threadIdx.x % 32 == 0) to.scales[row * to.kv_heads + head] = scale;
}

// Without `sequences` a step: one token of each slot, which is one longer then.
template <class C> DEVICE void append(const float* k, const float* v, const int* sequences, int* lengths, int capacity, const Rows<C>& keys, const Rows<C>& values) {
    const int index = blockIdx.y, i = blockIdx.x;
    const int begin = sequences ? sequences[4 * index] : index, end = sequences ? sequences[4 * index + 1] : index + 1, slot = sequences ? sequences[4 * index + 2] : index;
    const int length = lengths[slot];
    __syncthreads();
    if (!sequences && threadIdx.x == 0) lengths[slot] = length + 1;
    if (begin + i >= end || length + i >= capacity) return;
    const i64 row = static_cast<i64>(slot) * capacity + length + i;
    for (int head = threadIdx.x / 32; head < keys.kv_heads; head += blockDim.x / 32) {
        const i64 from = (static_cast<i64>(begin + i) * keys.kv_heads + head) * keys.d;
        const Head key(k + from, keys.d), value(v + from, keys.d);
        keep_head(keys, row, head, key);
        keep_head(values, row, head, value);
    }
}

// 64 queries of one head against all keys that they see, 32 at a time, with a running maximum and sum; warp w has the queries from
// 16 w on, a lane the rows lane / 4 and lane / 4 + 8 of them.
template <class C> DEVICE void attend(const float* q, const Rows<C>& keys, const Rows<C>& values, const int* queries, const int* segments, int heads, int kv_heads, int d, float* out) {
    DYNAMIC_SHARED(u8, shared);
    auto& query = *reinterpret_cast<Halves<QUERIES, MAX_DIM>*>(shared);
    auto& key = *reinterpret_cast<Halves<KEYS, MAX_DIM>*>(shared + sizeof(Halves<QUERIES, MAX_DIM>));
    auto& value = *reinterpret_cast<Halves<MAX_DIM, KEYS>*>(shared + sizeof(Halves<QUERIES, MAX_DIM>) + sizeof(Halves<KEYS, MAX_DIM>));  // [feature][key]
    const int* own = queries + 4 * blockIdx.z;
    const int first = own[0] + blockIdx.x * QUERIES, count = minimum(QUERIES, own[1] - first);
    if (count <= 0) return;
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int padded = (d + 15) & ~15;
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(d)));
    for (int i = threadIdx.x; i < QUERIES * MAX_DIM / 2; i += blockDim.x) {
        const int row = i / (MAX_DIM / 2), c = i % (MAX_DIM / 2) * 2;
        const float* at = q + (static_cast<i64>(first + row) * heads + head) * d + c;
        put(query, row, c, row < count && c < d ? at[0] * scale : 0.0f, row < count && c + 1 < d ? at[1] * scale : 0.0f);
    }
    int total = 0;
    for (int s = own[2]; s < own[3]; ++s) total += segments[2 * s + 1] - segments[2 * s];
    // Query i of a sequence sees all keys but those of the queries behind it.
    const int row = warp * 16 + lane / 4, visible = total - (own[1] - 1 - (first + row));
    const int farthest = total - (own[1] - (first + count));
    float largest[2] = {NONE, NONE}, sum[2] = {0.0f, 0.0f}, result[MAX_DIM / 8][4] = {};
    int before = 0;  // keys of the segments already done
    for (int s = own[2]; s < own[3]; ++s) {
        const int begin = segments[2 * s], length = segments[2 * s + 1] - begin;
        for (int start = 0; start < length && before + start < farthest; start += KEYS) {
            const int tile = minimum(KEYS, length - start);
            __syncthreads();
            transfer<KEYS * MAX_DIM / 2>(
                [&](int i) -> Pair {
                    const int k = i / (MAX_DIM / 2), c = i % (MAX_DIM / 2) * 2;
                    const i64 row = begin + start + k;
                    return {k < tile && c < d ? keys.at(row, kv_head, c) : 0.0f, k < tile && c + 1 < d ? keys.at(row, kv_head, c + 1) : 0.0f};
                },
                [&](int i, Pair x) { put(key, i / (MAX_DIM / 2), i % (MAX_DIM / 2) * 2, x.first, x.second); });
            transfer<KEYS * MAX_DIM / 2>(
                [&](int i) -> Pair {
                    const int c = i % MAX_DIM, k = i / MAX_DIM * 2;
                    const i64 row = begin + start + k;
                    return {k < tile && c < d ? values.at(row, kv_head, c) : 0.0f, k + 1 < tile && c < d ? values.at(row + 1, kv_head, c) : 0.0f};
                },
                [&](int i, Pair x) { put(value, i % MAX_DIM, i / MAX_DIM * 2, x.first, x.second); });
            __syncthreads();
            float scores[KEYS / 8][4] = {};
            for (int c = 0; c < padded; c += 16) {
                u32 high[4], low[4];
                load_left<MAX_DIM>(high, query.high, warp * 16, c);
                load_left<MAX_DIM>(low, query.low, warp * 16, c);
                accumulate<KEYS / 16>(scores, high, low, key, 0, c);
            }
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                float tile_largest = NONE;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int k = n * 8 + lane % 4 * 2 + i;
                        float& score = scores[n][side * 2 + i];
                        if (k >= tile || before + start + k >= visible + side * 8) score = NONE;
                        tile_largest = fmaxf(tile_largest, score);
                    }
                tile_largest = fmaxf(tile_largest, shuffle_xor(tile_largest, 1));
                tile_largest = fmaxf(tile_largest, shuffle_xor(tile_largest, 2));
                const float new_largest = fmaxf(largest[side], tile_largest), correction = expf(largest[side] - new_largest);
                largest[side] = new_largest;
                float tile_sum = 0.0f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& score = scores[n][side * 2 + i];
                        score = score == NONE ? 0.0f : expf(score - new_largest);
                        tile_sum += score;
                    }
                tile_sum += shuffle_xor(tile_sum, 1);
                tile_sum += shuffle_xor(tile_sum, 2);
                sum[side] = sum[side] * correction + tile_sum;
#pragma unroll
                for (int n = 0; n < MAX_DIM / 8; ++n) result[n][side * 2] *= correction, result[n][side * 2 + 1] *= correction;
            }
#pragma unroll
            for (int k = 0; k < KEYS / 16; ++k) {
                // Results of a product are the left side of the next as they lie. Columns behind the last are zeros.
                u32 high[4], low[4];
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    const float* from = scores[2 * k + word / 2] + word % 2 * 2;
                    halve(from[0], from[1], high[word], low[word]);
                }
#pragma unroll
                for (int n = 0; n < MAX_DIM / 16; n += 2)
                    if (n * 16 < d) accumulate<2>(result + 2 * n, high, low, value, n * 16, k * 16);
            }
        }
        before += length;
    }
#pragma unroll
    for (int n = 0; n < MAX_DIM / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = n * 8 + lane % 4 * 2 + i % 2, at = row + i / 2 * 8;
            if (at < count && c < d) out[(static_cast<i64>(first + at) * heads + head) * d + c] = __fdiv_rn(result[n][i], sum[i / 2]);
        }
}

// Four elements of a row as they are stored, and as floats.
DEVICE float4 load_four(const float* at) { return *reinterpret_cast<const float4*>(at); }
DEVICE uint2 load_four(const bf16* at) { return *reinterpret_cast<const uint2*>(at); }
DEVICE uint2 load_four(const f16* at) { return *reinterpret_cast<const uint2*>(at); }
DEVICE u32 load_four(const i8* at) { return *reinterpret_cast<const u32*>(at); }

template <class C> struct Four;
template <> struct Four<float> {
    float4 x;
    float4 floats(float) const { return x; }
};
template <> struct Four<bf16> {
    uint2 x;
    float4 floats(float) const { return make_float4(bits_float(x.x << 16), bits_float(x.x & 0xffff0000u), bits_float(x.y << 16), bits_float(x.y & 0xffff0000u)); }
};
template <> struct Four<f16> {
    uint2 x;
    static float half(u32 bits) { return widen(f16{static_cast<unsigned short>(bits)}); }
    float4 floats(float) const { return make_float4(half(x.x), half(x.x >> 16), half(x.y), half(x.y >> 16)); }
};
template <> struct Four<i8> {
    u32 x;
    float4 floats(float scale) const {
        const auto code = [&](int i) { return __fmul_rn(static_cast<float>(static_cast<i8>(x >> 8 * i)), scale); };
        return make_float4(code(0), code(1), code(2), code(3));
    }
};

// One query a sequence: a block has one key/value head, the up to RATIO query heads that share it, and its share of the keys. A warp takes
// STEP_KEYS keys at a time and reads all of them, and their values, before it uses the first: four lanes share a key, and of the values a
// lane has four features. Code is kept short: a step comes here once a layer, and the weights read meanwhile have driven it from the caches.
template <class C, int RATIO>
DEVICE void attend_step(const float* q, const Rows<C>& keys, const Rows<C>& values, const int* lengths, int capacity, int heads, int kv_heads, int d, int splits, float* partial, float (*query)[MAX_DIM], float (*weights)[STEP_KEYS], float (*merged)[MAX_DIM + 4]) {
    constexpr int FOURS = MAX_DIM / 16;
    const int kv_head = blockIdx.x, split = blockIdx.y, slot = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
    const int ratio = heads / kv_heads, width = kv_heads * d, length = minimum(lengths[slot], capacity);
    // Tiles of keys, divided among the warps of all splits.
    const int tiles = divide_up(length, STEP_KEYS), unit = split * STEP_WARPS + warp, units = splits * STEP_WARPS;
    const int first_tile = static_cast<int>(static_cast<i64>(tiles) * unit / units), end_tile = static_cast<int>(static_cast<i64>(tiles) * (unit + 1) / units);
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(d)));
    for (int r = warp; r < ratio; r += STEP_WARPS)
        for (int c = lane; c < d; c += 32) query[r][c] = q[(static_cast<i64>(slot) * heads + kv_head * ratio + r) * d + c] * scale;
    __syncthreads();
    float largest[RATIO], sum[RATIO], result[RATIO][4];
#pragma unroll
    for (int r = 0; r < RATIO; ++r) {
        largest[r] = NONE, sum[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) result[r][i] = 0.0f;
    }
    const i64 rows = static_cast<i64>(slot) * capacity;
    const C *own_keys = keys.values + rows * width + kv_head * d, *own_values = values.values + rows * width + kv_head * d + minimum(lane * 4, d - 4);
    for (int tile = first_tile; tile < end_tile; ++tile) {
        // Behind the last key that one is read again; it weighs nothing there.
        const int first = tile * STEP_KEYS, key = minimum(first + lane / 4, length - 1);
        const bool counts = first + lane / 4 < length;
        Four<C> k[FOURS], v[STEP_KEYS];
#pragma unroll
        for (int j = 0; j < FOURS; ++j) k[j] = {load_four(own_keys + static_cast<i64>(key) * width + minimum(j * 16 + quad * 4, d - 4))};
#pragma unroll
        for (int i = 0; i < STEP_KEYS; ++i) v[i] = {load_four(own_values + static_cast<i64>(minimum(first + i, length - 1)) * width)};
        const float key_scale = keys.scale(rows + key, kv_head);
        float scores[RATIO] = {};
#pragma unroll
        for (int j = 0; j < FOURS; ++j) {
            if (j * 16 + quad * 4 >= d) break;
            const float4 own = k[j].floats(key_scale);
#pragma unroll
            for (int r = 0; r < RATIO; ++r) {
                if (r >= ratio) break;
                const float4 x = *reinterpret_cast<const float4*>(&query[r][j * 16 + quad * 4]);
                scores[r] = fmaf(x.x, own.x, fmaf(x.y, own.y, fmaf(x.z, own.z, fmaf(x.w, own.w, scores[r]))));
            }
        }
#pragma unroll
        for (int r = 0; r < RATIO; ++r) {
            if (r >= ratio) break;
            float score = scores[r];
            score += shuffle_xor(score, 1);
            score += shuffle_xor(score, 2);
            const float new_largest = fmaxf(largest[r], warp_max(score)), correction = expf(largest[r] - new_largest);
            const float p = counts ? expf(score - new_largest) : 0.0f;
            if (quad == 0) weights[warp * RATIO + r][lane / 4] = p;
            sum[r] = sum[r] * correction + warp_sum(quad == 0 ? p : 0.0f);
            largest[r] = new_largest;
#pragma unroll
            for (int i = 0; i < 4; ++i) result[r][i] *= correction;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < STEP_KEYS; ++i) {
            const float4 x = v[i].floats(values.scale(rows + minimum(first + i, length - 1), kv_head));
#pragma unroll
            for (int r = 0; r < RATIO; ++r) {
                if (r >= ratio) break;
                const float p = weights[warp * RATIO + r][i];
                result[r][0] = fmaf(p, x.x, result[r][0]), result[r][1] = fmaf(p, x.y, result[r][1]);
                result[r][2] = fmaf(p, x.z, result[r][2]), result[r][3] = fmaf(p, x.w, result[r][3]);
            }
        }
        __syncwarp();
    }
    // The warps' shares.
#pragma unroll
    for (int r = 0; r < RATIO; ++r) {
        if (r >= ratio) break;
        float* own = merged[warp * RATIO + r];
        if (lane == 0) own[0] = largest[r], own[1] = sum[r];
        if (lane * 4 < d) *reinterpret_cast<float4*>(own + 4 + lane * 4) = make_float4(result[r][0], result[r][1], result[r][2], result[r][3]);
    }
    __syncthreads();
    const int c = threadIdx.x;
#pragma unroll 1
    for (int r = 0; r < ratio && c < d; ++r) {
        float overall = NONE, total = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 0; w < STEP_WARPS; ++w) overall = fmaxf(overall, merged[w * RATIO + r][0]);
#pragma unroll
        for (int w = 0; w < STEP_WARPS; ++w) {
            const float* own = merged[w * RATIO + r];
            const float share = expf(own[0] - overall);
            total += share * own[1], value += share * own[4 + c];
        }
        float* to = partial + ((static_cast<i64>(slot) * heads + kv_head * ratio + r) * splits + split) * (d + 2);
        if (c == 0) to[0] = overall, to[1] = total;
        to[2 + c] = value;
    }
}

template <class C>
DEVICE void attend_step_any(const float* q, const Rows<C>& keys, const Rows<C>& values, const int* lengths, int capacity, int heads, int kv_heads, int d, int splits, float* partial) {
    SHARED_ROWS(float, query, 16, MAX_DIM);
    SHARED_ROWS(float, weights, STEP_WARPS * 16, STEP_KEYS);
    SHARED_ROWS(float, merged, STEP_WARPS * 16, MAX_DIM + 4);
    const int ratio = heads / kv_heads;
    if (ratio <= 4) attend_step<C, 4>(q, keys, values, lengths, capacity, heads, kv_heads, d, splits, partial, query, weights, merged);
    else if (ratio <= 8) attend_step<C, 8>(q, keys, values, lengths, capacity, heads, kv_heads, d, splits, partial, query, weights, merged);
    else attend_step<C, 16>(q, keys, values, lengths, capacity, heads, kv_heads, d, splits, partial, query, weights, merged);
}

}  // namespace

// Scales are null but for int8.
#define ATTENTION(suffix, C)                                                                                                                     \
    KERNEL(256, kv_append_##suffix, (const float* k, const float* v, int kv_heads, int head_dim, const int* sequences, int* lengths, int capacity, C* keys, C* values, float* key_scales, float* value_scales)) { depend(); \
        append<C>(k, v, sequences, lengths, capacity, Rows<C>{keys, key_scales, kv_heads, head_dim}, Rows<C>{values, value_scales, kv_heads, head_dim}); \
    }                                                                                                                                           \
    RESIDENT_KERNEL(128, 3, attention_##suffix, (const float* q, C* keys, C* values, float* key_scales, float* value_scales, const int* queries, const int* segments, int heads, int kv_heads, int head_dim, float* out)) { depend(); \
        attend<C>(q, Rows<C>{keys, key_scales, kv_heads, head_dim}, Rows<C>{values, value_scales, kv_heads, head_dim}, queries, segments, heads, kv_heads, head_dim, out); \
    }                                                                                                                                           \
    KERNEL(128, attention_decode_##suffix, (const float* q, C* keys, C* values, float* key_scales, float* value_scales, const int* lengths, int capacity, int heads, int kv_heads, int head_dim, int splits, float* partial)) { depend(); \
        attend_step_any<C>(q, Rows<C>{keys, key_scales, kv_heads, head_dim}, Rows<C>{values, value_scales, kv_heads, head_dim}, lengths, capacity, heads, kv_heads, head_dim, splits, partial); \
    }

ATTENTION(f32, float)
ATTENTION(bf16, bf16)
ATTENTION(f16, f16)
ATTENTION(i8, i8)

// Slots are longer by their sequences.
KERNEL(256, advance, (int* lengths, const int* sequences, int count)) {
    depend();
    for (int i = threadIdx.x; i < count; i += blockDim.x) lengths[sequences[4 * i + 2]] += sequences[4 * i + 1] - sequences[4 * i];
}

KERNEL(128, attention_merge, (const float* partial, int heads, int head_dim, int splits, float* out)) {
    depend();
    const int head = blockIdx.x, c = threadIdx.x;
    if (c >= head_dim) return;
    const i64 index = static_cast<i64>(blockIdx.y) * heads + head;
    const float* own = partial + index * splits * (head_dim + 2);
    float largest = NONE, total = 0.0f, value = 0.0f;
    for (int s = 0; s < splits; ++s) largest = fmaxf(largest, own[s * (head_dim + 2)]);
    for (int s = 0; s < splits; ++s) {
        const float share = expf(own[s * (head_dim + 2)] - largest);
        total = fmaf(share, own[s * (head_dim + 2) + 1], total);
        value = fmaf(share, own[s * (head_dim + 2) + 2 + c], value);
    }
    out[index * head_dim + c] = __fdiv_rn(value, total);
}
