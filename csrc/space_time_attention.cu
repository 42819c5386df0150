// space_time_attention on the tensor cores of sm_80 and later, forward and backward, in three size
// classes (space_time_attention.h has the rule). Schema: kernels/space_time_attention/op.py.
//
// packed   A warp has 16 rows of one head: all groups that fit into them. One 16 x 16 matrix of
//          weights, in which only a group's own square counts. Backward in one pass.
// whole    A block has a group and a head, with all keys and values in shared memory; a warp has
//          16 queries and their whole rows of weights in registers. Backward in one pass too: the
//          weights and their gradients go through shared memory to the warps of the keys.
// blocked  64 queries meet blocks of 64 keys: an online softmax. Backward one kernel for queries,
//          which leaves every query's delta = sum of the weights times their gradients behind,
//          then one for keys and values. Scores need the final log-sum-exp: a kernel of their own.
//
// Rows are gathered as they are loaded. A row beyond the end of its group is never read: it counts
// as zeros, so that a neighbour's NaN stays there. Nothing is added atomically: keys in several
// groups get a gradient for every entry, and a last kernel adds them in order.
//
// Limits. With n queries and keys a group, N rows in all and 16 bits, forward moves 8 N H D bytes
// for 4 n N H D FLOPs, backward 14 N H D bytes for 10 n N H D:
//   packed   bytes: at n = 8 4 FLOPs a byte, where an H200 needs 184
//   whole    bytes: at n = 69 35 forward, 49 backward
//   blocked  bytes up to about 260 (backward) and 370 (forward), FLOPs above; each block of queries
//            reads the keys again, from L2, and backward multiplies seven times instead of five
#undef NDEBUG  // device assertions guard the indices in release builds too
#include <type_traits>

#include "space_time_attention_warp.h"

#ifndef VIDL_HEAD_SIZES  // builds with sanitizers, and nvcc in tests, take fewer
#define VIDL_HEAD_SIZES 32, 64, 80, 96, 128
#endif

namespace vidl {
namespace {

constexpr int kPackedWarps = 4, kForwardWarps = 4;
constexpr int kBlock = 64;  // queries or keys of a block of a long group: 16 a warp
constexpr int kBlockThreads = kBlock / 16 * 32;
constexpr int kSumThreads = 256;

// ---- packed ------------------------------------------------------------------------------------
// What a warp has of the packed class: rows 0 to 15 are queries, one a lane, and rows 16 to 31
// keys. A row that no group fills is -1.
struct Pack {
  int h;
  int slot, groups;  // rows of a group, groups in 16 rows
  int row, place;    // of q, or of k and v; in the list of all groups' members
  int count;         // of queries, or keys, in the group

  __device__ __forceinline__ bool find(const Attention& a) {
    const int lane = lane_id(), inside = lane % 16;
    slot = static_cast<int>(a.max_queries > a.max_keys ? a.max_queries : a.max_keys);
    groups = 16 / slot;
    const int64_t item = blockIdx.x * int64_t{kPackedWarps} + threadIdx.x / 32;
    const int64_t g = item / a.H * groups + inside / slot;
    h = static_cast<int>(item % a.H);
    row = -1, place = 0, count = 0;
    if (inside / slot < groups && g < a.G) {
      const Members group = lane < 16 ? queries_of(a, g) : keys_of(a, g);
      const int member = inside % slot;
      count = group.count;
      if (member < group.count) row = group.row(member), place = group.first + member;
    }
    return item / a.H * groups < a.G;
  }

