// The gradient of a table of relative positions in CUDA kernels. For CUDA sources and for the
// emulator of tests/cuda_on_cpu.
//
// A warp takes its queries one after another and adds the gradients of 32 keys at once, one a lane.
// Keys of one query have the same row only if they have the same code; such keys are added one
// after another. So no addition needs to be atomic, and the sums have the same bits in every run.
// Gradients of the first and the last row, which many keys have, are summed in registers. A second
// kernel adds the tables of all blocks in their order.
#pragma once
#include "groups/blocks.h"

namespace vidl {
namespace {

constexpr int kChunk = 32;        // keys that a warp adds at once
constexpr int kChunkStride = 40;  // of a query's gradients: four queries in other banks
constexpr int kAtOnce = 4;        // queries whose gradients are read together
constexpr int kChunkBytes = 16 * kChunkStride * int{sizeof(float)};  // of 16 queries

// Writes 16 x 16 gradients to those of a chunk, from key `column` on.
__device__ __forceinline__ void put_chunk(float* grads, int column, const Square& square) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int j = e / 2, i = e % 2;
    float* const to = grads + row_of_lane(i) * kChunkStride + column + column_of_lane(j);
    *reinterpret_cast<float2*>(to) = make_float2(square[j][2 * i], square[j][2 * i + 1]);
  }
}

// The table to which a warp adds, in shared or global memory.
struct WarpTable {
  float* table;  // [last + 1]
  int last;
  float first_row, last_row;  // of this lane's keys

  __device__ __forceinline__ WarpTable(float* table, int64_t rows)
      : table(table), last(static_cast<int>(rows) - 1), first_row(0.0f), last_row(0.0f) {}

  // Adds the gradients of `members` queries and of the keys of the lanes, `grads` [16,
  // kChunkStride] in shared memory, which are zero for other queries. `code` is that of the lane's
  // key, which counts if it is `real`; `own_offset` is the offset of query `lane` % 16.
  __device__ __forceinline__ void add(const float* grads, int code, bool real, int members,
                                      int own_offset) {
    // The rank of a key: how many keys before it have its code.
    const unsigned same = __match_any_sync(kAllLanes, code) & __ballot_sync(kAllLanes, real);
    const int rank = real ? __popc(same & ((1u << lane_id()) - 1)) : -1;
    const int rounds = max_of_warp(rank) + 1;  // one, if codes are distinct
    __syncwarp();                              // the gradients of all lanes are there
#pragma unroll 1
    for (int first = 0; first < members; first += kAtOnce) {
      float own[kAtOnce];
      int row[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; n++) {
        own[n] = real ? grads[(first + n) * kChunkStride + lane_id()] : 0.0f;
        row[n] = wrapping_sum(code, __shfl_sync(kAllLanes, own_offset, first + n));
        first_row += row[n] <= 0 ? own[n] : 0.0f;
        last_row += row[n] > 0 && row[n] >= last ? own[n] : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; n++) {
        const bool inner = row[n] > 0 && row[n] < last && first + n < members;
        for (int round = 0; round < rounds; round++) {
          if (inner && rank == round) table[row[n]] += own[n];
          __syncwarp();  // other lanes may add to the same rows next
        }
      }
    }
    __syncwarp();  // the gradients can be overwritten
  }

  // Adds the sums of the first and the last row.
  __device__ __forceinline__ void finish() {
    first_row = warp_sum(first_row), last_row = warp_sum(last_row);
    if (lane_id() == 0) {
      table[0] += first_row;
      table[last] += last_row;
    }
  }
};

// sum[i] = the sum of `tables` of shared memory, [tables, rows], by all threads of the block.
__device__ __forceinline__ void sum_tables(const float* all, int tables, int64_t rows, float* sum) {
  __syncthreads();  // the tables of all warps are there
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    float x = 0.0f;
    for (int n = 0; n < tables; n++) x += all[n * rows + i];
    sum[i] = x;
  }
}

constexpr int kPartThreads = 256;

// sums[i] = the sum over the parts of by_part[part, i]
__global__ void __launch_bounds__(kPartThreads)
    sum_parts_kernel(const float* by_part, int64_t parts, int64_t numbers, float* sums) {
  const int64_t i = blockIdx.x * int64_t{kPartThreads} + threadIdx.x;
  if (i >= numbers) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; part++) sum += by_part[part * numbers + i];
  sums[i] = sum;
}

}  // namespace
}  // namespace vidl
