// Weights on their way through a ring of stages in shared memory: tiles of 16 rows, a piece of each row at a time, brought by the copy
// engine (sm_90 and later). Whoever brings does not wait for the launch in front, for weights are what no launch writes: while that launch
// still works the rings of all multiprocessors fill, and the memory never rests.
#pragma once
#include "few.cuh"

#ifdef BULK_COPIES

namespace {

constexpr int PIECE = 2048;        // bytes of a row in a stage
constexpr int PITCH = PIECE + 64;  // from one row to the next: two rows that a quarter of a warp reads meet different banks
constexpr int WINDOW = 32;         // groups of int4 weights in a stage
constexpr int SCALES = 2 * WINDOW + 16;  // bytes from one row's scales to the next: they come in whole pieces of 16
constexpr int STAGE = ROWS * (PITCH + SCALES);
// Stages asked for at a time: they keep the memory busy, and what others read does not queue behind a whole ring. With int4 a fuller ring is worth more behind a
// norm or relu² (on an H200 3 % of a step; with int8 it costs 4 %), but not behind a small launch, which reads while the ring fills.
constexpr int UNDER_WAY = 2, UNDER_WAY_FULLER = 3;
constexpr int BRINGING = 4;   // warps that bring, the last of a block: each asks for copies one by one, some hundred cycles each

// Stages of a ring as one of the block's roles sees them: the next to be filled, or to be read.
struct Stages {
    u8* pieces;
    u64 *full, *empty;
    int count, at, parity;

    // `shared`: the stages, then two barriers for each. As many warps as `readers` read each stage, and as many threads as `adders` hand it back.
    Stages(u8* shared, int count, int readers, int adders = 0) : pieces(shared), full(reinterpret_cast<u64*>(shared + count * STAGE)), empty(full + count), count(count), at(0), parity(0) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < count; ++i) {
                barrier_start(full + i, 2 * ROWS + adders);  // for a row's weights, for its scales, and for what was left with it the last time
                barrier_start(empty + i, 32 * readers);
            }
            barriers_ready();
        }
        __syncthreads();
    }

    // What lies behind.
    u8* behind() const { return reinterpret_cast<u8*>(empty + count); }
    u8* stage() const { return pieces + at * STAGE; }
    void wait_full() const { barrier_wait(full + at, parity); }
    void wait_empty() const { barrier_wait(empty + at, parity ^ 1); }
    void next() {
        if (++at == count) at = 0, parity ^= 1;
    }
    // By each lane that has read one: racecheck does not follow one that arrives for its warp. Reads that are under way must have come: an
    // arrival does not wait for them, nor does the copy engine.
    void release() {
        fence_async();
        __syncwarp();
        barrier_arrive(empty + at);
        next();
    }
    // For those who add up what readers left with a stage: all have read it; and it may be filled again, which they say of every stage once
    // in front of the first.
    void wait_released() const { barrier_wait(empty + at, parity); }
    void hand_back() {
        __syncwarp();
        barrier_arrive(full + at);
        next();
    }
};

// What a block has of a matrix: tiles `at`, at + step and so on below `end`, the matrix's first being `first`.
struct Tiles {
    int at, end, step, first;

    bool more() const { return at < end; }
    void next() { at += step; }
    int row() const { return (at - first) * ROWS; }
};

// The tiles of this block among those from `first` on of a matrix of so many rows, in a launch whose blocks take turns.
DEVICE Tiles tiles_of_block(int first, int rows) {
    const int own = blockIdx.x, step = gridDim.x;
    return {own + (first - own + step - 1) / step * step, first + divide_up(rows, ROWS), step, first};
}

// Where a row's scales lie in a stage. They came from the 16 bytes in which the first of them is.
DEVICE const bf16* scales_of(const u8* stage, int row, i64 first) { return reinterpret_cast<const bf16*>(stage + ROWS * PITCH + row * SCALES) + first % 8; }

// Who brings: the stage to be asked for next, and the one that must have come before, `under_way` in front of it.
struct Bringing {
    Stages next, awaited;
    int under_way, asked = 0;

    explicit Bringing(const Stages& ring, int under_way = UNDER_WAY) : next(ring), awaited(ring), under_way(under_way) {}

    void advance() {
        next.next();
        if (++asked < under_way) return;
        awaited.wait_full();
        awaited.next();
    }
};

// Brings the rows of `tiles`, `piece` bytes of each at a time, and with them a window of the scales of int4 weights, `groups` a row. By the block's
// last WARPS warps.
template <int WARPS = BRINGING> DEVICE void bring(Bringing& bringing, Tiles tiles, const void* w, const bf16* w_scales, int groups, int rows, int row_bytes, int piece) {
    // A warp has some rows, a lane one's weights or scales.
    constexpr int LINES = (ROWS + WARPS - 1) / WARPS;
    const int lane = threadIdx.x % 32, warp = (threadIdx.x - (blockDim.x - 32 * WARPS)) / 32, line = warp * LINES + lane % LINES, part = lane / LINES;
    const bool asks = part < 2 && line < ROWS;
    for (; tiles.more(); tiles.next()) {
        const int count = minimum(ROWS, rows - tiles.row()), row = tiles.row() + minimum(line, count - 1);
        const u8* weights = static_cast<const u8*>(w) + static_cast<i64>(row) * row_bytes;
        i64 group = static_cast<i64>(row) * groups;
        const i64 end = group + groups;
        for (int at = 0; at < row_bytes; at += piece, group += WINDOW, bringing.advance()) {
            const Stages& stages = bringing.next;
            u64* const full = stages.full + stages.at;
            const i64 first = group / 8 * 8, behind = (minimum(WINDOW, static_cast<int>(end - group)) + group + 7) / 8 * 8;
            const int own = part == 0 ? minimum(piece, row_bytes - at) : part == 1 && groups > 0 ? static_cast<int>(behind - first) * 2 : 0;
            const int bytes = line < count ? own : 0;
            stages.wait_empty();
            if (asks) barrier_expect(full, bytes);
            if (!asks || bytes == 0) continue;
            if (part == 0) copy_bulk(stages.stage() + line * PITCH, weights + at, bytes, full);
            else copy_bulk(stages.stage() + ROWS * PITCH + line * SCALES, w_scales + first, bytes, full);
        }
    }
}

}  // namespace

#endif
