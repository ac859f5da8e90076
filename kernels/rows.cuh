// What all that round a row to codes share.
#pragma once
#include "device.cuh"

DEVICE bool aligned(const void* a) { return reinterpret_cast<u64>(a) % 16 == 0; }

// Bits of |x|, which compare like the magnitudes themselves, NaN above all.
DEVICE int magnitude(float x) { return static_cast<int>(float_bits(x) & 0x7fffffff); }

// round-half-even(x / scale) within ±127, as the low byte of a word. The product with the reciprocal is within 2^-15 of the quotient: only where
// it lies near the middle between two codes, or is no number, is the division made.
DEVICE u32 code_of(float x, float scale, float reciprocal) {
    constexpr float INTEGERS = 12582912.0f;  // numbers from here on have no bits behind the point
    const float ratio = fminf(fmaxf(__fmul_rn(x, reciprocal), -127.0f), 127.0f);
    float shifted = __fadd_rn(ratio, INTEGERS);
    if (!(fabsf(__fsub_rn(ratio, __fsub_rn(shifted, INTEGERS))) < 0.4999f)) shifted = __fadd_rn(fminf(fmaxf(__fdiv_rn(x, scale), -127.0f), 127.0f), INTEGERS);
    return float_bits(shifted) & 0xff;
}
