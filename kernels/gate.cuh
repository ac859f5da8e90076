// The gate of a mixer, y · silu(z), applied by whoever stores y: a kernel of its own would read both again.
#pragma once
#include "device.cuh"

// z [tokens, inner] is the first columns of `gate` [tokens, gate_stride]; null: y stays as it is.
#define GATE_PARAMETERS const float *gate, int gate_stride
#define GATE_ARGUMENTS gate, gate_stride

namespace {

struct Gate {
    const float* z;
    int stride;
    float raw(i64 token, int c) const { return z ? z[token * stride + c] : 0.0f; }
    // What y is multiplied by.
    float factor(float raw) const { return z ? silu(raw) : 1.0f; }
    // Of c and c + 1, of an even c where rows have an even number.
    float2 pair(i64 token, int c) const { return z ? *reinterpret_cast<const float2*>(z + token * stride + c) : make_float2(0.0f, 0.0f); }
    float at(i64 token, int c) const { return factor(raw(token, c)); }
    // Brings the 128 bytes around z to the second-level cache.
    void ask(i64 token, int c) const {
        if (z) prefetch(z + token * stride + c);
    }
};

}  // namespace
