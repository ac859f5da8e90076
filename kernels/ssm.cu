// One step of the selective recurrence: `S ← exp(dt·A)·S + dt·x ⊗ B`, `y = S·C + D·x`, dt = softplus(raw + bias) clamped.
// State `[slots, heads, head_dim, state]` in f32, f16 or int8 with one scale a row; arithmetic in f32. A row of the state is a
// warp's, four consecutive values a lane. y is read out before the new state is rounded to what stores it. x, B, C and dt are floats
// or codes; of codes, C·B is an integer product: `y = exp(dt·A)·S·C + (C·B)·dt·x + D·x` with the state as it was. What is stored is y
// times its gate; of codes, whose heads may be rotated, a block takes a whole head, OWN rows a warp at a time, and turns its y back first.
#include "gate.cuh"
#include "rotate.cuh"

namespace {

constexpr int OWN = 4;  // rows of a warp at a time
constexpr int MAX_THREADS = 640;
constexpr int MAX_HEAD = 32 * COUNT;

struct Four {
    float v[4];
};

// Four values as they are stored, and what they stand for.
DEVICE float4 fetch(const float* at) { return *reinterpret_cast<const float4*>(at); }
DEVICE uint2 fetch(const f16* at) { return *reinterpret_cast<const uint2*>(at); }
DEVICE u32 fetch(const i8* at) { return *reinterpret_cast<const u32*>(at); }

DEVICE Four expand(float4 x, float) { return {{x.x, x.y, x.z, x.w}}; }

DEVICE Four expand(uint2 x, float) {
    const f16 a = {static_cast<unsigned short>(x.x)}, b = {static_cast<unsigned short>(x.x >> 16)}, c = {static_cast<unsigned short>(x.y)}, d = {static_cast<unsigned short>(x.y >> 16)};
    return {{widen(a), widen(b), widen(c), widen(d)}};
}

DEVICE Four expand(u32 x, float scale) {
    Four out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.v[i] = __fmul_rn(static_cast<float>(static_cast<i8>(x >> 8 * i)), scale);
    return out;
}

template <class State> DEVICE Four read(const State* at, float scale) { return expand(fetch(at), scale); }

DEVICE void write(float* at, const Four& x, float) { *reinterpret_cast<float4*>(at) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]); }

