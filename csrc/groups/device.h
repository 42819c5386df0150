// Groups of packed rows in CUDA kernels: the rows of a group, and their copy to shared memory. For
// CUDA sources and for the emulator of tests/cuda_on_cpu.
#pragma once
#include "cuda/mma_tiles.h"
#include "groups/interface.h"

namespace vidl {
namespace {

// The queries or the keys of one group. `Groups` checks its lists once, when it is made; kernels
// only make sure that no address is out of range. An assertion would end the CUDA context of the
// process, and cost up to a third of the instructions.
struct Members {
  const int32_t* rows;  // null: the rows in their order
  int64_t total;
  int first, count;

  __device__ int row(int i) const {
    return rows == nullptr ? first + i : within(rows[first + i], total - 1);
  }
};

__device__ __forceinline__ Members members(const int32_t* offsets, const int32_t* rows, int64_t g,
                                           int64_t places, int64_t total, int64_t longest) {
  const int begin = within(offsets[g], places), end = within(offsets[g + 1], places);
  return {rows, total, begin, total == 0 ? 0 : within(end - begin, longest)};
}
__device__ __forceinline__ Members queries_of(const Groups& groups, int64_t g) {
  return members(groups.query_offsets, groups.query_rows, g, groups.num_queries, groups.num_queries,
                 groups.max_queries);
}
__device__ __forceinline__ Members keys_of(const Groups& groups, int64_t g) {
  return members(groups.key_offsets, groups.key_rows, g, groups.E, groups.num_keys,
                 groups.max_keys);
}

// The group of an entry.
__device__ __forceinline__ int64_t group_of(const Groups& groups, int64_t entry) {
  int64_t low = 0, high = groups.G;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (groups.key_offsets[middle] <= entry ? low : high) = middle;
  }
  return low;
}

// Tiles whose rows have kStride numbers.
template <int D>
struct Padded {
  static __device__ __forceinline__ int at(int row, int d) { return row * kStride<D> + d; }
};

// Starts to copy `rows` rows of a group of one tensor or more, from member `start` on; zeros beyond
// the group's end. A thread copies the same unit of 16 bytes of every row. Four indices are loaded
// before the first copy: a chain of loads would wait for each.
template <class T, int D, class Layout = Padded<D>, int kTensors>
__device__ __forceinline__ void copy_rows(T* const (&tiles)[kTensors], int rows,
                                          const Strided (&tensors)[kTensors], int h,
                                          const Members& group, int start, int thread,
                                          int threads) {
  constexpr int kUnits = D / 8, kAtOnce = 4;
  const int step = threads / kUnits, first = thread / kUnits, d = thread % kUnits * 8;
  if (first >= step) return;  // threads that are too few for one row more
  for (int r = first; r < rows; r += kAtOnce * step) {
    int row[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      const int member = start + r + n * step;
      row[n] = group.first + member;
      if (group.rows != nullptr) row[n] = member < group.count ? group.rows[row[n]] : 0;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      const int to = r + n * step;
      // Not negative: a product of 32 and 64 bits is half of one of 64.
      const uint32_t from = static_cast<uint32_t>(within(row[n], group.total - 1));
#pragma unroll
      for (int t = 0; t < kTensors; t++) {
        const T* const head = static_cast<const T*>(tensors[t].data) + h * tensors[t].head + d;
        if (to < rows) {
          cp_async_16(tiles[t] + Layout::at(to, d), head + int64_t{from} * tensors[t].row,
                      start + to < group.count);
        }
      }
    }
  }
}
template <class T, int D>
__device__ __forceinline__ void copy_rows(T* tile, int rows, const Strided& x, int h,
                                          const Members& group, int start, int thread,
                                          int threads) {
  T* const tiles[1] = {tile};
  const Strided tensors[1] = {x};
  copy_rows<T, D>(tiles, rows, tensors, h, group, start, thread, threads);
}

}  // namespace
}  // namespace vidl
