// What passes through a Mamba-2 mixer as int8, and its rotation. A *span* is the channels that share a run-time scale: a head of z, x
// or y, a state group of B or C, or all of dt. A row has `heads` spans of `head_dim` channels, then `groups` of `state`, then one of
// `rest` (0: none). A warp takes a span, lane l its channels l, l + 32, …; scales are `[rows, spans]`, or `fixed`, one a channel.
#include "gate.cuh"
#include "rotate.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int TOKENS = 8;  // of a block of the convolution

struct Layout {
    int heads, head_dim, head_block, groups, state, state_block, rest;
};

struct Span {
    int first, width, block;  // block: of its rotation, 1 where there is none
};

DEVICE int spans_of(const Layout& layout) { return layout.heads + layout.groups + (layout.rest > 0); }

DEVICE Span span_of(const Layout& layout, int index) {
    if (index < layout.heads) return {index * layout.head_dim, layout.head_dim, layout.head_block};
    const int behind = layout.heads * layout.head_dim;
    if (index < layout.heads + layout.groups) return {behind + (index - layout.heads) * layout.state, layout.state, layout.state_block};
    return {behind + layout.groups * layout.state, layout.rest, 1};
}

// round-half-even(x / scale) within ±127, 0 where the scale is 0.
DEVICE i8 code_of(float x, float scale) {
    return scale > 0.0f ? static_cast<i8>(round_even(fminf(fmaxf(__fdiv_rn(x, scale), -127.0f), 127.0f))) : static_cast<i8>(0);
}

// A span's codes under `fixed`, of its first channel, or under absmax / 127, which it returns. Codes cannot say that something is not a number:
// `fault` does.
DEVICE float codes_of_span(const float (&v)[COUNT], i8 (&codes)[COUNT], int width, const float* fixed, int* fault) {
    const int lane = threadIdx.x % 32;
    float largest = 0.0f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (lane + 32 * i < width) {
            largest = fmaxf(largest, fabsf(v[i]));
            finite = finite && fabsf(v[i]) < INFINITY;
        }
    if (!finite) *fault = 1;
    const float found = __fdiv_rn(warp_max(largest), 127.0f);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int c = lane + 32 * i;
        codes[i] = c < width ? code_of(v[i], fixed ? fixed[c] : found) : static_cast<i8>(0);
    }
    return found;
}

// Leaves a span's codes, and its scale unless that is `fixed`.
DEVICE void round_span(const float (&v)[COUNT], int width, const float* fixed, i8* codes, float* scale, int* fault) {
    const int lane = threadIdx.x % 32;
    i8 rounded[COUNT];
    const float found = codes_of_span(v, rounded, width, fixed, fault);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (lane + 32 * i < width) codes[lane + 32 * i] = rounded[i];
    if (!fixed && lane == 0) *scale = found;
}

struct Sequence {
    int begin, end, from, to;
};

DEVICE Sequence sequence(const int* sequences, int index) {
    return {sequences[4 * index], sequences[4 * index + 1], sequences[4 * index + 2], sequences[4 * index + 3]};
}

}  // namespace

KERNEL(128, spans, (const float* x, int heads, int head_dim, int head_block, int groups, int state, int state_block, int rest, float* out, GATE_PARAMETERS, i8* codes, const float* fixed, float* scales, int* fault)) {
    depend();
    const Layout layout = {heads, head_dim, head_block, groups, state, state_block, rest};
    const int index = blockIdx.y * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, count = spans_of(layout);
    if (index >= count) return;
    const Span span = span_of(layout, index);
    const i64 row = blockIdx.x, at = row * (heads * head_dim + groups * state + rest) + span.first;
    float v[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = lane + 32 * i < span.width ? x[at + lane + 32 * i] : 0.0f;
    rotate(v, span.width, span.block);
    const Gate gates = {GATE_ARGUMENTS};
    if (out)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) if (lane + 32 * i < span.width) out[at + lane + 32 * i] = v[i] * gates.at(row, span.first + lane + 32 * i);
    if (codes) round_span(v, span.width, fixed ? fixed + span.first : nullptr, codes + at, scales + row * count + index, fault);
}

