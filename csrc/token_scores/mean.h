// token_scores of all queries of each group on CUDA: "mean". Blocks of 64 queries meet blocks of 64
// keys (groups/blocks.h). Forward: the log-sum-exp of every query, unless it is given, then a
// kernel for keys that sums their weights. Backward: a kernel for queries, which also writes the
// sum of the weights of every query and its delta, then one for keys, and one for the table if it
// needs a gradient.
//
// The log-sum-exp is rounded, so the backward divides the weights by their sum again: the gradient
// is a difference, in which the error would show. Gradients of logits are rounded to 16 bits for
// their matmul; before that a power of two brings the gradients of a group's scores to the size of
// one, so that neither a small gradient nor a scaled loss leaves the range of float16.
//
// Limit, for N rows in all and n in a group, in 16 bits: bytes up to about 100 rows per group, then
// the exponentials. Forward reads 4 N H D bytes for 4 n N H D FLOPs and 2 n N H exponentials (half
// of both with the log-sum-exp given), backward reads as many and writes as many for 10 n N H D
// FLOPs and 3 n N H exponentials; blocks read the other side from L2 again. Groups of less than 64
// rows leave a part of every block idle. For 64 clips, 12 heads of 64, on an H200 by its data sheet
// (16 exponentials a clock and multiprocessor), by bytes, FLOPs and exponentials:
//   P1    273 tokens   11, 15 and 31 us forward;      22, 37 and 46 us backward
//   P1f   785 tokens   32, 122 and 255 us forward;    64, 306 and 383 us backward
//   P3   1568 tokens   64, 489 and 1018 us forward;  128, 1222 and 1527 us backward
#pragma once
#include "groups/table.h"
#include "token_scores/interface.h"

namespace vidl {
namespace {

// A power of two that brings the greatest of the gradients of a group's scores into [1, 2). Called
// by a warp.
struct GradScale {
  float up, down;  // its inverse

