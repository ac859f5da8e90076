// Products of f32 matrices on the tensor cores: every value is split into two bf16, high + low, and three products of halves are
// added, which leaves an error of 2^-17 of each term. Four warps, each with 16 rows of a result.
#pragma once

#include "device.cuh"

namespace {

// A matrix of f32 in shared memory as two of bf16, `high` and `low`, rows of `COLS` elements. 16-byte pieces of a row are
// permuted by its number, so that the eight rows that a matrix load reads lie in different banks.
template <int ROWS, int COLS> struct Halves {
    unsigned short high[ROWS * COLS], low[ROWS * COLS];
};

template <int COLS> DEVICE int place(int row, int col) {
    const int turn = COLS == 32 ? row >> 1 & 3 : row & 7;
    return row * COLS + ((col >> 3 ^ turn) << 3) + (col & 7);
}

// Calls `store(i, load(i))` for every i below `COUNT` that is this thread's; a few loads are under way before the first is used.
struct Pair {
    float first, second;
};

template <int COUNT, int THREADS = 128, class Load, class Store> DEVICE void transfer(Load load, Store store) {
    constexpr int AHEAD = 8;
    static_assert(COUNT % (AHEAD * THREADS) == 0, "whole rounds");
    for (int start = threadIdx.x; start < COUNT; start += AHEAD * THREADS) {
        Pair held[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) held[i] = load(start + i * THREADS);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) store(start + i * THREADS, held[i]);
    }
}

// Two elements as a word of each half.
DEVICE void halve(float first, float second, u32& high, u32& low) {
    high = pack_bf16(first, second);
    low = pack_bf16(first - bits_float(high << 16), second - bits_float(high & 0xffff0000u));
}

// Elements (row, col) and (row, col + 1), col even.
template <int ROWS, int COLS> DEVICE void put(Halves<ROWS, COLS>& to, int row, int col, float first, float second) {
    halve(first, second, *reinterpret_cast<u32*>(to.high + place<COLS>(row, col)), *reinterpret_cast<u32*>(to.low + place<COLS>(row, col)));
}

// Operand of 16 rows from `row` by 16 inner indices from `col`, for the left side of a product.
template <int COLS> DEVICE void load_left(u32 (&words)[4], const unsigned short* half, int row, int col) {
    const int lane = threadIdx.x % 32;
    load_matrices(words, half + place<COLS>(row + lane % 16, col + lane / 16 * 8));
}

// Operands of 16 columns (rows of the matrix from `row`) by 16 inner indices, for the right side: words 0 and 1, 2 and 3.
template <int COLS> DEVICE void load_right(u32 (&words)[4], const unsigned short* half, int row, int col) {
    const int lane = threadIdx.x % 32;
    load_matrices(words, half + place<COLS>(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
}

DEVICE void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(sum, a[0], a[1], a[2], a[3], b0, b1); }

// sums[n] += left · right for 16 rows and 16 PAIRS columns, one step of 16 inner indices; smallest terms first. Products that follow each
// other belong to different sums, so that none waits for the one before.
template <int PAIRS, int ROWS, int COLS> DEVICE void accumulate(float (*sums)[4], const u32 (&high)[4], const u32 (&low)[4], const Halves<ROWS, COLS>& right, int row, int col) {
    u32 right_high[PAIRS][4], right_low[PAIRS][4];
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
        load_right<COLS>(right_high[i], right.high, row + 16 * i, col);
        load_right<COLS>(right_low[i], right.low, row + 16 * i, col);
    }
#pragma unroll
    for (int n = 0; n < 2 * PAIRS; ++n) multiply(sums[n], low, right_high[n / 2][n % 2 * 2], right_high[n / 2][n % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < 2 * PAIRS; ++n) multiply(sums[n], high, right_low[n / 2][n % 2 * 2], right_low[n / 2][n % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < 2 * PAIRS; ++n) multiply(sums[n], high, right_high[n / 2][n % 2 * 2], right_high[n / 2][n % 2 * 2 + 1]);
}

}  // namespace