// The floats that codes stand for.
KERNEL(128, widen_spans, (const i8* codes, int stride, const float* scales, int scale_stride, const float* fixed, int heads, int head_dim, int groups, int state, float* out)) {
    depend();
    const Layout layout = {heads, head_dim, 1, groups, state, 1, 0};
    const int index = blockIdx.y * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (index >= spans_of(layout)) return;
    const Span span = span_of(layout, index);
    const i64 row = blockIdx.x;
    const float scale = fixed ? 0.0f : scales[row * scale_stride + index];
    for (int c = span.first + lane; c < span.first + span.width; c += 32)
        out[row * (heads * head_dim + groups * state) + c] = __fmul_rn(static_cast<float>(codes[row * stride + c]), fixed ? fixed[c] : scale);
}

// The causal convolution of x | B | C in integers, SiLU, rotation, and the codes of the result. With run-time scales a tap's product is
// scaled by its token's scale and taps are added in f32, oldest first; with static ones (`scales` null, part of `tap_scales`) in int32.
KERNEL(128, conv_i8, (const i8* projected, int stride, int inner, const float* scales, int scale_stride, int scale_offset, const i8* taps, const float* tap_scales, const float* bias, int kernel, int heads, int head_dim, int head_block, int groups, int state, int state_block, const int* sequences, const i8* windows, const float* window_scales, const float* fixed, i8* out, float* out_scales, int* fault)) {
    depend();
    const Layout layout = {heads, head_dim, head_block, groups, state, state_block, 0};
    const int index = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, count = spans_of(layout);
    const Sequence own = sequence(sequences, blockIdx.z);
    const int length = own.end - own.begin, first = blockIdx.y * TOKENS;
    if (index >= count || first >= length) return;
    const Span span = span_of(layout, index);
    const int channels = heads * head_dim + groups * state;
    const i8* tokens = projected + static_cast<i64>(own.begin) * stride + inner + span.first;
    const float* token_scales = scales ? scales + static_cast<i64>(own.begin) * scale_stride + scale_offset + index : nullptr;
    const i8* window = own.from < 0 ? nullptr : windows + static_cast<i64>(own.from) * (kernel - 1) * channels + span.first;
    const float* window_scale = own.from < 0 || !scales ? nullptr : window_scales + static_cast<i64>(own.from) * (kernel - 1) * count + index;
    for (int t = first; t < minimum(first + TOKENS, length); ++t) {
        float v[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int c = lane + 32 * i;
            v[i] = 0.0f;
            if (c >= span.width) continue;
            int integer = 0;
            float sum = 0.0f;
            for (int k = 0; k < kernel; ++k) {
                const int at = t - kernel + 1 + k;  // negative: in the window
                if (at < 0 && !window) continue;
                const int code = at < 0 ? window[static_cast<i64>(kernel - 1 + at) * channels + c] : tokens[static_cast<i64>(at) * stride + c];
                const int product = code * taps[(span.first + c) * kernel + k];
                integer += product;
                if (scales) sum += static_cast<float>(product) * (at < 0 ? window_scale[(kernel - 1 + at) * count] : token_scales[static_cast<i64>(at) * scale_stride]);
            }
            v[i] = silu((scales ? sum : static_cast<float>(integer)) * tap_scales[span.first + c] + bias[span.first + c]);
        }
        rotate(v, span.width, span.block);
        const i64 row = own.begin + t;
        round_span(v, span.width, fixed ? fixed + span.first : nullptr, out + row * channels + span.first, out_scales + row * count + index, fault);
    }
}

