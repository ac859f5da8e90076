// Norms and relu², and the forms in which they hand a row on: floats, int8 codes with a scale, either after a block-Hadamard
// transform. One block a token. `emit_rows` keeps the row in registers; rows that do not fit, or are not of whole fours, stay in shared memory,
// so that they are read and written once, six vectors a thread at a time. `turn_row` divides a single token's row among blocks.
#include "rotate.cuh"
#include "rows.cuh"

#define EMIT_PARAMETERS float *out, i8 *codes, float *scales, const float *static_scale, int hadamard
#define EMIT_ARGUMENTS out, codes, scales, static_scale, hadamard

namespace {

constexpr int THREADS = 1024;
constexpr int MAX_GROUPS = 256;
constexpr int AHEAD = 6;  // vectors of four that a thread reads before it uses the first

// Where value c of the row lies in shared memory: one place is left out after 32, so that strides of 16 and 32 meet different banks.
DEVICE int place(int c) { return c + (c >> 5); }

// Maximum over the block's threads; every thread gets it.
DEVICE int block_max(int x, int* partial) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    int largest = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) largest = maximum(largest, partial[warp]);
    return largest;
}

// Calls `use(c, value)` for every c below `cols` that is this thread's, with the value at from[c]. A warp's values of one vector
// lie together: `from` is read in order.
template <class F> DEVICE void read_row(const float* from, int cols, F use) {
    if (cols % 4 != 0 || !aligned(from)) {
        for (int c = threadIdx.x; c < cols; c += blockDim.x) use(c, from[c]);
        return;
    }
    const float4* vectors = reinterpret_cast<const float4*>(from);
    for (int start = threadIdx.x; start < cols / 4; start += blockDim.x * AHEAD) {
        float4 held[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int at = start + i * blockDim.x;
            if (at < cols / 4) held[i] = vectors[at];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int at = start + i * blockDim.x;
            if (at >= cols / 4) break;
            use(4 * at, held[i].x), use(4 * at + 1, held[i].y), use(4 * at + 2, held[i].z), use(4 * at + 3, held[i].w);
        }
    }
}

// A norm's weight. A thread's part of it, where that is at most two vectors, is read while the launch in front still runs.
struct Weight {
    static constexpr int HELD = 2;
    const float* from;
    int cols;
    bool held;
    float4 own[HELD];

    Weight(const float* from, int cols) : from(from), cols(cols), held(cols % 4 == 0 && aligned(from) && cols <= 4 * HELD * static_cast<int>(blockDim.x)) {
        if (!held) return;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < cols / 4) own[i] = reinterpret_cast<const float4*>(from)[at];
        }
    }

    // As `read_row`.
    template <class F> void each(F use) const {
        if (!held) {
            read_row(from, cols, use);
            return;
        }
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at >= cols / 4) break;
            use(4 * at, own[i].x), use(4 * at + 1, own[i].y), use(4 * at + 2, own[i].z), use(4 * at + 3, own[i].w);
        }
    }
};

// BITS stages of the transform at once, on values 2^shift apart.
template <int BITS> DEVICE void stages(float* row, int cols, int shift, float scale, bool last) {
    constexpr int COUNT = 1 << BITS;
    for (int index = threadIdx.x; index < cols >> BITS; index += blockDim.x) {
        const int first = (index >> shift << (shift + BITS)) | (index & ((1 << shift) - 1));
        float held[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) held[i] = row[place(first + (i << shift))];
#pragma unroll
        for (int half = 1; half < COUNT; half *= 2)
#pragma unroll
            for (int pair = 0; pair < COUNT / 2; ++pair) {
                const int at = pair / half * 2 * half + pair % half;
                const float a = held[at], b = held[at + half];
                held[at] = a + b;
                held[at + half] = a - b;
            }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) row[place(first + (i << shift))] = last ? __fmul_rn(held[i], scale) : held[i];
    }
    __syncthreads();
}

