// What all that round a row to codes share.
#pragma once
#include "device.cuh"

DEVICE bool aligned(const void* a) { return reinterpret_cast<u64>(a) % 16 == 0; }

// Bits of |x|, which compare like the magnitudes themselves, NaN above all.
DEVICE int magnitude(float x) { return static_cast<int>(float_bits(x) & 0x7fffffff); }

constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// Rounds to the codes of a scale.
struct Rounding {
    float power, divisor, reciprocal, limit;

    // Powers of two bring the scale, whatever it is, to where nothing below underflows.
    explicit Rounding(float scale) : power(bits_float(254 - (float_bits(scale) >> 23) << 23)), divisor(__fmul_rn(scale, power)), reciprocal(__fdiv_rn(1.0f, divisor)), limit(__fmul_rn(scale, 127.0f)) {}

    // x to within ±127 codes: static scales need it, and those below the smallest normal number, which are not absmax / 127 to the last bit.
    float within(float x) const { return fminf(fmaxf(x, -limit), limit); }

    // round-half-even(x / scale) in the low byte of a word, the others undefined. The quotient is that of a division: corrected twice by the rest it
    // leaves, under the correctly rounded reciprocal (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
    u32 code(float x) const {
        constexpr float INTEGERS = 12582912.0f;  // numbers from here on have no bits behind the point
        const float value = __fmul_rn(x, power);
        float quotient = __fmul_rn(value, reciprocal);
        quotient = fmaf(fmaf(-quotient, divisor, value), reciprocal, quotient);
        quotient = fmaf(fmaf(-quotient, divisor, value), reciprocal, quotient);
        return float_bits(__fadd_rn(quotient, INTEGERS));
    }
    u32 codes(float a, float b, float c, float d) const { return low_bytes(code(a), code(b), code(c), code(d)); }
};