  __device__ __forceinline__ GradScale(const float* grads, const Members& keys) {
    float most = 0.0f;
    for (int j = lane_id(); j < keys.count; j += 32) {
      most = fmaxf(most, fabsf(grads[keys.first + j]));
    }
    const int exponent = max_of_warp(__float_as_int(most)) >> 23;  // biased by 127
    const bool usual = exponent > 0 && exponent < 254;             // else zero, tiny or not finite
    up = usual ? __int_as_float((254 - exponent) << 23) : 1.0f;
    down = usual ? __int_as_float(exponent << 23) : 1.0f;
  }
};

// The share of a weight in the mean over queries and heads; 0 without queries.
__device__ __forceinline__ float share_of(const TokenScores& s, int queries) {
  return queries == 0 ? 0.0f : 1.0f / (static_cast<float>(s.H) * static_cast<float>(queries));
}

// The query rows of a warp's 16 queries from `first` on, or -1.
struct RowsOf {
  const Members& members;
  int first;
  __device__ __forceinline__ int64_t operator()(int r) const {
    return first + r < members.count ? members.row(first + r) : -1;
  }
};

// Loads 16 members from `first` on, of a warp, into `tile`, and then into registers.
template <class T, int D>
__device__ __forceinline__ void load_rows(Rows16<D>& rows, T* tile, const Strided& x, int h,
                                          const Members& members, int first) {
  copy_rows<T, D>(tile, 16, x, h, members, first, lane_id(), 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();  // all lanes' rows are there
  rows.load(tile);
}

// The blocks of a multiprocessor, by registers: without the number ptxas aims at more, and spills.
template <int D, class Kind>
constexpr int mean_lse_blocks() {
  if (D <= 32) return Kind::kBiased ? 4 : 5;
  return D > 96 && Kind::kBiased ? 3 : 4;
}

template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads, mean_lse_blocks<D, Kind>())
    mean_lse_kernel(TokenScores s, float* lse, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  const Work work = find_work(s.groups.query_offsets, s.groups, blocks, s.H);
  const Members queries = queries_of(s.groups, work.g);
  Members keys = keys_of(s.groups, work.g);
  if (work.start >= queries.count) return;
  if (Kind::kLimited) keys = seen_keys(s.groups, queries, keys, work.start);
  const int first = work.start + threadIdx.x / 32 * 16;
  Rows16<D> rows;
  load_rows<T, D>(rows, memory + threadIdx.x / 32 * 16 * kStride<D>, s.q, work.h, queries, first);
  const QueryLogits<Kind> all(s, work.h, queries, keys, first, terms_behind<T, D>(memory, 3, 0));
  const int seen = all.most();
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  stream<T, D>(
      memory + kBlock * kStride<D>, s.k, nullptr, work.h, keys,
      [&](int start, int) {
        if (Kind::kBiased)
          terms_behind<T, D>(memory, 3, start).template copy<kBlock>(s, keys, start);
      },
      [&](const T* k, const T*, int start) {
        const QueryLogits<Kind> logit = all.from(start, terms_behind<T, D>(memory, 3, start));
        const int count = min(seen - start, kBlock);
        const float before[2] = {most[0], most[1]};
        Square weights[kBlock / 16];
#pragma unroll
        for (int n = 0; n < kBlock / 16; n++) {
          if (16 * n < count) multiply_transposed<T, D>(weights[n], rows, k, 16 * n);
        }
        scale_logits(weights, count, most, logit);
#pragma unroll
        for (int i = 0; i < 2; i++) {  // the sums so far are relative to a smaller maximum
          sum[i] *= exp2_approx(before[i] - (most[i] == -INFINITY ? 0.0f : most[i]));
        }
        exponentiate(weights, count, most, sum);
      });
  const Normaliser row(most, sum);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    if (query < queries.count && lane_id() % 4 == 0) {
      lse[work.h * s.groups.num_queries + queries.row(query)] = row.lse[i];
    }
  }
}

// What a kernel for keys needs of the queries in the two buffers of stream().
template <int kNumbers, class Kind>
struct QueryTerms {
  float* numbers;         // [kNumbers, 2, kBlock], of each query
  int *limits, *offsets;  // [2, kBlock]: how many keys it sees, and its offset in the table

  static constexpr int64_t kBytes =
      2 * kBlock * (kNumbers + (Kind::kLimited ? 2 : 0)) * int64_t{sizeof(float)};

  __device__ __forceinline__ explicit QueryTerms(void* memory)
      : numbers(static_cast<float*>(memory)),
        limits(reinterpret_cast<int*>(numbers + kNumbers * 2 * kBlock)),
        offsets(limits + 2 * kBlock) {}

