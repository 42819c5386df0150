// space_time_attention on CUDA for groups of at most 16 queries and keys. A warp computes one head
// of as many groups as fit into 16 rows: a 16 x 16 matrix of weights with one square block per
// group, zero elsewhere. The backward is one pass. No barriers of the block.
//
// Limit: bytes. For N rows in all, n in a group, in 16 bits: forward moves 8 N H D bytes for
// 4 n N H D useful FLOPs, backward 14 N H D bytes for 10 n N H D. At n = 8 that is 4 and 6 FLOPs
// per byte; an H200 balances at 184.
#pragma once
#include <type_traits>

#include "space_time_attention/warp.h"

namespace vidl {
namespace {

constexpr int kPackedWarps = 4;

// The rows of a warp: lanes 0 to 15 hold a query, lanes 16 to 31 a key. A row that no group fills
// is -1.
struct Pack {
  int h;
  int slot, groups;  // rows per group, groups in 16 rows
  int row, place;    // in q, or in k and v; in the list of all queries, or of all keys
  int count;         // queries, or keys, of the group

  __device__ __forceinline__ bool find(const SpaceTimeAttention& a) {
    const int lane = lane_id(), inside = lane % 16;
    slot = static_cast<int>(a.groups.max_queries > a.groups.max_keys ? a.groups.max_queries
                                                                     : a.groups.max_keys);
    groups = 16 / slot;
    const int64_t item = blockIdx.x * int64_t{kPackedWarps} + threadIdx.x / 32;
    const int64_t g = item / a.H * groups + inside / slot;
    h = static_cast<int>(item % a.H);
    row = -1, place = 0, count = 0;
    if (inside / slot < groups && g < a.groups.G) {
      const Members group = lane < 16 ? queries_of(a.groups, g) : keys_of(a.groups, g);
      const int member = inside % slot;
      count = group.count;
      if (member < group.count) row = group.row(member), place = group.first + member;
    }
    return item / a.H * groups < a.groups.G;
  }

  // Bit c is set if key c is one of the first `most` of the group of query r and both are among
  // `rows`.
  __device__ __forceinline__ uint32_t seen_by(int r, int rows, int most) const {
    const uint32_t real = __ballot_sync(kAllLanes, rows >= 0);
    return real >> r & 1 ? real >> 16 & ((1u << most) - 1) << r / slot * slot : 0u;
  }
};

// The logits of the lane's two queries.
template <class Kind>
struct PackedLogits {
  static constexpr bool kLimited = Kind::kLimited;
  float scale;
  uint32_t seen[2];        // bits of keys
  int offset[2], code[4];  // Biased, as the rest; of the lane's queries and keys
  float bias[4];
  Table table;

  __device__ __forceinline__ PackedLogits(const SpaceTimeAttention& a, const Pack& group, int rows)
      : scale(a.scale * kLog2E), table(a.bias, group.h) {
    const bool is_query = lane_id() < 16 && rows >= 0;
    const int slot = group.slot;
    int most = slot;
    if (Kind::kLimited && is_query && a.groups.query_limits != nullptr)
      most = within(a.groups.query_limits[rows], slot);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = row_of_lane(i);
      seen[i] = group.seen_by(r, rows, Kind::kLimited ? __shfl_sync(kAllLanes, most, r) : slot);
    }
    if constexpr (Kind::kBiased) {
      const bool is_key = lane_id() >= 16 && rows >= 0;
      const bool has_table = a.bias.table != nullptr;
      const int place = is_query              ? offset_of(a.bias, rows)
                        : is_key && has_table ? a.bias.key_codes[rows]
                                              : 0;
      const float more = is_key && a.bias.key_bias != nullptr ? a.bias.key_bias[rows] : 0.0f;
#pragma unroll
      for (int i = 0; i < 2; i++) offset[i] = __shfl_sync(kAllLanes, place, row_of_lane(i));
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int key = 16 + column_of_lane(e / 2) + e % 2;
        code[e] = __shfl_sync(kAllLanes, place, key);
        bias[e] = __shfl_sync(kAllLanes, more, key);
      }
    }
  }

  __device__ __forceinline__ void hide(const float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (Kind::kBiased && lse[i] == -INFINITY) seen[i] = 0;
    }
  }
  __device__ __forceinline__ bool sees(int i, int column) const {
    return (seen[i] >> column & 1) != 0;
  }
  __device__ __forceinline__ float scaled(int i, int column, float x) const {
    if (!Kind::kBiased) return x * scale;
    const int e = column / 8 * 2 + column % 2;
    return x * scale + (table.at(code[e], offset[i]) + bias[e]) * kLog2E;
  }
};

