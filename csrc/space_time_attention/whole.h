// space_time_attention on CUDA for groups of 17 to 256 queries or keys (forward) and up to 128
// (backward). A block computes one head of one group, with all keys and values in shared memory; a
// warp computes 16 queries, with their whole rows of weights in registers. The backward is one pass
// as well: weights and their gradients reach the warps of the keys through shared memory.
//
// Limit: bytes. For N rows in all, n in a group, in 16 bits: forward moves 8 N H D bytes for
// 4 n N H D FLOPs, backward 14 N H D bytes for 10 n N H D. At n = 69 that is 35 and 49 FLOPs per
// byte; an H200 balances at 184.
#pragma once
#include "space_time_attention/warp.h"

namespace vidl {
namespace {

constexpr int kForwardWarps = 4;

template <class T, int D, int kSquares, class Kind>
__global__ void __launch_bounds__(32 * kForwardWarps, kSquares == 4 && D <= 64 ? 3 : 2)
    whole_forward_kernel(SpaceTimeAttention a, Forward f) {
  DYNAMIC_SHARED(T, memory);
  const int64_t g = blockIdx.x / a.H;
  const int h = static_cast<int>(blockIdx.x % a.H);
  const Members queries = queries_of(a.groups, g), keys = keys_of(a.groups, g);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int most = round_up_16(a.groups.max_keys), real = round_up_16(keys.count);
  T *const k = memory, *const v = k + most * kStride<D>;
  T* const q = v + (most + 16 * warp) * kStride<D>;  // of this warp: 16 queries, later their output
  float* const columns =                             // sums of weights, for every warp
      reinterpret_cast<float*>(v + (most + 16 * warps) * kStride<D>);
  const KeyTerms terms(columns + warps * most, most);
  if (Kind::kBiased) terms.store(a.bias, keys, real, threadIdx.x, blockDim.x);
  copy_rows<T, D>({k, v}, real, {a.k, a.v}, h, keys, 0, threadIdx.x, blockDim.x);
  copy_rows<T, D>(q, 16, a.q, h, queries, 16 * warp, lane_id(), 32);
  cp_async_commit();
  if (f.scores != nullptr) {
    for (int i = threadIdx.x; i < warps * most; i += blockDim.x) columns[i] = 0.0f;
  }
  cp_async_wait();
  __syncthreads();

  for (int start = 16 * warp; start < queries.count; start += 16 * warps) {
    Square weights[kSquares], out[D / 16];
    const QueryLogits<Kind> logit(a, h, queries, keys, start, terms);
    const int count = logit.most();
    const Normaliser row = weigh_keys<T, D>(q, k, count, weights, logit);
    float share[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = start + row_of_lane(i);
      const bool is_query = query < queries.count;
      if (is_query && lane_id() % 4 == 0)
        f.lse[h * a.groups.num_queries + queries.row(query)] = row.lse[i];
      share[i] = is_query ? row.inverse[i] * share_of(a.scores, query, queries.count) : 0.0f;
    }
    if (f.scores != nullptr && (a.scores == Scores::kMean || start == 0)) {
#pragma unroll
      for (int e = 0; e < 4 * kSquares; e++) {
        const int n = e / 4, j = e / 2 % 2, l = e % 2, column = 16 * n + column_of_lane(j) + l;
        if (16 * n >= count) continue;
        const float score =
            sum_of_column(weights[n][j][l] * share[0] + weights[n][j][2 + l] * share[1]);
        if (lane_id() < 4) columns[warp * most + column] += score;
      }
    }
    clear<D>(out);
    add_values<T, D>(out, weights, v, count);
    clear_rows<Kind, D>(out, row.inverse[0] == 0.0f, row.inverse[1] == 0.0f);
    __syncwarp();
    store_rows<T, D>(
        static_cast<T*>(f.out), a.H, h, q, out, row.inverse[0], row.inverse[1],
        [&](int r) { return start + r < queries.count ? queries.row(start + r) : -1; });
    if (start + 16 * warps < queries.count) {
      copy_rows<T, D>(q, 16, a.q, h, queries, start + 16 * warps, lane_id(), 32);
      cp_async_commit();
      cp_async_wait();
      __syncwarp();
    }
  }
  if (f.scores == nullptr) return;
  __syncthreads();
  for (int key = threadIdx.x; key < keys.count; key += blockDim.x) {
    float score = 0.0f;
    for (int w = 0; w < warps; w++) score += columns[w * most + key];
    f.scores[h * a.groups.E + keys.first + key] = score;
  }
}

// The shared memory of a block, for the whole numbers of squares of the longest group: tiles, and
// behind them what Limited and Biased need.
template <class T, int D>
__host__ __device__ constexpr int64_t whole_backward_tiles(int64_t queries, int64_t keys) {
  constexpr int64_t kRow = kStride<D> * sizeof(T);
  const int64_t tiles = 2 * keys * kRow, weights = 2 * queries * (keys + 8) * sizeof(T);
  return 2 * queries * kRow + (tiles > weights ? tiles : weights);
}
template <class T, int D, class Kind>
constexpr int64_t whole_backward_bytes(int64_t queries, int64_t keys) {
  return whole_backward_tiles<T, D>(queries, keys) +
         (Kind::kLimited ? queries / 16 * int64_t{sizeof(int)} : 0) +
         (Kind::kBiased ? keys * KeyTerms::kBytes : 0);
}

// There is a warp for every 16 queries and 16 keys. It computes its queries first, then its keys.
// One block a multiprocessor is enough: without the number ptxas aims at more, and spills.
template <class T, int D, int kSquares, class Kind>
__global__ void __launch_bounds__(32 * kSquares, 1)
    whole_backward_kernel(SpaceTimeAttention a, Backward b) {
  DYNAMIC_SHARED(T, memory);
  const int64_t g = blockIdx.x / a.H;
  const int h = static_cast<int>(blockIdx.x % a.H);
  const Members queries = queries_of(a.groups, g), keys = keys_of(a.groups, g);
  const int warp = threadIdx.x / 32, start = 16 * warp;
  const int stride = round_up_16(a.groups.max_keys) + 8;  // of a row of weights
  T *const q = memory, *const grad_out = q + round_up_16(a.groups.max_queries) * kStride<D>;
  T* const k = grad_out + round_up_16(a.groups.max_queries) * kStride<D>;
  T* const v = k + round_up_16(a.groups.max_keys) * kStride<D>;
  // The weights and their gradients, [queries, keys], overwrite keys and values.
  T *const weights_tile = k, *const grads_tile = k + round_up_16(a.groups.max_queries) * stride;
  // The most keys that any of 16 queries sees; then the terms of the keys.
  int* const most_seen =
      reinterpret_cast<int*>(reinterpret_cast<char*>(memory) +
                             whole_backward_tiles<T, D>(round_up_16(a.groups.max_queries),
                                                        round_up_16(a.groups.max_keys)));
  const KeyTerms terms(most_seen + round_up_16(a.groups.max_queries) / 16,
                       round_up_16(a.groups.max_keys));
  if (Kind::kBiased) {
    terms.store(a.bias, keys, round_up_16(keys.count), threadIdx.x, blockDim.x);
  }
  const Strided grads_of_out = {b.grad_out, a.H * D, D};
  copy_rows<T, D>({q, grad_out}, round_up_16(queries.count), {a.q, grads_of_out}, h, queries, 0,
                  threadIdx.x, blockDim.x);
  copy_rows<T, D>({k, v}, round_up_16(keys.count), {a.k, a.v}, h, keys, 0, threadIdx.x, blockDim.x);
  cp_async_commit();
  cp_async_wait();
  __syncthreads();

  const bool has_queries = start < queries.count, has_keys = start < keys.count;
  uint32_t packed_weights[kSquares][4], packed_grads[kSquares][4];
  Square grad_q[D / 16];
  clear<D>(grad_q);
  QueryLogits<Kind> logit(a, h, queries, keys, start, terms);
  int count = keys.count;  // of keys that the warp's queries see
  if (has_queries) {
    float lse[2], share[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = start + row_of_lane(i);
      const bool real = query < queries.count;
      lse[i] = real ? b.lse[h * a.groups.num_queries + queries.row(query)] * kLog2E : INFINITY;
      share[i] = share_of(a.scores, query, queries.count) / static_cast<float>(a.H);
    }
    logit.hide(lse);
    count = logit.most();
    Square weights[kSquares], grads[kSquares];
    differentiate<T, D>(
        q + start * kStride<D>, grad_out + start * kStride<D>, k, v, count, lse, weights, grads,
        delta, logit, [&](int i, int column) {
          return b.grad_scores == nullptr ? 0.0f : b.grad_scores[keys.first + column] * share[i];
        });
#pragma unroll
    for (int n = 0; n < kSquares; n++) {
      if (16 * n >= count) continue;
      pack<T>(packed_weights[n], weights[n]);
      pack<T>(packed_grads[n], grads[n]);
      accumulate<T, D>(grad_q, packed_grads[n], k, 16 * n);
    }
    clear_rows<Kind, D>(grad_q, logit.limit[0] == 0, logit.limit[1] == 0);
    if (Kind::kLimited && lane_id() == 0) most_seen[warp] = count;
    if (Kind::kBiased) store_delta(a, b, h, queries, start, delta);
  }
  __syncthreads();  // nobody reads keys and values any more
  if (has_queries) {
#pragma unroll
    for (int n = 0; n < kSquares; n++) {
      if (16 * n >= count) continue;
      put(weights_tile, stride, start, 16 * n, packed_weights[n]);
      put(grads_tile, stride, start, 16 * n, packed_grads[n]);
    }
  }
  __syncthreads();  // the weights are there
  Square grad_k[D / 16], grad_v[D / 16];
  clear<D>(grad_k);
  clear<D>(grad_v);
  for (int row = 0; has_keys && row < queries.count; row += 16) {
    if (Kind::kLimited && most_seen[row / 16] <= start) continue;
    uint32_t across[4];
    load_square<false, true>(across, weights_tile, stride, row, start);
    accumulate<T, D>(grad_v, across, grad_out, row);
    load_square<false, true>(across, grads_tile, stride, row, start);
    accumulate<T, D>(grad_k, across, q, row);
  }
  __syncthreads();
  T* const mine = memory + start * kStride<D>;
  if (has_queries) {
    store_rows<T, D>(static_cast<T*>(b.grad_q), a.H, h, mine, grad_q, a.scale, a.scale, [&](int r) {
      return start + r < queries.count ? queries.row(start + r) : -1;
    });
  }
  if (!has_keys) return;
  store_key_grads<T, D>(a, b, h, keys, start, mine, grad_k, grad_v);
}

}  // namespace
}  // namespace vidl