  // Starts to copy those of the queries from `start` on. from[n] is [H, num_queries].
  __device__ __forceinline__ void copy(const TokenScores& s, int h, const Members& queries,
                                       const Members& keys, int start, int parity,
                                       const float* const (&from)[kNumbers]) const {
    const int i = threadIdx.x % kBlock, query = start + i;
    const bool real = query < queries.count;
    const int64_t row = real ? queries.row(query) : 0;
#pragma unroll
    for (int n = 0; n < kNumbers; n++) {
      if (static_cast<int>(threadIdx.x) / kBlock != n % 2) continue;
      cp_async_4(numbers + (2 * n + parity) * kBlock + i, from[n] + h * s.groups.num_queries + row,
                 real);
    }
    if (!Kind::kLimited) return;
    if (threadIdx.x < kBlock) {
      limits[parity * kBlock + i] = limit_of(s.groups, queries, keys, query);
    } else {
      offsets[parity * kBlock + i] = Kind::kBiased && real ? offset_of(s.bias, row) : 0;
    }
  }
  __device__ __forceinline__ float number(int n, int parity, int column) const {
    return numbers[(2 * n + parity) * kBlock + column];
  }
  // The weight of the lane's key i for the query in `column`, before the division by their sum.
  __device__ __forceinline__ float weight(const KeyLogits<Kind>& logit, int i, int parity,
                                          int column, float product) const {
    const int at = parity * kBlock + column;
    const float level = number(0, parity, column) * kLog2E;
    const float x = logit.scaled(i, Kind::kBiased ? offsets[at] : 0, product);
    if (Kind::kLimited && (logit.key[i] >= limits[at] || level == -INFINITY)) return 0.0f;
    return exp2_approx(x - level);
  }
};

// A warp computes the weights of 16 keys, transposed, and sums them over the queries.
template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads)
    mean_weights_kernel(TokenScores s, ScoresForward f, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  const Work work = find_work(s.groups.key_offsets, s.groups, blocks, s.H);
  const Members all_queries = queries_of(s.groups, work.g), keys = keys_of(s.groups, work.g);
  if (work.start >= keys.count) return;
  const Members queries =
      Kind::kLimited ? seeing_queries(s.groups, all_queries, keys, work.start) : all_queries;
  const int first = work.start + threadIdx.x / 32 * 16;
  const QueryTerms<1, Kind> terms(memory + 3 * kBlock * kStride<D>);
  Rows16<D> rows;
  load_rows<T, D>(rows, memory + threadIdx.x / 32 * 16 * kStride<D>, s.k, work.h, keys, first);
  const KeyLogits<Kind> logit(s, work.h, keys, first);
  float sums[2] = {};
  stream<T, D>(
      memory + kBlock * kStride<D>, s.q, nullptr, work.h, queries,
      [&](int start, int parity) { terms.copy(s, work.h, queries, keys, start, parity, {f.lse}); },
      [&](const T* q, const T*, int start) {
        const int parity = start / kBlock % 2;
        float block[2] = {};  // the sum of a block, which loses less than one of all queries
#pragma unroll
        for (int n = 0; n < kBlock / 16; n++) {
          if (start + 16 * n >= queries.count) break;
          Square weights;
          multiply_transposed<T, D>(weights, rows, q, 16 * n);
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int column = 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
            const float x = terms.weight(logit, i, parity, column, weights[e / 4][e % 4]);
            if (start + column < queries.count) block[i] += x;
          }
        }
        sums[0] += block[0], sums[1] += block[1];
      });
  const float share = all_queries.count == 0 ? 0.0f : 1.0f / static_cast<float>(all_queries.count);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float sum = sum_of_row(sums[i]) * share;
    const int key = first + row_of_lane(i);
    if (key < keys.count && lane_id() % 4 == 0)
      f.by_head[work.h * s.groups.E + keys.first + key] = sum;
  }
}

