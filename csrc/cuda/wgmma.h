// Products of a warpgroup (sm_90a): four warps multiply matrices that lie in shared memory while
// they compute something else. For nvcc and for the CPU emulator of tests/cuda_on_cpu.
//
// The rules, which the emulator checks:
// - All four warps of a warpgroup execute the same instructions with the same operands.
// - wgmma_fence() names the accumulators and the fragments of A of the products after it. Nobody
//   touches these registers until a wgmma_wait() that names them and covers the products.
// - A thread that has written to shared memory what a product reads executes fence_proxy_async()
//   and then a barrier. cp.async is such a write.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Async proxy".
#pragma once
#include "cuda/primitives.h"
#ifdef __CUDACC__
// Aligned to a swizzle atom.
#define DYNAMIC_SHARED_1024(T, name)                                      \
  extern __shared__ __align__(1024) unsigned char dynamic_shared_1024_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_1024_)
#else
#include "warpgroups.h"
#define DYNAMIC_SHARED_1024(T, name) DYNAMIC_SHARED(T, name)
#endif

// VIDL_WGMMA: this translation unit has kernels with these instructions; the build defines
// VIDL_SM_90A if it compiles for sm_90a. VIDL_WGMMA_NOW: the architecture that is being compiled
// has the instructions.
#if !defined(__CUDACC__) || defined(VIDL_SM_90A)
#define VIDL_WGMMA 1
#endif
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VIDL_WGMMA_NOW 1
#endif

// Tiles of 16-bit numbers, in rows of 64 numbers (128 bytes) with a swizzle of 128 bytes: the unit
// of 16 bytes u of row r lies at unit u ^ r % 8. A tile starts at a multiple of 1024 bytes. An
// operand is K-major if a row is one m or n and holds its k, MN-major if a row is one k. The next
// 16 k are 32 bytes further on in a K-major tile, and 16 rows in an MN-major one.
enum class Major { kK = 0, kMN = 1 };

constexpr int kSwizzledRow = 128;  // bytes

// Where the byte at `offset` of a tile without swizzle lies.
__host__ __device__ constexpr uint32_t swizzled(uint32_t offset) {
  return offset ^ (offset >> 7 & 7) << 4;
}

// The matrix descriptor of a tile: its address, the distance of the next eight rows, the swizzle.
__device__ __forceinline__ uint64_t describe_tile(const void* tile) {
  constexpr uint64_t kStride = 8 * kSwizzledRow / 16, kSwizzle128 = 1;
#ifdef __CUDACC__
  const uint32_t address = shared_address(tile);
#else
  const uint32_t address = cuda_on_cpu::warpgroups().address(tile);
#endif
  return address >> 4 | kStride << 32 | kSwizzle128 << 62;
}
// The operand so many bytes further on.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Orders what this thread has written to shared memory before what products read there.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  cuda_on_cpu::warpgroups().fence_proxy();
#endif
}

#ifdef __CUDACC__
// Keeps the compiler from moving accesses of registers across this place: to it, a product has
// ended with its instruction.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int n>
__device__ __forceinline__ void pin(T (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) pin(x[i]);
}
#endif

// Hands accumulators and fragments of A to the tensor cores.
template <class... Arrays>
__device__ __forceinline__ void wgmma_fence(Arrays&... registers) {
#ifdef __CUDACC__
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  cuda_on_cpu::warpgroups().fence({{registers, sizeof registers}...});
#endif
}
// Ends a group: the products since the last one.
__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  cuda_on_cpu::warpgroups().commit();
#endif
}
// Waits until at most `pending` of the latest groups are unfinished, and takes registers back.
template <int pending, class... Arrays>
__device__ __forceinline__ void wgmma_wait(Arrays&... registers) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (pin(registers), ...);
#else
  cuda_on_cpu::warpgroups().wait(pending, {{registers, sizeof registers}...});
#endif
}

