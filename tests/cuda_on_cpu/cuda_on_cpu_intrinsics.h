// CUDA's barriers, warp functions, atomics, arithmetic and 16-bit floats, for cuda_on_cpu.h.
#pragma once
#include "cuda_on_cpu.h"

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::current()

inline void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::block->barrier("__syncthreads", 0, 0, true, false, site);
}
inline int __syncthreads_count(int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block->barrier("__syncthreads_count", 0, 0, true, p != 0, site);
}
inline int __syncthreads_or(int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block->barrier("__syncthreads_or", 0, 0, true, p != 0, site) != 0;
}
inline int __syncthreads_and(int p, CUDA_ON_CPU_SITE) {  // no thread voted against
  return cuda_on_cpu::block->barrier("__syncthreads_and", 0, 0, true, p == 0, site) == 0;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() { __threadfence(); }
inline void __nanosleep(unsigned) {  // lets the other threads of the block run
  cuda_on_cpu::TsanIgnore ignore;
  cuda_on_cpu::block->make_ready(cuda_on_cpu::self->warp, 1u << cuda_on_cpu::self->lane);
  cuda_on_cpu::block->wait();
}
[[noreturn]] inline void __trap(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::fail("__trap at " + cuda_on_cpu::where(site));
}
inline long long clock64() {
  static std::atomic<long long> ticks{0};
  return ++ticks;
}
#undef assert
#define assert(c) ((c) ? void(0) : ::cuda_on_cpu::assert_failed(#c, __FILE__, __LINE__))

namespace cuda_on_cpu {

// Every lane passes a value and receives f(lanes, values by lane, receiving lane).
template <class T, class F>
T exchange(const char* name, uint32_t mask, T value, Site site, F f) {
  struct Operands {
    T in, out;
  } mine{value, value};
  block->collective(name, mask, mine, site, false, [&](uint32_t lanes, Operands** all) {
    T in[32];
    std::memset(static_cast<void*>(in), 0xFF,
                sizeof in);  // the value of a lane outside the mask: poison
    for (uint32_t m = lanes; m; m &= m - 1) in[std::countr_zero(m)] = all[std::countr_zero(m)]->in;
    for (uint32_t m = lanes; m; m &= m - 1)
      all[std::countr_zero(m)]->out = f(lanes, in, std::countr_zero(m));
  });
  return mine.out;
}
// A shuffle: from(lane) is the source lane, counted within the lane's segment of `width` lanes. The
// source may differ from lane to lane, so every lane passes its own.
template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, Site site) {
  struct Pair {
    T value;
    int source;
  } mine{value, source};
  return exchange(name, mask, mine, site,
                  [](uint32_t, Pair* in, int lane) { return in[in[lane].source & 31]; })
      .value;
}
inline uint32_t ballot(const char* name, uint32_t mask, bool p, Site site) {
  return exchange(name, mask, uint32_t(p), site, [](uint32_t lanes, uint32_t* in, int) {
    uint32_t bits = 0;
    for (uint32_t m = lanes; m; m &= m - 1) bits |= in[std::countr_zero(m)] << std::countr_zero(m);
    return bits;
  });
}
}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_SITE) {
  // Only __syncwarp orders memory; shuffles do not. The address is new for every block.
  void* order = cuda_on_cpu::block->arena + cuda_on_cpu::Block::arena_bytes -
                8 * (cuda_on_cpu::self->warp + 1);
  cuda_on_cpu::tsan_release(order);
  cuda_on_cpu::exchange("__syncwarp", mask, 0, site, [](uint32_t, int*, int) { return 0; });
  cuda_on_cpu::tsan_acquire(order);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32, CUDA_ON_CPU_SITE) {
  int me = cuda_on_cpu::self->lane;
  return cuda_on_cpu::shuffle("__shfl_sync", mask, v, (me & -width) | (lane & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32, CUDA_ON_CPU_SITE) {
  int me = cuda_on_cpu::self->lane, from = me ^ lane_mask;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, v, from < (me & -width) + width ? from : me,
                              site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  int me = cuda_on_cpu::self->lane, from = me - int(delta);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, v, from >= (me & -width) ? from : me, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  int me = cuda_on_cpu::self->lane, from = me + int(delta);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, v, from < (me & -width) + width ? from : me,
                              site);
}
inline unsigned __ballot_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__ballot_sync", mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__any_sync", mask, p != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::ballot("__all_sync", mask, p == 0, site) == 0;
}
// c + the sum of the products of the four bytes of a and b.
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 0xFF) * (b >> i & 0xFF);
  return c;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T v, CUDA_ON_CPU_SITE) {
  struct Pair {
    T value;
    uint32_t same;
  };
  return cuda_on_cpu::exchange(
             "__match_any_sync", mask, Pair{v, 0}, site,
             [](uint32_t lanes, Pair* in, int lane) {
               Pair r{in[lane].value, 0};
               for (uint32_t m = lanes; m; m &= m - 1)
                 r.same |=
                     uint32_t(!std::memcmp(&in[std::countr_zero(m)].value, &r.value, sizeof(T)))
                     << std::countr_zero(m);
               return r;
             })
      .same;
}
inline unsigned __activemask() {
  cuda_on_cpu::fail("__activemask has no meaning here: pass the mask you mean");
}

