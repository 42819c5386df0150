// space_time_attention on CUDA, backward of groups of 129 to 256 queries or keys with a head size
// of 64, on GPUs with wgmma (sm_90a), without limits, biases and gradients of the scores; wide.h
// has all others.
//
// A block of two warpgroups computes one head of a group after another, with all keys and values of
// one in shared memory. A warpgroup has 128 keys, two tiles of 64, and sums their gradients in
// registers. The queries come 64 at a time, a stage, in halves of 32. For a half and a tile, a
// warpgroup multiplies keys with queries and values with gradients of the output: weights and
// gradients of logits are transposed in its registers, and are the left operands of the gradients
// of values and keys there. The gradients of the logits of a stage also go through shared memory to
// one of the warpgroups, which multiplies them with all keys. Meanwhile cp.async brings the next
// stage, and a part of the next head's keys and values.
//
// Limit: bytes, as in wide.h: for N rows in all, n in a group, 16 N H D bytes for 10 n N H D FLOPs.
// At n = 197, tensor cores and the operands of wgmma in shared memory need about as long.
#pragma once
#include <cstdlib>

#include "cuda/wgmma.h"
#include "space_time_attention/warp.h"

#ifdef VIDL_WGMMA
namespace vidl {
namespace {

constexpr int kHopperD = 64, kHopperThreads = 256;
constexpr int kHopperKeys = 256, kTileKeys = 64;  // of a block, of a tile
constexpr int kStageQueries = 64, kHalfQueries = 32;

struct Swizzled {
  static __device__ __forceinline__ int at(int row, int d) {
    return static_cast<int>(swizzled(row * kSwizzledRow + 2 * d)) / 2;
  }
};

// The shared memory of a block. Rows are swizzled.
template <class T>
struct HopperMemory {
  static constexpr int kKeys = kHopperKeys * kHopperD, kQueries = kStageQueries * kHopperD;
  static constexpr int64_t kBytes = (4 * kKeys + 5 * kQueries + kKeys) * sizeof(T) +
                                    kStageQueries * (sizeof(float2) + sizeof(float));
  T* keys;        // of two heads: keys, then values
  T* queries;     // of two stages: queries, then gradients of the output
  T* out;         // of a stage; a thread reads what it has copied
  T* grads;       // [kHopperKeys, kStageQueries]: of the logits of a stage, before the scale
  float2* known;  // [kStageQueries]: log-sum-exp to the base two, delta
  float* lse;     // [kStageQueries]; a thread reads what it has copied

  __device__ __forceinline__ explicit HopperMemory(T* memory)
      : keys(memory),
        queries(keys + 4 * kKeys),
        out(queries + 4 * kQueries),
        grads(out + kQueries),
        known(reinterpret_cast<float2*>(grads + kKeys)),
        lse(reinterpret_cast<float*>(known + kStageQueries)) {}
  __device__ __forceinline__ T* keys_of(int slot) const { return keys + slot * 2 * kKeys; }
  __device__ __forceinline__ T* queries_of(int slot) const { return queries + slot * 2 * kQueries; }
};

// A head of a group.
struct HopperTask {
  int h;
  Members queries, keys;

