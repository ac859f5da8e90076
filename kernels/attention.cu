// Causal grouped-query attention without positions, softmax in f32. Whole sequences run on the tensor cores with halves
// (`halves.cuh`). Caches are rows of `kv_heads·head_dim` in f32, bf16, f16, or int8 with a scale a row and head.
#include "device.cuh"
#include "halves.cuh"
#include "ticket.cuh"

namespace {

constexpr int QUERIES = 64;
constexpr int KEYS = 32;
constexpr int STEP_KEYS = 32;  // that a block of a decoding step takes at a time: one a lane
constexpr int READERS = 4;     // warps of it that read keys, and as many that read values
constexpr int MOST_WARPS = 16;
constexpr int MAX_DIM = 128;
constexpr float NONE = -1e30f;  // the largest score of no keys at all: finite, so that differences are numbers

// Four features of keys or values, as a cache holds them.
template <class C> struct Four;
template <> struct Four<float> {
    float4 x;
    static Four round(float4 from, float&) { return {from}; }
    float4 floats() const { return x; }
};
template <> struct Four<bf16> {
    uint2 x;
    static Four round(float4 from, float&) { return {make_uint2(pack_bf16(from.x, from.y), pack_bf16(from.z, from.w))}; }
    float4 floats() const { return make_float4(bits_float(x.x << 16), bits_float(x.x & 0xffff0000u), bits_float(x.y << 16), bits_float(x.y & 0xffff0000u)); }
};
template <> struct Four<f16> {
    uint2 x;
    static u32 pair(float low, float high) { return narrow_f16(low).bits | static_cast<u32>(narrow_f16(high).bits) << 16; }
    static float half(u32 bits) { return widen(f16{static_cast<unsigned short>(bits)}); }
    static Four round(float4 from, float&) { return {make_uint2(pair(from.x, from.y), pair(from.z, from.w))}; }
    float4 floats() const { return make_float4(half(x.x), half(x.x >> 16), half(x.y), half(x.y >> 16)); }
};
template <> struct Four<i8> {
    u32 x;
    // With the scale of the head that the warp has.
    static Four round(float4 from, float& scale) {
        scale = __fdiv_rn(warp_max(fmaxf(fmaxf(fabsf(from.x), fabsf(from.y)), fmaxf(fabsf(from.z), fabsf(from.w)))), 127.0f);
        const auto code = [&](float x) { return scale > 0.0f ? static_cast<u32>(round_even(fminf(fmaxf(__fdiv_rn(x, scale), -127.0f), 127.0f))) & 255 : 0u; };
        return {code(from.x) | code(from.y) << 8 | code(from.z) << 16 | code(from.w) << 24};
    }
    // Without it.
    float4 floats() const {
        const auto code = [&](int i) { return static_cast<float>(static_cast<i8>(x >> 8 * i)); };
        return make_float4(code(0), code(1), code(2), code(3));
    }
};

// Keys or values in a cache; `scales` `[rows, kv_heads]` are int8's.
template <class C> struct Rows {
    C* values;
    float* scales;
    int kv_heads, d;
    float scale(i64, int) const { return 1.0f; }
    void set_scale(i64, int, float) const {}
    float at(i64 row, int head, int c) const { return widen(values[(row * kv_heads + head) * d + c]); }
    Four<C>* fours(i64 row, int head) const { return reinterpret_cast<Four<C>*>(values + (row * kv_heads + head) * d); }
};

template <> struct Rows<i8> {
    i8* values;
    float* scales;
    int kv_heads, d;
    float scale(i64 row, int head) const { return scales[row * kv_heads + head]; }
    void set_scale(i64 row, int head, float scale) const { scales[row * kv_heads + head] = scale; }
    float at(i64 row, int head, int c) const { return __fmul_rn(static_cast<float>(values[(row * kv_heads + head) * d + c]), scale(row, head)); }
    Four<i8>* fours(i64 row, int head) const { return reinterpret_cast<Four<i8>*>(values + (row * kv_heads + head) * d); }
};

DEVICE float4 scaled(float4 x, float factor) { return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor); }
DEVICE float4 add_scaled(float4 sum, float factor, float4 x) {
    return make_float4(fmaf(factor, x.x, sum.x), fmaf(factor, x.y, sum.y), fmaf(factor, x.z, sum.z), fmaf(factor, x.w, sum.w));
}

