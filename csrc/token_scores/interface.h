// token_scores: what its host code and its CUDA kernels share. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "groups/interface.h"

namespace vidl {

struct TokenScores {
  Groups groups;
  Bias bias;
  Strided q, k, v;
  int64_t H, D;
  int64_t heads;  // of an item of "cls" on the CPU
  float scale;
  Dtype dtype;
};

enum class Score : int32_t { kCls, kMean, kValue, kSimilarity };

// What the CUDA kernels of the forward write; null if the kind of score does not need it.
struct ScoresForward {
  float* scores;     // [E]
  float* by_head;    // [H, E]: the weights of the first query, or their mean over all queries
  float* lse;        // [H, num_queries], of "mean"
  bool given;        // the log-sum-exp is read, not written
  float* norms;      // [num_keys], of "value"
  void* directions;  // [E, 2, D] in float16, of "similarity"
};

// What those of the backward read and write.
struct ScoresBackward {
  const float* grad_scores;  // [E]
  const float* weights;      // [H, E], or for "mean" the log-sum-exp [H, num_queries]
  const float* norms;        // [num_keys], of "value"
  void *grad_q, *grad_k,
      *grad_v;            // [num_queries, H, D], [num_keys, H, D]; of "cls" grad_q is zeros
  float* grad_attention;  // [E], of "value": of the mean of the weights over the heads
  float* grad_norms;      // [E], of "value"
  float* grad_logits;     // [H, E], of "cls" where rows are shared
  float* entry_grad_k;    // [E, H, D], of "mean" where rows are shared
  float *total, *delta;   // [H, num_queries], of "mean"
  // The gradient of the table, [H, bias.rows], or null: the sum of `parts` of [H, bias.rows], in
  // their order.
  float *grad_bias, *bias_parts;
  int64_t parts;
};

}  // namespace vidl

// CUDA entry points, for float16 and bfloat16, with rows that begin at multiples of 16 bytes.
// Pointers are device pointers, `stream` is a cudaStream_t, the result is a cudaError_t. Under the
// emulator of tests/cuda_on_cpu they are host pointers.
extern "C" {
int vidl_token_scores_cuda(const vidl::TokenScores* scores, vidl::Score kind,
                           const vidl::ScoresForward* forward, void* stream);
int vidl_token_scores_bwd_cuda(const vidl::TokenScores* scores, vidl::Score kind,
                               const vidl::ScoresBackward* backward, void* stream);
}