  __device__ __forceinline__ HopperTask(const SpaceTimeAttention& a, unsigned index)
      : h(static_cast<int>(index % static_cast<unsigned>(a.H))),
        queries(queries_of(a.groups, index / static_cast<unsigned>(a.H))),
        keys(keys_of(a.groups, index / static_cast<unsigned>(a.H))) {}
};

// Without queries there is one: the gradients of the keys are zero.
__device__ __forceinline__ int stages_of(int queries) {
  return max((queries + kStageQueries - 1) / kStageQueries, 1);
}

template <class T>
__device__ __forceinline__ void fetch_queries(const SpaceTimeAttention& a, const Backward& b,
                                              const HopperMemory<T>& memory, const HopperTask& task,
                                              int stage, int slot) {
  const int first = stage * kStageQueries, thread = thread_id();
  T* const q = memory.queries_of(slot);
  const Strided grads_of_out = {b.grad_out, a.H * kHopperD, kHopperD};
  const Strided out = {b.out, a.H * kHopperD, kHopperD};
  copy_rows<T, kHopperD, Swizzled>({q, q + memory.kQueries, memory.out}, kStageQueries,
                                   {a.q, grads_of_out, out}, task.h, task.queries, first, thread,
                                   kHopperThreads);
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const int r = thread / 8 + 32 * n;
    if (thread % 8 != 0 || first + r >= task.queries.count) continue;
    cp_async_4(memory.lse + r, b.lse + task.h * a.groups.num_queries + task.queries.row(first + r));
  }
}

template <class T>
__device__ __forceinline__ void fetch_keys(const SpaceTimeAttention& a,
                                           const HopperMemory<T>& memory, const HopperTask& task,
                                           int slot, int first, int rows) {
  T* const k = memory.keys_of(slot) + first * kHopperD;
  copy_rows<T, kHopperD, Swizzled>({k, k + memory.kKeys}, rows, {a.k, a.v}, task.h, task.keys,
                                   first, thread_id(), kHopperThreads);
}

// Starts to copy what follows a stage: the next one, and a part of the next head's keys and values.
template <class T>
__device__ __forceinline__ void fetch_next(const SpaceTimeAttention& a, const Backward& b,
                                           const HopperMemory<T>& memory, unsigned index,
                                           unsigned tasks, int stage, int keys_slot, int slot) {
  const unsigned next_index = index + gridDim.x;
  const bool has_next = next_index < tasks;
  const bool is_last = stage + 1 == stages_of(HopperTask(a, index).queries.count);
  if (!is_last || has_next) {
    const HopperTask task(a, is_last ? next_index : index);
    fetch_queries(a, b, memory, task, is_last ? 0 : stage + 1, slot);
  }
  if (has_next) {
    const int first = stage * kTileKeys;
    fetch_keys(a, memory, HopperTask(a, next_index), keys_slot, first,
               is_last ? kHopperKeys - first : kTileKeys);
  }
  cp_async_commit();
}

// Writes the log-sum-exp to the base two and delta of a stage of which the thread's copies are
// there. Eight threads have a row.
template <class T>
__device__ __forceinline__ void prepare_stage(const HopperMemory<T>& memory, const T* grad_out,
                                              int count) {
  const int thread = thread_id(), unit = thread % 8;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const int r = thread / 8 + 32 * n, at = Swizzled::at(r, 8 * unit);
    const uint4 x = *reinterpret_cast<const uint4*>(memory.out + at);
    const uint4 y = *reinterpret_cast<const uint4*>(grad_out + at);
    const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 l = unpack2<T>(left[i]), g = unpack2<T>(right[i]);
      dot += l.x * g.x + l.y * g.y;
    }
#pragma unroll
    for (int d = 1; d < 8; d *= 2) dot += __shfl_xor_sync(kAllLanes, dot, d);
    // Without a query the weights become zero.
    if (unit == 0)
      memory.known[r] = make_float2(r < count ? memory.lse[r] * kLog2E : INFINITY, dot);
  }
}

// The first of a warp's keys in the first of its tiles.
__device__ __forceinline__ int first_key(int thread) {
  return thread / 128 * 2 * kTileKeys + thread % 128 / 32 * 16;
}

