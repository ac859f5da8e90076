// What passes through a Mamba-2 mixer as int8 under static scales, one a channel: rounding, the convolution of four taps and gates go element by
// element, and only rotations look at other channels. A thread has four channels, a warp 128, so that blocks of a rotation have up to so many
// and begin at multiples of their size. Run-time scales and other sizes are those of `internals.cu`.
#include "rotate.cuh"
#include "rows.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int TOKENS = 8;  // of a thread
constexpr int AHEAD = 4;   // tokens read before the first of them is used; all eight unrolled would not stay in the instruction cache
constexpr int TAPS = 4;

// Static scales of four channels.
struct Scales {
    float4 scale;
    Rounding a, b, c, d;
    u32 mask;  // of the codes of scales that are not 0

    explicit Scales(const float* at) : scale(*reinterpret_cast<const float4*>(at)), a(scale.x), b(scale.y), c(scale.z), d(scale.w) {
        mask = (scale.x > 0.0f ? 0xffu : 0) | (scale.y > 0.0f ? 0xff00u : 0) | (scale.z > 0.0f ? 0xff0000u : 0) | (scale.w > 0.0f ? 0xff000000u : 0);
    }
    // Codes cannot say that something is not a number: `fault` does.
    u32 codes(const float4& x, int* fault) const {
        if (!(maximum(maximum(magnitude(x.x), magnitude(x.y)), maximum(magnitude(x.z), magnitude(x.w))) < 0x7f800000)) *fault = 1;
        return low_bytes(a.code(a.within(x.x)), b.code(b.within(x.y)), c.code(c.within(x.z)), d.code(d.within(x.w))) & mask;
    }
    float4 floats(u32 codes) const {
        const auto one = [&](int i, float scale) { return __fmul_rn(static_cast<float>(static_cast<i8>(codes >> 8 * i)), scale); };
        return make_float4(one(0, scale.x), one(1, scale.y), one(2, scale.z), one(3, scale.w));
    }
};

// Orthonormal transform of each `block` channels; no lane's block is larger than `largest`.
DEVICE float4 rotate(const float4& v, int block, int largest) {
    const float4 turned = turn_four(v, block, largest);
    return block > 1 ? times(turned, turn_scale(block)) : turned;
}

// The last four codes of each of four channels, oldest first, and what the convolution makes of them.
struct Window {
    u32 of[4] = {};

    void push(u32 codes) {
#pragma unroll
        for (int i = 0; i < 4; ++i) of[i] = push_byte(of[i], codes, i);
    }
    float4 convolved(const uint4& taps, const float4& scale, const float4& bias) const {
        const auto one = [](u32 inputs, u32 taps, float scale, float bias) { return silu(static_cast<float>(dot4(static_cast<int>(inputs), static_cast<int>(taps), 0)) * scale + bias); };
        return make_float4(one(of[0], taps.x, scale.x, bias.x), one(of[1], taps.y, scale.y, bias.y), one(of[2], taps.z, scale.z, bias.z), one(of[3], taps.w, scale.w, bias.w));
    }
};

DEVICE u32 word_at(const i8* at) { return *reinterpret_cast<const u32*>(at); }
DEVICE float4 four_at(const float* at) { return *reinterpret_cast<const float4*>(at); }

}  // namespace

// Codes of rows of `width` channels.
KERNEL(128, fixed_round, (const float* x, int rows, int width, const float* scales, i8* codes, int* fault)) {
    launch_next();
    const int c = 4 * (blockIdx.x * THREADS + threadIdx.x), first = blockIdx.y * TOKENS;
    if (c >= width) return;
    const Scales own(scales + c);
    wait_previous();
#pragma unroll 1
    for (int begin = first; begin < minimum(first + TOKENS, rows); begin += AHEAD) {
        float4 held[AHEAD];
#pragma unroll
        for (int t = 0; t < AHEAD; ++t)
            if (begin + t < rows) held[t] = four_at(x + static_cast<i64>(begin + t) * width + c);
#pragma unroll
        for (int t = 0; t < AHEAD; ++t)
            if (begin + t < rows) *reinterpret_cast<u32*>(codes + static_cast<i64>(begin + t) * width + c) = own.codes(held[t], fault);
    }
}

