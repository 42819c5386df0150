// Packed rows of several heads, for host code and CUDA kernels alike. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace vidl {

// [rows, H, D], the last dimension contiguous; strides count elements.
struct Strided {
  const void* data;
  int64_t row, head;
};

}  // namespace vidl
