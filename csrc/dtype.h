// The dtypes of tensors, for host code and CUDA kernels alike. No torch, no CUDA.
#pragma once
#include <cstdint>

namespace vidl {

enum class Dtype : int32_t { kUInt8, kFloat32, kFloat16, kBFloat16 };

}  // namespace vidl
