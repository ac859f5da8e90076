// Runs the kernel sources on the CPU, for tests: C++20. Threads of a block are fibers of one OS thread that take turns in an order
// that the caller picks, so that a missing barrier shows; blocks run one after another. Start with `launch` in host.cpp.
#pragma once

#define STRATA_HOST

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace strata {

struct Index { unsigned x, y, z; };

// What one lane hands to the others of its warp.
struct Message { u32 words[12]; const void* address; };

struct Warp {
    int live = 0, arrived = 0, generation = 0;
    Message messages[2][32];
};

// What a thread has asked for and not yet waited for, in groups: done when it waits, so that who does not wait reads what was there
// before, and who lets go of an input too early has products of the next one.
template <class T> struct Queue {
    std::vector<std::pair<T, unsigned>> asked;  // with the number of its group
    unsigned groups = 0;

    // Does what is in all groups but the last `pending`.
    void wait(unsigned pending) {
        std::size_t kept = 0;
        for (auto& [operation, group] : asked) {
            if (group + pending < groups) operation();
            else asked[kept++] = {operation, group};
        }
        asked.resize(kept);
    }
};

struct Copy {
    void* to;
    const void* from;
    bool valid;
    void operator()() const { if (valid) std::memcpy(to, from, 16); else std::memset(to, 0, 16); }
};

// d = a b for the results of one thread of a warpgroup, added to d where `add`; `a` and `b` describe tiles in shared memory.
struct Product {
    int* d;
    int count;
    u64 a, b;
    bool add;
    void operator()() const;
};

struct Thread {
    Index thread, block, block_size, grid;
    Warp* warp;
    unsigned char* shared;  // the block's shared memory, dynamic part first
    unsigned parity;        // which of the warp's message buffers is next
    Queue<Copy> copies;
    Queue<Product> products;
};

extern __thread Thread* current __attribute__((tls_model("initial-exec")));

void block_barrier();
void warp_barrier();
void group_wait(int id, int threads);
// Lets others run until `done()`.
void poll_once();
void polled();
template <class F> void poll(F done) {
    if (done()) return;
    do poll_once(); while (!done());
    polled();
}
// Memory of one declaration; the same for all threads and all calls, as on a GPU.
void* declare_shared(int site, unsigned bytes);
int new_site();

// Hands `message` to the warp and returns everyone's. Buffers alternate: a lane can be one exchange ahead, never two.
inline const Message* exchange(const Message& message) {
    const unsigned parity = current->parity;
    current->parity ^= 1;
    Message* all = current->warp->messages[parity];
    all[current->thread.x % 32] = message;
    warp_barrier();
    return all;
}

template <class T> T exchange_value(T value, unsigned lane) {
    Message message;
    std::memcpy(message.words, &value, sizeof value);
    const Message* all = exchange(message);
    std::memcpy(&value, all[lane % 32].words, sizeof value);
    return value;
}

using Entry = void (*)(const void* kernel, void** arguments);

template <class... A, std::size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

struct Registration {
    template <class... A> Registration(const char* name, unsigned threads, void (*kernel)(A...)) {
        add(name, threads, reinterpret_cast<const void*>(kernel), [](const void* kernel, void** arguments) {
            call(reinterpret_cast<void (*)(A...)>(const_cast<void*>(kernel)), arguments, std::index_sequence_for<A...>());
        });
    }
    static void add(const char* name, unsigned threads, const void* kernel, Entry entry);
};

}  // namespace strata

// Launches run one after another here.
inline void launch_next() {}
inline void wait_previous() {}
inline void depend() {}

#define KERNEL(threads, name, parameters)                                            \
    static void name parameters;                                                     \
    static const strata::Registration name##_registration(#name, threads, &name);   \
    static void name parameters
