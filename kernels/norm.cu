// Norms and relu², and the forms in which they hand a row on: floats, int8 codes with a scale, either after a block-Hadamard
// transform. One block a token; the row stays in shared memory, so that it is read and written once. With one token a single
// block works, so what counts is how much it has under way: rows are read six vectors a thread at a time.
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
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(size)));
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
        const float positive = fmaxf(value, 0.0f);
        row[place(c)] = positive * positive;
        largest = maximum(largest, magnitude(positive * positive));
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
