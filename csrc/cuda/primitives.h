// Warp-level building blocks for nvcc (sm_80 and later) and for the CPU emulator of
// tests/cuda_on_cpu.
//
// Kernels include no other CUDA header. Under nvcc a function is the PTX instruction of that name;
// under a host compiler it emulates that instruction, with the same fragment layouts. All 32 lanes
// of a warp must call the collective ones (ldmatrix, movmatrix, mma) together.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#define SITE_PARAM
#define SHARED(T, name, dims) __shared__ __align__(16) T name dims
// One symbol for all kernels: extern arrays with one name must have one type.
#define DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(128) unsigned char dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_)
#else
#include "cuda_on_cpu_intrinsics.h"
#define SITE_PARAM , cuda_on_cpu::Site site = cuda_on_cpu::Site::current()
#endif

using bf16 = __nv_bfloat16;
using fp16 = __half;

// x, limited to [0, end].
__device__ __forceinline__ int within(int x, int64_t end) {
  return max(min(x, static_cast<int>(end)), 0);
}

// In one-dimensional blocks.
__device__ __forceinline__ unsigned lane_id() { return threadIdx.x % 32; }

// threadIdx.x, read again: a compiler keeps nothing that follows from it in registers through a
// loop around the call.
__device__ __forceinline__ int thread_id() {
#ifdef __CUDACC__
  int id;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(id));
  return id;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// x, of which a compiler then knows nothing: it keeps nothing that follows from it in registers.
__device__ __forceinline__ unsigned opaque(unsigned x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Two 16-bit numbers in a register; the first argument is the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return cuda_on_cpu::float_to_bf16(lo) | uint32_t(cuda_on_cpu::float_to_bf16(hi)) << 16;
#endif
}
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return cuda_on_cpu::float_to_half(lo) | uint32_t(cuda_on_cpu::float_to_half(hi)) << 16;
#endif
}
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t r);
template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t r) {
  return make_float2(__uint_as_float(r << 16), __uint_as_float(r & 0xFFFF0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<fp16>(uint32_t r) {
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(r))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(r >> 16))));
}

// 16 bytes of global memory; the address must be a multiple of 16. load_16 is for data that no
// thread writes in this launch.
__device__ __forceinline__ uint4 load_16(const void* p) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  cuda_on_cpu::check_aligned(p, 16, "load_16");
  return *static_cast<const uint4*>(p);
#endif
}
__device__ __forceinline__ void store_16(void* p, uint4 v) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
#else
  cuda_on_cpu::check_aligned(p, 16, "store_16");
  *static_cast<uint4*>(p) = v;
#endif
}

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// cp.async: copies 16 or 4 bytes from global to shared memory in the background, or zeros if !valid
// (the source is then not read). The copying thread can read them after cp_async_wait, the others
// after a further barrier.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  cuda_on_cpu::start_copy<16>("cp_async_16", to, from, valid);
#endif
}
__device__ __forceinline__ void cp_async_4(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
#else
  cuda_on_cpu::start_copy<4>("cp_async_4", to, from, valid);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_cpu::TsanIgnore ignore;
  cuda_on_cpu::self->groups++;
#endif
}
template <int pending = 0>  // waits until at most `pending` of the latest groups are unfinished
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  cuda_on_cpu::finish_copies(pending);
#endif
}

