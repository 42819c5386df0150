// Blocks of 64 queries and 64 keys of groups of any length: which of them a block of threads
// computes, and the loop over the others. For CUDA sources and for the emulator of
// tests/cuda_on_cpu.
#pragma once
#include "groups/logits.h"

namespace vidl {
namespace {

constexpr int kBlock = 64;  // queries or keys of a block of a long group: 16 a warp
constexpr int kBlockThreads = kBlock / 16 * 32;

// The block of queries, or of keys, that a block of threads computes.
struct Work {
  int64_t g;
  int h, start;
};

// Every group has `blocks` blocks; or, if that is 0, group g has those from offsets[g] / kSize + g
// on, which always suffices and wastes at most one block per group, however unequal the groups are.
template <int kSize = kBlock>
__device__ __forceinline__ Work find_work(const int32_t* offsets, const Groups& groups,
                                          int64_t blocks, int64_t item, int h) {
  if (blocks > 0) return {item / blocks, h, static_cast<int>(item % blocks) * kSize};
  int64_t low = 0, high = groups.G;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] / kSize + middle <= item ? low : high) = middle;
  }
  const int64_t start = (item - low - offsets[low] / kSize) * kSize;
  return {low, h, start < 0 || start > INT32_MAX ? INT32_MAX : static_cast<int>(start)};
}
// The same for a grid of `heads` blocks of threads for every block of members.
__device__ __forceinline__ Work find_work(const int32_t* offsets, const Groups& groups,
                                          int64_t blocks, int64_t heads) {
  return find_work(offsets, groups, blocks, blockIdx.x / heads,
                   static_cast<int>(blockIdx.x % heads));
}

// The keys that any query of the block from `start` on sees.
__device__ __forceinline__ Members seen_keys(const Groups& groups, const Members& queries,
                                             Members keys, int start) {
  int most = 0;
  for (int i = lane_id(); i < kBlock; i += 32) {
    most = max(most, limit_of(groups, queries, keys, start + i));
  }
  keys.count = max_of_warp(most);
  return keys;
}

// The queries from the first to the last that sees key `start`. Later keys are seen by fewer.
__device__ __forceinline__ Members seeing_queries(const Groups& groups, Members queries,
                                                  const Members& keys, int start) {
  int after = 0, before = 0;  // queries after the first, and before the last; itself included
  for (int i = lane_id(); i < queries.count; i += 32) {
    if (limit_of(groups, queries, keys, i) <= start) continue;
    after = max(after, queries.count - i), before = max(before, i + 1);
  }
  const int skipped = queries.count - max_of_warp(after);
  queries.count = max(max_of_warp(before) - skipped, 0);
  queries.first += skipped;
  return queries;
}

// The terms of the keys in the two buffers of stream(), behind `tiles` tiles of `memory`.
template <class T, int D>
__device__ __forceinline__ KeyTerms terms_behind(T* memory, int tiles, int start) {
  T* const end = memory + tiles * kBlock * kStride<D>;
  return KeyTerms(reinterpret_cast<int*>(end) + start / kBlock % 2 * 2 * kBlock, kBlock);
}
constexpr int64_t kTermsBytes = 2 * kBlock * KeyTerms::kBytes;

// Loads the rows of x, and of y unless it is null, block by block into two tiles, or two pairs of
// tiles, and calls body(tile of x, tile of y, start) while the next is loading. also(start, parity)
// may start more copies.
template <class T, int D, class Also, class Body>
__device__ __forceinline__ void stream(T* memory, const Strided& x, const Strided* y, int h,
                                       const Members& group, Also also, Body body) {
  constexpr int kTile = kBlock * kStride<D>;
  const int tiles = y == nullptr ? 1 : 2;
  const auto fetch = [&](int start) {
    const int parity = start / kBlock % 2;
    T* const to = memory + parity * tiles * kTile;
    if (y != nullptr) {
      copy_rows<T, D>({to, to + kTile}, kBlock, {x, *y}, h, group, start, threadIdx.x,
                      kBlockThreads);
    } else {
      copy_rows<T, D>(to, kBlock, x, h, group, start, threadIdx.x, kBlockThreads);
    }
    also(start, parity);
    cp_async_commit();
  };
  if (group.count > 0) fetch(0);
  for (int start = 0; start < group.count; start += kBlock) {
    cp_async_wait();
    __syncthreads();  // the block is there, and nobody reads the one before any more
    if (start + kBlock < group.count) fetch(start + kBlock);
    const T* const tile = memory + start / kBlock % 2 * tiles * kTile;
    body(tile, tile + kTile, start);
  }
}

constexpr int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Blocks of threads for the members of all groups, and of every group; 0: see find_work().
struct Blocks {
  int64_t all, of_group;
};
[[maybe_unused]] Blocks blocks_of(const Groups& groups, int64_t H, int64_t longest,
                                  int64_t members) {
  const int64_t G = groups.G, of_group = div_up(longest, kBlock), fewest = members / kBlock + G;
  if (G * of_group <= 2 * fewest) return {G * of_group * H, of_group};
  return {fewest * H, 0};
}

}  // namespace
}  // namespace vidl
