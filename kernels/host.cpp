// The scheduler behind host.h: fibers, barriers, and the warp-wide instructions by their documented layouts.

#include "host.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace strata {

__thread Thread* current __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr std::size_t STACK = 256 << 10;
// Shared memory of a block on sm_90; smaller GPUs are the host's concern.
constexpr unsigned SHARED_LIMIT = 227 << 10;
// Declared (static) shared memory that a kernel may have.
constexpr unsigned STATIC_LIMIT = 48 << 10;
// Behind the dynamic part and every declaration lie so many bytes that nobody may write, and that read as NaN.
constexpr unsigned GUARD = 64, MAX_SITES = 64;

struct Kernel {
    unsigned threads;
    const void* function;
    Entry entry;
};

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

std::atomic<int> order{0};

#if defined(__x86_64__)
// Saves what a call preserves, changes stacks, restores.
extern "C" void strata_switch(void** from, void* to);
asm(R"(
.text
.type strata_switch, @function
strata_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size strata_switch, . - strata_switch
)");
#endif

enum class State { Ready, Block, WarpWait, Poll, Done };

struct Fiber {
    Thread thread;
    State state;
    int generation;  // of the warp barrier it waits for
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
};

// A barrier of some of a block's threads.
struct Group {
    int arrived = 0, generation = 0;
};

struct Block {
    Group groups[16];
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned char* stacks = nullptr;
    std::size_t stacks_size = 0;
    std::vector<u32> shared;
    unsigned dynamic_shared = 0, shared_used = 0, declared = 0;
    std::vector<unsigned> guards;  // where they begin
    std::vector<int> sites;  // where each declaration's memory begins, −1 where not met yet
    const Kernel* kernel = nullptr;
    void** arguments = nullptr;
    int live = 0, waiting = 0;
    bool failed = false, overrun = false;
    bool polled = false;  // a thread that had waited for a condition went on
    Fiber* running = nullptr;
#if defined(__x86_64__)
    void* scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
    ~Block() { if (stacks) munmap(stacks, stacks_size); }
};

// The block that this thread runs.
__thread Block* block = nullptr;

// Blocks that nobody runs. They are the library's and not their threads': what a thread has to destroy keeps the library in memory until the
// thread ends, and with it its share of the little room for variables like `current`.
std::mutex idle_lock;
std::vector<std::unique_ptr<Block>> idle;

struct Lease {
    Lease() {
        const std::lock_guard lock(idle_lock);
        if (idle.empty()) idle.push_back(std::make_unique<Block>());
        block = idle.back().release();
        idle.pop_back();
    }
    ~Lease() {
        const std::lock_guard lock(idle_lock);
        idle.emplace_back(block);
        block = nullptr;
    }
};

void leave() {
    Fiber* fiber = block->running;
#if defined(__x86_64__)
    strata_switch(&fiber->stack_pointer, block->scheduler);
#else
    swapcontext(&fiber->context, &block->scheduler);
#endif
    current = &fiber->thread;
}

void fiber_main() {
    block->kernel->entry(block->kernel->function, block->arguments);
    Fiber* fiber = block->running;
    fiber->state = State::Done;
    --block->live;
    Warp* warp = fiber->thread.warp;
    --warp->live;
    // Those that wait in the warp wait only for threads that still run.
    if (warp->live > 0 && warp->arrived == warp->live) { warp->arrived = 0; ++warp->generation; }
    leave();
    std::abort();
}

