// space_time_attention on CUDA: the groups of a call, and the softmax of 16 queries a warp, forward
// and backward.
#pragma once
#include "cuda_groups.h"
#include "space_time_attention.h"

namespace vidl {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;  // exponentials are to the base two

__device__ __forceinline__ Members queries_of(const Attention& a, int64_t g) {
  return members(a.query_offsets, a.query_rows, g, a.Q, a.Q, a.max_queries);
}
__device__ __forceinline__ Members keys_of(const Attention& a, int64_t g) {
  return members(a.key_offsets, a.key_rows, g, a.E, a.K, a.max_keys);
}

// Offsets must begin with 0 and end with all rows; members() looks at the rest.
__device__ __forceinline__ void check_ends(const Attention& a) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  assert(a.query_offsets[0] == 0 && a.query_offsets[a.G] == a.Q);
  assert(a.key_offsets[0] == 0 && a.key_offsets[a.G] == a.E);
}

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

// What 16 queries know after some of their keys.
template <int D>
struct Softmax {
  float top[2], sum[2];  // of the lane's rows; each lane sums its own columns
  Square out[D / 16];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < 2; i++) top[i] = -INFINITY, sum[i] = 0.0f;
    clear<D>(out);
  }

  // Meets `count` more keys, of which the lane's row i sees those with sees(i, column). Leaves
  // their weights, relative to `top`.
  template <class T, int kSquares, class Sees>
  __device__ __forceinline__ void meet(const Rows16<D>& q, const T* k, const T* v, int count,
                                       float scale, Square (&weights)[kSquares], Sees sees) {
    float most[2] = {top[0], top[1]}, factor[2];
#pragma unroll
    for (int n = 0; n < kSquares; n++) {
      if (16 * n < count) multiply_transposed<T, D>(weights[n], q, k, 16 * n);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int j = e / 4, i = e / 2 % 2;
        float& x = weights[n][j][e % 4];
        x = 16 * n < count && sees(i, 16 * n + column_of_lane(j) + e % 2) ? x * scale : -INFINITY;
        most[i] = fmaxf(most[i], x);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      most[i] = max_of_row(most[i]);
      factor[i] = exp2_approx(top[i] - (most[i] == -INFINITY ? 0.0f : most[i]));
      top[i] = most[i];
      sum[i] *= factor[i];
      if (most[i] == -INFINITY) most[i] = 0.0f;  // the row has seen nothing
    }
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
#pragma unroll
      for (int e = 0; e < 8; e++) out[n][e / 4][e % 4] *= factor[e / 2 % 2];
    }
#pragma unroll
    for (int n = 0; n < kSquares; n++) {
      if (16 * n >= count) continue;
#pragma unroll
      for (int e = 0; e < 8; e++) {
        float& x = weights[n][e / 4][e % 4];
        x = exp2_approx(x - most[e / 2 % 2]);
        sum[e / 2 % 2] += x;
      }
      uint32_t a[4];
      pack<T>(a, weights[n]);
      accumulate<T, D>(out, a, v, 16 * n);
    }
  }

  // After all keys: what makes the weights sum to one, and the log-sum-exp; 0 and -inf of none.
  __device__ __forceinline__ void finish(float (&inverse)[2], float (&lse)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float total = sum_of_row(sum[i]);
      inverse[i] = total == 0.0f ? 0.0f : 1.0f / total;
      lse[i] = total == 0.0f ? -INFINITY : top[i] * kLn2 + logf(total);
    }
  }
};

// Whole rows of weights of 16 queries once more, and the gradients of their products before the
// scale. `lse` is to the base two; more(i, column) is added to the gradient of a weight. The
// weights of a row are made to sum to one again, as far as rounding in the log-sum-exp let them
// stray: their gradient is a difference that would show it.
template <class T, int D, int kSquares, class Sees, class More>
__device__ __forceinline__ void differentiate(const T* q, const T* grad_out, const T* k, const T* v,
                                              int count, float scale, const float (&lse)[2],
                                              Square (&weights)[kSquares],
                                              Square (&grads)[kSquares], Sees sees, More more) {
  float sum[2] = {}, total[2] = {};
  Rows16<D> rows;
  rows.load(q);
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    if (16 * n >= count) continue;
    multiply_transposed<T, D>(weights[n], rows, k, 16 * n);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int i = e / 2 % 2;
      float& x = weights[n][e / 4][e % 4];
      const bool seen = sees(i, 16 * n + column_of_lane(e / 4) + e % 2);
      x = seen ? exp2_approx(x * scale - lse[i]) : 0.0f;
      sum[i] += x;
    }
  }
  rows.load(grad_out);
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    if (16 * n >= count) continue;
    multiply_transposed<T, D>(grads[n], rows, v, 16 * n);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int i = e / 2 % 2, column = 16 * n + column_of_lane(e / 4) + e % 2;
      float& x = grads[n][e / 4][e % 4];
      x = sees(i, column) ? x + more(i, column) : 0.0f;
      total[i] += weights[n][e / 4][e % 4] * x;
    }
  }
  float delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sum[i] = sum_of_row(sum[i]);
    sum[i] = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
    delta[i] = sum_of_row(total[i]) * sum[i];
  }
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    if (16 * n >= count) continue;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      float& weight = weights[n][e / 4][e % 4];
      weight *= sum[e / 2 % 2];
      grads[n][e / 4][e % 4] = weight * (grads[n][e / 4][e % 4] - delta[e / 2 % 2]);
    }
  }
}

// The part of a query's weights in the scores of its keys, of one head.
__device__ __forceinline__ float share_of(Scores scores, int i, int queries) {
  if (scores == Scores::kMean) return 1.0f / static_cast<float>(queries);
  return i == 0 ? 1.0f : 0.0f;
}

}  // namespace
}  // namespace vidl
