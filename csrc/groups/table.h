// The gradient of a table of relative positions in CUDA kernels. For CUDA sources and for the
// emulator of tests/cuda_on_cpu.
//
// A block takes a fixed part of the blocks of 64 queries, for one head. Each of its warps has a
// table of its own. It takes its queries one after another and adds the gradients of 64 keys at
// once. Keys of one query have the same row only if they have the same code; such keys are added
// one after another. So no addition needs to be atomic, and the sums have the same bits in every
// run. Gradients of the first and the last row, which many keys have, are summed in registers. A
// second kernel adds the tables of all parts in their order.
//
// Limit: shared memory. A gradient is written to it, read back, and its row is read and written:
// about four accesses for a pair of query and key, beside the matmuls that are repeated.
#pragma once
#include "groups/blocks.h"

namespace vidl {
namespace {

constexpr int kTableWarps = kBlockThreads / 32;
constexpr int kGradStride = kBlock + 8;  // of a query's gradients: four queries in other banks

// The shared memory of a block without its tables and tiles: the terms of two blocks of keys, the
// ranks of one, and the gradients of 64 queries and keys.
constexpr int64_t kTableBytes =
    kTermsBytes + 2 * kBlock * int64_t{sizeof(int)} + kBlock * kGradStride * int64_t{sizeof(float)};

// The tables of the warps of a block: in shared memory, or each is one of the parts in global
// memory.
struct Tables {
  int* ranks;    // [2, kBlock]
  float* grads;  // [16, kGradStride], of this warp
  float* all;    // [kTableWarps, rows], in shared memory
  float* table;  // of this warp
  int rows;
  float first_row, last_row;  // of this lane's keys

  // `memory`: of kTableBytes, with the terms first. `parts`: [parts or parts * kTableWarps, H,
  // rows].
  __device__ __forceinline__ Tables(void* memory, float* parts, int64_t part, int64_t H, int h,
                                    int64_t table_rows, bool shared)
      : ranks(reinterpret_cast<int*>(static_cast<char*>(memory) + kTermsBytes)),
        rows(static_cast<int>(table_rows)),
        first_row(0.0f),
        last_row(0.0f) {
    const int warp = threadIdx.x / 32;
    float* const all_grads = reinterpret_cast<float*>(ranks + 2 * kBlock);
    grads = all_grads + 16 * warp * kGradStride;
    all = all_grads + kBlock * kGradStride;
    const int64_t own = shared ? part : part * kTableWarps + warp;
    table = shared ? all + int64_t{warp} * rows : parts + (own * H + h) * table_rows;
    for (int i = lane_id(); i < rows; i += 32) table[i] = 0.0f;
    __syncwarp();
  }

  // The rank of a key: how many keys before it in the block have its code. Two threads count. All
  // threads of the block call it.
  __device__ __forceinline__ void rank(const KeyTerms& terms) const {
    const int j = threadIdx.x % kBlock, from = threadIdx.x / kBlock * (kBlock / 2);
    int before = 0;
#pragma unroll
    for (int i = 0; i < kBlock / 2; i++) {
      before += from + i < j && terms.codes[from + i] == terms.codes[j];
    }
    ranks[threadIdx.x] = before;
    __syncthreads();  // the ranks are there
  }

  // Adds the gradients of the warp's first `members` queries and the block's first `count` keys.
  // `own_offset` is the offset of query `lane`.
  __device__ __forceinline__ void add(const KeyTerms& terms, int count, int members,
                                      int own_offset) {
    const int lane = lane_id(), last = rows - 1;
    __syncwarp();  // the gradients of all lanes are there
    int code[2], rank[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int at = 32 * c + lane;
      code[c] = terms.codes[at];
      rank[c] = at < count ? ranks[at] + ranks[kBlock + at] : -1;
    }
    const int rounds = max_of_warp(max(rank[0], rank[1])) + 1;  // one, if codes are distinct
    for (int r = 0; r < members; r++) {
      const int offset = __shfl_sync(kAllLanes, own_offset, r);
      for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          if (rank[c] != round) continue;
          const float grad = grads[r * kGradStride + 32 * c + lane];
          const int row = wrapping_sum(code[c], offset);
          if (row <= 0) {
            first_row += grad;
          } else if (row >= last) {
            last_row += grad;
          } else {
            table[row] += grad;
          }
        }
        __syncwarp();  // other lanes may add to the same rows next
      }
    }
  }

  // Completes the tables, and writes the sum of those in shared memory to a part, [rows].
  __device__ __forceinline__ void finish(float* part, bool shared) {
    first_row = warp_sum(first_row), last_row = warp_sum(last_row);
    if (lane_id() == 0) {
      table[0] += first_row;
      table[rows - 1] += last_row;
    }
    if (!shared) return;
    __syncthreads();  // the tables of all warps are there
    for (int i = threadIdx.x; i < rows; i += kBlockThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kTableWarps; w++) sum += all[int64_t{w} * rows + i];
      part[i] = sum;
    }
  }
};

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