void prepare(Fiber& fiber, unsigned char* stack) {
#if defined(__x86_64__)
    auto top = reinterpret_cast<void**>(stack + STACK);
    *--top = nullptr;  // keeps the stack 16-byte aligned at the entry, as after a call
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

void resume(Fiber& fiber) {
    block->running = &fiber;
    current = &fiber.thread;
#if defined(__x86_64__)
    strata_switch(&block->scheduler, fiber.stack_pointer);
#else
    swapcontext(&block->scheduler, &fiber.context);
#endif
}

// Runs one block to its end; false when its threads wait for each other for ever or it declares too much shared memory.
bool run_block(Index index, Index grid, unsigned threads, std::vector<unsigned>& turns, std::mt19937& random) {
    Block& b = *block;
    b.warps.assign((threads + 31) / 32, Warp());
    std::fill(b.shared.begin(), b.shared.end(), 0xffffffffu);  // NaN, so that reading what nobody wrote shows
    std::fill(std::begin(b.groups), std::end(b.groups), Group());
    b.live = static_cast<int>(threads);
    b.waiting = 0;
    b.shared_used = b.dynamic_shared + GUARD;
    b.declared = 0;
    b.guards.assign(1, b.dynamic_shared);
    std::fill(b.sites.begin(), b.sites.end(), -1);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = b.fibers[t];
        fiber.thread = {{t, 0, 0}, index, {threads, 1, 1}, grid, &b.warps[t / 32], reinterpret_cast<unsigned char*>(b.shared.data()), 0, {}, {}};
        fiber.state = State::Ready;
        ++b.warps[t / 32].live;
        prepare(fiber, b.stacks + t * STACK);
    }
    while (b.live > 0) {
        if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
        bool progress = false;
        for (unsigned t : turns) {
            Fiber& fiber = b.fibers[t];
            if (fiber.state == State::WarpWait && fiber.generation != fiber.thread.warp->generation) fiber.state = State::Ready;
            if (fiber.state != State::Ready && fiber.state != State::Poll) continue;
            const bool polls = fiber.state == State::Poll;
            b.polled = false;
            fiber.state = State::Ready;
            resume(fiber);
            // Looking again whether a condition holds is none.
            if (!polls || b.polled || fiber.state != State::Poll) progress = true;
            if (b.failed) return false;
        }
        if (b.live > 0 && b.waiting == b.live) {
            b.waiting = 0;
            for (unsigned t = 0; t < threads; ++t)
                if (b.fibers[t].state == State::Block) b.fibers[t].state = State::Ready;
            progress = true;
        }
        if (!progress) return false;
    }
    for (unsigned guard : b.guards)
        for (unsigned word = guard / 4; word < (guard + GUARD) / 4; ++word)
            if (b.shared[word] != 0xffffffffu) { b.overrun = true; return false; }
    return true;
}

}  // namespace

void block_barrier() {
    ++block->waiting;
    block->running->state = State::Block;
    leave();
}

void poll_once() {
    block->running->state = State::Poll;
    leave();
}

void polled() { block->polled = true; }

void warp_barrier() {
    Warp* warp = current->warp;
    if (++warp->arrived == warp->live) {
        warp->arrived = 0;
        ++warp->generation;
        return;
    }
    block->running->state = State::WarpWait;
    block->running->generation = warp->generation;
    leave();
}

void group_wait(int id, int threads) {
    Group& group = block->groups[id];
    const int generation = group.generation;
    if (++group.arrived == threads) group.arrived = 0, ++group.generation;
    poll([=] { return block->groups[id].generation != generation; });
}

int new_site() {
    static std::atomic<int> sites{0};
    return sites++;
}

void* declare_shared(int site, unsigned bytes) {
    Block& b = *block;
    if (static_cast<std::size_t>(site) >= b.sites.size()) b.sites.resize(site + 1, -1);
    if (b.sites[site] < 0) {
        b.sites[site] = static_cast<int>(b.shared_used);
        const unsigned size = (bytes + 15) & ~15u;
        b.declared += size;
        if (b.dynamic_shared + b.declared > SHARED_LIMIT || b.declared > STATIC_LIMIT || b.guards.size() > MAX_SITES) {
            b.failed = true;
            leave();
        }
        b.guards.push_back(b.shared_used + size);
        b.shared_used += size + GUARD;
    }
    return current->shared + b.sites[site];
}

void Registration::add(const char* name, unsigned threads, const void* kernel, Entry entry) { kernels()[name] = {threads, kernel, entry}; }

}  // namespace strata

using namespace strata;

extern "C" void strata_order(int order) { strata::order = order; }

