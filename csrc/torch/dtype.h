// The Dtype of a tensor.
#pragma once
#include "dtype.h"
#include "torch/device.h"

namespace vidl {

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Byte:
      return Dtype::kUInt8;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "vidl: need uint8, float32, float16 or bfloat16");
  }
  return Dtype::kFloat32;
}

}  // namespace vidl
