// Numbers of every dtype from and to float32, in CUDA kernels.
#pragma once
#include "cuda/primitives.h"
#include "dtype.h"

namespace vidl {
namespace {

template <class T>
__device__ __forceinline__ float to_float(T x);
template <>
__device__ __forceinline__ float to_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float to_float<uint8_t>(uint8_t x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ float to_float<fp16>(fp16 x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float<bf16>(bf16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float load_any(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kUInt8:
      return to_float(static_cast<const uint8_t*>(p)[i]);
    case Dtype::kFloat32:
      return static_cast<const float*>(p)[i];
    case Dtype::kFloat16:
      return to_float(static_cast<const fp16*>(p)[i]);
    default:
      return to_float(static_cast<const bf16*>(p)[i]);
  }
}

// Writes NaN to `count` numbers: the result of indices that are out of range. Kernels do not assert
// them: an assertion ends the CUDA context of the process. Called by `threads` threads.
template <class T>
__device__ __forceinline__ void write_nan(T* to, int64_t count, int64_t thread, int64_t threads) {
  for (int64_t i = thread; i < count; i += threads) to[i] = from_float<T>(NAN);
}

// Calls f with a null pointer of the type that `dtype` names.
template <class F>
int with_type(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::kFloat16) return f(static_cast<fp16*>(nullptr));
  return f(static_cast<bf16*>(nullptr));
}

}  // namespace
}  // namespace vidl