  // Bit c is set where key c belongs to the group of query r; `rows` are those that are there now.
  __device__ __forceinline__ uint32_t seen_by(int r, int rows) const {
    const uint32_t real = __ballot_sync(kAllLanes, rows >= 0);
    return real >> r & 1 ? real >> 16 & ((1u << slot) - 1) << r / slot * slot : 0u;
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

// Whether 16 rows of a tile hold neither NaN nor infinity; asked by all lanes of a warp.
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

// Groups share the sums of a product, where a weight of zero does not stop another group's NaN.
// So where there is one, the groups of a warp go one after the other.
template <class T, int D>
__global__ void __launch_bounds__(32 * kPackedWarps) packed_forward_kernel(Attention a, Forward f) {
  constexpr int kTile = 16 * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  check_ends(a);
  Pack group;
  if (!group.find(a)) return;
  T *const q = memory + threadIdx.x / 32 * 3 * kTile, *const k = q + kTile, *const v = k + kTile;
  T* const out = static_cast<T*>(f.out);
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
    const uint32_t seen[2] = {group.seen_by(row_of_lane(0), rows),
                              group.seen_by(row_of_lane(1), rows)};
    Rows16<D> queries;
    queries.load(q);
    Softmax<D> softmax;
    Square weights[1];
    softmax.start();
    softmax.template meet<T>(queries, k, v, 16, a.scale * kLog2E, weights,
                             [&](int i, int column) { return (seen[i] >> column & 1) != 0; });
    float inverse[2], lse[2];
    softmax.finish(inverse, lse);
    __syncwarp();
    store_rows<T, D>(out, a.H, group.h, q, softmax.out, inverse[0], inverse[1],
                     [&](int r) { return __shfl_sync(kAllLanes, rows, r); });
    float share[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = row_of_lane(i), row = __shfl_sync(kAllLanes, rows, r);
      if (row >= 0 && lane_id() % 4 == 0) f.lse[group.h * a.Q + row] = lse[i];
      const int count = __shfl_sync(kAllLanes, group.count, r);
      share[i] = row < 0 ? 0.0f : inverse[i] * share_of(a.scores, r % group.slot, count);
    }
    if (f.scores == nullptr) continue;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int j = e / 2, l = e % 2, key = 16 + column_of_lane(j) + l;
      const float score =
          sum_of_column(weights[0][j][l] * share[0] + weights[0][j][2 + l] * share[1]);
      const int row = __shfl_sync(kAllLanes, rows, key);
      const int place = __shfl_sync(kAllLanes, group.place, key);
      if (row >= 0 && lane_id() < 4) f.scores[group.h * a.E + place] = score;
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(32 * kPackedWarps)
    packed_backward_kernel(Attention a, Backward b) {
  constexpr int kTile = 16 * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  check_ends(a);
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
    float lse[2], share[2], grad_score[4];
    uint32_t seen[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = row_of_lane(i), row = __shfl_sync(kAllLanes, rows, r);
      const int count = __shfl_sync(kAllLanes, group.count, r);
      seen[i] = group.seen_by(r, rows);
      lse[i] = row < 0 ? 0.0f : b.lse[group.h * a.Q + row] * kLog2E;
      share[i] = row < 0 ? 0.0f : share_of(a.scores, r % group.slot, count) / float(a.H);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = 16 + column_of_lane(e / 2) + e % 2;
      const int row = __shfl_sync(kAllLanes, rows, key);
      const int place = __shfl_sync(kAllLanes, group.place, key);
      grad_score[e] = b.grad_scores != nullptr && row >= 0 ? b.grad_scores[place] : 0.0f;
    }
    Square weights[1], grads[1];
    differentiate<T, D>(
        q, grad_out, k, v, 16, a.scale * kLog2E, lse, weights, grads,
        [&](int i, int column) { return (seen[i] >> column & 1) != 0; },
        [&](int i, int column) { return grad_score[column / 8 * 2 + column % 2] * share[i]; });
    uint32_t across[4], down[4];
    pack<T>(across, weights[0]);
    transpose(across);
    const auto row_of = [&](int r) { return int64_t{__shfl_sync(kAllLanes, rows, r)}; };
    const auto place_of = [&](int r) {  // of a key
      const int row = __shfl_sync(kAllLanes, rows, 16 + r);
      const int place = __shfl_sync(kAllLanes, group.place, 16 + r);
      return int64_t{row < 0 || b.entry_grad_k == nullptr ? row : place};
    };
    // Each gradient takes the place of a tile that is not needed any more: v, then grad_out, k.
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

// ---- whole -------------------------------------------------------------------------------------
__host__ __device__ constexpr int round_up_16(int64_t n) {
  return static_cast<int>((n + 15) / 16 * 16);
}

template <class T, int D, int kSquares>
__global__ void __launch_bounds__(32 * kForwardWarps, kSquares == 4 && D <= 64 ? 3 : 2)
    whole_forward_kernel(Attention a, Forward f) {
  DYNAMIC_SHARED(T, memory);
  check_ends(a);
  const int64_t g = blockIdx.x / a.H;
  const int h = static_cast<int>(blockIdx.x % a.H);
  const Members queries = queries_of(a, g), keys = keys_of(a, g);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int most = round_up_16(a.max_keys), real = round_up_16(keys.count);
  T *const k = memory, *const v = k + most * kStride<D>;
  T* const q = v + (most + 16 * warp) * kStride<D>;  // of this warp: 16 queries, then their output
  float* const columns =                             // sums of weights, of each warp
      reinterpret_cast<float*>(v + (most + 16 * warps) * kStride<D>);
  copy_rows<T, D>(k, real, a.k, h, keys, 0, threadIdx.x, blockDim.x);
  copy_rows<T, D>(v, real, a.v, h, keys, 0, threadIdx.x, blockDim.x);
  copy_rows<T, D>(q, 16, a.q, h, queries, 16 * warp, lane_id(), 32);
  cp_async_commit();
  if (f.scores != nullptr) {
    for (int i = threadIdx.x; i < warps * most; i += blockDim.x) columns[i] = 0.0f;
  }
  cp_async_wait();
  __syncthreads();

  for (int start = 16 * warp; start < queries.count; start += 16 * warps) {
    Rows16<D> rows;
    rows.load(q);
    Softmax<D> softmax;
    Square weights[kSquares];
    softmax.start();
    softmax.template meet<T>(rows, k, v, keys.count, a.scale * kLog2E, weights,
                             [&](int, int column) { return column < keys.count; });
    float inverse[2], lse[2];
    softmax.finish(inverse, lse);
    __syncwarp();
    store_rows<T, D>(
        static_cast<T*>(f.out), a.H, h, q, softmax.out, inverse[0], inverse[1],
        [&](int r) { return start + r < queries.count ? queries.row(start + r) : -1; });
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = start + row_of_lane(i);
      if (query < queries.count && lane_id() % 4 == 0) {
        f.lse[h * a.Q + queries.row(query)] = lse[i];
      }
      inverse[i] *= query < queries.count ? share_of(a.scores, query, queries.count) : 0.0f;
    }
    if (f.scores != nullptr && (a.scores == Scores::kMean || start == 0)) {
#pragma unroll
      for (int e = 0; e < 4 * kSquares; e++) {
        const int n = e / 4, j = e / 2 % 2, l = e % 2, column = 16 * n + column_of_lane(j) + l;
        if (16 * n >= keys.count) continue;
        const float score =
            sum_of_column(weights[n][j][l] * inverse[0] + weights[n][j][2 + l] * inverse[1]);
        if (lane_id() < 4) columns[warp * most + column] += score;
      }
    }
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
    f.scores[h * a.E + keys.first + key] = score;
  }
}

// A warp for every 16 queries and 16 keys: first it has the queries, then the keys.
template <class T, int D, int kSquares>
__global__ void __launch_bounds__(32 * kSquares) whole_backward_kernel(Attention a, Backward b) {
  DYNAMIC_SHARED(T, memory);
  check_ends(a);
  const int64_t g = blockIdx.x / a.H;
  const int h = static_cast<int>(blockIdx.x % a.H);
  const Members queries = queries_of(a, g), keys = keys_of(a, g);
  const int warp = threadIdx.x / 32, start = 16 * warp;
  const int stride = round_up_16(a.max_keys) + 8;  // of a row of weights
  T *const q = memory, *const grad_out = q + round_up_16(a.max_queries) * kStride<D>;
  T* const k = grad_out + round_up_16(a.max_queries) * kStride<D>;
  T* const v = k + round_up_16(a.max_keys) * kStride<D>;
  // The weights and their gradients, [queries, keys], take the place of keys and values.
  T *const weights_tile = k, *const grads_tile = k + round_up_16(a.max_queries) * stride;
  const Strided grads_of_out = {b.grad_out, a.H * D, D};
  copy_rows<T, D>(q, round_up_16(queries.count), a.q, h, queries, 0, threadIdx.x, blockDim.x);
  copy_rows<T, D>(k, round_up_16(keys.count), a.k, h, keys, 0, threadIdx.x, blockDim.x);
  copy_rows<T, D>(grad_out, round_up_16(queries.count), grads_of_out, h, queries, 0, threadIdx.x,
                  blockDim.x);
  copy_rows<T, D>(v, round_up_16(keys.count), a.v, h, keys, 0, threadIdx.x, blockDim.x);
  cp_async_commit();
  cp_async_wait();
  __syncthreads();

  const bool has_queries = start < queries.count, has_keys = start < keys.count;
  uint32_t packed_weights[kSquares][4], packed_grads[kSquares][4];
  Square grad_q[D / 16];
  clear<D>(grad_q);
  if (has_queries) {
    float lse[2], share[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = start + row_of_lane(i);
      const bool real = query < queries.count;
      lse[i] = real ? b.lse[h * a.Q + queries.row(query)] * kLog2E : INFINITY;
      share[i] = share_of(a.scores, query, queries.count) / static_cast<float>(a.H);
    }
    Square weights[kSquares], grads[kSquares];
    differentiate<T, D>(
        q + start * kStride<D>, grad_out + start * kStride<D>, k, v, keys.count, a.scale * kLog2E,
        lse, weights, grads, [&](int, int column) { return column < keys.count; },
        [&](int i, int column) {
          return b.grad_scores == nullptr ? 0.0f : b.grad_scores[keys.first + column] * share[i];
        });
#pragma unroll
    for (int n = 0; n < kSquares; n++) {
      if (16 * n >= keys.count) continue;
      pack<T>(packed_weights[n], weights[n]);
      pack<T>(packed_grads[n], grads[n]);
      accumulate<T, D>(grad_q, packed_grads[n], k, 16 * n);
    }
  }
  __syncthreads();  // nobody reads keys and values any more
  if (has_queries) {
#pragma unroll
    for (int n = 0; n < kSquares; n++) {
      if (16 * n >= keys.count) continue;
      put(weights_tile, stride, start, 16 * n, packed_weights[n]);
      put(grads_tile, stride, start, 16 * n, packed_grads[n]);
    }
  }
  __syncthreads();  // the weights are there
  Square grad_k[D / 16], grad_v[D / 16];
  clear<D>(grad_k);
  clear<D>(grad_v);
  for (int row = 0; has_keys && row < queries.count; row += 16) {
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
  if (b.entry_grad_k != nullptr) {
    const auto place = [&](int r) {
      return start + r < keys.count ? int64_t{keys.first + start + r} : -1;
    };
    store_floats<D>(b.entry_grad_k, a.H, h, grad_k, a.scale, place);
    store_floats<D>(b.entry_grad_v, a.H, h, grad_v, 1.0f, place);
  } else {
    const auto row = [&](int r) { return start + r < keys.count ? keys.row(start + r) : -1; };
    store_rows<T, D>(static_cast<T*>(b.grad_k), a.H, h, mine, grad_k, a.scale, a.scale, row);
    store_rows<T, D>(static_cast<T*>(b.grad_v), a.H, h, mine, grad_v, 1.0f, 1.0f, row);
  }
}

// ---- blocked -----------------------------------------------------------------------------------
// The block of queries, or of keys, that a block of threads works on.
struct Work {
  int64_t g;
  int h, start;
};

// Either every group has `blocks` blocks, or, with 0, group g has those from
// offsets[g] / kBlock + g on: always enough, and seldom more, however unequal the groups are.
__device__ __forceinline__ Work find_work(const int32_t* offsets, const Attention& a,
                                          int64_t blocks) {
  const int64_t item = blockIdx.x / a.H;
  const int h = static_cast<int>(blockIdx.x % a.H);
  if (blocks > 0) return {item / blocks, h, static_cast<int>(item % blocks) * kBlock};
  int64_t low = 0, high = a.G;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] / kBlock + middle <= item ? low : high) = middle;
  }
  return {low, h, static_cast<int>(item - low - offsets[low] / kBlock) * kBlock};
}

// Brings the rows of x, and of y unless it is null, block after block: body(tile of x, of y, start)
// runs while the next two tiles are on their way. also(start, parity) starts more copies.
template <class T, int D, class Also, class Body>
__device__ __forceinline__ void stream(T* memory, const Strided& x, const Strided* y, int h,
                                       const Members& group, Also also, Body body) {
  constexpr int kTile = kBlock * kStride<D>;
  const auto fetch = [&](int start) {
    const int parity = start / kBlock % 2;
    T* const to = memory + parity * 2 * kTile;
    copy_rows<T, D>(to, kBlock, x, h, group, start, threadIdx.x, kBlockThreads);
    if (y != nullptr) {
      copy_rows<T, D>(to + kTile, kBlock, *y, h, group, start, threadIdx.x, kBlockThreads);
    }
    also(start, parity);
    cp_async_commit();
  };
  if (group.count > 0) fetch(0);
  for (int start = 0; start < group.count; start += kBlock) {
    cp_async_wait();
    __syncthreads();  // the block is there, and nobody reads the one before any more
    if (start + kBlock < group.count) fetch(start + kBlock);
    const T* const tile = memory + start / kBlock % 2 * 2 * kTile;
    body(tile, tile + kTile, start);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads)
    blocked_forward_kernel(Attention a, Forward f, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  check_ends(a);
  const Work work = find_work(a.query_offsets, a, blocks);
  const Members queries = queries_of(a, work.g), keys = keys_of(a, work.g);
  if (work.start >= queries.count) return;
  const int first = work.start + threadIdx.x / 32 * 16;
  T* const q = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  copy_rows<T, D>(q, 16, a.q, work.h, queries, first, lane_id(), 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> rows;
  rows.load(q);
  Softmax<D> softmax;
  softmax.start();
  stream<T, D>(
      memory + kBlock * kStride<D>, a.k, &a.v, work.h, keys, [](int, int) {},
      [&](const T* k, const T* v, int start) {
        const int count = min(keys.count - start, kBlock);
        Square weights[kBlock / 16];
        softmax.template meet<T>(rows, k, v, count, a.scale * kLog2E, weights,
                                 [&](int, int column) { return column < count; });
      });
  float inverse[2], lse[2];
  softmax.finish(inverse, lse);
  __syncwarp();
  store_rows<T, D>(static_cast<T*>(f.out), a.H, work.h, q, softmax.out, inverse[0], inverse[1],
                   [&](int r) { return first + r < queries.count ? queries.row(first + r) : -1; });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    if (query < queries.count && lane_id() % 4 == 0) {
      f.lse[work.h * a.Q + queries.row(query)] = lse[i];
    }
  }
}

// The scores of 16 keys a warp: their weights, transposed, summed over the queries.
template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 4)
    blocked_scores_kernel(Attention a, Forward f, int64_t blocks) {
  DYNAMIC_SHARED(T, memory);
  check_ends(a);
  const Work work = find_work(a.key_offsets, a, blocks);
  Members queries = queries_of(a, work.g);
  const Members keys = keys_of(a, work.g);
  if (work.start >= keys.count) return;
  const float share = queries.count > 0 ? share_of(a.scores, 0, queries.count) : 0.0f;
  if (a.scores == Scores::kCls) queries.count = min(queries.count, 1);
  const int first = work.start + threadIdx.x / 32 * 16;
  T* const k = memory + threadIdx.x / 32 * 16 * kStride<D>;
  copy_rows<T, D>(k, 16, a.k, work.h, keys, first, lane_id(), 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> rows;
  rows.load(k);
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
            const float lse = f.lse[work.h * a.Q + queries.row(query)] * kLog2E;
#pragma unroll
            for (int i = 0; i < 2; i++) {
              sums[i] += exp2_approx(weights[j][2 * i + l] * (a.scale * kLog2E) - lse);
            }
          }
        }
      });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float sum = sum_of_row(sums[i]) * share;
    const int key = first + row_of_lane(i);
    if (key < keys.count && lane_id() % 4 == 0) f.scores[work.h * a.E + keys.first + key] = sum;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, D <= 64 ? 3 : 2)
    query_backward_kernel(Attention a, Backward b, int64_t blocks) {
  constexpr int kTile = kBlock * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  check_ends(a);
  const Work work = find_work(a.query_offsets, a, blocks);
  const Members queries = queries_of(a, work.g), keys = keys_of(a, work.g);
  if (work.start >= queries.count) return;
  const int lane = lane_id(), first = work.start + threadIdx.x / 32 * 16;
  T* const q = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  T* const grad_out = q + kTile;
  copy_rows<T, D>(q, 16, a.q, work.h, queries, first, lane, 32);
  copy_rows<T, D>(grad_out, 16, {b.grad_out, a.H * D, D}, work.h, queries, first, lane, 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> rows, grad_rows;
  rows.load(q);
  grad_rows.load(grad_out);

  // delta = sum of the weights times their gradients = the output times its gradient: a row for
  // two lanes.
  float dot = 0.0f;
  if (first + lane / 2 < queries.count) {
    const int64_t row = queries.row(first + lane / 2);
    const T* const out = static_cast<const T*>(b.out) + (row * a.H + work.h) * D;
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
  dot += __shfl_xor_sync(kAllLanes, dot, 1);
  float lse[2], share[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int query = first + row_of_lane(i);
    delta[i] = __shfl_sync(kAllLanes, dot, 2 * row_of_lane(i));
    lse[i] = query < queries.count ? b.lse[work.h * a.Q + queries.row(query)] * kLog2E : 0.0f;
    share[i] = share_of(a.scores, query, queries.count) / static_cast<float>(a.H);
  }
  const auto weight_of = [&](float product, int i, bool real) {
    return real ? exp2_approx(product * (a.scale * kLog2E) - lse[i]) : 0.0f;
  };
  const auto score_grad = [&](int key) {
    return b.grad_scores != nullptr && key < keys.count ? b.grad_scores[keys.first + key] : 0.0f;
  };
  T* const buffers = memory + 2 * kTile;

  // What the scores' gradient adds to delta.
  if (b.grad_scores != nullptr && (a.scores == Scores::kMean || work.start == 0)) {
    float more[2] = {};
    stream<T, D>(
        buffers, a.k, nullptr, work.h, keys, [](int, int) {},
        [&](const T* k, const T*, int start) {
          for (int n = 0; n < kBlock / 16 && start + 16 * n < keys.count; n++) {
            Square weights;
            multiply_transposed<T, D>(weights, rows, k, 16 * n);
#pragma unroll
            for (int e = 0; e < 8; e++) {
              const int key = start + 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
              more[i] += weight_of(weights[e / 4][e % 4], i, key < keys.count) * score_grad(key);
            }
          }
        });
#pragma unroll
    for (int i = 0; i < 2; i++) delta[i] += sum_of_row(more[i]) * share[i];
    __syncthreads();  // the buffers are filled again
  }

  Square sums[D / 16];
  clear<D>(sums);
  stream<T, D>(
      buffers, a.k, &a.v, work.h, keys, [](int, int) {},
      [&](const T* k, const T* v, int start) {
#pragma unroll
        for (int n = 0; n < kBlock / 16; n++) {
          if (start + 16 * n >= keys.count) break;
          Square weights, grads;
          multiply_transposed<T, D>(weights, rows, k, 16 * n);
          multiply_transposed<T, D>(grads, grad_rows, v, 16 * n);
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int key = start + 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
            float& x = grads[e / 4][e % 4];
            x += score_grad(key) * share[i] - delta[i];
            x *= weight_of(weights[e / 4][e % 4], i, key < keys.count);
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
      b.delta[work.h * a.Q + queries.row(query)] = delta[i];
    }
  }
  __syncwarp();
  store_rows<T, D>(static_cast<T*>(b.grad_q), a.H, work.h, q, sums, a.scale, a.scale,
                   [&](int r) { return first + r < queries.count ? queries.row(first + r) : -1; });
}

// Weights and their gradients are transposed here: a warp has 16 keys.
template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, D <= 64 ? 3 : 2)
    key_backward_kernel(Attention a, Backward b, int64_t blocks) {
  constexpr int kTile = kBlock * kStride<D>;
  DYNAMIC_SHARED(T, memory);
  SHARED(float, lse, [2][kBlock]);  // of the queries in the two buffers
  SHARED(float, delta, [2][kBlock]);
  check_ends(a);
  const Work work = find_work(a.key_offsets, a, blocks);
  const Members queries = queries_of(a, work.g), keys = keys_of(a, work.g);
  if (work.start >= keys.count) return;
  const int lane = lane_id(), first = work.start + threadIdx.x / 32 * 16;
  T* const k = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  T* const v = k + kTile;
  copy_rows<T, D>(k, 16, a.k, work.h, keys, first, lane, 32);
  copy_rows<T, D>(v, 16, a.v, work.h, keys, first, lane, 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();
  Rows16<D> key_rows, value_rows;
  constexpr bool kHeld = D <= 96;  // longer rows do not fit into registers beside both sums
  key_rows.load(k);
  if (kHeld) value_rows.load(v);
  float grad_score[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int key = first + row_of_lane(i);
    if (b.grad_scores != nullptr && key < keys.count) {
      const float share = share_of(a.scores, 0, queries.count) / static_cast<float>(a.H);
      grad_score[i] = b.grad_scores[keys.first + key] * share;
    }
  }
  Square grad_k[D / 16], grad_v[D / 16];
  clear<D>(grad_k);
  clear<D>(grad_v);
  const Strided grads_of_out = {b.grad_out, a.H * D, D};
  stream<T, D>(
      memory + 2 * kTile, a.q, &grads_of_out, work.h, queries,
      [&](int start, int parity) {
        const int i = threadIdx.x % kBlock, query = start + i;
        const bool real = query < queries.count;
        const int64_t at = real ? work.h * a.Q + queries.row(query) : 0;
        if (threadIdx.x < kBlock) {
          cp_async_4(&lse[parity][i], b.lse + at, real);
        } else {
          cp_async_4(&delta[parity][i], b.delta + at, real);
        }
      },
      [&](const T* q, const T* grad_out, int start) {
        const int parity = start / kBlock % 2;
#pragma unroll
        for (int n = 0; n < kBlock / 16; n++) {
          if (start + 16 * n >= queries.count) break;
          // Beyond the last query these are wrong, but meet rows of zeros.
          Square weights, grads;
          multiply_transposed<T, D>(weights, key_rows, q, 16 * n);
          if (!kHeld) value_rows.load(v);
          multiply_transposed<T, D>(grads, value_rows, grad_out, 16 * n);
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int column = 16 * n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
            float& weight = weights[e / 4][e % 4];
            float& x = grads[e / 4][e % 4];
            weight = exp2_approx(weight * (a.scale * kLog2E) - lse[parity][column] * kLog2E);
            if (a.scores == Scores::kMean || start + column == 0) x += grad_score[i];
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
  if (b.entry_grad_k != nullptr) {
    const auto place = [&](int r) {
      return first + r < keys.count ? int64_t{keys.first + first + r} : -1;
    };
    store_floats<D>(b.entry_grad_k, a.H, work.h, grad_k, a.scale, place);
    store_floats<D>(b.entry_grad_v, a.H, work.h, grad_v, 1.0f, place);
  } else {
    const auto row = [&](int r) { return first + r < keys.count ? keys.row(first + r) : -1; };
    store_rows<T, D>(static_cast<T*>(b.grad_k), a.H, work.h, k, grad_k, a.scale, a.scale, row);
    store_rows<T, D>(static_cast<T*>(b.grad_v), a.H, work.h, v, grad_v, 1.0f, 1.0f, row);
  }
}

// ---- Sums in a fixed order ---------------------------------------------------------------------
__global__ void __launch_bounds__(kSumThreads) mean_scores_kernel(Forward f, int64_t H, int64_t E) {
  const int64_t e = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  if (e >= E) return;
  float sum = 0.0f;
  for (int64_t h = 0; h < H; h++) sum += f.scores[h * E + e];
  f.mean_scores[e] = sum / static_cast<float>(H);
}

// A thread has two neighbouring channels of a row of keys and values.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_entries_kernel(Backward b, int64_t K, int64_t E, int64_t channels) {
  const int64_t i = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  const int64_t row = i / (channels / 2), channel = i % (channels / 2) * 2;
  if (row >= K) return;
  const int begin = b.entry_offsets[row], end = b.entry_offsets[row + 1];
  assert(begin >= 0 && begin <= end && end <= E);  // entry_offsets must ascend from 0 to E
  float2 k = make_float2(0.0f, 0.0f), v = k;
  for (int n = begin; n < end; n++) {
    const int64_t entry = b.entries[n];
    assert(entry >= 0 && entry < E);  // entries are out of range
    const int64_t at = entry * channels + channel;
    const float2 more_k = *reinterpret_cast<const float2*>(b.entry_grad_k + at);
    const float2 more_v = *reinterpret_cast<const float2*>(b.entry_grad_v + at);
    k.x += more_k.x, k.y += more_k.y, v.x += more_v.x, v.y += more_v.y;
  }
  const int64_t to = row * channels + channel;
  *reinterpret_cast<uint32_t*>(static_cast<T*>(b.grad_k) + to) = pack2<T>(k.x, k.y);
  *reinterpret_cast<uint32_t*>(static_cast<T*>(b.grad_v) + to) = pack2<T>(v.x, v.y);
}

// ---- Launches ----------------------------------------------------------------------------------
template <class... P, class... A>
int start(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
          const A&... args) {
  constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return kInvalidConfiguration;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream), args...);
}

constexpr int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Blocks of threads for the members of all groups, and how many each group has; 0: see find_work().
struct Blocks {
  int64_t all, each;
};
Blocks blocks_of(const Attention& a, int64_t longest, int64_t members) {
  const int64_t each = div_up(longest, kBlock), fewest = members / kBlock + a.G;
  if (a.G * each <= 2 * fewest) return {a.G * each * a.H, each};
  return {fewest * a.H, 0};
}

int64_t packs_of(const Attention& a) {
  const int64_t slot = a.max_queries > a.max_keys ? a.max_queries : a.max_keys;
  return slot == 0 ? 0 : div_up(div_up(a.G, 16 / slot) * a.H, kPackedWarps);
}

template <class T, int D>
int forward(const Attention& a, const Forward& f, void* stream) {
  constexpr int64_t kRow = kStride<D> * sizeof(T);
  int error = 0;
  if (size_of(a.max_queries, a.max_keys) == Size::kPacked) {
    error = start(packed_forward_kernel<T, D>, packs_of(a), 32 * kPackedWarps,
                  kPackedWarps * 3 * 16 * kRow, stream, a, f);
  } else if (size_of(a.max_queries, a.max_keys) == Size::kWhole) {
    const int64_t keys = round_up_16(a.max_keys), squares = round_up_16(a.max_queries) / 16;
    const int64_t warps = squares < 1 ? 1 : squares < kForwardWarps ? squares : kForwardWarps;
    const int64_t bytes = (2 * keys + 16 * warps) * kRow + warps * keys * sizeof(float);
    const auto kernel = keys <= 64 ? whole_forward_kernel<T, D, 4> : whole_forward_kernel<T, D, 8>;
    error = start(kernel, a.G * a.H, static_cast<int>(32 * warps), bytes, stream, a, f);
  } else {
    const Blocks blocks = blocks_of(a, a.max_queries, a.Q), keys = blocks_of(a, a.max_keys, a.E);
    error = start(blocked_forward_kernel<T, D>, blocks.all, kBlockThreads, 5 * kBlock * kRow,
                  stream, a, f, blocks.each);
    if (error == 0 && f.scores != nullptr) {
      error = start(blocked_scores_kernel<T, D>, keys.all, kBlockThreads, 5 * kBlock * kRow, stream,
                    a, f, keys.each);
    }
  }
  if (error != 0 || f.scores == nullptr) return error;
  return start(mean_scores_kernel, div_up(a.E, kSumThreads), kSumThreads, 0, stream, f, a.H, a.E);
}

template <class T, int D>
int backward(const Attention& a, const Backward& b, void* stream) {
  constexpr int64_t kRow = kStride<D> * sizeof(T);
  int error = 0;
  if (size_of(a.max_queries, a.max_keys) == Size::kPacked) {
    error = start(packed_backward_kernel<T, D>, packs_of(a), 32 * kPackedWarps,
                  kPackedWarps * 4 * 16 * kRow, stream, a, b);
  } else if (size_of(a.max_queries, a.max_keys) == Size::kWhole) {
    const int64_t queries = round_up_16(a.max_queries), keys = round_up_16(a.max_keys);
    const int64_t most = queries > keys ? queries : keys;
    const int64_t tiles = 2 * keys * kRow, weights = 2 * queries * (keys + 8) * sizeof(T);
    const int64_t bytes = 2 * queries * kRow + (tiles > weights ? tiles : weights);
    const auto kernel =
        most <= 64 ? whole_backward_kernel<T, D, 4> : whole_backward_kernel<T, D, 8>;
    error = start(kernel, a.G * a.H, static_cast<int>(2 * most), bytes, stream, a, b);
  } else {
    const Blocks blocks = blocks_of(a, a.max_queries, a.Q), keys = blocks_of(a, a.max_keys, a.E);
    error = start(query_backward_kernel<T, D>, blocks.all, kBlockThreads, 6 * kBlock * kRow, stream,
                  a, b, blocks.each);
    if (error == 0) {
      error = start(key_backward_kernel<T, D>, keys.all, kBlockThreads, 6 * kBlock * kRow, stream,
                    a, b, keys.each);
    }
  }
  if (error != 0 || b.entry_offsets == nullptr) return error;
  const int64_t pairs = a.K * a.H * D / 2;
  return start(sum_entries_kernel<T>, div_up(pairs, kSumThreads), kSumThreads, 0, stream, b, a.K,
               a.E, a.H * int64_t{D});
}

template <int... kSizes>
struct HeadSizes {
  // Calls f with a null pointer of the type that `dtype` names, and the head size as a type.
  template <class F>
  static int with(const Attention& a, F f) {
    constexpr int kNotSupported = 801;  // cudaErrorNotSupported
    int result = kNotSupported;
    const auto with_size = [&](auto* type) {
      ((a.D == kSizes ? void(result = f(type, std::integral_constant<int, kSizes>())) : void()),
       ...);
    };
    if (a.dtype == Dtype::kFloat16) with_size(static_cast<fp16*>(nullptr));
    if (a.dtype == Dtype::kBFloat16) with_size(static_cast<bf16*>(nullptr));
    return result;
  }
};

}  // namespace
}  // namespace vidl

int vidl_attention_cuda(const vidl::Attention* a, const vidl::Forward* f, void* stream) {
  return vidl::HeadSizes<VIDL_HEAD_SIZES>::with(*a, [&](auto* type, auto D) {
    return vidl::forward<std::remove_pointer_t<decltype(type)>, D.value>(*a, *f, stream);
  });
}

int vidl_attention_bwd_cuda(const vidl::Attention* a, const vidl::Backward* b, void* stream) {
  return vidl::HeadSizes<VIDL_HEAD_SIZES>::with(*a, [&](auto* type, auto D) {
    return vidl::backward<std::remove_pointer_t<decltype(type)>, D.value>(*a, *b, stream);
  });
}
