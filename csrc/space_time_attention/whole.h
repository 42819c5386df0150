// space_time_attention on CUDA for groups of 17 to 256 queries or keys (forward) and up to 128
// (backward). A warp computes 16 queries. A block of the forward computes several heads of one
// group, with all queries, keys and values of one in shared memory while those of the next arrive;
// a warp meets its keys with an online softmax, 80 at a time. The backward is one pass for one head
// of a group, with whole rows of weights in registers: weights and their gradients reach the warps
// of the keys through shared memory.
//
// Limit: bytes. For N rows in all, n in a group, in 16 bits: forward moves 8 N H D bytes for
// 4 n N H D FLOPs, backward 14 N H D bytes for 10 n N H D. At n = 69 that is 35 and 49 FLOPs per
// byte; an H200 balances at 184. From about 98 rows on shared memory takes longer: every warp reads
// all keys and values for 16 queries, 8 n N H D / 16 bytes in all.
#pragma once
#include "space_time_attention/warp.h"

namespace vidl {
namespace {

// The shared memory of a block of the forward: one stage or two, each with the queries, keys and
// values of a head; behind them sums of weights for every warp, and the terms of the keys.
template <class T, int D, class Kind>
struct WholeForward {
  static constexpr int kMostWarps = D <= 64 ? 16 : 8;
  static constexpr int kKeys =
      D <= 64 && !Kind::kBiased ? 80 : 48;  // whose weights are in registers
  int queries, keys, stages;                // rows of a tile