#define RESIDENT_KERNEL(threads, blocks, name, parameters) KERNEL(threads, name, parameters)
#define DEVICE static inline
#define SHARED(type, name, count)                          \
    static const int name##_site = strata::new_site();     \
    type* const name = static_cast<type*>(strata::declare_shared(name##_site, (count) * sizeof(type)))
#define SHARED_ROWS(type, name, rows, cols)                \
    static const int name##_site = strata::new_site();     \
    type(*const name)[cols] = static_cast<type(*)[cols]>(strata::declare_shared(name##_site, (rows) * (cols) * sizeof(type)))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(strata::current->shared)

#define threadIdx (strata::current->thread)
#define blockIdx (strata::current->block)
#define blockDim (strata::current->block_size)
#define gridDim (strata::current->grid)

inline void __syncthreads() { strata::block_barrier(); }
inline void __syncwarp() { strata::warp_barrier(); }
inline void group_wait(int id, int threads) { strata::group_wait(id, threads); }
template <class T> T __ldg(const T* from) { return *from; }

inline u32 float_bits(float x) { u32 y; std::memcpy(&y, &x, 4); return y; }
inline float bits_float(u32 x) { float y; std::memcpy(&y, &x, 4); return y; }
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return bits_float(static_cast<u32>(x.bits) << 16); }
float widen(f16 x);
template <class T> T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {
    const u32 bits = float_bits(x);
    if (x != x) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> f16 narrow<f16>(float x);
inline u32 pack_bf16(float low, float high) { return narrow<bf16>(low).bits | static_cast<u32>(narrow<bf16>(high).bits) << 16; }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

inline u32 push_byte(u32 word, u32 from, int i) { return word >> 8 | (from >> 8 * i & 0xff) << 24; }
inline u32 low_bytes(u32 a, u32 b, u32 c, u32 d) { return (a & 0xff) | (b & 0xff) << 8 | (c & 0xff) << 16 | d << 24; }

inline int dot4(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += static_cast<i8>(a >> 8 * i) * static_cast<i8>(b >> 8 * i);
    return sum;
}

inline float shuffle(float x, int lane) { return strata::exchange_value(x, lane); }
inline int shuffle(int x, int lane) { return strata::exchange_value(x, lane); }
inline float shuffle_xor(float x, int mask) { return strata::exchange_value(x, threadIdx.x ^ mask); }
inline double shuffle_xor(double x, int mask) { return strata::exchange_value(x, threadIdx.x ^ mask); }
inline int shuffle_xor(int x, int mask) { return strata::exchange_value(x, threadIdx.x ^ mask); }
inline int warp_max(int x) {
    for (int mask = 16; mask > 0; mask /= 2) { const int other = shuffle_xor(x, mask); x = x > other ? x : other; }
    return x;
}

void mma_s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
void load_matrices(u32 (&words)[4], const void* row);

inline void copy_async(void* to, const void* from, bool valid) { strata::current->copies.asked.push_back({{to, from, valid}, strata::current->copies.groups}); }
inline void copy_commit() { ++strata::current->copies.groups; }
template <int Pending> void copy_wait() { strata::current->copies.wait(Pending); }
inline uint4 load_once(const void* from) { uint4 x; std::memcpy(&x, from, 16); return x; }

inline void prefetch(const void*) {}

inline void __threadfence() {}
inline int atomicAdd(int* to, int x) { int old = *to; *to += x; return old; }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long x) { unsigned long long old = *to; *to += x; return old; }
inline unsigned atomicAdd(unsigned* to, unsigned x) { unsigned old = *to; *to += x; return old; }

// Hopper: barriers in shared memory, the copy engine (which is at once done), and products of a warpgroup.
#define BULK_COPIES
#define HOPPER
#define MAP TensorMap

namespace strata {

struct Matrix { u64 address, rows, row_bytes; };

// A barrier's eight bytes.
struct Barrier {
    short count, pending;  // arrivals of a phase, and how many of them are still to come
    int phase_bytes;       // twice the bytes still to come, and in the lowest bit the parity of the phase

    void start(int arrivals) { count = pending = static_cast<short>(arrivals), phase_bytes = 0; }
    void change(int arrivals, int bytes) {
        pending = static_cast<short>(pending - arrivals), phase_bytes += 2 * bytes;
        if (pending == 0 && phase_bytes < 2) pending = count, phase_bytes ^= 1;
    }
};
static_assert(sizeof(Barrier) == sizeof(u64));

inline Barrier* barrier(u64* at) { return reinterpret_cast<Barrier*>(at); }

template <int COUNT> void ask_product(int (&d)[COUNT], u64 a, u64 b, int add) { current->products.asked.push_back({{d, COUNT, a, b, add != 0}, current->products.groups}); }

}  // namespace strata

struct TensorMap { const strata::Matrix* matrix; };

inline u32 address(const void* at) { return static_cast<u32>(static_cast<const u8*>(at) - strata::current->shared); }
inline void barrier_start(u64* at, int count) { strata::barrier(at)->start(count); }
inline void barrier_arrive(u64* at) { strata::barrier(at)->change(1, 0); }
inline void barrier_wait(u64* at, int parity) { strata::poll([=] { return (strata::barrier(at)->phase_bytes & 1) != parity; }); }
inline void barrier_expect(u64* at, int bytes) { strata::barrier(at)->change(1, bytes); }
void copy_bulk(void* to, const void* from, int bytes, u64* barrier);
void copy_box(u8* to, const TensorMap& map, int at, int row, u64* barrier);
inline void barriers_ready() {}
inline void fence_async() {}
template <int COUNT> void take_registers() {}
template <int COUNT> void give_registers() {}
inline void products_begin() {}
inline void products_commit() { ++strata::current->products.groups; }
// Of the whole warp.
template <int PENDING> void products_wait() {
    strata::current->products.wait(PENDING);
    strata::warp_barrier();
}
inline void product(int (&d)[32], u64 a, u64 b, int add) { strata::ask_product(d, a, b, add); }
inline void product(int (&d)[64], u64 a, u64 b, int add) { strata::ask_product(d, a, b, add); }
inline void product(int (&d)[128], u64 a, u64 b, int add) { strata::ask_product(d, a, b, add); }