DEVICE void write(f16* at, const Four& x, float) {
    *reinterpret_cast<uint2*>(at) = make_uint2(narrow_f16(x.v[0]).bits | static_cast<u32>(narrow_f16(x.v[1]).bits) << 16,
                                               narrow_f16(x.v[2]).bits | static_cast<u32>(narrow_f16(x.v[3]).bits) << 16);
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

// What a step reads of the token of a slot: floats `xbc` [slots, channels], and dt in a row of `projected` at `dt_offset`.
struct Floats {
    const float *xbc, *projected;
    int channels, stride, dt_offset;
    static constexpr bool INTEGER = false;
    float x(int slot, int c, int) const { return xbc[static_cast<i64>(slot) * channels + c]; }
    Four four(int slot, int c, int) const { return read(xbc + static_cast<i64>(slot) * channels + c, 1.0f); }
    float dt(int slot, int head) const { return projected[static_cast<i64>(slot) * stride + dt_offset + head]; }
    u32 word(int, int) const { return 0; }
    float scale(int, int, int) const { return 1.0f; }
};

// x | B | C as codes: scales `[slots, spans]`, or `fixed` ones a channel.
struct Codes {
    const i8* xbc;
    const float* projected;
    int channels, stride, dt_offset, spans;
    const float *scales, *fixed;
    static constexpr bool INTEGER = true;
    float scale(int slot, int c, int span) const { return fixed ? fixed[c] : scales[slot * spans + span]; }
    float x(int slot, int c, int span) const { return __fmul_rn(static_cast<float>(xbc[static_cast<i64>(slot) * channels + c]), scale(slot, c, span)); }
    Four four(int slot, int c, int span) const { return read(xbc + static_cast<i64>(slot) * channels + c, scale(slot, c, span)); }
    u32 word(int slot, int c) const { return *reinterpret_cast<const u32*>(xbc + static_cast<i64>(slot) * channels + c); }
    float dt(int slot, int head) const { return projected[static_cast<i64>(slot) * stride + dt_offset + head]; }
};

struct Mixer {
    const float *a, *d, *dt_bias;
    float dt_min, dt_max;
    int heads, head_dim, groups, size;
};

// CHUNKS: vectors of four states that a lane has of a row, 128 states each. `head_block`: of the rotation of heads of codes, 1 where there is none.
template <class State, int CHUNKS, class Input>
DEVICE void step(const Input& in, const Mixer& m, State* state, float* state_scales, const Gate& gate, float* y, int head_block = 1) {
    SHARED(float, turned, MAX_HEAD);
    SHARED(float, factors, MAX_HEAD);
    const int head = blockIdx.x, slot = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int inner = m.heads * m.head_dim, group = head / (m.heads / m.groups), size = m.size;
    const int b_offset = inner + group * size, c_offset = inner + (m.groups + group) * size;
    const i64 first = (static_cast<i64>(slot) * m.heads + head) * m.head_dim;
    int start = blockIdx.y * OWN * warps;
    const int end = Input::INTEGER ? m.head_dim : minimum(m.head_dim, start + OWN * warps);
    decltype(fetch(state)) held[OWN][CHUNKS];
    // Lane i has what there is one of in row i of the warp.
    float scales = 1.0f, z = 0.0f, x = 0.0f, out = 0.0f;
    const auto row = [&](int own) { return start + own * warps + warp; };
    const auto keeps = [&] { return lane < OWN && row(lane) < end; };
    const auto ask = [&] {
        if (keeps()) {
            if (scaled<State>) scales = state_scales[first + row(lane)];
            if (!Input::INTEGER) z = gate.raw(slot, head * m.head_dim + row(lane));
        }
#pragma unroll
        for (int own = 0; own < OWN; ++own) {
            const int p = row(own);
            if (p >= end) continue;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                const int n = chunk * 128 + lane * 4;
                if (n < size) held[own][chunk] = fetch(state + (first + p) * size + n);
            }
        }
    };
    const auto ask_inputs = [&] {
        if (!keeps()) return;
        x = in.x(slot, head * m.head_dim + row(lane), head);
        if (Input::INTEGER) z = gate.raw(slot, head * m.head_dim + row(lane));
    };
    // Everything that is read from memory is under way before the first of it is used, states too: they are widened later. They are read while the
    // launch in front still runs, and of floats dt and z, too: that one runs since `conv_step`, `conv_i8_step` or `fixed_conv_step`, which let nothing begin before all in
    // front of themselves is done, wrote none of them.
    ask();
    float raw = Input::INTEGER ? 0.0f : in.dt(slot, head);
    const float bias = m.dt_bias[head], a = m.a[head], skip = m.d[head];
    launch_next();
    wait_previous();
    if (Input::INTEGER) raw = in.dt(slot, head);
    ask_inputs();
    Four b[CHUNKS], c[CHUNKS];
    int product = 0;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int n = chunk * 128 + lane * 4;
        if (n >= size) continue;
        b[chunk] = in.four(slot, b_offset + n, m.heads + group);
        c[chunk] = in.four(slot, c_offset + n, m.heads + m.groups + group);
        if (Input::INTEGER) product = dot4(static_cast<int>(in.word(slot, b_offset + n)), static_cast<int>(in.word(slot, c_offset + n)), product);
    }
    const float dt = fminf(fmaxf(softplus(raw + bias), m.dt_min), m.dt_max);
    const float decay = expf(dt * a);
    float share = 0.0f;  // C·B
    if (Input::INTEGER) {
        for (int mask = 16; mask > 0; mask /= 2) product += shuffle_xor(product, mask);
        share = static_cast<float>(product) * (in.scale(slot, c_offset, m.heads + m.groups + group) * in.scale(slot, b_offset, m.heads + group));
    }
    for (;;) {
#pragma unroll
        for (int own = 0; own < OWN; ++own) {
            const int p = row(own);
            if (p >= end) break;
            Four s[CHUNKS];
            const float own_x = shuffle(x, own), held_scale = scaled<State> ? shuffle(scales, own) : 1.0f;
            float sum = 0.0f, largest = 0.0f;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                if (chunk * 128 + lane * 4 >= size) continue;
                s[chunk] = expand(held[own][chunk], held_scale);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& value = s[chunk].v[i];
                    if (Input::INTEGER) sum = fmaf(value, c[chunk].v[i], sum);
                    value = value * decay + dt * own_x * b[chunk].v[i];
                    if (!Input::INTEGER) sum = fmaf(value, c[chunk].v[i], sum);
                    if (scaled<State>) largest = fmaxf(largest, fabsf(value));
                }
            }
            sum = warp_sum(sum);
            const float scale = scaled<State> ? __fdiv_rn(warp_max(largest), 127.0f) : 1.0f;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                const int n = chunk * 128 + lane * 4;
                if (n < size) write(state + (first + p) * size + n, s[chunk], scale);
            }
            if (lane == own) out = sum;
            if (scaled<State> && lane == own) scales = scale;
        }
        if (keeps()) {
            const int p = row(lane);
            if (scaled<State>) state_scales[first + p] = scales;
            if (Input::INTEGER) out = decay * out + share * dt * x;
            out += skip * x;
            const float factor = gate.factor(z);
            if (Input::INTEGER) turned[p] = out, factors[p] = factor;
            else y[static_cast<i64>(slot) * inner + head * m.head_dim + p] = out * factor;
        }
        if (!Input::INTEGER) return;
        start += OWN * warps;
        if (start >= end) break;
        ask();
        ask_inputs();
    }
    __syncthreads();
    if (warp > 0) return;
    float v[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = lane + 32 * i < m.head_dim ? turned[lane + 32 * i] : 0.0f;
    rotate(v, m.head_dim, head_block);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (lane + 32 * i < m.head_dim) y[static_cast<i64>(slot) * inner + head * m.head_dim + lane + 32 * i] = v[i] * factors[lane + 32 * i];
}

}  // namespace