#ifndef __CUDACC__
namespace cuda_on_cpu {
struct LdMatrix {
  uint16_t row[8];
  uint32_t* out;
};
inline void ldmatrix(const char* name, int n, bool trans, uint32_t* out, const void* row,
                     Site site) {
#if defined(CUDA_ON_CPU_PROFILE)  // counted, not computed
  if (int(self->lane) < 8 * n) profile::load_matrix(row, __builtin_return_address(0));
  std::fill_n(out, n, 0u);
  return;
#endif
  LdMatrix mine{{}, out};
  // The first 8 lanes hold the row addresses of matrix 0, the next 8 of matrix 1, ...
  if (int(self->lane) < 8 * n) {
    check_aligned(row, 16, name);
    check_shared(row, 16, name);
    for (int i = 0; i < 8; i++) mine.row[i] = static_cast<const uint16_t*>(row)[i];
  }
  block->collective(name, ~0u, mine, site, true, [=](uint32_t, LdMatrix** all) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < n; m++) {
        auto at = [&](int r, int c) { return uint32_t(all[8 * m + r]->row[c]); };
        int g = lane / 4, t = lane % 4 * 2;
        all[lane]->out[m] = trans ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
      }
  });
}
struct Mma {
  float* d;
  const uint32_t *a, *b;
};
template <class T>
__attribute__((noinline)) void multiply(uint32_t, Mma** all) {
  // 8 doubles: the products are exact, and the sum is rounded once.
  typedef double Row __attribute__((vector_size(64)));
  double A[16][16];
  Row B[16], D[16];
  for (int lane = 0; lane < 32; lane++) {
    const Mma& o = *all[lane];
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
      const float2 v = unpack2<T>(o.a[i]);
      const int r = g + i % 2 * 8, c = t + i / 2 * 8;
      A[r][c] = v.x, A[r][c + 1] = v.y;
      D[g + i / 2 * 8][t + i % 2] = o.d[i];
    }
    for (int i = 0; i < 2; i++) {
      const float2 v = unpack2<T>(o.b[i]);
      B[t + i * 8][g] = v.x, B[t + i * 8 + 1][g] = v.y;
    }
  }
  for (int m = 0; m < 16; m++) {
    Row sum = D[m];
    for (int k = 0; k < 16; k++) sum += A[m][k] * B[k];
    D[m] = sum;
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      all[lane]->d[i] = float(D[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}
template <class T>
void mma(const char* name, float* d, const uint32_t* a, const uint32_t* b, Site site) {
#if defined(CUDA_ON_CPU_PROFILE)  // counted, not computed
  profile::multiply(!self->copies.empty(), __builtin_return_address(0));
  return;
#endif
  Mma mine{d, a, b};
  block->collective(name, ~0u, mine, site, true, multiply<T>);
}
}  // namespace cuda_on_cpu
#endif

// d += a * b for a warp: a is 16x16 (row major), b is 16x8 (column major), d is 16x8 in fp32. With
// g = lane / 4 and t = lane % 4 * 2, a register of a or b holds two neighbouring elements, and a
// lane holds
//     a: [g][t], [g+8][t], [g][t+8], [g+8][t+8]
//     b: [t][g], [t+8][g]  (k, n)
//     d: [g][t], [g][t+1], [g+8][t], [g+8][t+1]
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] SITE_PARAM);
#ifdef __CUDACC__
#define DEFINE_MMA(T, type)                                                              \
  template <>                                                                            \
  __device__ __forceinline__ void mma_m16n8k16<T>(float (&d)[4], const uint32_t (&a)[4], \
                                                  const uint32_t (&b)[2]) {              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                  \
                 ".f32 "                                                                 \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));    \
  }
#else
#define DEFINE_MMA(T, type)                                                                    \
  template <>                                                                                  \
  __device__ __forceinline__ void mma_m16n8k16<T>(                                             \
      float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], cuda_on_cpu::Site site) { \
    cuda_on_cpu::mma<T>("mma.m16n8k16." type, d, a, b, site);                                  \
  }
#endif
DEFINE_MMA(bf16, "bf16")
DEFINE_MMA(fp16, "f16")
#undef DEFINE_MMA