// d = (accumulate ? d : 0) + a b for a warpgroup: a is 64 x 16, b 16 x N, d 64 x N in float32 with
// N = 2 count. Warp w of the four has the rows from 16 w on. With g = lane / 4 and t = lane % 4 *
// 2, d[4 * j + 2 * i + l] is row g + 8 * i of these, column 8 * j + t + l. In registers, a is the
// fragment of mma_m16n8k16 for the warp's rows: so two neighbouring pairs of 8 columns of d,
// packed, are a fragment of 16 k.
#ifdef __CUDACC__
#define WGMMA_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_32 WGMMA_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_OUTPUTS_16 WGMMA_4(0), WGMMA_4(4), WGMMA_4(8), WGMMA_4(12)
#define WGMMA_OUTPUTS_32 WGMMA_OUTPUTS_16, WGMMA_4(16), WGMMA_4(20), WGMMA_4(24), WGMMA_4(28)
#define WGMMA_TEXT(n, type, d, a, b, accumulate, transposes)                           \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate                                       \
  ", 0;\n"                                                                             \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" d "}, " a ", " b \
  ", p, 1, 1, " transposes ";\n}\n"
#define DEFINE_WGMMA(T, type)                                                                \
  template <int a_major, int b_major>                                                        \
  __device__ __forceinline__ void wgmma_shared(T, float (&d)[16], uint64_t a, uint64_t b,    \
                                               int accumulate) {                             \
    asm volatile(WGMMA_TEXT("32", type, WGMMA_16, "%16", "%17", "%18", "%19, %20")           \
                 : WGMMA_OUTPUTS_16                                                          \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(a_major), "n"(b_major));             \
  }                                                                                          \
  template <int a_major, int b_major>                                                        \
  __device__ __forceinline__ void wgmma_shared(T, float (&d)[32], uint64_t a, uint64_t b,    \
                                               int accumulate) {                             \
    asm volatile(WGMMA_TEXT("64", type, WGMMA_32, "%32", "%33", "%34", "%35, %36")           \
                 : WGMMA_OUTPUTS_32                                                          \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(a_major), "n"(b_major));             \
  }                                                                                          \
  template <int b_major>                                                                     \
  __device__ __forceinline__ void wgmma_registers(T, float (&d)[32], const uint32_t (&a)[4], \
                                                  uint64_t b, int accumulate) {              \
    asm volatile(WGMMA_TEXT("64", type, WGMMA_32, "{%32,%33,%34,%35}", "%36", "%37", "%38")  \
                 : WGMMA_OUTPUTS_32                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),      \
                   "n"(b_major));                                                            \
  }
DEFINE_WGMMA(bf16, "bf16")
DEFINE_WGMMA(fp16, "f16")
#undef DEFINE_WGMMA
#undef WGMMA_TEXT
#undef WGMMA_OUTPUTS_32
#undef WGMMA_OUTPUTS_16
#undef WGMMA_4
#undef WGMMA_32
#undef WGMMA_16
#endif
template <class T, Major a_major, Major b_major, int count>
__device__ __forceinline__ void wgmma(float (&d)[count], uint64_t a, uint64_t b,
                                      bool accumulate SITE_PARAM) {
#ifdef __CUDACC__
  wgmma_shared<static_cast<int>(a_major), static_cast<int>(b_major)>(T(), d, a, b, accumulate);
#else
  cuda_on_cpu::warpgroups().multiply({d, 2 * count, accumulate, std::is_same_v<T, bf16>, nullptr, a,
                                      b, a_major == Major::kMN, b_major == Major::kMN},
                                     site);
#endif
}
template <class T, Major b_major, int count>
__device__ __forceinline__ void wgmma(float (&d)[count], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate SITE_PARAM) {
#ifdef __CUDACC__
  wgmma_registers<static_cast<int>(b_major)>(T(), d, a, b, accumulate);
#else
  cuda_on_cpu::warpgroups().multiply(
      {d, 2 * count, accumulate, std::is_same_v<T, bf16>, a, 0, b, false, b_major == Major::kMN},
      site);
#endif
}