// What a warpgroup has in registers. A step is a half of the queries of a stage and a tile of the
// warpgroup's keys.
template <class T>
struct HopperSums {
  static constexpr int kTiles = 2;
  float grad_k[kTiles][32], grad_v[kTiles][32];
  float weights[16], grads[16];                       // products of a step, then what they become
  uint32_t packed_weights[2][4], packed_grads[2][4];  // of a step: left operands, 16 queries each
  float4 known[4];  // of a half: log-sum-exp and delta of the lane's queries, two each

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 32; i++) grad_k[tile][i] = grad_v[tile][i] = 0.0f;
    }
  }

  // Keys times queries, values times gradients of the output. `keys` and `queries` describe the
  // tiles of the warpgroup's keys and of the stage.
  __device__ __forceinline__ void start_products(uint64_t keys, uint64_t queries, int step) {
    using Memory = HopperMemory<T>;
    keys = advance(keys, step % kTiles * kTileKeys * kSwizzledRow);
    queries = advance(queries, step / kTiles * kHalfQueries * kSwizzledRow);
    wgmma_fence(weights, grads);
#pragma unroll
    for (int d = 0; d < kHopperD / 16; d++) {
      wgmma<T, Major::kK, Major::kK>(weights, advance(keys, 32 * d), advance(queries, 32 * d),
                                     d > 0);
    }
#pragma unroll
    for (int d = 0; d < kHopperD / 16; d++) {
      wgmma<T, Major::kK, Major::kK>(grads, advance(keys, Memory::kKeys * 2 + 32 * d),
                                     advance(queries, Memory::kQueries * 2 + 32 * d), d > 0);
    }
    wgmma_commit();
  }

  // Turns the products of a step into weights and gradients of logits.
  __device__ __forceinline__ void weigh(const float2* stage, float scale, int thread, int count,
                                        int step) {
    if (step % kTiles == 0) {
      stage += step / kTiles * kHalfQueries + thread % 4 * 2;
#pragma unroll
      for (int j = 0; j < 4; j++) known[j] = *reinterpret_cast<const float4*>(stage + 8 * j);
    }
    const int key = first_key(thread) + step % kTiles * kTileKeys + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float lse[2] = {known[j].x, known[j].z}, delta[2] = {known[j].y, known[j].w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const bool is_key = key + 8 * (e / 2) < count;
        float &weight = weights[4 * j + e], &grad = grads[4 * j + e];
        weight = is_key ? exp2_approx(weight * scale - lse[e % 2]) : 0.0f;
        grad = is_key ? weight * (grad - delta[e % 2]) : 0.0f;
      }
    }
  }

  // Rounds them, and writes the gradients to `tile`.
  __device__ __forceinline__ void pack(T* tile, int thread, int step) {
    const int row = first_key(thread) + step % kTiles * kTileKeys + thread % 32 / 4;
    // Rows are eight apart: units of all have the same swizzle.
    const uint32_t start = swizzled(row * kSwizzledRow);
    char* const bytes = reinterpret_cast<char*>(tile) + thread % 4 * 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      packed_weights[i / 4][i % 4] = pack2<T>(weights[2 * i], weights[2 * i + 1]);
      packed_grads[i / 4][i % 4] = pack2<T>(grads[2 * i], grads[2 * i + 1]);
      const uint32_t unit = step / kTiles * kHalfQueries / 8 + i / 2;
      const uint32_t at = (start ^ 16 * unit) + i % 2 * 8 * kSwizzledRow;
      *reinterpret_cast<uint32_t*>(bytes + at) = packed_grads[i / 4][i % 4];
    }
  }

  // Gradients of values: weights times gradients of the output; of keys: gradients of the logits
  // times queries.
  __device__ __forceinline__ void start_sums(uint64_t queries, int step) {
    const int tile = step % kTiles;
    queries = advance(queries, step / kTiles * kHalfQueries * kSwizzledRow);
    wgmma_fence(grad_v[tile], grad_k[tile], packed_weights, packed_grads);
#pragma unroll
    for (int n = 0; n < kHalfQueries / 16; n++) {
      const uint64_t q = advance(queries, n * 16 * kSwizzledRow);
      wgmma<T, Major::kMN>(grad_v[tile], packed_weights[n],
                           advance(q, HopperMemory<T>::kQueries * 2), true);
      wgmma<T, Major::kMN>(grad_k[tile], packed_grads[n], q, true);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void finish_sums(int step) {
    const int tile = step % kTiles;
    wgmma_wait<0>(grad_v[tile], grad_k[tile], packed_weights, packed_grads);
  }
};

// All steps of a stage, kSteps of them. While the sums of one are added up, the products of the
// next become weights. ptxas wants no branch between wgmma and the wait for it, and no left operand
// written in between; else it waits after each.
template <int kSteps, class T>
__device__ __forceinline__ void add_stage(HopperSums<T>& sums, uint64_t keys, uint64_t queries,
                                          const HopperMemory<T>& memory, float scale, int count) {
  const int thread = thread_id();
  sums.start_products(keys, queries, 0);
  wgmma_wait<0>(sums.weights, sums.grads);
  sums.weigh(memory.known, scale, thread, count, 0);
  sums.pack(memory.grads, thread, 0);
#pragma unroll
  for (int step = 1; step < kSteps; step++) {
    sums.start_products(keys, queries, step);
    sums.start_sums(queries, step - 1);
    wgmma_wait<1>(sums.weights, sums.grads);
    sums.weigh(memory.known, scale, thread, count, step);
    sums.finish_sums(step - 1);
    sums.pack(memory.grads, thread, step);
  }
  sums.start_sums(queries, kSteps - 1);
  sums.finish_sums(kSteps - 1);
}

// Exchanges x of the upper lanes of pairs with y of the lower ones.
template <int kDistance>
__device__ __forceinline__ void exchange(uint32_t& x, uint32_t& y) {
  const bool is_upper = lane_id() & kDistance;
  const uint32_t other = __shfl_xor_sync(kAllLanes, is_upper ? x : y, kDistance);
  (is_upper ? x : y) = other;
}

// Stores the 16 rows of a warp's sums, times `scale`, as rows of one head of x [rows, H, kHopperD]:
// row r as row_of(r), or not at all if that is negative. The four lanes of a row exchange what they
// have, so that each has 16 bytes in a row.
template <class T, class RowOf>
__device__ __forceinline__ void store_sums(T* x, int64_t H, int h, const float (&sums)[32],
                                           float scale, RowOf row_of) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t row = row_of(row_of_lane(i));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t u[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const int at = 4 * (4 * half + n) + 2 * i;
        u[n] = pack2<T>(sums[at] * scale, sums[at + 1] * scale);
      }
      exchange<1>(u[0], u[1]), exchange<1>(u[2], u[3]);
      exchange<2>(u[0], u[2]), exchange<2>(u[1], u[3]);
      const int d = 8 * (4 * half + static_cast<int>(lane_id()) % 4);
      if (row >= 0) store_16(x + (row * H + h) * kHopperD + d, make_uint4(u[0], u[1], u[2], u[3]));
    }
  }
}
// The same in float32.
template <class RowOf>
__device__ __forceinline__ void store_sums(float* x, int64_t H, int h, const float (&sums)[32],
                                           float scale, RowOf row_of) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t row = row_of(row_of_lane(i));
    if (row < 0) continue;
    float* const to = x + (row * H + h) * kHopperD;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      *reinterpret_cast<float2*>(to + column_of_lane(j)) =
          make_float2(sums[4 * j + 2 * i] * scale, sums[4 * j + 2 * i + 1] * scale);
    }
  }
}

