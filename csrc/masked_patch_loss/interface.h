// masked_patch_loss: what its host code and its CUDA kernels share. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "patches/interface.h"

namespace vidl {

// The most numbers of a patch in a CUDA kernel: they fit into the shared memory of a warp on every
// GPU, and the sum of their squares, as bytes, into 31 bits.
constexpr int64_t kMaxNumbers = 8192;

// What mean and variance of a target are computed over: nothing, a patch, a channel of a patch.
enum class Statistics : int32_t { kNone, kPatch, kChannel };

// A pixel x of channel c enters the target as x * scale[c] + shift[c]. With kPatch both are
// relative to the first channel, with kChannel to the channel itself: a common factor and summand
// cancel in the normalisation, except in eps.
struct Channels {
  float scale[kMaxChannels], shift[kMaxChannels], eps[kMaxChannels];
};

// [B, K, numbers], or [total, numbers] if packed, with contiguous rows. Row m is row m - sample * K
// of its sample, or row m if packed (K = 0).
struct Predictions {
  const void* data;
  Dtype dtype;
  int64_t stride_b, stride_m;
};

}  // namespace vidl

// CUDA entry points. Pointers are device pointers, `stream` is a cudaStream_t, the result is a
// cudaError_t. Under the emulator of tests/cuda_on_cpu they are host pointers.
extern "C" {

// losses[m] = the mean of (prediction[m] - target)^2; moments[m] = mean and 1 / deviation of every
// normalised part of the patch, [total, 0 or 1 or C_in, 2].
int vidl_masked_patch_loss_cuda(const vidl::Clip* clip, const vidl::Rows* rows,
                                const vidl::Predictions* predictions, vidl::Statistics statistics,
                                const vidl::Channels* channels, float* losses, float* moments,
                                void* stream);

// out[m] = 2 (prediction[m] - target) * grad[m] / numbers: [total, numbers] in the predictions'
// dtype, from the moments of the forward.
int vidl_masked_patch_loss_bwd_cuda(const float* grad, const float* moments, const vidl::Clip* clip,
                                    const vidl::Rows* rows, const vidl::Predictions* predictions,
                                    vidl::Statistics statistics, const vidl::Channels* channels,
                                    void* out, void* stream);
}
