// space_time_attention on CUDA, the gradient of the table of relative positions. One kernel for
// groups of all sizes computes the gradients of the logits once more, by the log-sum-exp and delta
// of every query, and adds them to tables (groups/table.h); a second one adds these tables.
#pragma once
#include "groups/table.h"
#include "space_time_attention/warp.h"

namespace vidl {
namespace {

// The shared memory of a block without its tables: six tiles beside that of groups/table.h.
template <class T, int D>
constexpr int64_t table_backward_bytes() {
  return 6 * kBlock * kStride<D> * int64_t{sizeof(T)} + kTableBytes;
}

// The tables lie in shared memory, or each is one of `b.parts` in global memory.
template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 2)
    table_backward_kernel(SpaceTimeAttention a, Backward b, int64_t blocks, int64_t items,
                          bool shared) {
  constexpr int kTile = kBlock * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  const int lane = lane_id(), warp = threadIdx.x / 32;
  const int h = static_cast<int>(blockIdx.x % a.H);
  const int64_t part = blockIdx.x / a.H, parts = gridDim.x / a.H;
  T* const q = memory + 16 * warp * kStride<D>;  // of this warp
  T* const grad_out = q + kTile;
  T* const buffers = memory + 2 * kTile;
  Tables tables(memory + 6 * kTile, b.bias_parts, part, a.H, h, a.bias.rows, shared);

  for (int64_t item = items * part / parts; item < items * (part + 1) / parts; item++) {
    const Work work = find_work(a.groups.query_offsets, a.groups, blocks, item, h);
    const Members queries = queries_of(a.groups, work.g);
    if (work.start >= queries.count) continue;
    const Members keys = seen_keys(a.groups, queries, keys_of(a.groups, work.g), work.start);
    const int first = work.start + 16 * warp;
    copy_rows<T, D>({q, grad_out}, 16, {a.q, {b.grad_out, a.H * D, D}}, h, queries, first, lane,
                    32);
    cp_async_commit();
    cp_async_wait();
    __syncwarp();
    Rows16<D> query_rows, grad_rows;
    query_rows.load(q);
    grad_rows.load(grad_out);

    float lse[2], delta[2], share[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = first + row_of_lane(i);
      const bool real = query < queries.count;
      const int64_t at = real ? h * a.groups.num_queries + queries.row(query) : 0;
      lse[i] = real ? b.lse[at] * kLog2E : 0.0f;
      delta[i] = real ? b.delta[at] : 0.0f;
      share[i] = share_of(a.scores, query, queries.count) / static_cast<float>(a.H);
    }
    QueryLogits<Biased> all(a, h, queries, keys, first, terms_behind<T, D>(memory, 6, 0));
    all.hide(lse);
    // The offset of query `lane`, and how many of the 16 queries there are.
    const int own_query = first + lane % 16, members = min(queries.count - first, 16);
    const int own_offset =
        own_query < queries.count ? offset_of(a.bias, queries.row(own_query)) : 0;
    const int seen = all.most();
    stream<T, D>(
        buffers, a.k, &a.v, h, keys,
        [&](int start, int) {
          terms_behind<T, D>(memory, 6, start).template copy<kBlock>(a, keys, start);
        },
        [&](const T* k, const T* v, int start) {
          const KeyTerms terms = terms_behind<T, D>(memory, 6, start);
          tables.rank(terms);
          if (start >= seen) return;
          const QueryLogits<Biased> logit = all.from(start, terms);
#pragma unroll 1
          for (int n = 0; n < kBlock; n += 16) {
            Square weights, x;
            multiply_transposed<T, D>(weights, query_rows, k, n);
            multiply_transposed<T, D>(x, grad_rows, v, n);
#pragma unroll
            for (int e = 0; e < 8; e++) {
              const int i = e / 2 % 2, r = row_of_lane(i);
              const int column = n + column_of_lane(e / 4) + e % 2;
              const float scaled = logit.scaled(i, column, weights[e / 4][e % 4]);
              float grad = 0.0f;
              if (logit.sees(i, column)) {
                grad = x[e / 4][e % 4] - delta[i];
                if (b.grad_scores != nullptr)
                  grad += b.grad_scores[keys.first + start + column] * share[i];
                grad *= exp2_approx(scaled - lse[i]);
              }
              tables.grads[r * kGradStride + column] = grad;
            }
          }
          tables.add(terms, keys.count - start, members, own_offset);
        });
    __syncthreads();  // the buffers are filled again
  }

  tables.finish(b.bias_parts + (part * a.H + h) * a.bias.rows, shared);
}

}  // namespace
}  // namespace vidl
