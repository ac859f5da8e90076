// Linears for few tokens, bound by reading the weights once. A block has 16 rows of the weights and up to 8 tokens; its 8 warps
// divide the inputs. Weights go from memory straight into the fragments of tensor-core products, 16 bytes a lane: a product
// does not care in which order its inputs are taken, so lane (row, quad) of a warp takes 16 consecutive bytes of its row and
// the activations are read in the same order.
//
// Integer results are exactly those of the CPU backend: int8 y = acc·(s_x·s_w); int4 y = (Σ_g acc_g·s_w[g])·s_x with the
// groups in ascending order, product and sum rounded apart.
#include "few.cuh"

namespace {

// What a block computes: outputs from `row` on of `count` rows from `first`.
struct Tile {
    int row, first, count;
};

template <class W, class S>
DEVICE Tile tile_of_block(int tokens, const Expert* experts, const int* tiles, const W*& w, const S*& w_scales, const float*& bias) {
    const Rows rows = rows_of_tile(blockIdx.y, TOKENS, tokens, experts, tiles, w, w_scales, bias);
    return {static_cast<int>(blockIdx.x) * ROWS, rows.first, rows.count};
}

// int8 weights, of which the first are asked for before the launch in front is waited for. `partial` holds the warps' sums.
DEVICE void few_int8(int* partial, const i8* w, const float* w_scales, const i8* x, const float* x_scales, int rows, int cols, const Tile& tile, const int* x_rows, TAIL_PARAMETERS) {
    constexpr int UNROLL = 4;
    const int width = ld(cols), warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, quad = lane % 4;
    const i8* upper = w + static_cast<i64>(minimum(tile.row + line, rows - 1)) * width + quad * 16;
    const i8* lower = w + static_cast<i64>(minimum(tile.row + line + 8, rows - 1)) * width + quad * 16;
    // The weights of the first inputs are asked for ahead. No more of them: loads come back in order, and the activations follow.
    uint4 next_upper, next_lower;
    const auto fetch = [&](int at) {
        next_upper = at < width ? load_once(upper + at) : zero();
        next_lower = at < width ? load_once(lower + at) : zero();
    };
    fetch(warp * 64);
    wait_previous();
    const int token = threadIdx.x / ROWS, row = tile.row + threadIdx.x % ROWS;
    const bool present = line < tile.count, stores = token < tile.count && row < rows;
    const i8* input = x + static_cast<i64>(present ? x_row(tile.first + line, x_rows) : 0) * width + quad * 16;
    const float scale = stores ? __fmul_rn(x_scales[x_row(tile.first + token, x_rows)], w_scales[row]) : 0.0f;
    const Result to = result(stores, tile.first + token, row, TAIL_ARGUMENTS);
    int sum[4] = {0, 0, 0, 0};
    for (int start = warp * 64; start < width; start += WARPS * 64 * UNROLL) {
        uint4 a[UNROLL], b[UNROLL], c[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int at = start + i * WARPS * 64;
            const bool inside = at < width;
            a[i] = i == 0 ? next_upper : inside ? load_once(upper + at) : zero();
            b[i] = i == 0 ? next_lower : inside ? load_once(lower + at) : zero();
            c[i] = inside && present ? load(input + at) : zero();
        }
        fetch(start + WARPS * 64 * UNROLL);
        __syncwarp();  // all are under way before the first is used
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            mma_s8(sum, a[i].x, b[i].x, a[i].y, b[i].y, c[i].x, c[i].y);
            mma_s8(sum, a[i].z, b[i].z, a[i].w, b[i].w, c[i].z, c[i].w);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[warp * OUTPUTS + (quad * 2 + i % 2) * ROWS + line + i / 2 * 8] = sum[i];
    __syncthreads();
    if (!stores) return;
    int total = 0;
    for (int i = 0; i < WARPS; ++i) total += partial[i * OUTPUTS + threadIdx.x];
    finish(__fmul_rn(static_cast<float>(total), scale), to, TAIL_ARGUMENTS);
}

// int4 weights with PARTS groups in a segment of 128 inputs. `products` holds acc_g·s_w[g] of a window of 32 groups, twice, so
// that the next window is computed while this one is added up.
template <int PARTS>
DEVICE void few_groups(float* products, const u8* w, const bf16* w_scales, const i8* x, const float* x_scales, int rows, int cols, const Tile& tile, const int* x_rows, TAIL_PARAMETERS) {
    wait_previous();
    constexpr int UNROLL = 4 / PARTS, WINDOW = 32, GROUP = 128 / PARTS;
    const int width = ld(cols), groups = cols / GROUP, warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, quad = lane % 4;
    const int upper_row = minimum(tile.row + line, rows - 1), lower_row = minimum(tile.row + line + 8, rows - 1);
    const u8* upper = w + static_cast<i64>(upper_row) * (width / 2) + quad * 16;
    const u8* lower = w + static_cast<i64>(lower_row) * (width / 2) + quad * 16;
    const bf16* upper_scales = w_scales + static_cast<i64>(upper_row) * groups;
    const bf16* lower_scales = w_scales + static_cast<i64>(lower_row) * groups;
    const bool present = line < tile.count;
    const i8* input = x + static_cast<i64>(present ? x_row(tile.first + line, x_rows) : 0) * width + quad * 32;
    const int token = threadIdx.x / ROWS, row = tile.row + threadIdx.x % ROWS;
    const bool stores = token < tile.count && row < rows;
    const Result to = result(stores, tile.first + token, row, TAIL_ARGUMENTS);
    float total = 0.0f;
    uint4 a[UNROLL], b[UNROLL], c[UNROLL], d[UNROLL];
    bf16 above_scales[UNROLL * PARTS], below_scales[UNROLL * PARTS];
    const auto fetch = [&](int window) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int segment = window * (WINDOW / PARTS) + i * WARPS + warp;
            const bool inside = segment * 128 + quad * 32 < width;
            a[i] = inside ? load_once(upper + segment * 64) : zero();
            b[i] = inside ? load_once(lower + segment * 64) : zero();
            c[i] = inside && present ? load(input + segment * 128) : zero();
            d[i] = inside && present ? load(input + segment * 128 + 16) : zero();
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int group = segment * PARTS + part;
                above_scales[i * PARTS + part] = group < groups ? upper_scales[group] : bf16{0};
                below_scales[i * PARTS + part] = group < groups ? lower_scales[group] : bf16{0};
            }
        }
    };
    fetch(0);
    for (int window = 0; window * WINDOW < groups; ++window) {
        float* own = products + window % 2 * WINDOW * OUTPUTS;
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const u32 above[4] = {a[i].x, a[i].y, a[i].z, a[i].w}, below[4] = {b[i].x, b[i].y, b[i].z, b[i].w};
            const u32 low[4] = {c[i].x, c[i].y, c[i].z, c[i].w}, high[4] = {d[i].x, d[i].y, d[i].z, d[i].w};
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const bool mine = quad * PARTS / 4 == part;
                int sum[4] = {0, 0, 0, 0};
                // Codes in the high half of a byte are 16 times themselves, which is divided out below.
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    mma_s8(sum, above[k] << 4 & 0xf0f0f0f0u, below[k] << 4 & 0xf0f0f0f0u, above[k] & 0xf0f0f0f0u, below[k] & 0xf0f0f0f0u,
                           mine ? low[k] : 0, mine ? high[k] : 0);
                const float above_scale = widen(above_scales[i * PARTS + part]), below_scale = widen(below_scales[i * PARTS + part]);
                float* slot = own + ((i * WARPS + warp) * PARTS + part) * OUTPUTS + quad * 2 * ROWS + line;
                slot[0] = __fmul_rn(static_cast<float>(sum[0] >> 4), above_scale);
                slot[ROWS] = __fmul_rn(static_cast<float>(sum[1] >> 4), above_scale);
                slot[8] = __fmul_rn(static_cast<float>(sum[2] >> 4), below_scale);
                slot[ROWS + 8] = __fmul_rn(static_cast<float>(sum[3] >> 4), below_scale);
            }
        }
        if ((window + 1) * WINDOW < groups) fetch(window + 1);
        __syncthreads();
        if (token < tile.count) {
            const int count = minimum(WINDOW, groups - window * WINDOW);
            for (int i = 0; i < count; ++i) total = __fadd_rn(total, own[i * OUTPUTS + threadIdx.x]);
        }
    }
    if (stores) finish(__fmul_rn(total, x_scales[x_row(tile.first + token, x_rows)]), to, TAIL_ARGUMENTS);
}

