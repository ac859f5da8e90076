// One step of the selective recurrence: `S ← exp(dt·A)·S + dt·x ⊗ B`, `y = S·C + D·x`, dt = softplus(raw + bias) clamped.
// State `[slots, heads, head_dim, state]` in f32, f16 or int8 with one scale a row; arithmetic in f32. A row of the state is a
// warp's, four consecutive values a lane. y is read out before the new state is rounded to what stores it.
#include "device.cuh"

namespace {

constexpr int ROWS = 16;  // of a block
constexpr int WARPS = 4;

struct Four {
    float v[4];
};

DEVICE Four read(const float* at, float) {
    const float4 x = *reinterpret_cast<const float4*>(at);
    return {{x.x, x.y, x.z, x.w}};
}

DEVICE Four read(const f16* at, float) {
    const uint2 x = *reinterpret_cast<const uint2*>(at);
    const f16 a = {static_cast<unsigned short>(x.x)}, b = {static_cast<unsigned short>(x.x >> 16)}, c = {static_cast<unsigned short>(x.y)}, d = {static_cast<unsigned short>(x.y >> 16)};
    return {{widen(a), widen(b), widen(c), widen(d)}};
}

DEVICE Four read(const i8* at, float scale) {
    const u32 x = *reinterpret_cast<const u32*>(at);
    Four out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.v[i] = __fmul_rn(static_cast<float>(static_cast<i8>(x >> 8 * i)), scale);
    return out;
}

DEVICE void write(float* at, const Four& x, float) { *reinterpret_cast<float4*>(at) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]); }

DEVICE void write(f16* at, const Four& x, float) {
    *reinterpret_cast<uint2*>(at) = make_uint2(narrow<f16>(x.v[0]).bits | static_cast<u32>(narrow<f16>(x.v[1]).bits) << 16,
                                               narrow<f16>(x.v[2]).bits | static_cast<u32>(narrow<f16>(x.v[3]).bits) << 16);
}

DEVICE void write(i8* at, const Four& x, float scale) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (scale > 0.0f) word |= (static_cast<u32>(round_even(fminf(fmaxf(__fdiv_rn(x.v[i], scale), -127.0f), 127.0f))) & 0xff) << 8 * i;
    *reinterpret_cast<u32*>(at) = word;
}

template <class State> constexpr bool scaled = false;
template <> constexpr bool scaled<i8> = true;

// CHUNKS: vectors of four states that a lane has of a row, 128 states each.
template <class State, int CHUNKS>
DEVICE void step(const float* xbc, const float* projected, int stride, const float* a, const float* d, const float* dt_bias, float dt_min, float dt_max, int heads, int head_dim, int groups, int size, State* state, float* state_scales, float* y) {
    constexpr int OWN = ROWS / WARPS;
    const int head = blockIdx.x, slot = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int inner = heads * head_dim, channels = inner + 2 * groups * size, group = head / (heads / groups);
    const float* row = xbc + static_cast<i64>(slot) * channels;
    const i64 first = (static_cast<i64>(slot) * heads + head) * head_dim;
    // Everything that is read from memory is under way before the first of it is used.
    Four s[OWN][CHUNKS], b[CHUNKS], c[CHUNKS];
    float x[OWN];
#pragma unroll
    for (int own = 0; own < OWN; ++own) {
        const int p = blockIdx.y * ROWS + own * WARPS + warp;
        if (p >= head_dim) continue;
        x[own] = row[head * head_dim + p];
        const float scale = scaled<State> ? state_scales[first + p] : 1.0f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int n = chunk * 128 + lane * 4;
            if (n < size) s[own][chunk] = read(state + (first + p) * size + n, scale);
        }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int n = chunk * 128 + lane * 4;
        if (n >= size) continue;
        b[chunk] = read(row + inner + group * size + n, 1.0f);
        c[chunk] = read(row + inner + (groups + group) * size + n, 1.0f);
    }
    const float raw = projected[static_cast<i64>(slot) * stride + inner + channels + head];
    const float dt = fminf(fmaxf(softplus(raw + dt_bias[head]), dt_min), dt_max);
    const float decay = expf(dt * a[head]);
#pragma unroll
    for (int own = 0; own < OWN; ++own) {
        const int p = blockIdx.y * ROWS + own * WARPS + warp;
        if (p >= head_dim) break;
        float sum = 0.0f, largest = 0.0f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (chunk * 128 + lane * 4 >= size) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& value = s[own][chunk].v[i];
                value = value * decay + dt * x[own] * b[chunk].v[i];
                sum = fmaf(value, c[chunk].v[i], sum);
                if (scaled<State>) largest = fmaxf(largest, fabsf(value));
            }
        }
        sum = warp_sum(sum);
        const float scale = scaled<State> ? __fdiv_rn(warp_max(largest), 127.0f) : 1.0f;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            const int n = chunk * 128 + lane * 4;
            if (n < size) write(state + (first + p) * size + n, s[own][chunk], scale);
        }
        if (lane == 0) {
            if (scaled<State>) state_scales[first + p] = scale;
            y[static_cast<i64>(slot) * inner + head * head_dim + p] = sum + d[head] * x[own];
        }
    }
}

}  // namespace

#define STEP(name, State)                                                                                                                       \
    KERNEL(128, name, (const float* xbc, const float* projected, int stride, const float* a, const float* d, const float* dt_bias, float dt_min, \
                       float dt_max, int heads, int head_dim, int groups, int state_size, State* state, float* state_scales, float* y)) { depend();       \
        if (state_size <= 128) step<State, 1>(xbc, projected, stride, a, d, dt_bias, dt_min, dt_max, heads, head_dim, groups, state_size, state, state_scales, y); \
        else step<State, 2>(xbc, projected, stride, a, d, dt_bias, dt_min, dt_max, heads, head_dim, groups, state_size, state, state_scales, y); \
    }

STEP(ssm_step_f32, float)
STEP(ssm_step_f16, f16)
STEP(ssm_step_i8, i8)

// States between f32, in which the scan over a sequence leaves them, and what stores them. A block a row of `size`.
#define CONVERT(name, State)                                                                                                                    \
    KERNEL(64, state_to_##name, (const float* from, int size, State* to, float* scales)) { depend();                                                      \
        SHARED(float, largest, 2);                                                                                                              \
        const i64 row = blockIdx.x;                                                                                                             \
        const int n = threadIdx.x * 4;                                                                                                          \
        Four x = {};                                                                                                                            \
        if (n < size) x = read(from + row * size + n, 1.0f);                                                                                    \
        const float own = warp_max(fmaxf(fmaxf(fabsf(x.v[0]), fabsf(x.v[1])), fmaxf(fabsf(x.v[2]), fabsf(x.v[3]))));                            \
        if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = own;                                                                             \
        __syncthreads();                                                                                                                        \
        const float scale = scaled<State> ? __fdiv_rn(fmaxf(largest[0], largest[1]), 127.0f) : 1.0f;                                            \
        if (n < size) write(to + row * size + n, x, scale);                                                                                     \
        if (scaled<State> && threadIdx.x == 0) scales[row] = scale;                                                                             \
    }                                                                                                                                           \
    KERNEL(64, state_from_##name, (const State* from, const float* scales, int size, float* to)) { depend();                                              \
        const i64 row = blockIdx.x;                                                                                                             \
        const int n = threadIdx.x * 4;                                                                                                          \
        if (n < size) write(to + row * size + n, read(from + row * size + n, scaled<State> ? scales[row] : 1.0f), 1.0f);                        \
    }

CONVERT(f16, f16)
CONVERT(i8, i8)