// The gradient of 16 queries by a warp, in two passes over the keys: the sum of the weights and
// delta, the sum of the weights times their gradients, are needed first.
template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads)
    mean_queries_kernel(TokenScores s, ScoresBackward b, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  SHARED(float, grads, [2][kBlock]);  // of the scores of the keys in the two buffers
  const Work work = find_work(s.groups.query_offsets, s.groups, blocks, s.H);
  const Members queries = queries_of(s.groups, work.g), all_keys = keys_of(s.groups, work.g);
  if (work.start >= queries.count) return;
  const Members keys =
      Kind::kLimited ? seen_keys(s.groups, queries, all_keys, work.start) : all_keys;
  const int first = work.start + threadIdx.x / 32 * 16;
  T* const q = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  T* const buffers = memory + kBlock * kStride<D>;
  Rows16<D> rows;
  load_rows<T, D>(rows, q, s.q, work.h, queries, first);
  const GradScale scale(b.grad_scores, all_keys);
  float lse[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    lse[i] = query < queries.count
                 ? b.weights[work.h * s.groups.num_queries + queries.row(query)] * kLog2E
                 : 0.0f;
  }
  QueryLogits<Kind> all(s, work.h, queries, keys, first, terms_behind<T, D>(memory, 3, 0));
  all.hide(lse);
  const int seen = all.most();
  const auto copy_terms = [&](int start, int parity) {
    if (Kind::kBiased) terms_behind<T, D>(memory, 3, start).template copy<kBlock>(s, keys, start);
    const int i = threadIdx.x % kBlock;
    const bool real = start + i < keys.count;
    if (static_cast<int>(threadIdx.x) < kBlock) {
      cp_async_4(&grads[parity][i], b.grad_scores + (real ? keys.first + start + i : 0), real);
    }
  };
  // Calls f(n, weights): the weights for 16 keys of a block from 16 n on.
  const auto for_weights = [&](const T* k, int start, auto f) {
    const QueryLogits<Kind> logit = all.from(start, terms_behind<T, D>(memory, 3, start));
#pragma unroll
    for (int n = 0; n < kBlock / 16; n++) {
      if (start + 16 * n >= seen) break;
      Square weights;
      multiply_transposed<T, D>(weights, rows, k, 16 * n);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int column = 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
        float& x = weights[e / 4][e % 4];
        const float scaled = logit.scaled(i, column, x);
        x = logit.sees(i, column) ? exp2_approx(scaled - lse[i]) : 0.0f;
      }
      f(n, weights);
    }
  };

  float total[2] = {}, delta[2] = {};
  stream<T, D>(buffers, s.k, nullptr, work.h, keys, copy_terms,
               [&](const T* k, const T*, int start) {
                 const int parity = start / kBlock % 2;
                 float sum[2] = {}, product[2] = {};
                 for_weights(k, start, [&](int n, const Square& weights) {
#pragma unroll
                   for (int e = 0; e < 8; e++) {
                     const int column = 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
                     const float x = weights[e / 4][e % 4];
                     sum[i] += x;
                     product[i] = fmaf(x, grads[parity][column] * scale.up, product[i]);
                   }
                 });
#pragma unroll
                 for (int i = 0; i < 2; i++) total[i] += sum[i], delta[i] += product[i];
               });
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    total[i] = sum_of_row(total[i]);
    inverse[i] = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
    delta[i] = sum_of_row(delta[i]) * inverse[i];
    const int query = first + row_of_lane(i);
    if (query < queries.count && lane_id() % 4 == 0) {
      const int64_t at = work.h * s.groups.num_queries + queries.row(query);
      b.total[at] = inverse[i];
      b.delta[at] = delta[i];
    }
  }
  __syncthreads();  // the buffers are filled again

  Square sums[D / 16];
  clear<D>(sums);
  stream<T, D>(buffers, s.k, nullptr, work.h, keys, copy_terms,
               [&](const T* k, const T*, int start) {
                 const int parity = start / kBlock % 2;
                 for_weights(k, start, [&](int n, Square& weights) {
#pragma unroll
                   for (int e = 0; e < 8; e++) {
                     const int column = 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
                     float& x = weights[e / 4][e % 4];
                     x = x * inverse[i] * (grads[parity][column] * scale.up - delta[i]);
                   }
                   uint32_t packed[4];
                   pack<T>(packed, weights);
                   accumulate<T, D>(sums, packed, k, 16 * n);
                 });
               });
  const float share = share_of(s, queries.count) * s.scale * scale.down;
  float slope[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int limit = Kind::kLimited ? all.limit[i] : all.count;
    slope[i] = limit == 1 ? 0.0f : share;  // one key always has all the weight
  }
  clear_rows<Kind, D>(sums, all.sees_none(0), all.sees_none(1));
  __syncwarp();
  store_rows<T, D>(static_cast<T*>(b.grad_q), s.H, work.h, q, sums, slope[0], slope[1],
                   RowsOf{queries, first});
}