DEVICE void few_int4(float* products, const u8* w, const bf16* w_scales, int group, const i8* x, const float* x_scales, int rows, int cols, const Tile& tile, const int* x_rows, TAIL_PARAMETERS) {
    if (group == 128) few_groups<1>(products, w, w_scales, x, x_scales, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
    if (group == 64) few_groups<2>(products, w, w_scales, x, x_scales, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
    if (group == 32) few_groups<4>(products, w, w_scales, x, x_scales, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
}

constexpr int PRODUCTS = 2 * 32 * OUTPUTS;

}  // namespace

KERNEL(256, few_w8a8, (const i8* w, const float* w_scales, const i8* x, const float* x_scales, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    if (tiles) wait_previous();
    SHARED(int, partial, WARPS * OUTPUTS);
    const Tile tile = tile_of_block(tokens, experts, tiles, w, w_scales, bias);
    if (tile.count > 0) few_int8(partial, w, w_scales, x, x_scales, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
}

RESIDENT_KERNEL(256, 2, few_w4a8, (const u8* w, const bf16* w_scales, int group, const i8* x, const float* x_scales, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    SHARED(float, products, PRODUCTS);
    const Tile tile = tile_of_block(tokens, experts, tiles, w, w_scales, bias);
    if (tile.count > 0) few_int4(products, w, w_scales, group, x, x_scales, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
}

// A linear of two parts, int4 rows in front of int8 rows, in one launch: its first blocks take the int8 rows, 16 each.
RESIDENT_KERNEL(256, 2, few_w4w8a8, (const u8* w, const bf16* w_scales, int group, int rows, const i8* other_w, const float* other_scales, int other_rows, const i8* x, const float* x_scales, int tokens, int cols, TAIL_PARAMETERS)) {
    launch_next();
    SHARED(float, products, PRODUCTS);
    Tile tile = tile_of_block(tokens, nullptr, nullptr, w, w_scales, bias);
    const int others = divide_up(other_rows, ROWS) * ROWS;
    if (tile.row < others) {
        few_int8(reinterpret_cast<int*>(products), other_w, other_scales, x, x_scales, other_rows, cols, tile, nullptr, bias ? bias + rows : nullptr, residual ? residual + rows : nullptr, out + rows, out_stride);
        return;
    }
    tile.row -= others;
    few_int4(products, w, w_scales, group, x, x_scales, rows, cols, tile, nullptr, TAIL_ARGUMENTS);
}

namespace {

constexpr int SETS = TOKENS / 2;

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

// Two int8 codes, biased by 128, of bytes `at` and `at + 1` of a word, as bf16.
DEVICE u32 widen_codes(u32 biased, int at) {
    const float first = bits_float(0x4b000000u | (biased >> 8 * at & 0xff)) - 8388736.0f;
    const float second = bits_float(0x4b000000u | (biased >> (8 * at + 8) & 0xff)) - 8388736.0f;
    return pack_bf16(first, second);
}

enum Weights { BF16, INT8, INT4 };

// Float activations. KIND: how 16 bytes of weights are read: as 8 bf16, 16 int8 or 32 int4.
template <Weights KIND>
DEVICE void few_float(const void* weights, const void* w_scales, int group, const float* x, int x_stride, int rows, int cols, const Tile& tile, const int* x_rows, TAIL_PARAMETERS) {
    constexpr int INPUTS = KIND == BF16 ? 8 : KIND == INT8 ? 16 : 32, PAIRS = INPUTS / 2;
    SHARED(float, partial, WARPS * OUTPUTS);
    const int width = ld(cols), bytes = width / INPUTS * 16, warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, quad = lane % 4;
    const u8* base = static_cast<const u8*>(weights);
    const int upper_row = minimum(tile.row + line, rows - 1), lower_row = minimum(tile.row + line + 8, rows - 1);
    const u8* upper = base + static_cast<i64>(upper_row) * bytes;
    const u8* lower = base + static_cast<i64>(lower_row) * bytes;
    const int groups = KIND == INT4 ? cols / group : 1;
    const bf16* group_scales = static_cast<const bf16*>(w_scales);
    constexpr int AHEAD = 2;
    uint4 above_held[AHEAD], below_held[AHEAD];
    const auto fetch = [&](int start) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int at = ((start + i * WARPS) * 4 + quad) * INPUTS;
            above_held[i] = at < width ? load_once(upper + at / INPUTS * 16) : zero();
            below_held[i] = at < width ? load_once(lower + at / INPUTS * 16) : zero();
        }
    };
    fetch(warp);
    wait_previous();
    const int token = threadIdx.x / ROWS, row = tile.row + threadIdx.x % ROWS;
    const bool stores = token < tile.count && row < rows;
    const Result to = result(stores, tile.first + token, row, TAIL_ARGUMENTS);
    const Inputs inputs(x, x_stride, tile.first, tile.count, cols, x_rows);
    float sums[SETS][4] = {};
    for (int start = warp; start * 4 * INPUTS < width; start += WARPS * AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int at = ((start + i * WARPS) * 4 + quad) * INPUTS;  // this lane's first input
            const bool inside = at < width;
            const u32 above[4] = {above_held[i].x, above_held[i].y, above_held[i].z, above_held[i].w};
            const u32 below[4] = {below_held[i].x, below_held[i].y, below_held[i].z, below_held[i].w};
            float above_scale = 1.0f, below_scale = 1.0f;
            if (KIND == INT4) {
                // A lane's 32 inputs lie in one group. The scale goes into the weight: code·scale is exact in f32.
                above_scale = inside && at < cols ? widen(group_scales[static_cast<i64>(upper_row) * groups + at / group]) : 0.0f;
                below_scale = inside && at < cols ? widen(group_scales[static_cast<i64>(lower_row) * groups + at / group]) : 0.0f;
            }
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair += 2) {
                // Inputs offset, offset + 1 and offset + 2, offset + 3 from `at`.
                int offset = pair * 2;
                u32 a[4];
                u32 scaled_high[4], scaled_low[4];
                if (KIND == BF16) {
                    a[0] = above[pair], a[1] = below[pair], a[2] = above[pair + 1], a[3] = below[pair + 1];
                } else if (KIND == INT8) {
                    const u32 first = above[pair / 2] ^ 0x80808080u, second = below[pair / 2] ^ 0x80808080u;
                    a[0] = widen_codes(first, 0), a[1] = widen_codes(second, 0), a[2] = widen_codes(first, 2), a[3] = widen_codes(second, 2);
                } else {
                    const int word = pair / 2 % 4;
                    const bool high = pair / 2 >= 4;
                    const u32 first = (above[word] >> (high ? 4 : 0) & 0x0f0f0f0fu) ^ 0x08080808u, second = (below[word] >> (high ? 4 : 0) & 0x0f0f0f0fu) ^ 0x08080808u;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const u32 from = i % 2 ? second : first;
                        const float scale = i % 2 ? below_scale : above_scale;
                        const int byte = i / 2 * 2;
                        const float one = (bits_float(0x4b000000u | (from >> 8 * byte & 0xff)) - 8388616.0f) * scale;
                        const float two = (bits_float(0x4b000000u | (from >> (8 * byte + 8) & 0xff)) - 8388616.0f) * scale;
                        scaled_high[i] = pack_bf16(one, two);
                        scaled_low[i] = pack_bf16(one - bits_float(scaled_high[i] << 16), two - bits_float(scaled_high[i] & 0xffff0000u));
                    }
                    a[0] = scaled_high[0], a[1] = scaled_high[1], a[2] = scaled_high[2], a[3] = scaled_high[3];
                }
#pragma unroll
                for (int set = 0; set < SETS; ++set) {
                    if (set * 2 >= tile.count) continue;
                    const float4 values = inputs.read(set, at + offset);
                    const u32 b0 = split(values.x, values.y, inputs.part), b1 = split(values.z, values.w, inputs.part);
                    mma_bf16(sums[set], a[0], a[1], a[2], a[3], b0, b1);
                    if (KIND == INT4) mma_bf16(sums[set], scaled_low[0], scaled_low[1], scaled_low[2], scaled_low[3], b0, b1);
                }
            }
        }
        fetch(start + WARPS * AHEAD);
    }
    leave_sums(partial + warp * OUTPUTS, sums);
    __syncthreads();
    if (!stores) return;
    float total = 0.0f;
    for (int i = 0; i < WARPS; ++i) total += partial[i * OUTPUTS + threadIdx.x];
    if (KIND == INT8) total *= static_cast<const float*>(w_scales)[row];
    finish(total, to, TAIL_ARGUMENTS);
}

}  // namespace

RESIDENT_KERNEL(256, 3, few_bf16, (const bf16* w, const float* x, int x_stride, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    if (tiles) wait_previous();
    const float* none = nullptr;
    const Tile tile = tile_of_block(tokens, experts, tiles, w, none, bias);
    if (tile.count > 0) few_float<BF16>(w, nullptr, 0, x, x_stride, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
}

KERNEL(256, few_w8a16, (const i8* w, const float* w_scales, const float* x, int x_stride, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    if (tiles) wait_previous();
    const Tile tile = tile_of_block(tokens, experts, tiles, w, w_scales, bias);
    if (tile.count > 0) few_float<INT8>(w, w_scales, 0, x, x_stride, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
}

KERNEL(256, few_w4a16, (const u8* w, const bf16* w_scales, int group, const float* x, int x_stride, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    launch_next();
    if (tiles) wait_previous();
    const Tile tile = tile_of_block(tokens, experts, tiles, w, w_scales, bias);
    if (tile.count > 0) few_float<INT4>(w, w_scales, group, x, x_stride, rows, cols, tile, x_rows, TAIL_ARGUMENTS);
}

// f32 weights, two rows a warp.
KERNEL(256, few_f32, (const float* w, const float* x, int x_stride, int tokens, int rows, int cols, EXPERTS_PARAMETERS, TAIL_PARAMETERS)) {
    depend();
    const float* none = nullptr;
    const Tile tile = tile_of_block(tokens, experts, tiles, w, none, bias);
    const int lane = threadIdx.x % 32;
    for (int row = tile.row + threadIdx.x / 32; row < minimum(tile.row + ROWS, rows); row += WARPS) {
        const float* weights = w + static_cast<i64>(row) * cols;
        for (int token = 0; token < tile.count; ++token) {
            const float* input = x + static_cast<i64>(x_row(tile.first + token, x_rows)) * x_stride;
            float sum = 0.0f;
            for (int c = lane; c < cols; c += 32) sum = fmaf(weights[c], input[c], sum);
            sum = warp_sum(sum);
            if (lane == 0) finish(sum, result(true, tile.first + token, row, TAIL_ARGUMENTS), TAIL_ARGUMENTS);
        }
    }
}
