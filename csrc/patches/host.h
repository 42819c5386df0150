// Patches of a clip on the host: from the tensors of an op to `Clip` and `Rows`, with every check.
// `op` names the op in error messages. Errors say `ids` for ids_keep and ids_masked.
#pragma once
#include <cstdint>
#include <vector>

#include "patches/place.h"
#include "torch/dtype.h"

namespace vidl {
namespace {

// A clip [B, C, T, H, W] in patches of t x h x w pixels.
[[maybe_unused]] Clip clip_of(const char* op, const Tensor& video, int64_t t, int64_t h,
                              int64_t w) {
  STD_TORCH_CHECK(video.dim() == 5, op, ": need video [B, C, T, H, W]");
  Clip clip;
  clip.data = video.data_ptr();
  clip.dtype = dtype_of(video);
  clip.stride_b = video.stride(0);
  clip.stride_c = video.stride(1);
  clip.stride_t = video.stride(2);
  clip.stride_h = video.stride(3);
  clip.stride_w = video.stride(4);
  clip.C = static_cast<int32_t>(video.size(1));
  const int64_t parts[] = {t, h, w};
  int32_t* patch[] = {&clip.t, &clip.h, &clip.w};
  int32_t* grid[] = {&clip.grid_t, &clip.grid_h, &clip.grid_w};
  for (int i = 0; i < 3; i++) {
    const int64_t size = video.size(2 + i), part = parts[i];
    STD_TORCH_CHECK(part > 0 && size % part == 0, op, ": a patch of ", part, " does not divide ",
                    size);
    *patch[i] = static_cast<int32_t>(part);
    *grid[i] = static_cast<int32_t>(size / part);
  }
  return clip;
}

[[maybe_unused]] Rows rows_of(const char* op, const Tensor& video, const Clip& clip,
                              const OptionalTensor& ids, const OptionalTensor& cu_seqlens) {
  Rows rows;
  rows.B = video.size(0);
  rows.N = int64_t{clip.grid_t} * clip.grid_h * clip.grid_w;
  rows.ids = nullptr;
  rows.cu_seqlens = nullptr;
  if (!ids) {
    rows.K = rows.N;
    rows.total = rows.B * rows.N;
    return rows;
  }
  STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long && ids->is_contiguous(), op,
                  ": need ids in int64, contiguous");
  rows.ids = ids->const_data_ptr<int64_t>();
  rows.total = ids->numel();
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->is_contiguous() &&
                        cu_seqlens->numel() == rows.B + 1 && ids->dim() == 1,
                    op, ": need ids [total] and cu_seqlens [B + 1] in int32");
    rows.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
    rows.K = 0;
  } else {
    STD_TORCH_CHECK(ids->dim() == 2 && ids->size(0) == rows.B, op, ": need ids [B, K]");
    rows.K = ids->size(1);
  }
  return rows;
}

// x, or a contiguous copy of it.
[[maybe_unused]] OptionalTensor packed(const OptionalTensor& x) {
  return x ? OptionalTensor(contiguous_of(*x)) : x;
}

[[maybe_unused]] void check_offsets(const char* op, const Rows& rows) {
  STD_TORCH_CHECK(offsets_ascend(rows, 0, 1), op, ": cu_seqlens must ascend from 0 to ",
                  rows.total);
}

// The places of `count` rows from row `first` on, with every index checked. Called outside of
// parallel loops: an exception inside one would lose its text.
[[maybe_unused]] std::vector<Place> locate(const char* op, const Rows& rows, int64_t first,
                                           int64_t count) {
  std::vector<Place> places(count);
  for (int64_t i = 0; i < count; i++) {
    places[i] = place_of(rows, first + i);
    const int64_t id = places[i].patch;
    STD_TORCH_CHECK(id >= 0 && id < rows.N, op, ": ids must lie in [0, ", rows.N, "), got ", id,
                    " in row ", first + i);
  }
  return places;
}

}  // namespace
}  // namespace vidl
