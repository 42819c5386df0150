// Numbers of every dtype from and to float32, in CUDA kernels.
#pragma once
#include "device_primitives.h"

namespace vidl {

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

}  // namespace vidl
