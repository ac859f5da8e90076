// What the kernels use of the machine, in two bodies: the GPU's (NVRTC, no headers) and the CPU's (host.h, for tests).
// Kernels hold no other code that differs between the two. Contraction is off on both (`--fmad=false`,
// `-ffp-contract=off`): where a fused multiply-add is wanted the code says `fmaf`, everything else rounds as written.
#pragma once

#ifdef STRATA_HOST
#include "host.h"
#else

#define KERNEL(threads, name, parameters) extern "C" __global__ void __launch_bounds__(threads) name parameters
// The same for a kernel of which a multiprocessor is to hold so many blocks: bounds its registers.
#define RESIDENT_KERNEL(threads, blocks, name, parameters) extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters
#define DEVICE static __device__ __forceinline__
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define SHARED_ROWS(type, name, rows, cols) __shared__ __align__(16) type name[rows][cols]
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) unsigned char strata_shared[]; type* const name = reinterpret_cast<type*>(strata_shared)

#define INFINITY __int_as_float(0x7f800000)

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

// The launch behind may get ready now: first in every kernel but `*conv*_step` and `ssm_step_*`, which say why.
DEVICE void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Everything before this launch is done and seen. In front of it a kernel may only read what no launch writes: weights. What waits
// for less than its predecessor must not exist: each kernel waits for all.
DEVICE void wait_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void depend() {
    launch_next();
    wait_previous();
}

DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
DEVICE float widen(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
template <class T> DEVICE T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { bf16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
template <> __device__ __forceinline__ f16 narrow<f16>(float x) { f16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
// Two bf16 in a word, `low` in the lower half.
DEVICE u32 pack_bf16(float low, float high) { u32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }

// The bytes of a word moved down by one, and byte i of another behind them.
DEVICE u32 push_byte(u32 word, u32 from, int i) { return __byte_perm(word, from, 0x0321 | (4 + i) << 12); }
// The lowest bytes of four words, a's lowest.
DEVICE u32 low_bytes(u32 a, u32 b, u32 c, u32 d) { return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410); }
DEVICE int dot4(int a, int b, int sum) { return __dp4a(a, b, sum); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

DEVICE int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }

// d += a b on 16 x 32 by 32 x 8 int8. With row = lane / 4 and quad = lane % 4: a[0] has row, inputs 4 quad + 0..3; a[1] row + 8;
// a[2], a[3] the same with inputs 16 + 4 quad + 0..3; b[0], b[1] column `row` with those inputs; d[0], d[1] row, columns
// 2 quad + 0..1; d[2], d[3] row + 8.
DEVICE void mma_s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same on 16 x 16 by 16 x 8 bf16, sums in f32: a[0] has row, inputs 2 quad + 0..1; a[2] inputs 8 + 2 quad + 0..1.
DEVICE void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 2-byte elements (rows of 16 bytes) from shared memory: lane i points at row i % 8 of matrix i / 8;
// word m of a lane is the pair (lane / 4, lane % 4) of matrix m.
DEVICE void load_matrices(u32 (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(static_cast<u32>(__cvta_generic_to_shared(row))) : "memory");
}

// 16 bytes from global to shared memory behind the thread's back; zeros where not `valid`.
DEVICE void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(Pending) : "memory"); }

// 16 bytes that are read once: not kept in the first-level cache. No `.nc`: the assembler would move such loads behind what waits for
// their neighbours, to save registers.
DEVICE uint4 load_once(const void* from) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}

// Brings the 128 bytes around `at` to the second-level cache.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Waits until so many threads, whole warps, have come to barrier `id`, 1 to 15.
DEVICE void group_wait(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

#if __CUDA_ARCH__ >= 900
#define BULK_COPIES
// Barriers in shared memory, and the copy engine.
DEVICE u32 address(const void* at) { return static_cast<u32>(__cvta_generic_to_shared(at)); }

DEVICE void barrier_start(u64* barrier, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory"); }
DEVICE void barrier_arrive(u64* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory"); }
// Waits until the phase of this parity has ended.
DEVICE void barrier_wait(u64* barrier, int parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(address(barrier)), "r"(parity) : "memory");
}
// Arrives, and promises that many bytes of copies.
DEVICE void barrier_expect(u64* barrier, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory"); }
// Has the copy engine bring `bytes` bytes, a multiple of 16 from a multiple of 16 to one.
DEVICE void copy_bulk(void* to, const void* from, int bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(barrier)) : "memory");
}
// Orders what this thread has done in shared memory before what the copy engine and products of a warpgroup do there behind its next arrival: what it
// wrote is seen, and what it read has come. Without it an arrival overtakes reads that are held up, and the copy engine writes first.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Barriers that were started are seen by the copy engine.
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER
// A kernel's parameter: how the copy engine sees a matrix, rows of bytes taken in boxes of 64 rows, zeros outside.
#define MAP const __grid_constant__ TensorMap

struct __align__(64) TensorMap { u64 words[16]; };

// Has the copy engine bring the box at byte `at` of row `row`.
DEVICE void copy_box(u8* to, const TensorMap& map, int at, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(address(to)), "l"(&map), "r"(at), "r"(row), "r"(address(barrier)) : "memory");
}

// Registers of a warpgroup's threads, from what the launch gave them.
template <int COUNT> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// d = a b, added to d where `add`: 64 rows by 64, 128 or 256 tokens by 32 inputs. d[4 j + i] of a lane is row
// 16 (warp % 4) + lane / 4 + 8 (i / 2), token 8 j + lane % 4 * 2 + i % 2.
#define D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define D32(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12), D4(i + 16), D4(i + 20), D4(i + 24), D4(i + 28)
DEVICE void product(int (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
        "}, %32, %33, added;\n}" : D32(0) : "l"(a), "l"(b), "r"(add));
}
DEVICE void product(int (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
        "}, %64, %65, added;\n}" : D32(0), D32(32) : "l"(a), "l"(b), "r"(add));
}
DEVICE void product(int (&d)[128], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
        "}, %128, %129, added;\n}" : D32(0), D32(32), D32(64), D32(96) : "l"(a), "l"(b), "r"(add));
}
#undef D4
#undef D32
#endif

#endif

// Codes, bf16 weights and what they multiply are padded to this many inputs.
DEVICE int ld(int cols) { return (cols + 63) & ~63; }

// Rounds to the nearest integer, halves to even, |x| < 2^22.
DEVICE int round_even(float x) { return static_cast<int>(float_bits(__fadd_rn(x, 12582912.0f))) - 0x4b400000; }

DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

DEVICE int warp_sum(int x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

DEVICE double warp_sum(double x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

DEVICE int minimum(int a, int b) { return a < b ? a : b; }
DEVICE int maximum(int a, int b) { return a > b ? a : b; }
DEVICE int divide_up(int a, int b) { return (a + b - 1) / b; }

// f16, values beyond its largest kept there.
DEVICE f16 narrow_f16(float x) { return narrow<f16>(fabsf(x) > 65504.0f ? copysignf(65504.0f, x) : x); }

// x / (1 + exp(−x)) to some units in the last place.
DEVICE float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
