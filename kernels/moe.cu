// Mixture of experts: which experts a token takes and with which weights, and the weighted sum of what they put out.
#include "device.cuh"

namespace {

// Index of the first largest of `count` values, for every lane of the warp.
DEVICE int first_largest(const float* values, int count) {
    float best = 0.0f;
    int index = -1;
    for (int i = threadIdx.x % 32; i < count; i += 32)
        if (index < 0 || values[i] > best) best = values[i], index = i;
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = shuffle_xor(best, mask);
        const int other_index = shuffle_xor(index, mask);
        if (other_index >= 0 && (index < 0 || other > best || (other == best && other_index < index))) best = other, index = other_index;
    }
    return index;
}

}  // namespace

// One warp a token. Experts are chosen by sigmoid(logit) + correction among the best `top_groups` groups, a group's score being
// the sum of its two best; weighted by sigmoid(logit), normalised if asked, times `scaling`; and put out in ascending order.
KERNEL(32, route, (const float* logits, const float* correction, int tokens, int experts, int chosen, int groups, int top_groups, int normalize, float scaling, int* experts_out, float* weights_out, int* tiles, int* x_rows)) {
    depend();
    DYNAMIC_SHARED(float, scores);
    float* choice = scores + experts;
    float* group_scores = choice + experts;
    float* kept_groups = group_scores + groups;
    const int token = blockIdx.x, lane = threadIdx.x, size = experts / groups;
    const float lowest = -INFINITY;
    if (token >= tokens) return;
    for (int e = lane; e < experts; e += 32) {
        scores[e] = 1.0f / (1.0f + expf(-logits[static_cast<i64>(token) * experts + e]));
        choice[e] = scores[e] + correction[e];
    }
    __syncwarp();
    if (top_groups < groups) {
        for (int g = lane; g < groups; g += 32) {
            float first = lowest, second = lowest;
            for (int e = g * size; e < (g + 1) * size; ++e) {
                if (choice[e] > first) second = first, first = choice[e];
                else if (choice[e] > second) second = choice[e];
            }
            group_scores[g] = size > 1 ? first + second : first;
        }
        __syncwarp();
        for (int i = 0; i < top_groups; ++i) {
            const int best = first_largest(group_scores, groups);
            __syncwarp();
            if (lane == 0) group_scores[best] = lowest, kept_groups[i] = static_cast<float>(best);
            __syncwarp();
        }
        for (int e = lane; e < experts; e += 32) {
            bool kept = false;
            for (int i = 0; i < top_groups; ++i) kept = kept || static_cast<int>(kept_groups[i]) == e / size;
            if (!kept) choice[e] = lowest;
        }
        __syncwarp();
    }
    int* own = experts_out + static_cast<i64>(token) * chosen;
    float total = 0.0f;
    for (int i = 0; i < chosen; ++i) {
        const int best = first_largest(choice, experts);
        __syncwarp();
        total += scores[best];
        if (lane == 0) {
            choice[best] = lowest;
            // Kept in ascending order as they come.
            int at = i;
            for (; at > 0 && own[at - 1] > best; --at) own[at] = own[at - 1];
            own[at] = best;
        }
        __syncwarp();
    }
    const float divisor = normalize ? total + 1e-20f : 1.0f;
    for (int i = lane; i < chosen; i += 32) {
        const int pair = token * chosen + i;
        weights_out[pair] = __fdiv_rn(scores[own[i]], divisor) * scaling;
        if (tiles) tiles[3 * pair] = own[i], tiles[3 * pair + 1] = pair, tiles[3 * pair + 2] = 1;
        if (x_rows) x_rows[pair] = token;
    }
}

// Pairs of a token and an expert that it chose, sorted by expert and then by token: places[pair] is where a pair stands, x_rows its
// token there. The pairs of each expert are divided into tiles of `height`: (expert, first place, pairs), and with no pairs
// those of `tile_count` that are left. One block: a thread counts, and then places, an expert's pairs in a share of all.
KERNEL(1024, sort_pairs, (const int* experts_of, int pairs, int chosen, int experts, int height, int tile_count, int* places, int* x_rows, int* tiles)) {
    depend();
    SHARED(int, counts, 1024);
    SHARED(int, totals, 1024);
    const int shares = blockDim.x / experts, expert = threadIdx.x % experts, share = threadIdx.x / experts;
    const int length = divide_up(pairs, shares), first = minimum(share * length, pairs), end = minimum(first + length, pairs);
    int count = 0;
    if (share < shares)
        for (int pair = first; pair < end; ++pair) count += experts_of[pair] == expert;
    counts[threadIdx.x] = count;
    __syncthreads();
    if (share == 0) {
        int total = 0;
        for (int i = 0; i < shares; ++i) total += counts[i * experts + expert];
        totals[expert] = total;
    }
    __syncthreads();
    int place = 0, tile = 0, used = 0;
    for (int e = 0; e < experts; ++e) {
        const int own = divide_up(totals[e], height);
        if (e < expert) place += totals[e], tile += own;
        used += own;
    }
    if (share == 0)
        for (int at = 0; at < totals[expert]; at += height, ++tile) {
            tiles[3 * tile] = expert;
            tiles[3 * tile + 1] = place + at;
            tiles[3 * tile + 2] = minimum(height, totals[expert] - at);
        }
    for (int i = 3 * used + threadIdx.x; i < 3 * tile_count; i += blockDim.x) tiles[i] = 0;
    if (share >= shares) return;
    for (int i = 0; i < share; ++i) place += counts[i * experts + expert];
    for (int pair = first; pair < end; ++pair) {
        if (experts_of[pair] != expert) continue;
        places[pair] = place;
        x_rows[place++] = pair / chosen;
    }
}

// The sum of what a token's experts put out, each times its weight, one after another.
KERNEL(256, combine, (const float* x, const int* pairs, const float* weights, int chosen, int cols, float* out)) {
    depend();
    const int c = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (c >= cols) return;
    float sum = 0.0f;
    for (int i = 0; i < chosen; ++i) {
        const int pair = pairs ? pairs[token * chosen + i] : token * chosen + i;
        sum = __fadd_rn(sum, __fmul_rn(weights[token * chosen + i], x[static_cast<i64>(pair) * cols + c]));
    }
    out[static_cast<i64>(token) * cols + c] = sum;
}