// A head of one token, four features a lane, zeros behind the last.
DEVICE float4 head_of(const float* from, int d) {
    const int lane = threadIdx.x % 32;
    return lane * 4 < d ? *reinterpret_cast<const float4*>(from + lane * 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// Keeps a head's keys or values of one token in the cache; returns them as they are there, with their scale.
template <class C> DEVICE Four<C> keep(const Rows<C>& to, i64 row, int head, float4 from, float& scale) {
    const int lane = threadIdx.x % 32;
    const Four<C> rounded = Four<C>::round(from, scale);
    if (lane * 4 < to.d) to.fours(row, head)[lane] = rounded;
    if (lane == 0) to.set_scale(row, head, scale);
    return rounded;
}

template <class C> DEVICE void append(const float* k, const float* v, const int* sequences, const int* lengths, int capacity, const Rows<C>& keys, const Rows<C>& values) {
    const int* own = sequences + 4 * blockIdx.y;
    const int token = own[0] + blockIdx.x, slot = own[2], position = lengths[slot * keys.kv_heads] + blockIdx.x;
    if (token >= own[1] || position >= capacity) return;
    const i64 row = static_cast<i64>(slot) * capacity + position;
    for (int head = threadIdx.x / 32; head < keys.kv_heads; head += blockDim.x / 32) {
        const i64 from = (static_cast<i64>(token) * keys.kv_heads + head) * keys.d;
        float scale = 1.0f;
        keep(keys, row, head, head_of(k + from, keys.d), scale);
        keep(values, row, head, head_of(v + from, keys.d), scale);
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

// One query a sequence, whose own key and value are kept on the way. A block has a key/value head, the query heads that share it, a warp each,
// and its share of the keys. Even warps read keys and odd ones values, as many as there are lanes, while those read before are attended to.
// The last block that is done with a head adds the shares up, in their order. Code is kept short: a step comes here once a layer, and the
// weights read meanwhile have driven it from the caches.
template <class C>
DEVICE void attend_step(const float* q, const float* k, const float* v, const Rows<C>& keys, const Rows<C>& values, int* lengths, int capacity, int ratio, float scale, float* partial, int* tickets, float* out) {
    constexpr int OWN = STEP_KEYS / READERS, FOURS = MAX_DIM / 4;
    SHARED_ROWS(Four<float>, query, MOST_WARPS, FOURS);
    SHARED_ROWS(Four<C>, rows, 2 * STEP_KEYS, FOURS + 1);  // keys, then values
    SHARED(float, scales, 2 * STEP_KEYS);
    SHARED(int, last, 1);
    const int kv_head = blockIdx.x, kv_heads = gridDim.x, split = blockIdx.y, splits = gridDim.y, slot = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = warp % 2, reader = warp / 2, d = keys.d;
    const int place = slot * kv_heads + kv_head;
    launch_next();
    if (threadIdx.x == 0) prefetch(lengths + place), prefetch(tickets + place);
    wait_previous();
    const Rows<C> own = side == 0 ? keys : values;
    const float4 fresh = head_of((side == 0 ? k : v) + place * d, d);
    const int head = place * ratio + warp;
    // Where there is no room it takes the last place.
    const int newest = minimum(lengths[place], capacity - 1), length = newest + 1;
    if (warp < ratio) query[warp][lane].x = head_of(q + head * d, d);
    const int share = divide_up(length, splits), first = minimum(split * share, length), end = minimum(first + share, length);
    const i64 row = static_cast<i64>(slot) * capacity;
    const int stride = kv_heads * (d / 4);
    const Four<C>* from = own.fours(row + first + reader, kv_head) + lane;
    float largest = NONE, sum = 0.0f;
    float4 result = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int start = first - STEP_KEYS;; start += STEP_KEYS) {
        const int next = start + STEP_KEYS;
        // Keys that are read: zeros weigh nothing.
        const int stored = minimum(minimum(STEP_KEYS, end - next), newest - next), readable = reader < READERS && lane * 4 < d ? stored : 0;
        Four<C> held[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            held[i] = {};
            if (i * READERS + reader < readable) held[i] = from[i * READERS * stride];
        }
        from += STEP_KEYS * stride;
        const float own_scale = lane < stored ? own.scale(row + next + lane, kv_head) : 1.0f;
        if (start >= first && warp < ratio) {
            const int count = minimum(STEP_KEYS, end - start);
            float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
            for (int c = 0; c < d; c += 16)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float4 key = rows[lane][c / 4 + i].floats(), x = query[warp][c / 4 + i].x;
                    sums = make_float4(fmaf(x.x, key.x, sums.x), fmaf(x.y, key.y, sums.y), fmaf(x.z, key.z, sums.z), fmaf(x.w, key.w, sums.w));
                }
            const float score = lane < count ? ((sums.x + sums.y) + (sums.z + sums.w)) * (scale * scales[lane]) : NONE;
            const float new_largest = fmaxf(largest, warp_max(score)), correction = expf(largest - new_largest);
            const float p = expf(score - new_largest), weight = p * scales[STEP_KEYS + lane];
            largest = new_largest, sum = sum * correction + p;
            result = scaled(result, correction);
#pragma unroll 1
            for (int key = 0; key < count; key += 4)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float w = shuffle(weight, key + i);
                    const float4 value = rows[STEP_KEYS + key + i][lane].floats();
                    result = add_scaled(result, w, value);
                }
        }
        if (next >= end) break;
        __syncthreads();
        const int at = newest < minimum(next + STEP_KEYS, end) ? newest - next : -1;
        if (reader < READERS)
#pragma unroll
            for (int i = 0; i < OWN; ++i) rows[side * STEP_KEYS + i * READERS + reader][lane] = held[i];
        if (reader == 0 && lane != at) scales[side * STEP_KEYS + lane] = own_scale;
        if (at >= 0 && at % READERS == reader) {
            float fresh_scale = 1.0f;
            rows[side * STEP_KEYS + at][lane] = keep(own, row + newest, kv_head, fresh, fresh_scale);
            if (lane == 0) scales[side * STEP_KEYS + at] = fresh_scale;
        }
        __syncthreads();
    }
    // A share: the largest score and the sum of weights, two values that nobody uses, the weighted sum of values.
    const int width = d / 4 + 1;
    float4* shares = reinterpret_cast<float4*>(partial) + head * splits * width;
    sum = warp_sum(sum);
    if (warp < ratio) {
        if (lane == 0) shares[split * width] = make_float4(largest, sum, 0.0f, 0.0f);
        if (lane * 4 < d) shares[split * width + 1 + lane] = result;
    }
    __syncthreads();
    if (threadIdx.x == 0) last[0] = take_ticket(tickets + place, splits);
    __syncthreads();
    if (!last[0]) return;
    if (warp < ratio) {
        largest = NONE, sum = 0.0f, result = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int first = 0; first < splits; first += 32) {
            const float4 x = first + lane < splits ? shares[(first + lane) * width] : make_float4(NONE, 0.0f, 0.0f, 0.0f);
            const float new_largest = fmaxf(largest, warp_max(x.x)), correction = expf(largest - new_largest), factor = expf(x.x - new_largest);
            largest = new_largest, sum = fmaf(factor, x.y, sum * correction);
            result = scaled(result, correction);
#pragma unroll 1
            for (int i = 0; i < minimum(32, splits - first); i += 8)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float w = shuffle(factor, i + j);
                    const float4 value = first + i + j < splits && lane * 4 < d ? shares[(first + i + j) * width + 1 + lane] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    result = add_scaled(result, w, value);
                }
        }
        const float reciprocal = __fdiv_rn(1.0f, warp_sum(sum));
        if (lane * 4 < d) reinterpret_cast<float4*>(out + head * d)[lane] = scaled(result, reciprocal);
    }
    // All blocks of the head have read how long it was.
    if (threadIdx.x == 0) lengths[place] = length;
}

}  // namespace

