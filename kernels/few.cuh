// What the matrix-vector kernels share: tiles of 16 outputs by 8 tokens, and where their results go.
#pragma once
#include "experts.cuh"

namespace {

constexpr int ROWS = 16;
constexpr int TOKENS = 8;
constexpr int OUTPUTS = ROWS * TOKENS;
constexpr int WARPS = 8;  // that multiply

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

}  // namespace
