// space_time_attention on CUDA for groups of any length: blocks of 64 queries meet blocks of 64
// keys, with an online softmax. The backward has one kernel for queries, which also writes every
// query's delta (the sum of its weights times their gradients), then one for keys and values.
// Scores need the final log-sum-exp and so have a kernel of their own.
//
// Limit: bytes up to about 260 rows per group (backward) and 370 (forward), FLOPs above. For N rows
// in all, n in a group, in 16 bits: forward moves 8 N H D bytes for 4 n N H D FLOPs, backward
// 16 N H D bytes for 14 n N H D, with seven matmuls instead of five. Every block of queries reads
// the keys from L2 again.
#pragma once
#include "groups/blocks.h"
#include "space_time_attention/warp.h"

namespace vidl {
namespace {

// The blocks of a multiprocessor, by registers: 3 with 168 a thread. Without the number ptxas aims
// at more for some kinds, and spills.
template <int D, class Kind>
constexpr int forward_blocks() {
  if (D <= 32) return Kind::kLimited ? 3 : 4;
  return D <= (Kind::kLimited ? 80 : 96) ? 3 : 2;
}

template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads, forward_blocks<D, Kind>())
    blocked_forward_kernel(SpaceTimeAttention a, Forward f, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  const Work work = find_work(a.groups.query_offsets, a.groups, blocks, a.H);
  const Members queries = queries_of(a.groups, work.g);
  Members keys = keys_of(a.groups, work.g);
  if (work.start >= queries.count) return;
  if (Kind::kLimited) keys = seen_keys(a.groups, queries, keys, work.start);
  const int first = work.start + threadIdx.x / 32 * 16;
  T* const q = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  copy_rows<T, D>(q, 16, a.q, work.h, queries, first, lane_id(), 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> rows;
  rows.load(q);
  const QueryLogits<Kind> all(a, work.h, queries, keys, first, terms_behind<T, D>(memory, 5, 0));
  const int seen = all.most();
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  Square out[D / 16];
  clear<D>(out);
  stream<T, D>(
      memory + kBlock * kStride<D>, a.k, &a.v, work.h, keys,
      [&](int start, int) {
        if (Kind::kBiased)
          terms_behind<T, D>(memory, 5, start).template copy<kBlock>(a, keys, start);
      },
      [&](const T* k, const T* v, int start) {
        const QueryLogits<Kind> logit = all.from(start, terms_behind<T, D>(memory, 5, start));
        const int count = min(seen - start, kBlock);
        Square weights[kBlock / 16];
#pragma unroll
        for (int n = 0; n < kBlock / 16; n++) {
          if (16 * n < count) multiply_transposed<T, D>(weights[n], rows, k, 16 * n);
        }
        add_block(weights, count, start == 0, most, sum, out, logit);
        add_values<T, D>(out, weights, v, count);
      });
  const Normaliser row(most, sum);
  clear_rows<Kind, D>(out, row.inverse[0] == 0.0f, row.inverse[1] == 0.0f);
  __syncwarp();
  store_rows<T, D>(static_cast<T*>(f.out), a.H, work.h, q, out, row.inverse[0], row.inverse[1],
                   [&](int r) { return first + r < queries.count ? queries.row(first + r) : -1; });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    if (query < queries.count && lane_id() % 4 == 0) {
      f.lse[work.h * a.groups.num_queries + queries.row(query)] = row.lse[i];
    }
  }
}

// A warp computes the scores of 16 keys: their weights, transposed, summed over the queries.
template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads, 4)
    blocked_scores_kernel(SpaceTimeAttention a, Forward f, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  const Work work = find_work(a.groups.key_offsets, a.groups, blocks, a.H);
  Members queries = queries_of(a.groups, work.g);
  const Members keys = keys_of(a.groups, work.g);
  if (work.start >= keys.count) return;
  const float share = queries.count > 0 ? share_of(a.scores, 0, queries.count) : 0.0f;
  if (a.scores == Scores::kCls) queries.count = min(queries.count, 1);
  if (Kind::kLimited) queries = seeing_queries(a.groups, queries, keys, work.start);
  const int first = work.start + threadIdx.x / 32 * 16;
  T* const k = memory + threadIdx.x / 32 * 16 * kStride<D>;
  copy_rows<T, D>(k, 16, a.k, work.h, keys, first, lane_id(), 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> rows;
  rows.load(k);
  const KeyLogits<Kind> logit(a, work.h, keys, first);
  float sums[2] = {};
  stream<T, D>(
      memory + kBlock * kStride<D>, a.q, nullptr, work.h, queries, [](int, int) {},
      [&](const T* q, const T*, int start) {
        for (int n = 0; n < kBlock / 16 && start + 16 * n < queries.count; n++) {
          Square weights;
          multiply_transposed<T, D>(weights, rows, q, 16 * n);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int j = e / 2, l = e % 2, query = start + 16 * n + column_of_lane(j) + l;
            if (query >= queries.count) continue;
            const int64_t row = queries.row(query);
            const float lse = f.lse[work.h * a.groups.num_queries + row] * kLog2E;
            const int limit = Kind::kLimited ? limit_of(a.groups, queries, keys, query) : 0;
            const int offset = Kind::kBiased ? offset_of(a.bias, row) : 0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const float x = logit.scaled(i, offset, weights[j][2 * i + l]);
              if (Kind::kLimited && (logit.key[i] >= limit || lse == -INFINITY)) continue;
              sums[i] += exp2_approx(x - lse);
            }
          }
        }
      });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float sum = sum_of_row(sums[i]) * share;
    const int key = first + row_of_lane(i);
    if (key < keys.count && lane_id() % 4 == 0)
      f.scores[work.h * a.groups.E + keys.first + key] = sum;
  }
}