// Scales are null but for int8.
#define ATTENTION(suffix, C)                                                                                                                     \
    KERNEL(256, kv_append_##suffix, (const float* k, const float* v, int kv_heads, int head_dim, const int* sequences, const int* lengths, int capacity, C* keys, C* values, float* key_scales, float* value_scales)) { depend(); \
        append<C>(k, v, sequences, lengths, capacity, Rows<C>{keys, key_scales, kv_heads, head_dim}, Rows<C>{values, value_scales, kv_heads, head_dim}); \
    }                                                                                                                                           \
    RESIDENT_KERNEL(128, 3, attention_##suffix, (const float* q, C* keys, C* values, float* key_scales, float* value_scales, const int* queries, const int* segments, int heads, int kv_heads, int head_dim, float* out)) { depend(); \
        attend<C>(q, Rows<C>{keys, key_scales, kv_heads, head_dim}, Rows<C>{values, value_scales, kv_heads, head_dim}, queries, segments, heads, kv_heads, head_dim, out); \
    }                                                                                                                                           \
    KERNEL(32 * MOST_WARPS, attention_decode_##suffix, (const float* q, const float* k, const float* v, C* keys, C* values, float* key_scales, float* value_scales, int* lengths, int capacity, int ratio, int head_dim, float scale, float* partial, int* tickets, float* out)) { \
        const int kv_heads = gridDim.x; \
        attend_step<C>(q, k, v, Rows<C>{keys, key_scales, kv_heads, head_dim}, Rows<C>{values, value_scales, kv_heads, head_dim}, lengths, capacity, ratio, scale, partial, tickets, out); \
    }

ATTENTION(f32, float)
ATTENTION(bf16, bf16)
ATTENTION(f16, f16)
ATTENTION(i8, i8)

// Slots are longer by their sequences.
KERNEL(256, advance, (int* lengths, const int* sequences, int count, int kv_heads)) {
    depend();
    for (int i = threadIdx.x; i < count * kv_heads; i += blockDim.x) {
        const int* own = sequences + 4 * (i / kv_heads);
        lengths[own[2] * kv_heads + i % kv_heads] += own[1] - own[0];
    }
}