// Orthonormal Hadamard transform of each `size` values of the row, Sylvester's order.
DEVICE void transform(float* row, int cols, int size) {
    const float scale = turn_scale(size);
    int bits = 0;
    while (1 << (bits + 1) <= size) ++bits;
    for (int shift = 0; shift < bits;) {
        const int left = bits - shift;
        if (left >= 4) stages<4>(row, cols, shift, scale, left == 4), shift += 4;
        else if (left == 3) stages<3>(row, cols, shift, scale, true), shift += 3;
        else if (left == 2) stages<2>(row, cols, shift, scale, true), shift += 2;
        else stages<1>(row, cols, shift, scale, true), shift += 1;
    }
}

// Hands on the block's row, which all threads have written, `largest` being the largest magnitude among what the thread wrote:
// scale = absmax / 127, code = round-half-even(x / scale). A row of zeros has scale 0 and codes 0; a row with a NaN has a NaN for
// its scale.
DEVICE void emit_row(float* row, int cols, int largest, EMIT_PARAMETERS) {
    SHARED(int, partial, THREADS / 32);
    const i64 token = blockIdx.x;
    __syncthreads();
    if (hadamard > 1) {
        transform(row, cols, hadamard);
        largest = 0;
#pragma unroll 8
        for (int c = threadIdx.x; c < cols; c += blockDim.x) largest = maximum(largest, magnitude(row[place(c)]));
    }
    if (out) for (int c = threadIdx.x; c < cols; c += blockDim.x) out[token * cols + c] = row[place(c)];
    if (!codes) return;
    const float scale = static_scale ? *static_scale : __fdiv_rn(bits_float(static_cast<u32>(block_max(largest, partial))), 127.0f);
    const Rounding rounding(scale);
    if (threadIdx.x == 0) scales[token] = scale;
    const int width = ld(cols);
    u32* words = reinterpret_cast<u32*>(codes + token * width);
#pragma unroll 2
    for (int word = threadIdx.x; word < width / 4; word += blockDim.x) {
        const float* four = row + place(4 * word);
        const auto value = [&](int i) { return 4 * word + i < cols ? rounding.within(four[i]) : 0.0f; };
        words[word] = scale > 0.0f ? rounding.codes(value(0), value(1), value(2), value(3)) : 0;
    }
}

constexpr int RUN = 8;  // segments of 128 values that a warp's lanes hold four each of

DEVICE float square_of(float x) { const float positive = fmaxf(x, 0.0f); return positive * positive; }

// The transform of each `size` values of a run, at least 2.
DEVICE void turn(float4 (&held)[RUN], int size) {
    const float scale = turn_scale(size);
#pragma unroll
    for (int i = 0; i < RUN; ++i) held[i] = turn_four(held[i], size, size);
#pragma unroll
    for (int step = 1; step < RUN; step *= 2) {
        if (128 * step >= size) break;
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            if (i & step) continue;
            const float4 a = held[i], b = held[i + step];
            held[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
            held[i + step] = make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
        }
    }
#pragma unroll
    for (int i = 0; i < RUN; ++i) held[i] = times(held[i], scale);
}

}  // namespace

// Over each `group` values of the row.
KERNEL(1024, rms_norm, (const float* x, const float* weight, float eps, int cols, int group, EMIT_PARAMETERS)) {
    launch_next();
    const Weight own_weight(weight, cols);
    wait_previous();
    DYNAMIC_SHARED(float, row);
    SHARED(float, sums, MAX_GROUPS);
    SHARED(float, factors, MAX_GROUPS);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    read_row(x + static_cast<i64>(blockIdx.x) * cols, cols, [&](int c, float value) { row[place(c)] = value; });
    __syncthreads();
    // Each group is a few warps', each of which adds up a part.
    const int groups = cols / group, sharing = maximum(1, warps / groups);
    for (int index = warp; index < groups * sharing; index += warps) {
        const int first = index / sharing * group;
        float sum = 0.0f;
#pragma unroll 8
        for (int c = index % sharing * 32 + lane; c < group; c += 32 * sharing) sum = fmaf(row[place(first + c)], row[place(first + c)], sum);
        sum = warp_sum(sum);
        if (lane == 0) sums[index] = sum;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < groups; index += blockDim.x) {
        float sum = 0.0f;
        for (int part = 0; part < sharing; ++part) sum += sums[index * sharing + part];
        factors[index] = __fdiv_rn(1.0f, __fsqrt_rn(sum / static_cast<float>(group) + eps));
    }
    __syncthreads();
    int largest = 0, shift = groups == 1 ? 31 : -1;
    if (groups > 1 && (group & (group - 1)) == 0)
        for (shift = 0; 1 << shift < group;) ++shift;
    own_weight.each([&](int c, float value) {
        const float result = row[place(c)] * factors[shift < 0 ? c / group : c >> shift] * value;
        row[place(c)] = result;
        largest = maximum(largest, magnitude(result));
    });
    emit_row(row, cols, largest, EMIT_ARGUMENTS);
}