template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads, D <= 64 ? 3 : 2)
    query_backward_kernel(SpaceTimeAttention a, Backward b, int64_t blocks) {
  constexpr int kTile = kBlock * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  const Work work = find_work(a.groups.query_offsets, a.groups, blocks, a.H);
  const Members queries = queries_of(a.groups, work.g);
  Members keys = keys_of(a.groups, work.g);
  if (work.start >= queries.count) return;
  if (Kind::kLimited) keys = seen_keys(a.groups, queries, keys, work.start);
  const int lane = lane_id(), first = work.start + threadIdx.x / 32 * 16;
  T* const q = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  T* const grad_out = q + kTile;
  copy_rows<T, D>({q, grad_out}, 16, {a.q, {b.grad_out, a.H * D, D}}, work.h, queries, first, lane,
                  32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> rows, grad_rows;
  rows.load(q);
  grad_rows.load(grad_out);

  const float dot = output_times_grad<T, D>(b.out, a.H, work.h, queries, first, grad_out);
  float lse[2], share[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    delta[i] = __shfl_sync(kAllLanes, dot, 2 * row_of_lane(i));
    lse[i] = query < queries.count
                 ? b.lse[work.h * a.groups.num_queries + queries.row(query)] * kLog2E
                 : 0.0f;
    share[i] = share_of(a.scores, query, queries.count) / static_cast<float>(a.H);
  }
  QueryLogits<Kind> all(a, work.h, queries, keys, first, terms_behind<T, D>(memory, 6, 0));
  all.hide(lse);
  const auto copy_terms = [&](int start, int) {
    if (Kind::kBiased) terms_behind<T, D>(memory, 6, start).template copy<kBlock>(a, keys, start);
  };
  const auto weight_of = [&](float product, int i, int start, int key) {
    const bool real = all.sees(i, key);
    const auto logit = all.from(start, terms_behind<T, D>(memory, 6, start));
    // Without a bias the factor is computed here: ptxas then needs fewer registers.
    const float scaled =
        Kind::kBiased ? logit.scaled(i, key - start, product) : product * (a.scale * kLog2E);
    return real ? exp2_approx(scaled - lse[i]) : 0.0f;
  };
  const int seen = all.most();
  const auto score_grad = [&](int key) {
    return b.grad_scores != nullptr && key < keys.count ? b.grad_scores[keys.first + key] : 0.0f;
  };
  T* const buffers = memory + 2 * kTile;

  // The gradient of the scores adds to delta.
  if (b.grad_scores != nullptr && (a.scores == Scores::kMean || work.start == 0)) {
    float more[2] = {};
    stream<T, D>(
        buffers, a.k, nullptr, work.h, keys, copy_terms, [&](const T* k, const T*, int start) {
          for (int n = 0; n < kBlock / 16 && start + 16 * n < seen; n++) {
            Square weights;
            multiply_transposed<T, D>(weights, rows, k, 16 * n);
#pragma unroll
            for (int e = 0; e < 8; e++) {
              const int key = start + 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
              more[i] += weight_of(weights[e / 4][e % 4], i, start, key) * score_grad(key);
            }
          }
        });
#pragma unroll
    for (int i = 0; i < 2; i++) delta[i] += sum_of_row(more[i]) * share[i];
    __syncthreads();  // the buffers are filled again
  }

  Square sums[D / 16];
  clear<D>(sums);
  stream<T, D>(buffers, a.k, &a.v, work.h, keys, copy_terms,
               [&](const T* k, const T* v, int start) {
#pragma unroll
                 for (int n = 0; n < kBlock / 16; n++) {
                   if (start + 16 * n >= seen) break;
                   Square weights, grads;
                   multiply_transposed<T, D>(weights, rows, k, 16 * n);
                   multiply_transposed<T, D>(grads, grad_rows, v, 16 * n);
#pragma unroll
                   for (int e = 0; e < 8; e++) {
                     const int key = start + 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
                     float& x = grads[e / 4][e % 4];
                     x += score_grad(key) * share[i] - delta[i];
                     x *= weight_of(weights[e / 4][e % 4], i, start, key);
                   }
                   uint32_t packed[4];
                   pack<T>(packed, grads);
                   accumulate<T, D>(sums, packed, k, 16 * n);
                 }
               });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    if (query < queries.count && lane % 4 == 0) {
      b.delta[work.h * a.groups.num_queries + queries.row(query)] = delta[i];
    }
  }
  clear_rows<Kind, D>(sums, all.limit[0] == 0, all.limit[1] == 0);
  __syncwarp();
  store_rows<T, D>(static_cast<T*>(b.grad_q), a.H, work.h, q, sums, a.scale, a.scale,
                   [&](int r) { return first + r < queries.count ? queries.row(first + r) : -1; });
}