// The gradient of 16 keys by a warp: weights and their gradients are transposed.
template <class T, int D, class Kind>
__global__ void __launch_bounds__(kBlockThreads)
    mean_keys_kernel(TokenScores s, ScoresBackward b, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  const Work work = find_work(s.groups.key_offsets, s.groups, blocks, s.H);
  const Members all_queries = queries_of(s.groups, work.g), keys = keys_of(s.groups, work.g);
  if (work.start >= keys.count) return;
  const Members queries =
      Kind::kLimited ? seeing_queries(s.groups, all_queries, keys, work.start) : all_queries;
  const int first = work.start + threadIdx.x / 32 * 16;
  T* const k = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  const QueryTerms<3, Kind> terms(memory + 3 * kBlock * kStride<D>);
  Rows16<D> rows;
  load_rows<T, D>(rows, k, s.k, work.h, keys, first);
  const GradScale scale(b.grad_scores, keys);
  const KeyLogits<Kind> logit(s, work.h, keys, first);
  float grad[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    grad[i] =
        logit.key[i] < keys.count ? b.grad_scores[keys.first + logit.key[i]] * scale.up : 0.0f;
  }
  Square sums[D / 16];
  clear<D>(sums);
  stream<T, D>(
      memory + kBlock * kStride<D>, s.q, nullptr, work.h, queries,
      [&](int start, int parity) {
        terms.copy(s, work.h, queries, keys, start, parity, {b.weights, b.total, b.delta});
      },
      [&](const T* q, const T*, int start) {
        const int parity = start / kBlock % 2;
#pragma unroll
        for (int n = 0; n < kBlock / 16; n++) {
          if (start + 16 * n >= queries.count) break;
          // Beyond the last query these are meaningless, but are multiplied with rows of zeros.
          Square weights;
          multiply_transposed<T, D>(weights, rows, q, 16 * n);
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int column = 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
            float& x = weights[e / 4][e % 4];
            x = terms.weight(logit, i, parity, column, x) * terms.number(1, parity, column);
            x *= grad[i] - terms.number(2, parity, column);
            if (Kind::kLimited && terms.limits[parity * kBlock + column] == 1) x *= 0.0f;
          }
          uint32_t packed[4];
          pack<T>(packed, weights);
          accumulate<T, D>(sums, packed, q, 16 * n);
        }
      });
  float share = share_of(s, all_queries.count) * s.scale * scale.down;
  if (keys.count == 1) share = 0.0f;  // one key always has all the weight
  __syncwarp();
  if (b.entry_grad_k != nullptr) {
    store_floats<D>(b.entry_grad_k, s.H, work.h, sums, share, [&](int r) {
      return first + r < keys.count ? int64_t{keys.first + first + r} : -1;
    });
  } else {
    store_rows<T, D>(static_cast<T*>(b.grad_k), s.H, work.h, k, sums, share, share,
                     RowsOf{keys, first});
  }
}

template <class T, int D>
constexpr int64_t kTilesBytes = 3 * kBlock * kStride<D> * int64_t{sizeof(T)};

constexpr int kTableWarps = kBlockThreads / 32;
// The shared memory of a block of mean_table_kernel without its tables.
template <class T, int D>
constexpr int64_t kMeanTableBytes =
    kTilesBytes<T, D> + kTermsBytes + kTableWarps * int64_t{kChunkBytes};

