// The softmax of 16 queries of a group by a warp, over blocks of keys. For CUDA sources and for the
// emulator of tests/cuda_on_cpu.
#pragma once
#include "groups/device.h"

namespace vidl {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;  // exponentials are to the base two

__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float sum_of_column(float x) {  // of the sixteen rows, given two
  x += __shfl_xor_sync(kAllLanes, x, 4);
  x += __shfl_xor_sync(kAllLanes, x, 8);
  return x + __shfl_xor_sync(kAllLanes, x, 16);
}

// Scales the logits of 16 queries with `count` keys: logit.scaled(i, column, product) of the lane's
// row i. A logit is -inf unless logit.sees(i, column): that query attends to that key. `most` is
// raised to the maximum of a row.
template <int kSquares, class Logit>
__device__ __forceinline__ void scale_logits(Square (&logits)[kSquares], int count,
                                             float (&most)[2], const Logit& logit) {
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    const bool any = 16 * n < count;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int j = e / 4, i = e / 2 % 2, column = 16 * n + column_of_lane(j) + e % 2;
      float& x = logits[n][j][e % 4];
      if (any) x = logit.scaled(i, column, x);
      x = any && logit.sees(i, column) ? x : -INFINITY;
      most[i] = fmaxf(most[i], x);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) most[i] = max_of_row(most[i]);
}

// Turns logits into exponentials relative to `most`; a lane adds those of its columns to `sum`.
template <int kSquares>
__device__ __forceinline__ void exponentiate(Square (&logits)[kSquares], int count,
                                             const float (&most)[2], float (&sum)[2]) {
  float top[2];
#pragma unroll
  for (int i = 0; i < 2; i++) top[i] = most[i] == -INFINITY ? 0.0f : most[i];  // no key so far
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    if (16 * n >= count) continue;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      float& x = logits[n][e / 4][e % 4];
      x = exp2_approx(x - top[e / 2 % 2]);
      sum[e / 2 % 2] += x;
    }
  }
}

// Turns the products of 16 queries with a block of keys into exponentials. Those of earlier blocks,
// of which `sum` and `out` hold sums, were relative to a smaller maximum.
template <int kSquares, int kSums, class Logit>
__device__ __forceinline__ void add_block(Square (&logits)[kSquares], int count, bool is_first,
                                          float (&most)[2], float (&sum)[2], Square (&out)[kSums],
                                          const Logit& logit) {
  const float before[2] = {most[0], most[1]};
  scale_logits(logits, count, most, logit);
  if (!is_first) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      factor[i] = exp2_approx(before[i] - (most[i] == -INFINITY ? 0.0f : most[i]));
      sum[i] *= factor[i];
    }
#pragma unroll
    for (int n = 0; n < kSums; n++) {
#pragma unroll
      for (int e = 0; e < 8; e++) out[n][e / 4][e % 4] *= factor[e / 2 % 2];
    }
  }
  exponentiate(logits, count, most, sum);
}

// 1 / the sum of the weights, and the log-sum-exp, of the lane's rows; 0 and -inf without keys.
struct Normaliser {
  float inverse[2], lse[2];

  __device__ __forceinline__ Normaliser(const float (&most)[2], const float (&sum)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float total = sum_of_row(sum[i]);
      inverse[i] = total == 0.0f ? 0.0f : reciprocal_approx(total);
      lse[i] = total == 0.0f ? -INFINITY : (most[i] + log2_approx(total)) * kLn2;
    }
  }
};

}  // namespace
}  // namespace vidl
