// token_scores by the similarity of keys on CUDA. One kernel averages the keys over the heads and
// divides them by their norms, a second one multiplies blocks of 64 even keys of a group with
// blocks of 64 odd ones (groups/blocks.h) and keeps the maximum of every row.
//
// The scores are those of float32. A number x of a direction is stored as two of float16, hi + lo
// with 22 bits of it, after a multiplication by 64 that keeps lo out of the subnormals. The product
// of two is hi hi + hi lo + lo hi: three matmuls, whose sums are in float32.
//
// Limit: bytes, for less than about 4000 keys in a group of 12 heads. For N keys in all and n in a
// group, in 16 bits: 2 N H D bytes read and 4 N D written for N H D FLOPs, then 4 N D read for
// 1.5 n N D FLOPs. For 64 clips of 1568 tokens, 12 heads of 64, that is 205 MB, 43 us on an H200.
#pragma once
#include "groups/blocks.h"
#include "token_scores/cls.h"
#include "token_scores/interface.h"

namespace vidl {
namespace {

constexpr float kDirectionScale = 64.0f;

// The even and the odd keys of a group. Their directions lie in the group's place in that order.
struct Halves {
  Members even, odd;

  __device__ __forceinline__ explicit Halves(const Groups& groups, const Members& keys)
      : even{nullptr, groups.E, keys.first, (keys.count + 1) / 2},
        odd{nullptr, groups.E, keys.first + even.count, keys.count / 2} {}
};

// The direction of an entry, by a warp; and the score of an odd key.
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads) directions_kernel(TokenScores s, ScoresForward f) {
  constexpr int kLanes = kLanesOfRow<D>;
  const int64_t entry = blockIdx.x * int64_t{kRowThreads / 32} + threadIdx.x / 32;
  if (entry >= s.groups.E || s.groups.G == 0) return;
  const Members keys = keys_of(s.groups, group_of(s.groups, entry));
  const int j = static_cast<int>(entry) - keys.first, unit = lane_id() % kLanes;
  if (j < 0 || j >= keys.count) return;
  const T* const from = static_cast<const T*>(s.k.data) + keys.row(j) * s.k.row + unit * 8;
  float sum[8] = {};
  for (int h = lane_id() / kLanes; h < s.H && unit < D / 8; h += 32 / kLanes) {
    float x[8];
    unpack8<T>(load_16(from + h * s.k.head), x);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += x[i];
  }
#pragma unroll
  for (int d = kLanes; d < 32; d *= 2) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], d);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    sum[i] /= static_cast<float>(s.H);
    squares = fmaf(sum[i], sum[i], squares);
  }
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) squares += __shfl_xor_sync(kAllLanes, squares, d);
  const float length = sqrtf(squares), divisor = length < 1e-12f ? 1e-12f : length;
  float hi[8], lo[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float x = sum[i] / divisor * kDirectionScale;
    hi[i] = to_float(from_float<fp16>(x));
    lo[i] = x - hi[i];
  }
  const Halves halves(s.groups, keys);
  const int64_t place = (j % 2 == 0 ? halves.even : halves.odd).first + j / 2;
  fp16* const to = static_cast<fp16*>(f.directions) + place * 2 * D + unit * 8;
  if (static_cast<int>(lane_id()) < D / 8) {
    store_16(to, pack8<fp16>(hi, 1.0f));
    store_16(to + D, pack8<fp16>(lo, 1.0f));
  }
  if (j % 2 == 1 && lane_id() == 0) f.scores[entry] = INFINITY;
}

// Minus the greatest cosine of each even key: a warp computes 16. Without the number ptxas
// aims at more blocks a multiprocessor for heads of 32, and spills.
template <int D>
__global__ void __launch_bounds__(kBlockThreads, D <= 32   ? 7
                                                 : D <= 64 ? 5
                                                           : 4)
    similarity_kernel(TokenScores s, ScoresForward f, int64_t blocks) {
  constexpr int kTile = kBlock * kStride<D>;
  DYNAMIC_SHARED(fp16, memory);
  const Work work = find_work(s.groups.key_offsets, s.groups, blocks, 1);
  const Members keys = keys_of(s.groups, work.g);
  const Halves halves(s.groups, keys);
  if (work.start >= halves.even.count) return;
  const int first = work.start + threadIdx.x / 32 * 16;
  const Strided hi = {f.directions, 2 * D, 0};
  const Strided lo = {static_cast<const fp16*>(f.directions) + D, 2 * D, 0};
  fp16* const own = memory + threadIdx.x / 32 * 16 * kStride<D>;  // of this warp
  copy_rows<fp16, D>(own, 16, hi, 0, halves.even, first, lane_id(), 32);
  copy_rows<fp16, D>(own + kTile, 16, lo, 0, halves.even, first, lane_id(), 32);
  cp_async_commit();
  cp_async_wait();
  __syncwarp();  // all lanes' directions are there
  Rows16<D> hi_rows, lo_rows;
  hi_rows.load(own);
  lo_rows.load(own + kTile);
  float most[2] = {-INFINITY, -INFINITY}, wrong[2] = {};
  stream<fp16, D>(
      memory + 2 * kTile, hi, &lo, 0, halves.odd, [](int, int) {},
      [&](const fp16* odd_hi, const fp16* odd_lo, int start) {
        for (int n = 0; n < kBlock && start + n < halves.odd.count; n += 16) {
          Square large, small;
          multiply_transposed<fp16, D>(large, hi_rows, odd_hi, n);
#pragma unroll
          for (int i = 0; i < 8; i++) small[i / 4][i % 4] = 0.0f;
#pragma unroll
          for (int d = 0; d < D / 16; d++) {
            uint32_t right[4];
            load_square<false, false>(right, odd_hi, kStride<D>, n, 16 * d);
            multiply<fp16>(small, lo_rows.x[d], right);
            load_square<false, false>(right, odd_lo, kStride<D>, n, 16 * d);
            multiply<fp16>(small, hi_rows.x[d], right);
          }
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int column = start + n + column_of_lane(e / 4) + e % 2, i = e / 2 % 2;
            if (column >= halves.odd.count) continue;
            const float cosine = large[e / 4][e % 4] + small[e / 4][e % 4];
            most[i] = fmaxf(most[i], cosine);
            wrong[i] += cosine - cosine;  // NaN if the cosine is, which a maximum ignores
          }
        }
      });
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float highest = max_of_row(most[i]) / (kDirectionScale * kDirectionScale);
    const float nan = sum_of_row(wrong[i]);
    const int key = first + row_of_lane(i);
    if (key < halves.even.count && lane_id() % 4 == 0) {
      f.scores[keys.first + 2 * key] = -(highest + nan);
    }
  }
}

template <class T, int D>
int similarity_forward(const TokenScores& s, const ScoresForward& f, void* stream) {
  const Groups& groups = s.groups;
  const int error = launch(directions_kernel<T, D>, div_up(groups.E, kRowThreads / 32), kRowThreads,
                           0, stream, s, f);
  if (error != 0) return error;
  const Blocks blocks = blocks_of(groups, 1, (groups.max_keys + 1) / 2, groups.E);
  return launch(similarity_kernel<D>, blocks.all, kBlockThreads,
                6 * kBlock * kStride<D> * int64_t{sizeof(fp16)}, stream, s, f, blocks.of_group);
}

}  // namespace
}  // namespace vidl