// Loads n 8x8 matrices of 16-bit elements from shared memory. Lane 8*i + r gives the address of row
// r of matrix i (16 bytes, aligned); register i receives elements [g][t], [g][t+1] of matrix i, of
// its transpose when `trans`.
template <int n, bool trans = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[n], const void* row SITE_PARAM) {
  static_assert(n == 1 || n == 2 || n == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
#define LDMATRIX(x, t, regs, addr, ...)                                                \
  asm volatile("ldmatrix.sync.aligned.m8n8." x t ".shared.b16 {" regs "}, [" addr "];" \
               : __VA_ARGS__                                                           \
               : "r"(shared_address(row))                                              \
               : "memory")
  if constexpr (n == 1) {
    if constexpr (trans)
      LDMATRIX("x1", ".trans", "%0", "%1", "=r"(r[0]));
    else
      LDMATRIX("x1", "", "%0", "%1", "=r"(r[0]));
  } else if constexpr (n == 2) {
    if constexpr (trans)
      LDMATRIX("x2", ".trans", "%0,%1", "%2", "=r"(r[0]), "=r"(r[1]));
    else
      LDMATRIX("x2", "", "%0,%1", "%2", "=r"(r[0]), "=r"(r[1]));
  } else {
    if constexpr (trans)
      LDMATRIX("x4", ".trans", "%0,%1,%2,%3", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
    else
      LDMATRIX("x4", "", "%0,%1,%2,%3", "%4", "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]));
  }
#undef LDMATRIX
#else
  cuda_on_cpu::ldmatrix(trans ? "ldmatrix.trans" : "ldmatrix", n, trans, r, row, site);
#endif
}

// Transposes an 8x8 matrix of 16-bit elements held one register per lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t r SITE_PARAM) {
#ifdef __CUDACC__
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(r));
  return d;
#else
  return cuda_on_cpu::exchange(
      "movmatrix.trans", ~0u, r, site, [](uint32_t, uint32_t* in, int lane) {
        auto at = [&](int row, int col) { return in[row * 4 + col / 2] >> col % 2 * 16 & 0xFFFF; };
        int g = lane / 4, t = lane % 4 * 2;
        return at(t, g) | at(t + 1, g) << 16;
      });
#endif
}

// Named barriers, with ids 1 to 15. `threads`, a multiple of 32, counts the threads that wait and
// those that only arrive.
__device__ __forceinline__ void named_barrier_sync(unsigned id, unsigned threads SITE_PARAM) {
#ifdef __CUDACC__
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  cuda_on_cpu::block->barrier("named_barrier_sync", id, threads, true, false, site);
#endif
}
__device__ __forceinline__ void named_barrier_arrive(unsigned id, unsigned threads SITE_PARAM) {
#ifdef __CUDACC__
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  cuda_on_cpu::block->barrier("named_barrier_arrive", id, threads, false, false, site);
#endif
}

__device__ __forceinline__ float exp2_approx(float x) {  // 2^x to about 2 ulp; 0 for -inf
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}
__device__ __forceinline__ float log2_approx(float x) {  // to about 2^-22, also relative to x > 2
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}
__device__ __forceinline__ float reciprocal_approx(float x) {  // 1 / x to 1 ulp
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, d);
  return x;
}

// A property of this GPU. 0 after an error, which the next launch returns.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}
// The bytes of shared memory, static and dynamic together, that a block can have.
inline int64_t most_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// A kernel gets more than 48 KB of shared memory, static and dynamic together, only if it asked for
// it. This asks for all that the device has, once per kernel and device.
inline cudaError_t allow_shared_memory(const void* kernel, int64_t dynamic) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  int device = 0, most = 0;
  cudaFuncAttributes own = {};
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& bytes = allowed[{kernel, device}];
  if (dynamic <= bytes) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&own, kernel);
  if (error == cudaSuccess) {
    const int64_t left = most - static_cast<int64_t>(own.sharedSizeBytes);
    const int64_t ask = left > dynamic ? left : dynamic;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(ask));
    if (error == cudaSuccess) bytes = ask;
  }
  if (error != cudaSuccess) cudaGetLastError();  // else the next launch would return it
  return error;
}

// Starts a kernel on a one-dimensional grid; without blocks there is nothing to do.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t blocks, int64_t threads, int64_t shared_bytes,
                   void* stream, A&&... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 0) {
    const void* const address = reinterpret_cast<const void*>(kernel);
    const cudaError_t error = allow_shared_memory(address, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
#ifdef __CUDACC__
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(
      static_cast<P>(args)...);
  return cudaGetLastError();
#else
  static_cast<void>(stream);
  return cuda_on_cpu::launch(kernel, grid, block, static_cast<size_t>(shared_bytes),
                             static_cast<P>(args)...);
#endif
}