// The gradient of the table. A warp has a table of its own, in shared memory or one of `b.parts`.
template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 2)
    mean_table_kernel(TokenScores s, ScoresBackward b, int64_t blocks, int64_t items, bool shared) {
  DYNAMIC_SHARED(T, memory);
  const int warp = threadIdx.x / 32, h = static_cast<int>(blockIdx.x % s.H);
  const int64_t part = blockIdx.x / s.H, parts = gridDim.x / s.H, rows_of_table = s.bias.rows;
  char* const behind = reinterpret_cast<char*>(memory) + kTilesBytes<T, D> + kTermsBytes;
  float* const grads = reinterpret_cast<float*>(behind + warp * kChunkBytes);
  float* const tables = reinterpret_cast<float*>(behind + kTableWarps * kChunkBytes);
  const int64_t own = shared ? part : part * kTableWarps + warp;
  float* const to = b.bias_parts + (own * s.H + h) * rows_of_table;
  WarpTable table(shared ? tables + warp * rows_of_table : to, rows_of_table);
  for (int64_t i = lane_id(); i < rows_of_table; i += 32) table.table[i] = 0.0f;
  __syncwarp();
  for (int64_t item = items * part / parts; item < items * (part + 1) / parts; item++) {
    const Work work = find_work(s.groups.query_offsets, s.groups, blocks, item, h);
    const Members queries = queries_of(s.groups, work.g), all_keys = keys_of(s.groups, work.g);
    if (work.start >= queries.count) continue;
    const Members keys = seen_keys(s.groups, queries, all_keys, work.start);
    const int first = work.start + 16 * warp;
    Rows16<D> rows;
    load_rows<T, D>(rows, memory + 16 * warp * kStride<D>, s.q, h, queries, first);
    const GradScale scale(b.grad_scores, all_keys);
    const float share = share_of(s, queries.count) * scale.down;
    float lse[2], inverse[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = first + row_of_lane(i);
      const bool real = query < queries.count;
      const int64_t at = real ? h * s.groups.num_queries + queries.row(query) : 0;
      lse[i] = real ? b.weights[at] * kLog2E : 0.0f;
      inverse[i] = real ? b.total[at] : 0.0f;
      delta[i] = real ? b.delta[at] : 0.0f;
    }
    QueryLogits<Biased> all(s, h, queries, keys, first, terms_behind<T, D>(memory, 3, 0));
    all.hide(lse);
    // The offset of query `lane`, and how many of the 16 queries there are.
    const int own_query = first + int(lane_id()) % 16, members = min(queries.count - first, 16);
    const int own_offset =
        own_query < queries.count ? offset_of(s.bias, queries.row(own_query)) : 0;
    const int seen = all.most();
    stream<T, D>(
        memory + kBlock * kStride<D>, s.k, nullptr, h, keys,
        [&](int start, int) {
          terms_behind<T, D>(memory, 3, start).template copy<kBlock>(s, keys, start);
        },
        [&](const T* k, const T*, int start) {
          if (start >= seen) return;
          const KeyTerms terms = terms_behind<T, D>(memory, 3, start);
          const QueryLogits<Biased> logit = all.from(start, terms);
#pragma unroll 1
          for (int chunk = 0; chunk < kBlock; chunk += kChunk) {
#pragma unroll 1
            for (int n = chunk; n < chunk + kChunk; n += 16) {
              Square x;
              multiply_transposed<T, D>(x, rows, k, n);
#pragma unroll
              for (int e = 0; e < 8; e++) {
                const int i = e / 2 % 2, column = n + column_of_lane(e / 4) + e % 2;
                const float scaled = logit.scaled(i, column, x[e / 4][e % 4]);
                float grad = 0.0f;
                if (logit.sees(i, column)) {
                  grad = b.grad_scores[keys.first + start + column] * scale.up - delta[i];
                  grad *= exp2_approx(scaled - lse[i]);
                  grad *= all.limit[i] == 1 ? 0.0f : inverse[i] * share;
                }
                x[e / 4][e % 4] = grad;
              }
              put_chunk(grads, n - chunk, x);
            }
            const int key = chunk + lane_id();
            table.add(grads, terms.codes[key], start + key < keys.count, members, own_offset);
          }
        });
    __syncthreads();  // the buffers are filled again
  }
  table.finish();
  if (shared) sum_tables(tables, kTableWarps, rows_of_table, to);
}

