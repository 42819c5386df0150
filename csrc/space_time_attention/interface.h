// space_time_attention: what its host code and its CUDA kernels share. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "groups/interface.h"

namespace vidl {

enum class Scores : int32_t { kNone, kCls, kMean };

struct Attention {
  Strided q, k, v;
  const int32_t *query_offsets, *key_offsets;  // [G + 1]
  const int32_t *query_rows, *key_rows;        // [Q], [E], or null
  int64_t G, H, D, Q, K, E;                    // Q rows of q, K rows of k and v
  int64_t max_queries, max_keys;               // of any group: upper bounds
  float scale;
  Scores scores;
  Dtype dtype;
};

struct Forward {
  void* out;           // [Q, H, D]
  float* lse;          // [H, Q]
  float* scores;       // [H, E] or null
  float* mean_scores;  // [E] or null: of the heads
};

struct Backward {
  const void *grad_out, *out;              // [Q, H, D]
  const float *lse, *grad_scores;          // [H, Q]; [E] or null
  void *grad_q, *grad_k, *grad_v;          // [Q, H, D], [K, H, D]
  float *entry_grad_k, *entry_grad_v;      // [E, H, D] where rows are shared, else null
  const int32_t *entry_offsets, *entries;  // [K + 1], [E], of rows that are shared
  float* delta;                            // [H, Q], for the kernels of long groups
};

// Which kernels a call takes on CUDA: by its longest group, before they are launched.
enum class Size {
  kPacked,   // at most 16 queries and keys: a warp has the groups that fill 16 rows
  kWhole,    // at most 128: a block has a group, and every warp whole rows of weights
  kWide,     // at most 256: the same, but backward with a few queries at a time
  kBlocked,  // any length: blocks of queries meet blocks of keys
};

constexpr Size forward_size(int64_t max_queries, int64_t max_keys) {
  const int64_t longest = max_queries > max_keys ? max_queries : max_keys;
  return longest <= 16    ? Size::kPacked
         : longest <= 128 ? Size::kWhole
         : longest <= 256 ? Size::kWide
                          : Size::kBlocked;
}
// All rows of a wide group, four tensors of them, fit into a block's shared memory up to D = 64.
constexpr Size backward_size(int64_t max_queries, int64_t max_keys, int64_t D) {
  const Size size = forward_size(max_queries, max_keys);
  return size == Size::kWide && D > 64 ? Size::kBlocked : size;
}

}  // namespace vidl

// CUDA entry points, for float16 and bfloat16, with rows that begin at multiples of 16 bytes.
// Pointers are device pointers, `stream` is a cudaStream_t, the result is a cudaError_t. Under the
// emulator of tests/cuda_on_cpu they are host pointers.
extern "C" {
int vidl_attention_cuda(const vidl::Attention* attention, const vidl::Forward* forward,
                        void* stream);
int vidl_attention_bwd_cuda(const vidl::Attention* attention, const vidl::Backward* backward,
                            void* stream);
}
