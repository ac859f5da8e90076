// What the matrix-vector kernels share: tiles of 16 outputs by 8 tokens, where their results go, and float activations as columns of
// products.
#pragma once
#include "experts.cuh"

namespace {

constexpr int ROWS = 16;
constexpr int TOKENS = 8;
constexpr int OUTPUTS = ROWS * TOKENS;
constexpr int WARPS = 8;  // that multiply
constexpr int SETS = TOKENS / 2;

// A result's place, and what is added to it: read before the products, which would keep the load waiting.
struct Result {
    i64 at;
    float bias, residual;
};

DEVICE Result result(bool present, int token, int row, TAIL_PARAMETERS) {
    const i64 at = static_cast<i64>(token) * out_stride + row;
    return {at, bias && present ? bias[row] : 0.0f, residual && present ? residual[at] : 0.0f};
}

// product (+ bias) (+ residual).
DEVICE void finish(float product, const Result& to, TAIL_PARAMETERS) {
    if (bias) product = product + to.bias;
    if (residual) product = to.residual + product;
    out[to.at] = product;
}

DEVICE uint4 zero() { return make_uint4(0, 0, 0, 0); }

DEVICE uint4 load(const void* from) { return *static_cast<const uint4*>(from); }

// The column's share of two activations: x = high + middle + low exactly, each a bf16; column % 4 says which, the fourth is 0.
DEVICE u32 split(float first, float second, int part) {
    const u32 high = pack_bf16(first, second);
    first -= bits_float(high << 16);
    second -= bits_float(high & 0xffff0000u);
    const u32 middle = pack_bf16(first, second);
    const u32 low = pack_bf16(first - bits_float(middle << 16), second - bits_float(middle & 0xffff0000u));
    return part == 0 ? high : part == 1 ? middle : part == 2 ? low : 0;
}

// Float activations of a tile as a lane reads them. A product has 8 columns: the three parts of 2 tokens; SETS products serve 8 tokens.
struct Inputs {
    const float* x;
    int rows[SETS];  // where each begins; −1: there is no such token
    int cols, part;
    bool wide;

    Inputs(const float* x, int x_stride, int first, int count, int cols, const int* x_rows)
        : x(x), cols(cols), part(threadIdx.x % 32 / 4 % 4), wide(x_stride % 4 == 0 && cols % 4 == 0 && reinterpret_cast<u64>(x) % 16 == 0) {
        const int line = threadIdx.x % 32 / 4;
#pragma unroll
        for (int set = 0; set < SETS; ++set) rows[set] = set * 2 + line / 4 < count ? x_row(first + set * 2 + line / 4, x_rows) * x_stride : -1;
    }

    // The same where rows are `wide`, and other activations in place of zeros: weights behind the last input are zeros, and the sums of
    // tokens that are none are nobody's. Without a condition no load waits for the one before.
    float4 read_wide(int set, int at) const { return *reinterpret_cast<const float4*>(x + (rows[set] >= 0 && at < cols ? rows[set] + at : 0)); }

    // The activations of inputs at to at + 3; zeros outside.
    float4 read(int set, int at) const {
        float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (rows[set] >= 0 && wide && at < cols) {
            const float4 four = *reinterpret_cast<const float4*>(x + rows[set] + at);
            values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else if (rows[set] >= 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) if (at + i < cols) values[i] = x[rows[set] + at + i];
        }
        return make_float4(values[0], values[1], values[2], values[3]);
    }
};

// The sums of a warp's rows for 8 tokens: columns 4 t … 4 t + 2 of a set are the parts of its token t; quads 2 t and 2 t + 1 hold them.
// Left at own[token][row], `own` being the warp's.
DEVICE void leave_sums(float* own, const float (&sums)[SETS][4]) {
    const int line = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
#pragma unroll
    for (int set = 0; set < SETS; ++set) {
        const float upper_half = sums[set][0] + sums[set][1], lower_half = sums[set][2] + sums[set][3];
        const float upper_sum = upper_half + shuffle_xor(upper_half, 1), lower_sum = lower_half + shuffle_xor(lower_half, 1);
        if (quad % 2 == 0) {
            float* to = own + (set * 2 + quad / 2) * ROWS + line;
            to[0] = upper_sum;
            to[8] = lower_sum;
        }
    }
}

}  // namespace