// 16 rows of a pack: its queries, or its keys (first = 16).
template <class T, int D>
__device__ __forceinline__ void copy_pack(T* tile, const Strided& x, int h, int rows, int first) {
  const T* const head = static_cast<const T*>(x.data) + h * x.head;
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    const int i = 32 * n + int(lane_id()), r = i / (D / 8), unit = i % (D / 8);
    const int row = __shfl_sync(kAllLanes, rows, first + r);
    cp_async_16(tile + r * kStride<D> + unit * 8, row < 0 ? head : head + row * x.row + unit * 8,
                row >= 0);
  }
}

// Whether 16 rows of a tile hold neither NaN nor infinity; called by all lanes of a warp.
template <class T, int D>
__device__ __forceinline__ bool finite(const T* tile) {
  constexpr uint32_t kExponents = std::is_same_v<T, bf16> ? 0x7F807F80u : 0x7C007C00u;
  constexpr uint32_t kOne = std::is_same_v<T, bf16> ? 0x00800080u : 0x04000400u;
  uint32_t carry = 0;
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    const int i = 32 * n + int(lane_id());
    const uint4 x =
        *reinterpret_cast<const uint4*>(tile + i / (D / 8) * kStride<D> + i % (D / 8) * 8);
    carry |= ((x.x & kExponents) + kOne) | ((x.y & kExponents) + kOne);
    carry |= ((x.z & kExponents) + kOne) | ((x.w & kExponents) + kOne);
  }
  return !__any_sync(kAllLanes, (carry & 0x80008000u) != 0);
}

// A sum runs over the rows of all groups of a warp, and a weight of zero does not stop NaN of
// another group. If a tile holds NaN or infinity, the groups of the warp are therefore computed one
// after another.
template <class T, int D, class Kind>
__global__ void __launch_bounds__(32 * kPackedWarps)
    packed_forward_kernel(SpaceTimeAttention a, Forward f) {
  constexpr int kTile = 16 * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  Pack group;
  if (!group.find(a)) return;
  T *const q = memory + threadIdx.x / 32 * 3 * kTile, *const k = q + kTile, *const v = k + kTile;
  const int inside = lane_id() % 16 / group.slot;
  int at_once = group.groups;
  for (int first = 0; first < group.groups; first += at_once) {
    const int rows = inside >= first && inside < first + at_once ? group.row : -1;
    copy_pack<T, D>(q, a.q, group.h, rows, 0);
    copy_pack<T, D>(k, a.k, group.h, rows, 16);
    copy_pack<T, D>(v, a.v, group.h, rows, 16);
    cp_async_commit();
    cp_async_wait();
    __syncwarp();
    if (at_once > 1 && !finite<T, D>(v)) {
      first = -1, at_once = 1;
      __syncwarp();
      continue;
    }
    const PackedLogits<Kind> logit(a, group, rows);
    Square weights[1], out[D / 16];
    const Normaliser softmax = weigh_keys<T, D>(q, k, 16, weights, logit);
    clear<D>(out);
    add_values<T, D>(out, weights, v, 16);
    clear_rows<Kind, D>(out, softmax.inverse[0] == 0.0f, softmax.inverse[1] == 0.0f);
    __syncwarp();
    store_rows<T, D>(static_cast<T*>(f.out), a.H, group.h, q, out, softmax.inverse[0],
                     softmax.inverse[1], [&](int r) { return __shfl_sync(kAllLanes, rows, r); });
    float share[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = row_of_lane(i), row = __shfl_sync(kAllLanes, rows, r);
      if (row >= 0 && lane_id() % 4 == 0)
        f.lse[group.h * a.groups.num_queries + row] = softmax.lse[i];
      const int count = __shfl_sync(kAllLanes, group.count, r);
      share[i] = row < 0 ? 0.0f : softmax.inverse[i] * share_of(a.scores, r % group.slot, count);
    }
    if (f.scores == nullptr) continue;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int j = e / 2, l = e % 2, column = column_of_lane(j) + l, key = 16 + column;
      float sum = 0.0f;  // of the queries of this group: others may be NaN
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (logit.sees(i, column)) sum += weights[0][j][2 * i + l] * share[i];
      }
      const float score = sum_of_column(sum);
      const int row = __shfl_sync(kAllLanes, rows, key);
      const int place = __shfl_sync(kAllLanes, group.place, key);
      if (row >= 0 && lane_id() < 4) f.scores[group.h * a.groups.E + place] = score;
    }
  }
}

