// Which patch a row shows and where it begins, on the host and in CUDA kernels alike.
#pragma once
#include "patches/interface.h"

#ifdef __CUDACC__
#define VIDL_HOST_DEVICE __host__ __device__
#else
#define VIDL_HOST_DEVICE
#endif

namespace vidl {

struct Place {
  int64_t sample, patch;
};

// The place of row m. The caller checks that the patch lies in [0, N), and the sample in [0, B).
VIDL_HOST_DEVICE inline Place place_of(const Rows& rows, int64_t m) {
  int64_t sample;
  if (rows.cu_seqlens == nullptr) {
    sample = m / rows.K;
  } else {
    int64_t low = 0, high = rows.B;  // the last b with cu_seqlens[b] <= m
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (rows.cu_seqlens[middle] <= m ? low : high) = middle;
    }
    sample = low;
  }
  return {sample, rows.ids == nullptr ? m - sample * rows.K : rows.ids[m]};
}

// Whether cu_seqlens ascend from 0 to `total`, as far as the samples first, first + step, ... show.
VIDL_HOST_DEVICE inline bool offsets_ascend(const Rows& rows, int64_t first, int64_t step) {
  if (rows.cu_seqlens == nullptr) return true;
  bool ascend = rows.cu_seqlens[0] == 0 && rows.cu_seqlens[rows.B] == rows.total;
  for (int64_t b = first; b < rows.B; b += step) {
    ascend = ascend && rows.cu_seqlens[b] <= rows.cu_seqlens[b + 1];
  }
  return ascend;
}

// The first pixel of a patch, in elements from the start of the clip.
VIDL_HOST_DEVICE inline int64_t corner(const Clip& clip, const Place& place) {
  const int32_t id = static_cast<int32_t>(place.patch);
  const int32_t frame = clip.grid_h * clip.grid_w;
  return place.sample * clip.stride_b + int64_t{id / frame} * clip.t * clip.stride_t +
         int64_t{id % frame / clip.grid_w} * clip.h * clip.stride_h +
         int64_t{id % clip.grid_w} * clip.w * clip.stride_w;
}

}  // namespace vidl