// A thread sums two neighbouring channels of a row over its entries.
template <class T>
__global__ void __launch_bounds__(kPartThreads)
    mean_entries_kernel(Groups groups, const float* entry_grads, int64_t channels, T* grads) {
  const int64_t i = blockIdx.x * int64_t{kPartThreads} + threadIdx.x;
  const int64_t row = i / (channels / 2), channel = i % (channels / 2) * 2;
  if (row >= groups.num_keys) return;
  const int begin = within(groups.entry_offsets[row], groups.E);
  const int end = within(groups.entry_offsets[row + 1], groups.E);
  float2 sum = make_float2(0.0f, 0.0f);
  for (int n = begin; n < end; n++) {
    const int64_t at = within(groups.entries[n], groups.E - 1) * channels + channel;
    const float2 more = *reinterpret_cast<const float2*>(entry_grads + at);
    sum.x += more.x, sum.y += more.y;
  }
  *reinterpret_cast<uint32_t*>(grads + row * channels + channel) = pack2<T>(sum.x, sum.y);
}

template <class Kind>
constexpr int64_t kKeyTermsBytes = Kind::kBiased ? kTermsBytes : 0;

template <class T, int D, class Kind>
int mean_forward(const TokenScores& s, const ScoresForward& f, void* stream) {
  const Groups& groups = s.groups;
  constexpr int64_t kTiles = kTilesBytes<T, D>;
  if (!f.given) {
    const Blocks blocks = blocks_of(groups, s.H, groups.max_queries, groups.num_queries);
    const int error = launch(mean_lse_kernel<T, D, Kind>, blocks.all, kBlockThreads,
                             kTiles + kKeyTermsBytes<Kind>, stream, s, f.lse, blocks.of_group);
    if (error != 0) return error;
  }
  const Blocks blocks = blocks_of(groups, s.H, groups.max_keys, groups.E);
  return launch(mean_weights_kernel<T, D, Kind>, blocks.all, kBlockThreads,
                kTiles + QueryTerms<1, Kind>::kBytes, stream, s, f, blocks.of_group);
}

template <class T, int D, class Kind>
int mean_backward(const TokenScores& s, const ScoresBackward& b, void* stream) {
  const Groups& groups = s.groups;
  constexpr int64_t kTiles = kTilesBytes<T, D>;
  const Blocks query_blocks = blocks_of(groups, s.H, groups.max_queries, groups.num_queries);
  const Blocks key_blocks = blocks_of(groups, s.H, groups.max_keys, groups.E);
  int error = launch(mean_queries_kernel<T, D, Kind>, query_blocks.all, kBlockThreads,
                     kTiles + kKeyTermsBytes<Kind>, stream, s, b, query_blocks.of_group);
  if (error == 0) {
    error = launch(mean_keys_kernel<T, D, Kind>, key_blocks.all, kBlockThreads,
                   kTiles + QueryTerms<3, Kind>::kBytes, stream, s, b, key_blocks.of_group);
  }
  if (error == 0 && groups.entry_offsets != nullptr) {
    const int64_t pairs = groups.num_keys * s.H * D / 2;
    error = launch(mean_entries_kernel<T>, div_up(pairs, kPartThreads), kPartThreads, 0, stream,
                   groups, b.entry_grad_k, s.H * int64_t{D}, static_cast<T*>(b.grad_k));
  }
  if constexpr (Kind::kBiased) {
    if (error != 0 || b.grad_bias == nullptr) return error;
    const int64_t tables = kTableWarps * s.bias.rows * int64_t{sizeof(float)};
    const int64_t bytes = kMeanTableBytes<T, D>;
    const bool shared = bytes + tables <= most_shared_bytes();
    const int64_t parts = shared ? b.parts : b.parts / kTableWarps;
    error =
        launch(mean_table_kernel<T, D>, parts * s.H, kBlockThreads, bytes + (shared ? tables : 0),
               stream, s, b, query_blocks.of_group, query_blocks.all / s.H, shared);
    if (error != 0) return error;
    const int64_t numbers = s.H * s.bias.rows;
    error = launch(sum_parts_kernel, div_up(numbers, kPartThreads), kPartThreads, 0, stream,
                   b.bias_parts, b.parts, numbers, b.grad_bias);
  }
  return error;
}

}  // namespace
}  // namespace vidl