  __host__ __device__ __forceinline__ int64_t stage() const {
    return (queries + 2 * int64_t{keys}) * kStride<D>;
  }
  __host__ __device__ __forceinline__ int64_t sums() const { return queries / 16 * int64_t{keys}; }
  int64_t bytes(bool scores) const {
    return stages * stage() * int64_t{sizeof(T)} + (scores ? sums() * int64_t{sizeof(float)} : 0) +
           (Kind::kBiased ? keys * KeyTerms::kBytes : 0);
  }
};

// A block computes `heads` heads of a group, one after another. With two stages it copies the rows
// of the next while it computes. There is a warp for every 16 queries.
template <class T, int D, class Kind, bool kScored>
__global__ void __launch_bounds__(32 * WholeForward<T, D, Kind>::kMostWarps)
    whole_forward_kernel(SpaceTimeAttention a, Forward f, WholeForward<T, D, Kind> plan,
                         int heads) {
  constexpr int kKeys = WholeForward<T, D, Kind>::kKeys;
  DYNAMIC_SHARED(T, memory);
  const unsigned parts = (static_cast<unsigned>(a.H) + heads - 1) / heads;
  const int64_t g = blockIdx.x / parts;
  const int first_head = static_cast<int>(blockIdx.x % parts) * heads;
  const int last_head = min(first_head + heads, static_cast<int>(a.H)) - 1;
  const int start = threadIdx.x / 32 * 16;
  float* const columns = reinterpret_cast<float*>(memory + plan.stages * plan.stage());
  const KeyTerms terms(columns + (kScored ? plan.sums() : 0), plan.keys);
  if (Kind::kBiased) {
    const Members keys = keys_of(a.groups, g);
    terms.store(a.bias, keys, round_up_16(keys.count), threadIdx.x, blockDim.x);
  }
  // Computed again for every head: kept through the loop, these would not fit into registers.
  const auto fetch = [&](int h, T* q) {
    const int thread = thread_id();
    const Members queries = queries_of(a.groups, g), keys = keys_of(a.groups, g);
    T *const k = q + plan.queries * kStride<D>, *const v = k + plan.keys * kStride<D>;
    copy_rows<T, D>(q, round_up_16(queries.count), a.q, h, queries, 0, thread, blockDim.x);
    copy_rows<T, D>({k, v}, round_up_16(keys.count), {a.k, a.v}, h, keys, 0, thread, blockDim.x);
    cp_async_commit();
  };
  fetch(first_head, memory + (plan.stages == 2 ? first_head % 2 * plan.stage() : 0));
  QueryLogits<Kind> logit(a, first_head, queries_of(a.groups, g), keys_of(a.groups, g), start,
                          terms);
  const int count = logit.most();

#pragma unroll 1
  for (int h = first_head; h <= last_head; h++) {
    const int64_t stage = plan.stage(), other = plan.stages == 2 ? stage : 0;
    T* const tiles = memory + h % 2 * other;
    T* const next = memory + (h + 1) % 2 * other;
    cp_async_wait();
    __syncthreads();  // this head is there, and nobody reads the one before any more
    if (h < last_head && plan.stages == 2) fetch(h + 1, next);
    T *const q = tiles + start * kStride<D>, *const k = tiles + plan.queries * kStride<D>;
    T* const v = k + plan.keys * kStride<D>;
    if (start < queries_of(a.groups, g).count) {
      logit.table = Table(a.bias, h);
      float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
      Square weights[kKeys / 16], out[D / 16];
      clear<D>(out);
      Rows16<D> rows;
      const auto multiply_keys = [&](int key) {
#pragma unroll
        for (int n = 0; n < kKeys / 16; n++) {
          if (key + 16 * n < count) multiply_transposed<T, D>(weights[n], rows, k, key + 16 * n);
        }
      };
#pragma unroll 1
      for (int key = 0; key < count; key += kKeys) {
        rows.load(q);  // again: kept through the loop, they would not fit into registers
        multiply_keys(key);
        add_block(weights, count - key, key == 0, most, sum, out, logit.from(key, terms.from(key)));
        add_values<T, D>(out, weights, v + key * kStride<D>, count - key);
      }
      const Normaliser row(most, sum);
      const Members queries = queries_of(a.groups, g);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int query = start + row_of_lane(i);
        if (query < queries.count && lane_id() % 4 == 0)
          f.lse[h * a.groups.num_queries + queries.row(query)] = row.lse[i];
      }
      clear_rows<Kind, D>(out, row.inverse[0] == 0.0f, row.inverse[1] == 0.0f);
      if (kScored) rows.load(q);  // the output overwrites them
      __syncwarp();
      store_rows<T, D>(
          static_cast<T*>(f.out), a.H, h, q, out, row.inverse[0], row.inverse[1],
          [&](int r) { return start + r < queries.count ? queries.row(start + r) : -1; });
      if (kScored) {
        float share[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int query = start + row_of_lane(i);
          const float factor = share_of(a.scores, query, queries.count);
          share[i] = query < queries.count ? row.inverse[i] * factor : 0.0f;
        }
        const int keys = keys_of(a.groups, g).count;
        float* const own = columns + start / 16 * plan.keys;
        const bool counts = a.scores == Scores::kMean || start == 0;
        for (int i = (counts ? count : 0) + lane_id(); i < keys; i += 32) own[i] = 0.0f;
#pragma unroll 1
        for (int key = 0; counts && key < count; key += kKeys) {
          if (count > kKeys) {  // the registers hold the weights of the last keys
            float unused[2] = {};
            multiply_keys(key);
            scale_logits(weights, count - key, most, logit.from(key, terms.from(key)));
            exponentiate(weights, count - key, most, unused);
          }
#pragma unroll
          for (int e = 0; e < kKeys / 4; e++) {
            const int n = e / 4, j = e / 2 % 2, l = e % 2, column = 16 * n + column_of_lane(j) + l;
            if (16 * n >= count - key) continue;
            const float score =
                sum_of_column(weights[n][j][l] * share[0] + weights[n][j][2 + l] * share[1]);
            if (lane_id() < 4 && key + column < count) own[key + column] = score;
          }
        }
      }
    }
    if (kScored) {
      __syncthreads();  // the sums of all warps are there
      const Members queries = queries_of(a.groups, g), keys = keys_of(a.groups, g);
      const int used = (queries.count + 15) / 16;
      for (int key = threadIdx.x; key < keys.count; key += blockDim.x) {
        float score = 0.0f;
        for (int w = 0; w < used; w++) score += columns[w * plan.keys + key];
        f.scores[h * a.groups.E + keys.first + key] = score;
      }
    }
    if (h < last_head && plan.stages == 1) {
      __syncthreads();  // nobody reads this head any more
      fetch(h + 1, next);
    }
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

// The blocks of a multiprocessor: with 128 registers a thread it has 16 warps, with 168 it has 12.
// Of more than 80 rows there is one: without the number ptxas aims at more, and spills.
template <int D, int kSquares, class Kind>
constexpr int whole_backward_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kFits = false;  // five squares with 128 registers
#else
  constexpr bool kFits = !Kind::kLimited;
#endif
  if (D > 64 || kSquares > 5) return 1;
  return kSquares == 4 ? 4 : kFits ? 3 : 2;
}

// There is a warp for every 16 queries and 16 keys. It computes its queries first, then its keys.
template <class T, int D, int kSquares, class Kind>
__global__ void __launch_bounds__(32 * kSquares, whole_backward_blocks<D, kSquares, Kind>())
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
