// space_time_attention on CUDA, backward of groups of 129 to 256 queries or keys with a head size
// of at most 64. A block computes one head of one group, with all its rows in shared memory; a warp
// sums the gradients of 16 keys in registers. The queries are taken 32 at a time: the gradients of
// their logits go through shared memory to the warps that multiply them with the keys. hopper.h
// has a faster kernel for some of these calls.
//
// Limit: bytes. For N rows in all, n in a group, in 16 bits: 16 N H D bytes for 10 n N H D FLOPs,
// which is 123 FLOPs per byte at n = 197; an H200 balances at 184. The gradient of the scores adds
// 2 n N H D FLOPs.
#pragma once
#include "space_time_attention/warp.h"

namespace vidl {
namespace {

constexpr int kWideRows = 256, kWideQueries = 32;

// The rows of one group and head in shared memory.
template <class T, int D, class Kind>
struct WideGroup {
  T *q, *grad_out, *k, *v;
  T* grads;       // [kWideQueries, stride]: of the logits, before the scale
  float2* known;  // [queries]: log-sum-exp to the base two, delta
  int stride;
  int2* places;    // [queries]: how many keys a query sees, its offset; Limited and Biased
  int* most_seen;  // [queries / 16]: by any of 16 queries
  KeyTerms terms;  // Biased

  __device__ WideGroup(T* memory, int queries, int keys)
      : q(memory),
        grad_out(q + queries * kStride<D>),
        k(grad_out + queries * kStride<D>),
        v(k + keys * kStride<D>),
        grads(v + keys * kStride<D>),
        known(reinterpret_cast<float2*>(grads + kWideQueries * (keys + 8))),
        stride(keys + 8),
        places(reinterpret_cast<int2*>(known + queries)),
        most_seen(reinterpret_cast<int*>(places + queries)),
        terms(most_seen + queries / 16, keys) {}

  static int64_t bytes(int64_t queries, int64_t keys) {
    const int64_t rows = 2 * (queries + keys) * kStride<D> + kWideQueries * (keys + 8);
    const int64_t limits = queries * sizeof(int2) + queries / 16 * sizeof(int);
    return rows * sizeof(T) + queries * sizeof(float2) + (Kind::kLimited ? limits : 0) +
           (Kind::kBiased ? keys * KeyTerms::kBytes : 0);
  }
};

// Writes the log-sum-exp (to the base two) and delta of a warp's 16 queries to shared memory.
template <class T, int D, class Kind>
__device__ __forceinline__ void prepare_queries(const SpaceTimeAttention& a, const Backward& b,
                                                int h, const Members& queries, const Members& keys,
                                                const WideGroup<T, D, Kind>& group, int first) {
  const float dot =
      output_times_grad<T, D>(b.out, a.H, h, queries, first, group.grad_out + first * kStride<D>);
  float lse[2], more[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    // Without a query the weights become zero.
    lse[i] = query < queries.count ? b.lse[h * a.groups.num_queries + queries.row(query)] * kLog2E
                                   : INFINITY;
  }
  QueryLogits<Kind> logit(a, h, queries, keys, first, group.terms);
  logit.hide(lse);
  const int count = logit.most();
  if (b.grad_scores != nullptr && (a.scores == Scores::kMean || first == 0)) {
    Rows16<D> rows;
    rows.load(group.q + first * kStride<D>);
    for (int n = 0; n < count; n += 16) {
      Square weights;
      multiply_transposed<T, D>(weights, rows, group.k, n);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int key = n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
        if (!logit.sees(i, key)) continue;
        const float weight = exp2_approx(logit.scaled(i, key, weights[e / 4][e % 4]) - lse[i]);
        more[i] += weight * b.grad_scores[keys.first + key];
      }
    }
  }
  if (Kind::kLimited && lane_id() == 0) group.most_seen[first / 16] = count;
  float delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = row_of_lane(i), query = first + r;
    const float share = share_of(a.scores, query, queries.count) / static_cast<float>(a.H);
    delta[i] = __shfl_sync(kAllLanes, dot, 2 * r) + sum_of_row(more[i]) * share;
    if (lane_id() % 4 != 0) continue;
    group.known[query] = make_float2(lse[i], delta[i]);
    if (Kind::kLimited)
      group.places[query] = make_int2(logit.limit[i], Kind::kBiased ? logit.offset[i] : 0);
  }
  if (Kind::kBiased) store_delta(a, b, h, queries, first, delta);
}

