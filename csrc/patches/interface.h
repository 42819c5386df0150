// Patches of a clip, for host code and CUDA kernels alike. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace vidl {

constexpr int kMaxChannels = 64;

// A strided clip [B, C, T, H, W] and its patches: a grid of grid_t x grid_h x grid_w, each of
// t x h x w pixels in C channels. Strides count elements.
struct Clip {
  const void* data;
  Dtype dtype;
  int64_t stride_b, stride_c, stride_t, stride_h, stride_w;
  int32_t C, t, h, w;
  int32_t grid_t, grid_h, grid_w;
};

// `total` rows, of which every one is a patch: of sample m / K for row m, or of the sample b with
// cu_seqlens[b] <= m < cu_seqlens[b + 1]; namely patch ids[m], or m % K without ids (then K = N).
struct Rows {
  const int64_t* ids;         // [total] or null
  const int32_t* cu_seqlens;  // [B + 1] or null
  int64_t B, K, total, N;     // N patches of a sample
};

}  // namespace vidl