// The gradients of a stage's queries from `first` on, by a warpgroup.
template <class T>
__device__ __forceinline__ void store_query_grads(const SpaceTimeAttention& a, const Backward& b,
                                                  unsigned index, int first, uint64_t grads,
                                                  uint64_t keys) {
  float sums[32];
  wgmma_fence(sums);
#pragma unroll
  for (int n = 0; n < kHopperKeys / 16; n++) {
    const uint32_t rows = n * 16 * kSwizzledRow;
    wgmma<T, Major::kMN, Major::kMN>(sums, advance(grads, rows), advance(keys, rows), n > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(sums);
  first += threadIdx.x % 128 / 32 * 16;
  const HopperTask task(a, index);
  store_sums(static_cast<T*>(b.grad_q), a.H, task.h, sums, a.scale, [&](int r) {
    return first + r < task.queries.count ? int64_t{task.queries.row(first + r)} : -1;
  });
}

// Those of a warp's 16 keys from `first` on, or of their entries.
template <class T>
__device__ __forceinline__ void store_key_sums(const SpaceTimeAttention& a, const Backward& b,
                                               unsigned index, int first, const float (&grad_k)[32],
                                               const float (&grad_v)[32]) {
  const HopperTask task(a, index);
  if (b.entry_grad_k != nullptr) {
    const auto place = [&](int r) {
      return first + r < task.keys.count ? int64_t{task.keys.first + first + r} : -1;
    };
    store_sums(b.entry_grad_k, a.H, task.h, grad_k, a.scale, place);
    store_sums(b.entry_grad_v, a.H, task.h, grad_v, 1.0f, place);
  } else {
    const auto row = [&](int r) {
      return first + r < task.keys.count ? int64_t{task.keys.row(first + r)} : -1;
    };
    store_sums(static_cast<T*>(b.grad_k), a.H, task.h, grad_k, a.scale, row);
    store_sums(static_cast<T*>(b.grad_v), a.H, task.h, grad_v, 1.0f, row);
  }
}

template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_backward_kernel(SpaceTimeAttention a, Backward b, unsigned tasks) {
#ifdef VIDL_WGMMA_NOW
  DYNAMIC_SHARED_1024(T, dynamic);
  const HopperMemory<T> memory(dynamic);
  // The same for all lanes, also to the compiler.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const uint64_t grads = describe_tile(memory.grads);
  {
    const HopperTask first(a, blockIdx.x);
    fetch_queries(a, b, memory, first, 0, 0);
    fetch_keys(a, memory, first, 0, 0, kHopperKeys);
    cp_async_commit();
  }
  int keys_slot = 0, slot = 0;
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < tasks; index += gridDim.x, keys_slot ^= 1) {
    const HopperTask task(a, index);
    const int query_count = task.queries.count, key_count = task.keys.count;
    const uint64_t keys = describe_tile(memory.keys_of(keys_slot));
    const uint64_t own_keys = advance(keys, warpgroup * 2 * kTileKeys * kSwizzledRow);
    HopperSums<T> sums;
    sums.clear();
#pragma unroll 1
    for (int stage = 0; stage < stages_of(query_count); stage++, slot ^= 1) {
      const int first = stage * kStageQueries;
      T* const q = memory.queries_of(slot);
      const uint64_t queries = describe_tile(q);
      cp_async_wait();
      prepare_stage(memory, q + memory.kQueries, query_count - first);
      fence_proxy_async();
      __syncthreads();  // the stage is there, and nobody reads the one before any more
      fetch_next(a, b, memory, index, tasks, stage, keys_slot ^ 1, slot ^ 1);
      const float scale = a.scale * kLog2E;
      if (query_count - first > kHalfQueries) {
        add_stage<4>(sums, own_keys, queries, memory, scale, key_count);
      } else {
        add_stage<2>(sums, own_keys, queries, memory, scale, key_count);
      }
      fence_proxy_async();
      __syncthreads();  // the gradients of the logits are there
      if (warpgroup == slot) store_query_grads<T>(a, b, index, first, grads, keys);
    }
#pragma unroll
    for (int tile = 0; tile < sums.kTiles; tile++) {
      const int first = first_key(thread_id()) + tile * kTileKeys;
      store_key_sums<T>(a, b, index, first, sums.grad_k[tile], sums.grad_v[tile]);
    }
  }
#endif  // other architectures in the same binary never launch it
}

// Whether this GPU has wgmma, and the shared memory of a block. With CUDA_FORCE_PTX_JIT the driver
// compiles PTX in place of the machine code of sm_90a; PTX has no such kernel.
template <class T>
bool runs_hopper() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0 &&
         HopperMemory<T>::kBytes <= most_shared_bytes() &&
         std::getenv("CUDA_FORCE_PTX_JIT") == nullptr;
}

}  // namespace
}  // namespace vidl
#endif
