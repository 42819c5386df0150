// select_tokens: what its host code and its CUDA kernels share. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace vidl {

// One number per token of a sample; strides count elements.
struct Numbers {
  const float* data;
  int64_t sample, token;
};

// B samples of rows of C elements; a sample begins with its prefix. With offsets they are packed.
struct Samples {
  const int32_t *cu_seqlens, *cu_kept;  // [B + 1] or null
  int64_t B, N, K;                      // tokens and kept tokens per sample, without offsets
  int64_t total, num_kept;              // rows and kept tokens of all
  int64_t prefix, C;
  Dtype dtype;
  bool fuses;
};

// Contiguous rows of x; strides count elements. With offsets the stride of samples is not used.
struct TokenRows {
  const void* data;
  int64_t sample, row;
};

// The outputs of the forward (kernels/select_tokens/op.py). mean and mass are null unless fuse is
// "mean".
struct Selection {
  void* tokens;
  int64_t *ids, *inverse;
  int32_t* offsets;
  float *mean, *mass;
};

// The inputs of the backward; mean and mass as above.
struct SelectionGrad {
  const void* tokens;  // the gradient of the tokens
  const int64_t* inverse;
  const int32_t* offsets;
  const float *mean, *mass;
};

}  // namespace vidl

// CUDA entry points. Pointers are device pointers, `stream` is a cudaStream_t, the result is a
// cudaError_t. Under the emulator of tests/cuda_on_cpu they are host pointers.
extern "C" {

// Writes every element of `out`. weights->data is null without a fused token.
int vidl_select_tokens_cuda(const vidl::Samples* samples, const vidl::TokenRows* x,
                            const vidl::Numbers* ranks, const vidl::Numbers* weights, bool by_score,
                            const vidl::Selection* out, void* stream);

// Writes every element of grad_x (contiguous, as x) and grad_weights (contiguous, as the scores).
// Either may be null; without grad_weights x->data is null. cu_kept and K are not used.
int vidl_select_tokens_bwd_cuda(const vidl::Samples* samples, const vidl::SelectionGrad* grad,
                                const vidl::TokenRows* x, const vidl::Numbers* weights,
                                void* grad_x, float* grad_weights, void* stream);
}
