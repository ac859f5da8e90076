// What is asked of logits, without bringing them to the host. One block a row, but for `argmax`; results in f64.
#include "device.cuh"
#include "ticket.cuh"

namespace {

constexpr int MAX_WARPS = 32;
constexpr int AHEAD = 16;  // logits that a thread reads before it compares the first
constexpr int RUN = 8;     // exponentials that are added in f32 before they go into the f64 sum
constexpr int NOWHERE = 0x7fffffff;

struct Top {
    float value;
    int index;
};

DEVICE Top better(Top a, Top b) { return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a; }

// The first largest of the values that a thread looks at from column `begin` on.
DEVICE Top own_largest(const float* row, int begin, int end) {
    Top top = {-INFINITY, NOWHERE};
#pragma unroll 1
    for (int start = begin + threadIdx.x; start < end; start += blockDim.x * AHEAD) {
        float held[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int c = start + i * blockDim.x;
            held[i] = c < end ? row[c] : -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (held[i] > top.value) top = {held[i], static_cast<int>(start + i * blockDim.x)};
    }
    return top;
}

DEVICE Top warp_best(Top top) {
#pragma unroll 1
    for (int mask = 16; mask > 0; mask /= 2) top = better(top, {shuffle_xor(top.value, mask), shuffle_xor(top.index, mask)});
    return top;
}

// The best of all threads, for all threads.
DEVICE Top block_best(Top top) {
    SHARED(float, values, MAX_WARPS);
    SHARED(int, indices, MAX_WARPS);
    top = warp_best(top);
    __syncthreads();  // an earlier call's values have been read
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = top.value, indices[threadIdx.x / 32] = top.index;
    __syncthreads();
    const int lane = threadIdx.x % 32, from = lane < static_cast<int>(blockDim.x) / 32 ? lane : 0;
    return warp_best({values[from], indices[from]});
}

DEVICE Top largest(const float* row, int cols) { return block_best(own_largest(row, 0, cols)); }

DEVICE double block_sum(double x) {
    SHARED(double, partial, MAX_WARPS);
    x = warp_sum(x);
    __syncthreads();  // an earlier call's values have been read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0.0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += partial[warp];
    return total;
}

// log Σ exp(row − max).
DEVICE double log_sum(const float* row, int cols, float max) {
    double total = 0.0;
    for (int start = threadIdx.x; start < cols; start += blockDim.x * RUN) {
        float sum = 0.0f;
        for (int i = 0; i < RUN; ++i) {
            const int c = start + i * blockDim.x;
            if (c < cols) sum += expf(row[c] - max);
        }
        total += static_cast<double>(sum);
    }
    return log(block_sum(total));
}

}  // namespace

KERNEL(256, log_probability, (const float* logits, int cols, const int* rows, const int* tokens, double* log_probability, int* is_top)) {
    depend();
    const float* row = logits + static_cast<i64>(rows[blockIdx.x]) * cols;
    const int token = tokens[blockIdx.x];
    const Top top = largest(row, cols);
    const double sum = log_sum(row, cols, top.value);
    if (threadIdx.x > 0) return;
    log_probability[blockIdx.x] = static_cast<double>(row[token] - top.value) - sum;
    is_top[blockIdx.x] = top.index == token;
}

KERNEL(256, divergence, (const float* reference, const float* logits, int cols, double* kl, int* same_top)) {
    depend();
    const float* p = reference + static_cast<i64>(blockIdx.x) * cols;
    const float* q = logits + static_cast<i64>(blockIdx.x) * cols;
    const Top p_top = largest(p, cols), q_top = largest(q, cols);
    // All of it in f64: what f32 sums leave of log Σ, some 1e-7, is as much as two models may differ by.
    const auto log_sum_exactly = [&](const float* row, double max) {
        double total = 0.0;
        for (int c = threadIdx.x; c < cols; c += blockDim.x) total += exp(row[c] - max);
        return log(block_sum(total));
    };
    const double p_max = p_top.value, q_max = q_top.value, p_sum = log_sum_exactly(p, p_max), q_sum = log_sum_exactly(q, q_max);
    double total = 0.0;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        const double log_p = p[c] - p_max - p_sum, log_q = q[c] - q_max - q_sum;
        total += exp(log_p) * (log_p - log_q);
    }
    total = block_sum(total);
    if (threadIdx.x > 0) return;
    kl[blockIdx.x] = total > 0.0 ? total : 0.0;
    same_top[blockIdx.x] = p_top.index == q_top.index;
}

// The first largest logit of each row, 0 where none is a number above −∞; the last block that is done with a row compares what the others found.
KERNEL(256, argmax, (const float* logits, int cols, Top* tops, int* tickets, const int* fault, u32* out)) {
    depend();
    SHARED(int, last, 1);
    const int row = blockIdx.y, parts = gridDim.x, width = divide_up(cols, parts), begin = blockIdx.x * width;
    Top* own = tops + row * parts;
    Top top = block_best(own_largest(logits + static_cast<i64>(row) * cols, begin, minimum(begin + width, cols)));
    if (threadIdx.x == 0) {
        own[blockIdx.x] = top;
        last[0] = parts == 1 || take_ticket(tickets + row, parts);
    }
    __syncthreads();
    if (!last[0]) return;
    if (threadIdx.x >= 32) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < parts; i += 32) top = better(top, own[i]);
    top = warp_best(top);
    if (threadIdx.x > 0) return;
    out[row] = top.index < cols ? top.index : 0;
    if (row == 0) out[gridDim.y] = fault ? *fault : 0;
}

// 1 − Σ p² of each row.
KERNEL(256, undecidedness, (const float* logits, int cols, double* out)) {
    depend();
    SHARED(float, tops, 8);
    SHARED_ROWS(double, partial, 8, 2);
    const float* row = logits + static_cast<i64>(blockIdx.x) * cols;
    float top = -INFINITY;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) top = fmaxf(top, row[c]);
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int warp = 0; warp < 8; ++warp) top = fmaxf(top, tops[warp]);
    double sum = 0.0, squares = 0.0;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        const double p = static_cast<double>(expf(row[c] - top));
        sum += p;
        squares += p * p;
    }
    sum = warp_sum(sum), squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][0] = sum, partial[threadIdx.x / 32][1] = squares;
    __syncthreads();
    if (threadIdx.x > 0) return;
    double total = 0.0, square = 0.0;
    for (int warp = 0; warp < 8; ++warp) total += partial[warp][0], square += partial[warp][1];
    const double doubt = 1.0 - square / (total * total);
    out[blockIdx.x] = doubt > 0.0 ? doubt : 0.0;
}
