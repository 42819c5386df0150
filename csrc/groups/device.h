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

// Starts to copy `rows` rows of a group, from member `start` on; zeros beyond the group's end. Four
// addresses are computed before their copies start: each needs an index from memory, and a copy
// would wait for it.
template <class T, int D>
__device__ __forceinline__ void copy_rows(T* tile, int rows, const Strided& x, int h,
                                          const Members& group, int start, int thread,
                                          int threads) {
  constexpr int kUnits = D / 8, kAtOnce = 4;
  const T* const head = static_cast<const T*>(x.data) + h * x.head;
  for (int first = thread; first < rows * kUnits; first += kAtOnce * threads) {
    const T* from[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      const int i = first + n * threads, member = start + i / kUnits;
      const bool real = i < rows * kUnits && member < group.count;
      from[n] = real ? head + group.row(member) * x.row + i % kUnits * 8 : nullptr;
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      const int i = first + n * threads;
      if (i >= rows * kUnits) break;
      cp_async_16(tile + i / kUnits * kStride<D> + i % kUnits * 8, from[n] ? from[n] : head,
                  from[n] != nullptr);
    }
  }
}

}  // namespace
}  // namespace vidl
