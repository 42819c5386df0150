// Accesses with known costs. The comment of a line gives the units of its access by each warp, and
// the ideal; tests/test_counters.py compares both with what was counted.
#include "profile_inputs.h"

namespace {

constexpr int kThreads = 64;  // two warps

__global__ void patterns_kernel(const float* in, float* out, uint4* wide) {
  SHARED(float, tile, [64 * 33]);
  SHARED(uint4, rows, [64 * 9]);
  const unsigned lane = lane_id(), thread = threadIdx.x;
  float x = in[thread];               // 4 units, 4 suffice
  x += in[thread + 1];                // 5 units, 4 suffice
  x += in[8 * thread];                // 32 units, 4 suffice
  x += in[0];                         // 1 units, 1 suffice
  if (lane < 8) x += in[lane];        // 1 units, 1 suffice
  tile[thread] = x;                   // 1 units, 1 suffice
  tile[32 * lane + thread / 32] = x;  // 32 units, 1 suffice
  tile[33 * lane] = x;                // 1 units, 1 suffice
  tile[2 * lane] = x;                 // 2 units, 1 suffice
  __syncthreads();
  x = tile[33 * lane + 1];    // 1 units, 1 suffice
  x += tile[lane / 16 * 32];  // 2 units, 1 suffice
  rows[thread] = {};          // 4 units, 4 suffice
  rows[9 * lane] = {};        // 4 units, 4 suffice
  rows[8 * lane] = {};        // 32 units, 4 suffice
  __syncwarp();
  for (int i = 0; i < 3; i++) x += in[thread + 64 * i];  // 4 units, 4 suffice
  for (unsigned i = lane; i < 40; i += 32) out[i] = x;   // 2.5 units, 2.5 suffice
  cp_async_16(&rows[thread], wide + 2 * thread);
  cp_async_commit();
  float sums[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k16<bf16>(sums, a, b);
  cp_async_wait();
  __syncthreads();
  for (unsigned i = 0; i < 1 + thread / 32; i++) mma_m16n8k16<bf16>(sums, a, b);
  uint32_t matrices[4];
  ldmatrix<4>(matrices, &rows[9 * lane]);                               // 4 units, 4 suffice
  store_16(wide + thread, {uint32_t(sums[0]) + matrices[0], 0, 0, 0});  // 16 units, 16 suffice
}

}  // namespace

int main(int count, char** texts) {
  const Arguments given(count, texts);
  const int64_t blocks = given["grid"];
  return expect_success(launch(patterns_kernel, blocks, kThreads, 0, nullptr,
                               array<float>("in", 1024), array<float>("out", 64),
                               array<uint4>("wide", 128)));
}