// As `forward_blocks`. Heads of 64 with limits do not fit into 168 registers on sm_80; on sm_90
// they do with a bias.
template <int D, class Kind>
constexpr int key_backward_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr bool kFits = !Kind::kLimited;
#else
  constexpr bool kFits = !Kind::kLimited || Kind::kBiased;
#endif
  return D < 64 || (D == 64 && kFits) ? 3 : 2;
}

// A warp computes 16 keys: weights and their gradients are transposed.
template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads, key_backward_blocks<D, Kind>())
    key_backward_kernel(SpaceTimeAttention a, Backward b, int64_t blocks) {
  constexpr int kTile = kBlock * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  SHARED(float, lse, [2][kBlock]);  // of the queries in the two buffers
  SHARED(float, delta, [2][kBlock]);
  const Work work = find_work(a.groups.key_offsets, a.groups, blocks, a.H);
  const Members all_queries = queries_of(a.groups, work.g), keys = keys_of(a.groups, work.g);
  if (work.start >= keys.count) return;
  const Members queries =
      Kind::kLimited ? seeing_queries(a.groups, all_queries, keys, work.start) : all_queries;
  // Of the queries in the two buffers, behind six tiles: how many keys they see, their offsets.
  int* const limits = reinterpret_cast<int*>(memory + 6 * kTile);
  int* const offsets = limits + 2 * kBlock;
  const int lane = lane_id(), first = work.start + threadIdx.x / 32 * 16;
  T* const k = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  T* const v = k + kTile;
  copy_rows<T, D>({k, v}, 16, {a.k, a.v}, work.h, keys, first, lane, 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> key_rows, value_rows;
  constexpr bool kHeld = D <= 96;  // longer rows do not fit into the registers beside both sums
  key_rows.load(k);
  if (kHeld) value_rows.load(v);
  const KeyLogits<Kind> logit(a, work.h, keys, first);
  float grad_score[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int key = first + row_of_lane(i);
    if (b.grad_scores != nullptr && key < keys.count) {
      const float share = share_of(a.scores, 0, all_queries.count) / static_cast<float>(a.H);
      grad_score[i] = b.grad_scores[keys.first + key] * share;
    }
  }
  const int first_query = queries.first - all_queries.first;  // in its group
  Square grad_k[D / 16], grad_v[D / 16];
  clear<D>(grad_k);
  clear<D>(grad_v);
  const Strided grads_of_out = {b.grad_out, a.H * D, D};
  stream<T, D>(
      memory + 2 * kTile, a.q, &grads_of_out, work.h, queries,
      [&](int start, int parity) {
        const int i = threadIdx.x % kBlock, query = start + i;
        const bool real = query < queries.count;
        const int64_t at = real ? work.h * a.groups.num_queries + queries.row(query) : 0;
        if (threadIdx.x < kBlock) {
          cp_async_4(&lse[parity][i], b.lse + at, real);
        } else {
          cp_async_4(&delta[parity][i], b.delta + at, real);
        }
        if (!Kind::kLimited) return;
        if (threadIdx.x < kBlock) {
          limits[parity * kBlock + i] = limit_of(a.groups, queries, keys, query);
        } else if (Kind::kBiased) {
          offsets[parity * kBlock + i] = real ? offset_of(a.bias, queries.row(query)) : 0;
        }
      },
      [&](const T* q, const T* grad_out, int start) {
        const int parity = start / kBlock % 2;
#pragma unroll
        for (int n = 0; n < kBlock / 16; n++) {
          if (start + 16 * n >= queries.count) break;
          // Beyond the last query these are meaningless, but are multiplied with rows of zeros.
          Square weights, grads;
          multiply_transposed<T, D>(weights, key_rows, q, 16 * n);
          if (!kHeld) value_rows.load(v);
          multiply_transposed<T, D>(grads, value_rows, grad_out, 16 * n);
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int column = 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
            float& weight = weights[e / 4][e % 4];
            float& x = grads[e / 4][e % 4];
            const int at = parity * kBlock + column;
            const float level = lse[parity][column] * kLog2E;
            weight = exp2_approx(logit.scaled(i, Kind::kBiased ? offsets[at] : 0, weight) - level);
            if (Kind::kLimited && (logit.key[i] >= limits[at] || level == -INFINITY)) weight = 0.0f;
            if (a.scores == Scores::kMean || first_query + start + column == 0) x += grad_score[i];
            x = weight * (x - delta[parity][column]);
          }
          uint32_t packed[4];
          pack<T>(packed, weights);
          accumulate<T, D>(grad_v, packed, grad_out, 16 * n);
          pack<T>(packed, grads);
          accumulate<T, D>(grad_k, packed, q, 16 * n);
        }
      });
  __syncwarp();
  store_key_grads<T, D>(a, b, work.h, keys, first, k, grad_k, grad_v);
}

}  // namespace
}  // namespace vidl