KERNEL(1024, relu2, (const float* x, int cols, EMIT_PARAMETERS)) {
    depend();
    DYNAMIC_SHARED(float, row);
    int largest = 0;
    read_row(x + static_cast<i64>(blockIdx.x) * cols, cols, [&](int c, float value) {
        const float squared = square_of(value);
        row[place(c)] = squared;
        largest = maximum(largest, magnitude(squared));
    });
    emit_row(row, cols, largest, EMIT_ARGUMENTS);
}

KERNEL(1024, emit, (const float* x, int cols, EMIT_PARAMETERS)) {
    depend();
    DYNAMIC_SHARED(float, row);
    int largest = 0;
    read_row(x + static_cast<i64>(blockIdx.x) * cols, cols, [&](int c, float value) {
        row[place(c)] = value;
        largest = maximum(largest, magnitude(value));
    });
    emit_row(row, cols, largest, EMIT_ARGUMENTS);
}

// Rows that stay in registers: a warp has a run of 1024 values, four of each 128 a lane, so that blocks of a Hadamard transform, at most as many, are
// within it. A norm (`weight` null: none) goes over groups of whole 128; `square`: relu².
KERNEL(1024, emit_rows, (const float* x, const float* weight, float eps, int group, int square, int cols, EMIT_PARAMETERS)) {
    SHARED(float, sums, 32 * RUN);
    SHARED(int, partial, 32);
    depend();
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * RUN;
    const i64 token = blockIdx.x, start = token * cols;
    const auto at = [&](int i) { return (first + i) * 32 + lane; };
    float4 held[RUN];
#pragma unroll
    for (int i = 0; i < RUN; ++i) held[i] = at(i) < cols / 4 ? reinterpret_cast<const float4*>(x + start)[at(i)] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (weight) {
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            const float4& v = held[i];
            const float sum = warp_sum(fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w))));
            if (lane == 0) sums[first + i] = sum;
        }
        __syncthreads();
        // Lane i has the factor of segment i.
        const int segments = group / 128, begin = minimum(first + lane % RUN, cols / 128 - 1) / segments * segments;
        float total = 0.0f;
#pragma unroll 8
        for (int segment = 0; segment < segments; ++segment) total += sums[begin + segment];
        const float own_factor = __fdiv_rn(1.0f, __fsqrt_rn(total / static_cast<float>(group) + eps));
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            const float factor = shuffle(own_factor, i);
            if (at(i) >= cols / 4) continue;
            const float4 own = reinterpret_cast<const float4*>(weight)[at(i)];
            held[i] = make_float4(held[i].x * factor * own.x, held[i].y * factor * own.y, held[i].z * factor * own.z, held[i].w * factor * own.w);
        }
    }
    if (square)
#pragma unroll
        for (int i = 0; i < RUN; ++i) held[i] = make_float4(square_of(held[i].x), square_of(held[i].y), square_of(held[i].z), square_of(held[i].w));
    if (hadamard > 1) turn(held, hadamard);
    if (out)
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (at(i) < cols / 4) reinterpret_cast<float4*>(out + start)[at(i)] = held[i];
    if (!codes) return;
    int largest = 0;