// Atomics are relaxed, as in CUDA.
namespace cuda_on_cpu {
template <class T, class F>
T atomic_update(T* p, F f) {
  std::atomic_ref<T> a(*p);
  T old = a.load(std::memory_order_relaxed);
  while (!a.compare_exchange_weak(old, f(old), std::memory_order_relaxed)) {
  }
  return old;
}
}  // namespace cuda_on_cpu
template <class T>
__attribute__((noinline)) T atomicAdd(T* p, std::type_identity_t<T> v) {
  PROFILE(update(p, sizeof(T), __builtin_return_address(0)));
  return cuda_on_cpu::atomic_update(p, [v](T o) { return T(o + v); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic_update(p, [v](T o) { return o < v ? v : o; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic_update(p, [v](T o) { return v < o ? v : o; });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic_update(p, [v](T o) { return T(o | v); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic_update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return cuda_on_cpu::atomic_update(p, [=](T o) { return o == expected ? v : o; });
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// The GPU's approximate functions are computed exactly here: compare results with a tolerance.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}

namespace cuda_on_cpu {  // round to nearest even, NaN becomes 0x7FFF: the same bits as on the GPU
inline uint16_t float_to_bf16(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f);
  return f != f ? 0x7FFF : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
inline float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
inline uint16_t float_to_half(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f), sign = u >> 16 & 0x8000;
  u &= 0x7FFFFFFF;
  if (f != f) return 0x7FFF;
  if (u >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65520 and above: infinity
  if (u < 0x38800000)  // a subnormal half counts 2^-24, which is the last place of 0.5f: let the
                       // addition round
    return uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(u) + 0.5f) - 0x3F000000));
  return uint16_t(sign | (u - 0x38000000 + 0xFFF + (u >> 13 & 1)) >> 13);
}
inline float half_to_float(uint16_t h) {
  uint32_t u = uint32_t(h & 0x7FFF) << 13, sign = uint32_t(h & 0x8000) << 16;
  uint32_t magnitude = (h & 0x7C00) == 0x7C00
                           ? u | 0x7F800000  // infinity or NaN
                           : std::bit_cast<uint32_t>(std::bit_cast<float>(u) * 0x1p112f);
  return std::bit_cast<float>(sign | magnitude);
}
}  // namespace cuda_on_cpu

// Arithmetic on two 16-bit values rounds to 16 bits each time, as on the GPU.
#define CUDA_ON_CPU_FLOAT16(T, T2, name, name2, to, from)                       \
  struct T {                                                                    \
    uint16_t bits;                                                              \
    T() = default;                                                              \
    T(float f) : bits(cuda_on_cpu::to(f)) {}                                    \
    operator float() const { return cuda_on_cpu::from(bits); }                  \
    friend T operator+(T a, T b) { return T(float(a) + float(b)); }             \
    friend T operator-(T a, T b) { return T(float(a) - float(b)); }             \
    friend T operator*(T a, T b) { return T(float(a) * float(b)); }             \
    friend T operator/(T a, T b) { return T(float(a) / float(b)); }             \
  };                                                                            \
  struct alignas(4) T2 {                                                        \
    T x, y;                                                                     \
  };                                                                            \
  inline T __float2##name(float f) { return T(f); }                             \
  inline T __float2##name##_rn(float f) { return T(f); }                        \
  inline float __##name##2float(T h) { return h; }                              \
  inline T2 __float2##name2##_rn(float f) { return {T(f), T(f)}; }              \
  inline T2 __floats2##name2##_rn(float x, float y) { return {T(x), T(y)}; }    \
  inline T2 __float22##name2##_rn(float2 f) { return {T(f.x), T(f.y)}; }        \
  inline float __low2float(T2 h) { return h.x; }                                \
  inline float __high2float(T2 h) { return h.y; }                               \
  inline T __ushort_as_##name(unsigned short u) { return std::bit_cast<T>(u); } \
  inline unsigned short __##name##_as_ushort(T h) { return h.bits; }
CUDA_ON_CPU_FLOAT16(__half, __half2, half, half2, float_to_half, half_to_float)
CUDA_ON_CPU_FLOAT16(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162, float_to_bf16,
                    bf16_to_float)
#undef CUDA_ON_CPU_FLOAT16
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {h.x, h.y}; }
