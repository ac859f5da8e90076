// What all that round a row to codes share.
#pragma once
#include "device.cuh"

DEVICE bool aligned(const void* a) { return reinterpret_cast<u64>(a) % 16 == 0; }

// Bits of |x|, which compare like the magnitudes themselves, NaN above all.
DEVICE int magnitude(float x) { return static_cast<int>(float_bits(x) & 0x7fffffff); }

// round-half-even(x / scale) within ±127. The product with the reciprocal is within 2^-15 of the quotient: only where it lies near
// the middle between two codes, or is no number, is the division made.
DEVICE u32 code_of(float x, float scale, float reciprocal) {
    float ratio = __fmul_rn(x, reciprocal);
    if (!(fabsf(__fsub_rn(ratio, __fsub_rn(__fadd_rn(ratio, 12582912.0f), 12582912.0f))) < 0.4999f)) ratio = __fdiv_rn(x, scale);
    return static_cast<u32>(round_even(fminf(fmaxf(ratio, -127.0f), 127.0f))) & 0xff;
}
