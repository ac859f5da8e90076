// The linears of a mixture's experts: matrices of weights of one shape, each of which has the tokens of some tiles.
#pragma once
#include "device.cuh"

// An expert's weights as a kernel reads them; null where it has no scales or no bias.
struct Expert {
    const void* weights;
    const void* scales;
    const float* bias;
};

#define EXPERTS_PARAMETERS const Expert *experts, const int *tiles, const int *x_rows
#define TAIL_PARAMETERS const float *bias, const float *residual, float *out, int out_stride
#define TAIL_ARGUMENTS bias, residual, out, out_stride

// Rows of the output.
struct Rows {
    int first, count;
};

// The rows of tile `index`: of `tokens` tokens those behind `index` tiles of `height`; of experts what the tile says, and the
// weights, scales and bias become those of its expert.
template <class W, class S>
DEVICE Rows rows_of_tile(int index, int height, int tokens, const Expert* experts, const int* tiles, const W*& weights, const S*& scales, const float*& bias) {
    if (!tiles) return {index * height, minimum(height, tokens - index * height)};
    const int* tile = tiles + 3 * index;
    if (tile[2] > 0) {
        const Expert& own = experts[tile[0]];
        weights = static_cast<const W*>(own.weights);
        scales = static_cast<const S*>(own.scales);
        bias = own.bias;
    }
    return {tile[1], tile[2]};
}

// The row of the activations that row `row` of the output is of.
DEVICE int x_row(int row, const int* x_rows) { return x_rows ? x_rows[row] : row; }
