// masked_patch_embed: what its host code and its CUDA kernels share. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "patches/interface.h"

namespace vidl {

// A pixel x of channel c becomes (x - centre[c]) * scale[c] + shift[c], in float32. The centre is
// an integer close to the mean, so that the difference is exact.
struct Affine {
  float centre[kMaxChannels], scale[kMaxChannels], shift[kMaxChannels];
};

// bias [D] + space [S, D] at id % S + time [N / S, D] at id / S; each may be null.
struct Position {
  const float* bias;
  const void *space, *time;
  Dtype space_dtype, time_dtype;
  int64_t S, D;
};

}  // namespace vidl

// CUDA entry points. Pointers are device pointers, `stream` is a cudaStream_t, the result is a
// cudaError_t. Under the emulator of tests/cuda_on_cpu they are host pointers.
extern "C" {

// weight_out[d, k] = weight[d, k] * affine.scale[c] rounded to `dtype`, and
// bias_out[d] = bias[d] + sum over k of weight_out[d, k] * affine.shift[c], where c = k / (kdim /
// C).
int vidl_fold_cuda(const void* weight, vidl::Dtype dtype, const float* bias, void* weight_out,
                   float* bias_out, int64_t D, int64_t kdim, int32_t C, const vidl::Affine* affine,
                   void* stream);

// patches[m, k] = the pixels of row m, in the order (C, t, h, w), after `affine`; and, unless `out`
// is null, out[m, d] = the sum of `position` at the patch of row m. Both have the dtype `dtype`.
int vidl_pack_patches_cuda(const vidl::Clip* clip, const vidl::Rows* rows,
                           const vidl::Affine* affine, const vidl::Position* position,
                           void* patches, void* out, vidl::Dtype dtype, void* stream);

// video [B, C, T, H, W] (contiguous, clip->dtype): every pixel is the sum over the rows that show
// it of grad_patches[m, k], zero where there is none. Writes every element.
int vidl_unpack_patches_cuda(const void* grad_patches, vidl::Dtype dtype, const vidl::Clip* clip,
                             const vidl::Rows* rows, void* video, void* stream);

// grad_position[n, d] = the sum of grad_out[m, d] over the rows m of patch n, in ascending order.
int vidl_position_grad_cuda(const void* grad_out, vidl::Dtype dtype, const vidl::Rows* rows,
                            float* grad_position, int64_t D, void* stream);
}
