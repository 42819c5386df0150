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

// The position of patch `id`: bias [C] + space [P, C] at id % P + time [N / P, C] at id / P. Any of
// the three may be null.
struct Position {
  const float* bias;
  const void *space, *time;
  Dtype space_dtype, time_dtype;
  int64_t P, C;
};

// The rows that show each patch, as lists in ascending order: first[b * N + n] is the first row of
// patch n of sample b, and next[m] the one after row m; -1 if there is none. Rows whose id is not
// in [0, N) are in no list, and their `next` has no meaning.
struct Inverse {
  const int32_t *first, *next;
};

}  // namespace vidl

// CUDA entry points. Pointers are device pointers, `stream` is a cudaStream_t, the result is a
// cudaError_t. Under the emulator of tests/cuda_on_cpu they are host pointers.
extern "C" {

// Folds the normalisation of pixels into the weight [C, numbers] of C_in channels:
// weight_out[c, i] = weight[c, i] * affine.scale[channel] rounded to `dtype`, and bias_out[c] =
// bias[c] + the sum over i of weight_out[c, i] * affine.shift[channel], where number i of a patch
// belongs to channel i / (numbers / C_in).
int vidl_masked_patch_embed_fold_cuda(const void* weight, vidl::Dtype dtype, const float* bias,
                                      void* weight_out, float* bias_out, int64_t C, int64_t numbers,
                                      int32_t C_in, const vidl::Affine* affine, void* stream);

// patches[m] = the pixels of row m, in the order (C_in, t, h, w), after `affine`; and, unless `out`
// is null, out[m] = the sum of `position` at the patch of row m. Both have the dtype `dtype`.
int vidl_masked_patch_embed_pack_cuda(const vidl::Clip* clip, const vidl::Rows* rows,
                                      const vidl::Affine* affine, const vidl::Position* position,
                                      void* patches, void* out, vidl::Dtype dtype, void* stream);

// Writes first [B, N] and next [total] of the inverse of `rows`, which have ids. The lists are
// empty if cu_seqlens do not ascend from 0 to the number of rows.
int vidl_masked_patch_embed_invert_cuda(const vidl::Rows* rows, int32_t* first, int32_t* next,
                                        void* stream);

// The gradient of a clip, contiguous, in clip->dtype: every pixel is the sum of its numbers in the
// rows of grad_patches that show it, zero if none does. Writes every element. The inverse of rows
// without ids is not read, here and below.
int vidl_masked_patch_embed_unpack_cuda(const void* grad_patches, vidl::Dtype dtype,
                                        const vidl::Clip* clip, const vidl::Rows* rows,
                                        const vidl::Inverse* inverse, void* video, void* stream);

// grad_position[n] [C] = the sum of grad_out[m] over the rows m of patch n, in ascending order.
int vidl_masked_patch_embed_position_grad_cuda(const void* grad_out, vidl::Dtype dtype,
                                               const vidl::Rows* rows, const vidl::Inverse* inverse,
                                               float* grad_position, int64_t C, void* stream);
}