template <class T, int D, class Kind>
__global__ void __launch_bounds__(2 * kWideRows)
    wide_backward_kernel(SpaceTimeAttention a, Backward b) {
  DYNAMIC_SHARED(T, memory);
  const int64_t g = blockIdx.x / a.H;
  const int h = static_cast<int>(blockIdx.x % a.H);
  const Members queries = queries_of(a.groups, g), keys = keys_of(a.groups, g);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, start = 16 * warp;
  const WideGroup<T, D, Kind> group(memory, round_up_16(a.groups.max_queries),
                                    round_up_16(a.groups.max_keys));
  const int query_rows = round_up_16(queries.count), key_rows = round_up_16(keys.count);
  const Strided grads_of_out = {b.grad_out, a.H * D, D};
  copy_rows<T, D>({group.q, group.grad_out}, query_rows, {a.q, grads_of_out}, h, queries, 0,
                  threadIdx.x, blockDim.x);
  copy_rows<T, D>({group.k, group.v}, key_rows, {a.k, a.v}, h, keys, 0, threadIdx.x, blockDim.x);
  cp_async_commit();
  if (Kind::kBiased) group.terms.store(a.bias, keys, key_rows, threadIdx.x, blockDim.x);
  cp_async_wait();
  __syncthreads();
  if (start < queries.count) prepare_queries<T, D, Kind>(a, b, h, queries, keys, group, start);
  __syncthreads();  // every query's delta is there

  const bool has_keys = start < keys.count;
  const KeyLogits<Kind> logit(a, h, keys, start);
  float grad_score[2] = {};  // of the lane's keys
  if (b.grad_scores != nullptr) {
    const float share = share_of(a.scores, 0, queries.count) / static_cast<float>(a.H);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int key = start + row_of_lane(i);
      if (key < keys.count) grad_score[i] = b.grad_scores[keys.first + key] * share;
    }
  }
  Square grad_k[D / 16], grad_v[D / 16];
  clear<D>(grad_k);
  clear<D>(grad_v);
  for (int first = 0; first < queries.count; first += kWideQueries) {
#pragma unroll 1
    for (int n = 0; n < kWideQueries; n += 16) {
      const int query = first + n;
      if (!has_keys || query >= queries.count) continue;
      if (Kind::kLimited && group.most_seen[query / 16] <= start) continue;
      Square weights, grads;
      multiply_tiles<T, D>(weights, group.k, start, group.q, query);
      multiply_tiles<T, D>(grads, group.v, start, group.grad_out, query);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int i = e / 2 % 2, column = query + column_of_lane(e / 4) + e % 2;
        float& weight = weights[e / 4][e % 4];
        float& x = grads[e / 4][e % 4];
        const float2 known = group.known[column];
        int2 place;
        if (Kind::kLimited) place = group.places[column];
        weight = exp2_approx(logit.scaled(i, Kind::kBiased ? place.y : 0, weight) - known.x);
        if (start + row_of_lane(i) >= (Kind::kLimited ? place.x : keys.count)) weight = 0.0f;
        if (a.scores == Scores::kMean || column == 0) x += grad_score[i];
        x = weight * (x - known.y);
      }
      uint32_t packed[4];
      pack<T>(packed, weights);
      accumulate<T, D>(grad_v, packed, group.grad_out, query);
      pack<T>(packed, grads);
      accumulate<T, D>(grad_k, packed, group.q, query);
      transpose(packed);
      put(group.grads, group.stride, n, start, packed);
    }
    __syncthreads();  // the gradients of these queries' products are there
    for (int square = warp; square < kWideQueries / 16 * (D / 16); square += warps) {
      const int n = square / (D / 16) * 16, d = square % (D / 16) * 16;
      if (first + n >= queries.count) continue;
      Square sums = {};
      const int seen = Kind::kLimited ? group.most_seen[(first + n) / 16] : keys.count;
      for (int key = 0; key < seen; key += 16) {
        uint32_t left[4], right[4];
        load_square<true, false>(left, group.grads, group.stride, n, key);
        load_square<true, true>(right, group.k, kStride<D>, key, d);
        multiply<T>(sums, left, right);
      }
      uint32_t packed[4];
      pack<T>(packed, sums, a.scale, a.scale);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int query = first + n + row_of_lane(i % 2);
        if (query >= queries.count) continue;
        if (Kind::kLimited && group.places[query].x == 0) packed[i] = 0;
        T* const to = static_cast<T*>(b.grad_q) + (queries.row(query) * a.H + h) * D;
        *reinterpret_cast<uint32_t*>(to + d + column_of_lane(i / 2)) = packed[i];
      }
    }
    __syncthreads();  // nobody reads these queries' gradients any more
  }
  if (!has_keys) return;
  // Computed again: kept through the loop, these would not fit into registers.
  const Members same_keys = keys_of(a.groups, blockIdx.x / a.H);
  store_key_grads<T, D>(a, b, static_cast<int>(blockIdx.x % a.H), same_keys, threadIdx.x / 32 * 16,
                        group.k + start * kStride<D>, grad_k, grad_v);
}

}  // namespace
}  // namespace vidl