template <class T, int D, class Kind>
__global__ void __launch_bounds__(32 * kPackedWarps)
    packed_backward_kernel(SpaceTimeAttention a, Backward b) {
  constexpr int kTile = 16 * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  Pack group;
  if (!group.find(a)) return;
  T *const q = memory + threadIdx.x / 32 * 4 * kTile, *const grad_out = q + kTile;
  T *const k = grad_out + kTile, *const v = k + kTile;
  const Strided grads_of_out = {b.grad_out, a.H * D, D};
  const int inside = lane_id() % 16 / group.slot;
  int at_once = group.groups;
  for (int first = 0; first < group.groups; first += at_once) {
    const int rows = inside >= first && inside < first + at_once ? group.row : -1;
    copy_pack<T, D>(q, a.q, group.h, rows, 0);
    copy_pack<T, D>(grad_out, grads_of_out, group.h, rows, 0);
    copy_pack<T, D>(k, a.k, group.h, rows, 16);
    copy_pack<T, D>(v, a.v, group.h, rows, 16);
    cp_async_commit();
    cp_async_wait();
    __syncwarp();
    if (at_once > 1 &&
        !(finite<T, D>(q) && finite<T, D>(grad_out) && finite<T, D>(k) && finite<T, D>(v))) {
      first = -1, at_once = 1;
      __syncwarp();
      continue;
    }
    float lse[2], share[2], grad_score[4], delta[2];
    PackedLogits<Kind> logit(a, group, rows);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = row_of_lane(i), row = __shfl_sync(kAllLanes, rows, r);
      const int count = __shfl_sync(kAllLanes, group.count, r);
      lse[i] = row < 0 ? 0.0f : b.lse[group.h * a.groups.num_queries + row] * kLog2E;
      share[i] = row < 0 ? 0.0f : share_of(a.scores, r % group.slot, count) / float(a.H);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = 16 + column_of_lane(e / 2) + e % 2;
      const int row = __shfl_sync(kAllLanes, rows, key);
      const int place = __shfl_sync(kAllLanes, group.place, key);
      grad_score[e] = b.grad_scores != nullptr && row >= 0 ? b.grad_scores[place] : 0.0f;
    }
    logit.hide(lse);
    Square weights[1], grads[1];
    differentiate<T, D>(
        q, grad_out, k, v, 16, lse, weights, grads, delta, logit,
        [&](int i, int column) { return grad_score[column / 8 * 2 + column % 2] * share[i]; });
    // The gradient of a weight, or a number of the table, may be NaN in one group of the warp.
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int i = e / 2 % 2, column = column_of_lane(e / 4) + e % 2;
      if (!logit.sees(i, column)) weights[0][e / 4][e % 4] = grads[0][e / 4][e % 4] = 0.0f;
    }
    if (Kind::kBiased && b.grad_bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = __shfl_sync(kAllLanes, rows, row_of_lane(i));
        if (row >= 0 && lane_id() % 4 == 0)
          b.delta[group.h * a.groups.num_queries + row] = delta[i];
      }
    }
    uint32_t across[4], down[4];
    pack<T>(across, weights[0]);
    transpose(across);
    const auto row_of = [&](int r) { return int64_t{__shfl_sync(kAllLanes, rows, r)}; };
    const auto place_of = [&](int r) {  // of a key
      const int row = __shfl_sync(kAllLanes, rows, 16 + r);
      const int place = __shfl_sync(kAllLanes, group.place, 16 + r);
      return int64_t{row < 0 || b.entry_grad_k == nullptr ? row : place};
    };
    // Every gradient overwrites a tile that is no longer needed: v, then grad_out, then k.
    const auto store_keys = [&](void* x, float* entries, T* tile, const Square(&sums)[D / 16],
                                float scale) {
      if (entries != nullptr) {
        store_floats<D>(entries, a.H, group.h, sums, scale, place_of);
      } else {
        store_rows<T, D>(static_cast<T*>(x), a.H, group.h, tile, sums, scale, scale, place_of);
      }
    };
    Square sums[D / 16];
    clear<D>(sums);
    accumulate<T, D>(sums, across, grad_out, 0);
    __syncwarp();
    store_keys(b.grad_v, b.entry_grad_v, v, sums, 1.0f);

    pack<T>(down, grads[0]);
    clear<D>(sums);
    accumulate<T, D>(sums, down, k, 0);
    clear_rows<Kind, D>(sums, logit.seen[0] == 0, logit.seen[1] == 0);
    __syncwarp();
    store_rows<T, D>(static_cast<T*>(b.grad_q), a.H, group.h, grad_out, sums, a.scale, a.scale,
                     row_of);

    transpose(down);
    clear<D>(sums);
    accumulate<T, D>(sums, down, q, 0);
    store_keys(b.grad_k, b.entry_grad_k, k, sums, a.scale);
    __syncwarp();
  }
}

}  // namespace
}  // namespace vidl
