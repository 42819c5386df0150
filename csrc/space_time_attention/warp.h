// space_time_attention on CUDA: the softmax of 16 queries by a warp, forward and backward.
#pragma once
#include "groups/logits.h"
#include "groups/softmax.h"
#include "space_time_attention/interface.h"

namespace vidl {
namespace {

// out += weights times values
template <class T, int D, int kSquares>
__device__ __forceinline__ void add_values(Square (&out)[D / 16], const Square (&weights)[kSquares],
                                           const T* v, int count) {
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    if (16 * n >= count) continue;
    uint32_t a[4];
    pack<T>(a, weights[n]);
    accumulate<T, D>(out, a, v, 16 * n);
  }
}

// The weights of 16 queries that meet all their keys at once, before the division by their sum.
template <class T, int D, int kSquares, class Logit>
__device__ __forceinline__ Normaliser weigh_keys(const T* q, const T* k, int count,
                                                 Square (&weights)[kSquares], const Logit& logit) {
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  Rows16<D> rows;
  rows.load(q);
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    if (16 * n < count) multiply_transposed<T, D>(weights[n], rows, k, 16 * n);
  }
  scale_logits(weights, count, most, logit);
  exponentiate(weights, count, most, sum);
  return Normaliser(most, sum);
}

// Recomputes whole rows of weights of 16 queries, and computes the gradients of their logits before
// the scale. `lse` is to the base two; more(i, column) is added to the gradient of a weight. The
// weights of a row are divided by their sum again, which differs from one by the rounding error of
// the log-sum-exp: their gradient is a difference, in which that error would show. `delta` becomes
// the sum of the weights times their gradients.
template <class T, int D, int kSquares, class Logit, class More>
__device__ __forceinline__ void differentiate(const T* q, const T* grad_out, const T* k, const T* v,
                                              int count, const float (&lse)[2],
                                              Square (&weights)[kSquares],
                                              Square (&grads)[kSquares], float (&delta)[2],
                                              const Logit& logit, More more) {
  float sum[2] = {}, total[2] = {};
  Rows16<D> rows;
  rows.load(q);
#pragma unroll
  for (int n = 0; n < kSquares; n++) {
    if (16 * n >= count) continue;
    multiply_transposed<T, D>(weights[n], rows, k, 16 * n);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int i = e / 2 % 2, column = 16 * n + column_of_lane(e / 4) + e % 2;
      float& x = weights[n][e / 4][e % 4];
      const float scaled = logit.scaled(i, column, x);
      x = logit.sees(i, column) ? exp2_approx(scaled - lse[i]) : 0.0f;
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
      x = logit.sees(i, column) ? x + more(i, column) : 0.0f;
      total[i] += weights[n][e / 4][e % 4] * x;
    }
  }
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

// delta of 16 queries from `first` on: the sum of the weights times their gradients equals the
// output times its gradient. `grad_out` is the queries' tile; lanes 2 r and 2 r + 1 share row r.
template <class T, int D>
__device__ __forceinline__ float output_times_grad(const void* output, int64_t H, int h,
                                                   const Members& queries, int first,
                                                   const T* grad_out) {
  const int lane = lane_id();
  float dot = 0.0f;
  if (first + lane / 2 < queries.count) {
    const int64_t row = queries.row(first + lane / 2);
    const T* const out = static_cast<const T*>(output) + (row * H + h) * D;
#pragma unroll
    for (int unit = 0; unit < D / 16; unit++) {
      const int d = 16 * unit + lane % 2 * 8;
      const uint4 x = load_16(out + d);
      const uint4 y = *reinterpret_cast<const uint4*>(grad_out + lane / 2 * kStride<D> + d);
      const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float2 l = unpack2<T>(left[n]), r = unpack2<T>(right[n]);
        dot += l.x * r.x + l.y * r.y;
      }
    }
  }
  return dot + __shfl_xor_sync(kAllLanes, dot, 1);
}

// Writes the delta of the warp's 16 queries from `first` on, for the gradient of the table.
__device__ __forceinline__ void store_delta(const SpaceTimeAttention& a, const Backward& b, int h,
                                            const Members& queries, int first,
                                            const float (&delta)[2]) {
  if (b.grad_bias == nullptr || lane_id() % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    if (query < queries.count) b.delta[h * a.groups.num_queries + queries.row(query)] = delta[i];
  }
}

// Stores the gradients of 16 keys and values from `first` on, or of their entries. Only this warp
// uses `tile`.
template <class T, int D>
__device__ __forceinline__ void store_key_grads(const SpaceTimeAttention& a, const Backward& b,
                                                int h, const Members& keys, int first, T* tile,
                                                const Square (&grad_k)[D / 16],
                                                const Square (&grad_v)[D / 16]) {
  if (b.entry_grad_k != nullptr) {
    const auto place = [&](int r) {
      return first + r < keys.count ? int64_t{keys.first + first + r} : -1;
    };
    store_floats<D>(b.entry_grad_k, a.H, h, grad_k, a.scale, place);
    store_floats<D>(b.entry_grad_v, a.H, h, grad_v, 1.0f, place);
  } else {
    const auto row = [&](int r) { return first + r < keys.count ? keys.row(first + r) : -1; };
    store_rows<T, D>(static_cast<T*>(b.grad_k), a.H, h, tile, grad_k, a.scale, a.scale, row);
    store_rows<T, D>(static_cast<T*>(b.grad_v), a.H, h, tile, grad_v, 1.0f, 1.0f, row);
  }
}

__host__ __device__ constexpr int round_up_16(int64_t n) {
  return static_cast<int>((n + 15) / 16 * 16);
}

// The factor of a query's weights in the scores of its keys, within one head.
__device__ __forceinline__ float share_of(Scores scores, int i, int queries) {
  if (scores == Scores::kMean) return 1.0f / static_cast<float>(queries);
  return i == 0 ? 1.0f : 0.0f;
}

}  // namespace
}  // namespace vidl