// x | B | C of sequences behind the convolution, SiLU and rotation; x has `inner` of the channels.
KERNEL(128, fixed_conv, (const i8* projected, int stride, int inner, const i8* taps, const float* tap_scales, const float* bias, int channels, int head_block, int state_block, const int* sequences, const i8* windows, const float* scales, i8* out, int* fault)) {
    depend();
    const int begin = sequences[4 * blockIdx.z], length = sequences[4 * blockIdx.z + 1] - begin, from = sequences[4 * blockIdx.z + 2];
    const int own = 4 * (blockIdx.x * THREADS + threadIdx.x), c = minimum(own, channels - 4), first = blockIdx.y * TOKENS;
    if (first >= length) return;
    const i8 *tokens = projected + static_cast<i64>(begin) * stride + inner + c, *window = from < 0 ? nullptr : windows + static_cast<i64>(from) * (TAPS - 1) * channels + c;
    const auto input = [&](int at) {
        if (at >= 0) return at < length ? word_at(tokens + static_cast<i64>(at) * stride) : 0;
        return window ? word_at(window + static_cast<i64>(TAPS - 1 + at) * channels) : 0;
    };
    u32 held[AHEAD];
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) held[k] = input(first - TAPS + 1 + k);
    const uint4 weights = *reinterpret_cast<const uint4*>(taps + TAPS * c);
    const float4 factor = four_at(tap_scales + c), start = four_at(bias + c);
    const Scales behind(scales + c);
    const int block = c < inner ? head_block : state_block, largest = maximum(head_block, state_block);
    Window past;
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) past.push(held[k]);
#pragma unroll 1
    for (int t = first; t < minimum(first + TOKENS, length); t += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) held[i] = input(t + i);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (t + i >= length) break;
            past.push(held[i]);
            const u32 codes = behind.codes(rotate(past.convolved(weights, factor, start), block, largest), fault);
            if (own < channels) *reinterpret_cast<u32*>(out + static_cast<i64>(begin + t + i) * channels + c) = codes;
        }
    }
}

// A step of each slot: rounds its row z | x | B | C | dt, leaves in `widened` [slots, inner + heads] what the codes of z and dt stand for, and of
// x | B | C, whose windows move on, the same as above.
KERNEL(128, fixed_conv_step, (const float* projected, const float* scales_in, const i8* taps, const float* tap_scales, const float* bias, int inner, int channels, int heads, int head_block, int state_block, i8* windows, const float* scales, float* widened, i8* out, int* fault)) {
    const int width = inner + channels + heads, slot = blockIdx.y;
    const int own = 4 * (blockIdx.x * THREADS + threadIdx.x), p = minimum(own, width - 4), c = p - inner;
    // What no launch writes is read while the launch in front still runs.
    const Scales in_front(scales_in + p);
    const bool convolved = c >= 0 && c < channels;
    const int channel = convolved ? c : 0;
    i8* const window = windows + static_cast<i64>(slot) * (TAPS - 1) * channels + channel;
    const uint4 weights = *reinterpret_cast<const uint4*>(taps + TAPS * channel);
    const float4 factor = four_at(tap_scales + channel), start = four_at(bias + channel);
    const Scales behind(scales + channel);
    // In this order: `ssm_step_*` reads ahead what is written before this launch.
    wait_previous();
    launch_next();
    const float4 x = four_at(projected + static_cast<i64>(slot) * width + p);
    u32 held[TAPS];
    Window past;
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) held[k] = convolved ? word_at(window + static_cast<i64>(k) * channels) : 0;
    held[TAPS - 1] = in_front.codes(x, fault);
#pragma unroll
    for (int k = 0; k < TAPS; ++k) past.push(held[k]);
    const int block = !convolved ? 1 : c < inner ? head_block : state_block;
    const u32 codes = behind.codes(rotate(past.convolved(weights, factor, start), block, maximum(head_block, state_block)), fault);
    if (own >= width) return;
    if (!convolved) {
        *reinterpret_cast<float4*>(widened + static_cast<i64>(slot) * (inner + heads) + (c < 0 ? p : p - channels)) = in_front.floats(held[TAPS - 1]);
        return;
    }
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) *reinterpret_cast<u32*>(window + static_cast<i64>(k) * channels) = held[k + 1];
    *reinterpret_cast<u32*>(out + static_cast<i64>(slot) * channels + c) = codes;
}

// y of rotated heads turned back, in place, and multiplied by silu(z), z being the first columns of codes.
KERNEL(128, fixed_turn, (float* y, int rows, int inner, int block, const i8* z, int stride, const float* scales)) {
    launch_next();
    const int own = 4 * (blockIdx.x * THREADS + threadIdx.x), c = minimum(own, inner - 4), first = blockIdx.y * TOKENS;
    const Scales in_front(scales + c);
    wait_previous();
#pragma unroll 1
    for (int begin = first; begin < minimum(first + TOKENS, rows); begin += AHEAD) {
        float4 held[AHEAD];
        u32 gates[AHEAD];
#pragma unroll
        for (int t = 0; t < AHEAD; ++t) {
            const i64 row = minimum(begin + t, rows - 1);
            held[t] = four_at(y + row * inner + c), gates[t] = word_at(z + row * stride + c);
        }
#pragma unroll
        for (int t = 0; t < AHEAD; ++t) {
            const float4 v = rotate(held[t], block, block), gate = in_front.floats(gates[t]);
            if (own < inner && begin + t < rows)
                *reinterpret_cast<float4*>(y + static_cast<i64>(begin + t) * inner + c) = make_float4(v.x * silu(gate.x), v.y * silu(gate.y), v.z * silu(gate.z), v.w * silu(gate.w));
        }
    }
}