// A step of each slot: rounds its row z | x | B | C | dt, leaves in `widened` [slots, inner + heads] what the codes of z and dt stand for, and of
// x | B | C, whose windows move on, the convolution as above. With run-time scales of the windows (`window_scales` not null), or `fixed_in` ones, of a
// row, in `tap_scales` as well.
KERNEL(128, conv_i8_step, (const float* projected, const float* fixed_in, const i8* taps, const float* tap_scales, const float* bias, int kernel, int heads, int head_dim, int head_block, int groups, int state, int state_block, i8* windows, float* window_scales, const float* fixed, float* widened, i8* out, float* out_scales, int* fault)) {
    // In this order: `ssm_step_*` reads ahead what is written before this launch.
    wait_previous();
    launch_next();
    const Layout row = {2 * heads, head_dim, 1, groups, state, 1, heads}, behind = {heads, head_dim, head_block, groups, state, state_block, 0};
    const int index = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, slot = blockIdx.y;
    if (index >= spans_of(row)) return;
    const Span from = span_of(row, index);
    const int inner = heads * head_dim, channels = inner + groups * state, width = inner + channels + heads;
    const float *x = projected + static_cast<i64>(slot) * width + from.first, *own_fixed = fixed_in ? fixed_in + from.first : nullptr;
    float v[COUNT];
    i8 codes[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = lane + 32 * i < from.width ? x[lane + 32 * i] : 0.0f;
    const float found = codes_of_span(v, codes, from.width, own_fixed, fault);
    if (index < heads || index >= 2 * heads + groups) {
        float* to = widened + static_cast<i64>(slot) * (inner + heads) + (index < heads ? from.first : inner);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int c = lane + 32 * i;
            if (c < from.width) to[c] = __fmul_rn(static_cast<float>(codes[i]), own_fixed ? own_fixed[c] : found);
        }
        return;
    }
    const int conv_index = index - heads, count = heads + groups;
    const Span span = span_of(behind, conv_index);
    i8* window = windows + static_cast<i64>(slot) * (kernel - 1) * channels + span.first;
    float* window_scale = window_scales ? window_scales + static_cast<i64>(slot) * (kernel - 1) * count + conv_index : nullptr;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int c = lane + 32 * i;
        v[i] = 0.0f;
        if (c >= span.width) continue;
        int integer = 0;
        float sum = 0.0f;
        for (int k = 0; k < kernel; ++k) {
            const i8 code = k < kernel - 1 ? window[static_cast<i64>(k) * channels + c] : codes[i];
            const int product = code * taps[(span.first + c) * kernel + k];
            integer += product;
            if (window_scale) sum += static_cast<float>(product) * (k < kernel - 1 ? window_scale[k * count] : found);
            if (k > 0) window[static_cast<i64>(k - 1) * channels + c] = code;
        }
        v[i] = silu((window_scale ? sum : static_cast<float>(integer)) * tap_scales[span.first + c] + bias[span.first + c]);
    }
    // All lanes have read the scales.
    __syncwarp();
    if (window_scale && lane == 0)
        for (int k = 1; k < kernel; ++k) window_scale[(k - 1) * count] = k < kernel - 1 ? window_scale[k * count] : found;
    rotate(v, span.width, span.block);
    round_span(v, span.width, fixed ? fixed + span.first : nullptr, out + static_cast<i64>(slot) * channels + span.first, out_scales + static_cast<i64>(slot) * count + conv_index, fault);
}

// The last `kernel − 1` inputs of each sequence, into its slot; behind `conv_i8`.
KERNEL(128, conv_window_i8, (const i8* projected, int stride, int inner, const float* scales, int scale_stride, int scale_offset, int kernel, int heads, int head_dim, int groups, int state, const int* sequences, i8* windows, float* window_scales)) {
    depend();
    const Layout layout = {heads, head_dim, 1, groups, state, 1, 0};
    const int index = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, count = spans_of(layout);
    const Sequence own = sequence(sequences, blockIdx.y);
    if (index >= count || own.to < 0) return;
    const Span span = span_of(layout, index);
    const int channels = heads * head_dim + groups * state, length = own.end - own.begin;
    const i64 size = static_cast<i64>(kernel - 1) * channels;
    // Slots may be the same: what is read lies behind what is written.
    for (int k = 0; k < kernel - 1; ++k) {
        const int at = length - kernel + 1 + k;
        for (int c = span.first + lane; c < span.first + span.width; c += 32) {
            i8 code = 0;
            if (at >= 0) code = projected[static_cast<i64>(own.begin + at) * stride + inner + c];
            else if (own.from >= 0) code = windows[own.from * size + static_cast<i64>(kernel - 1 + at) * channels + c];
            windows[own.to * size + static_cast<i64>(k) * channels + c] = code;
        }
        if (scales && lane == 0) {
            float scale = 0.0f;
            if (at >= 0) scale = scales[static_cast<i64>(own.begin + at) * scale_stride + scale_offset + index];
            else if (own.from >= 0) scale = window_scales[(static_cast<i64>(own.from) * (kernel - 1) + kernel - 1 + at) * count + index];
            window_scales[(static_cast<i64>(own.to) * (kernel - 1) + k) * count + index] = scale;
        }
    }
}