// 0: done, 1: no such kernel or a block larger than its bounds, 2: the threads wait for each other for ever, or too much shared memory,
// 3: something was written behind a piece of shared memory.
extern "C" int strata_launch(const char* name, const unsigned grid[3], const unsigned block_size[3], unsigned smem, void** arguments) {
    const auto found = kernels().find(name);
    if (found == kernels().end()) return 1;
    const unsigned threads = block_size[0];
    if (threads == 0 || threads > found->second.threads || block_size[1] != 1 || block_size[2] != 1) return 1;
    if (smem > SHARED_LIMIT) return 2;
    const Lease lease;
    Block& b = *block;
    if (b.stacks_size < threads * STACK) {
        if (b.stacks) munmap(b.stacks, b.stacks_size);
        b.stacks_size = threads * STACK;
        b.stacks = static_cast<unsigned char*>(mmap(nullptr, b.stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (b.stacks == MAP_FAILED) { b.stacks = nullptr; b.stacks_size = 0; return 2; }
    }
    b.fibers.resize(std::max<std::size_t>(b.fibers.size(), threads));
    b.dynamic_shared = (smem + 15) & ~15u;
    b.shared.resize((std::min(SHARED_LIMIT, b.dynamic_shared + STATIC_LIMIT) + (MAX_SITES + 2) * GUARD) / 4);
    b.kernel = &found->second;
    b.arguments = arguments;
    b.failed = b.overrun = false;
    std::mt19937 random(static_cast<unsigned>(strata::order));
    std::vector<unsigned> turns(threads);
    for (unsigned t = 0; t < threads; ++t) turns[t] = strata::order == 1 ? threads - 1 - t : t;
    const unsigned long blocks = static_cast<unsigned long>(grid[0]) * grid[1] * grid[2];
    for (unsigned long i = 0; i < blocks; ++i) {
        const unsigned long at = strata::order == 1 ? blocks - 1 - i : i;
        const Index index = {static_cast<unsigned>(at % grid[0]), static_cast<unsigned>(at / grid[0] % grid[1]), static_cast<unsigned>(at / grid[0] / grid[1])};
        if (!run_block(index, {grid[0], grid[1], grid[2]}, threads, turns, random)) return b.overrun ? 3 : 2;
    }
    return 0;
}

// f16 by hand: not every host compiler has the type.
float widen(f16 x) {
    const u32 sign = static_cast<u32>(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    if (exponent == 31) return bits_float(sign | 0x7f800000 | mantissa << 13);
    const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24) : std::ldexp(static_cast<float>(mantissa | 0x400), static_cast<int>(exponent) - 25);
    return sign ? -magnitude : magnitude;
}

template <> f16 narrow<f16>(float x) {
    const unsigned short sign = static_cast<unsigned short>(float_bits(x) >> 16 & 0x8000);
    const float magnitude = std::fabs(x);
    if (x != x) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
    if (magnitude == 0.0f) return {sign};
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent-1), 2^exponent)
    const int step = std::max(exponent - 11, -24);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -step)));
    // In units of the step the code is linear within and across binades.
    return {static_cast<unsigned short>(sign | (step == -24 ? units : ((step + 24) << 10) + units))};
}

void mma_s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const Message* all = exchange({{a0, a1, a2, a3, b0, b1}, nullptr});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
        for (int quad = 0; quad < 4; ++quad)
            for (int half = 0; half < 2; ++half)
                d[i] = dot4(static_cast<int>(all[row % 8 * 4 + quad].words[row / 8 + 2 * half]), static_cast<int>(all[column * 4 + quad].words[4 + half]), d[i]);
    }
}

void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const Message* all = exchange({{a0, a1, a2, a3, b0, b1}, nullptr});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
        for (int half = 0; half < 2; ++half)
            for (int quad = 0; quad < 4; ++quad) {
                const u32 a = all[row % 8 * 4 + quad].words[row / 8 + 2 * half], b = all[column * 4 + quad].words[4 + half];
                d[i] += bits_float(a << 16) * bits_float(b << 16);
                d[i] += bits_float(a & 0xffff0000) * bits_float(b & 0xffff0000);
            }
    }
}

void load_matrices(u32 (&words)[4], const void* row) {
    Message message;
    message.address = row;
    const Message* all = exchange(message);
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; ++m) std::memcpy(&words[m], static_cast<const u8*>(all[m * 8 + lane / 4].address) + lane % 4 * 4, 4);
}

void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
    if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from) | static_cast<unsigned>(bytes)) % 16 != 0) std::abort();
    std::memcpy(to, from, bytes);
    strata::barrier(barrier)->change(0, -bytes);
}

void copy_box(u8* to, const TensorMap& map, int at, int row, u64* barrier) {
    constexpr int ROWS = 64, WIDE = 128;
    const Matrix& from = *map.matrix;
    const u8* const bytes = reinterpret_cast<const u8*>(from.address);
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < WIDE; ++i) {
            const bool inside = row + r < static_cast<int>(from.rows) && at + i < static_cast<int>(from.row_bytes);
            // Chunks of 16 bytes are permuted by three bits of the address.
            const u32 place = r * WIDE + i;
            to[place ^ ((address(to) + place) >> 3 & 0x70)] = inside ? bytes[static_cast<std::size_t>(row + r) * from.row_bytes + at + i] : 0;
        }
    strata::barrier(barrier)->change(0, -ROWS * WIDE);
}

void strata::Product::operator()() const {
    const auto line = [](u64 tile, int row) { return (static_cast<u32>(tile & 0x3fff) << 4) + row * 128; };
    const auto code = [](u32 at) { return static_cast<int>(static_cast<i8>(current->shared[at ^ (at >> 3 & 0x70)])); };
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    for (int i = 0; i < count; ++i) {
        const u32 left = line(a, 16 * warp + lane / 4 + 8 * (i / 2 % 2)), right = line(b, i / 4 * 8 + lane % 4 * 2 + i % 2);
        int sum = add ? d[i] : 0;
        for (int k = 0; k < 32; ++k) sum += code(left + k) * code(right + k);
        d[i] = sum;
    }
}