#define STEP(name, int8_name, State)                                                                                                  \
    KERNEL(128, name, (const float* xbc, const float* projected, int stride, int dt_offset, const float* a, const float* d, const float* dt_bias, float dt_min, \
                       float dt_max, int heads, int head_dim, int groups, int state_size, State* state, float* state_scales, GATE_PARAMETERS, float* y)) { \
        const Floats in = {xbc, projected, heads * head_dim + 2 * groups * state_size, stride, dt_offset};                                      \
        const Mixer mixer = {a, d, dt_bias, dt_min, dt_max, heads, head_dim, groups, state_size};                                               \
        if (state_size <= 128) step<State, 1>(in, mixer, state, state_scales, {GATE_ARGUMENTS}, y);                                 \
        else step<State, 2>(in, mixer, state, state_scales, {GATE_ARGUMENTS}, y);                                                   \
    }                                                                                                                                           \
    KERNEL(MAX_THREADS, int8_name, (const i8* xbc, const float* scales, const float* fixed, const float* projected, int stride, int dt_offset, \
                       const float* a, const float* d, const float* dt_bias, float dt_min, float dt_max, int heads, int head_dim, int groups, int state_size, State* state, float* state_scales, GATE_PARAMETERS, float* y, int head_block)) { \
        const Codes in = {xbc, projected, heads * head_dim + 2 * groups * state_size, stride, dt_offset, heads + 2 * groups, scales, fixed};    \
        const Mixer mixer = {a, d, dt_bias, dt_min, dt_max, heads, head_dim, groups, state_size};                                               \
        if (state_size <= 128) step<State, 1>(in, mixer, state, state_scales, {GATE_ARGUMENTS}, y, head_block);                                 \
        else step<State, 2>(in, mixer, state, state_scales, {GATE_ARGUMENTS}, y, head_block);                                                   \
    }

STEP(ssm_step_f32, ssm_step_codes_f32, float)
STEP(ssm_step_f16, ssm_step_codes_f16, f16)
STEP(ssm_step_i8, ssm_step_codes_i8, i8)

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