#pragma unroll
    for (int i = 0; i < RUN; ++i) largest = maximum(largest, maximum(maximum(magnitude(held[i].x), magnitude(held[i].y)), maximum(magnitude(held[i].z), magnitude(held[i].w))));
    const float scale = static_scale ? *static_scale : __fdiv_rn(bits_float(static_cast<u32>(block_max(largest, partial))), 127.0f);
    const Rounding rounding(scale);
    if (threadIdx.x == 0) scales[token] = scale;
    const int width = ld(cols);
    u32* words = reinterpret_cast<u32*>(codes + token * width);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        if (at(i) >= width / 4) break;
        const u32 word = rounding.codes(rounding.within(held[i].x), rounding.within(held[i].y), rounding.within(held[i].z), rounding.within(held[i].w));
        words[at(i)] = scale > 0.0f && at(i) < cols / 4 ? word : 0;
    }
}

// What a norm or relu² and a Hadamard transform leave of a single token, as floats: a block has `width` values, a group of the norm (`weight` null:
// none) and whole blocks of the transform. It takes little of a multiprocessor, so that it waits beside the linear in front of it.
KERNEL(256, turn_row, (const float* x, const float* weight, float eps, int square, int width, int hadamard, float* out)) {
    constexpr int PART = 256, HELD = 2;
    SHARED(float, row, 4 * PART * HELD);
    SHARED(float, sums, PART / 32);
    launch_next();
    const int thread = threadIdx.x, lane = thread % 32;
    const i64 start = static_cast<i64>(blockIdx.x) * width;
    const float4 *from = reinterpret_cast<const float4*>(x + start), *weights = reinterpret_cast<const float4*>(weight + start);
    float4 held[HELD], own[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        if (weight && thread + i * PART < width / 4) own[i] = weights[thread + i * PART];
    wait_previous();
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = thread + i * PART < width / 4 ? from[thread + i * PART] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (weight) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) sum += fmaf(held[i].x, held[i].x, fmaf(held[i].y, held[i].y, fmaf(held[i].z, held[i].z, held[i].w * held[i].w)));
        sum = warp_sum(sum);
        if (lane == 0) sums[thread / 32] = sum;
        __syncthreads();
        float total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < PART / 32; ++warp) total += sums[warp];
        const float factor = __fdiv_rn(1.0f, __fsqrt_rn(total / static_cast<float>(width) + eps));
#pragma unroll
        for (int i = 0; i < HELD; ++i) held[i] = make_float4(held[i].x * factor * own[i].x, held[i].y * factor * own[i].y, held[i].z * factor * own[i].z, held[i].w * factor * own[i].w);
    }
    const float scale = turn_scale(hadamard);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        float4& v = held[i];
        if (square) v = make_float4(square_of(v.x), square_of(v.y), square_of(v.z), square_of(v.w));
        v = turn_four(v, hadamard, hadamard);
        const int at = thread + i * PART;
        if (at >= width / 4) continue;
        if (hadamard > 128) reinterpret_cast<float4*>(row)[at] = v;
        else reinterpret_cast<float4*>(out + start)[at] = times(v, scale);
    }
    if (hadamard <= 128) return;
    __syncthreads();
    // Across segments: a thread has the values of a block at one place of each.
    const int segments = hadamard / 128;
    for (int index = thread; index < width / segments; index += PART) {
        const int first = index / 128 * hadamard + index % 128;
        float v[RUN];
#pragma unroll
        for (int i = 0; i < RUN; ++i) v[i] = i < segments ? row[first + 128 * i] : 0.0f;
#pragma unroll
        for (int half = 1; half < RUN; half *= 2) {
            if (half >= segments) break;
#pragma unroll
            for (int i = 0; i < RUN; ++i) {
                if (i & half) continue;
                const float a = v[i], b = v[i + half];
                v[i] = a + b;
                v[i + half] = a - b;
            }
        }
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (i < segments) out[start + first + 128 * i] = __fmul_rn(v[i], scale);
    }
}
