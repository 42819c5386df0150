// Which keys of its group a query sees, and what is added to its logits. `Kind` is Plain, Limited
// or Biased (interface.h); what a kind does not use costs nothing. A `Call` has the groups, the
// bias, k, and the scale of the logits. For CUDA sources and for the emulator of tests/cuda_on_cpu.
//
// A logit is a product times `scale`, plus a number of the table and of the key, and to the base
// two. Codes of keys and their numbers lie in shared memory. Rows of the table are read from global
// memory through the L1 cache: neighbouring keys read neighbouring numbers.
#pragma once
#include <cfloat>

#include "groups/softmax.h"

namespace vidl {
namespace {

// How many keys query i of a group sees; without such a query none.
__device__ __forceinline__ int limit_of(const Groups& groups, const Members& queries,
                                        const Members& keys, int i) {
  if (i >= queries.count) return 0;
  if (groups.query_limits == nullptr) return keys.count;
  return within(groups.query_limits[queries.row(i)], keys.count);
}

__device__ __forceinline__ int max_of_warp(int x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

// Codes may be any numbers: sums of them wrap around.
__device__ __forceinline__ int wrapping_sum(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}

// The table of a head. Its row for a query and a key is key code + offset of the query, limited to
// [0, last].
struct Table {
  const float* rows;  // null: there is none
  int last;

  __device__ __forceinline__ Table(const Bias& bias, int h)
      : rows(bias.table == nullptr ? nullptr : bias.table + h * bias.rows),
        last(static_cast<int>(bias.rows) - 1) {}

  __device__ __forceinline__ float at(int code, int offset) const {
    if (rows == nullptr) return 0.0f;
    return __ldg(rows + within(wrapping_sum(code, offset), last));
  }
};

__device__ __forceinline__ int offset_of_code(const Bias& bias, int code) {
  return static_cast<int>(static_cast<unsigned>(bias.shift) - static_cast<unsigned>(code));
}
__device__ __forceinline__ int offset_of(const Bias& bias, int64_t query_row) {
  if (bias.table == nullptr) return 0;
  return offset_of_code(bias, bias.query_codes[query_row]);
}

// The codes of keys, and the numbers that are added to their logits.
struct KeyTerms {
  int* codes;
  float* bias;

  __device__ __forceinline__ KeyTerms(void* memory, int keys)
      : codes(static_cast<int*>(memory)), bias(reinterpret_cast<float*>(codes + keys)) {}
  static constexpr int64_t kBytes = sizeof(int) + sizeof(float);  // of a key

  // Those of keys from `start` on.
  __device__ __forceinline__ KeyTerms from(int start) const {
    KeyTerms moved = *this;
    moved.codes += start, moved.bias += start;
    return moved;
  }

  // Writes those of `count` keys, zeros beyond the group's end.
  __device__ __forceinline__ void store(const Bias& given, const Members& keys, int count,
                                        int thread, int threads) const {
    for (int j = thread; j < count; j += threads) {
      const int64_t row = j < keys.count ? keys.row(j) : 0;
      codes[j] = given.table != nullptr && j < keys.count ? given.key_codes[row] : 0;
      bias[j] = given.key_bias != nullptr && j < keys.count ? given.key_bias[row] : 0.0f;
    }
  }

  // The same for a block of keys from `start` on, in the background. Called by 2 kCount threads.
  template <int kCount, class Call>
  __device__ __forceinline__ void copy(const Call& a, const Members& keys, int start) const {
    const int j = threadIdx.x % kCount, key = start + j;
    const bool real = key < keys.count;
    const int64_t row = real ? keys.row(key) : 0;
    if (threadIdx.x < kCount) {
      const bool valid = real && a.bias.table != nullptr;
      cp_async_4(codes + j, valid ? static_cast<const void*>(a.bias.key_codes + row) : a.k.data,
                 valid);
    } else {
      const bool valid = real && a.bias.key_bias != nullptr;
      cp_async_4(bias + j, valid ? static_cast<const void*>(a.bias.key_bias + row) : a.k.data,
                 valid);
    }
  }
};

// The logits of the lane's two queries.
template <class Kind>
struct QueryLogits {
  static constexpr bool kLimited = Kind::kLimited;
  float scale;
  int count;      // of keys; Plain
  int limit[2];   // Limited and Biased
  int offset[2];  // Biased
  Table table;
  KeyTerms terms;

  // Of 16 queries from `first` on.
  template <class Call>
  __device__ __forceinline__ QueryLogits(const Call& a, int h, const Members& queries,
                                         const Members& keys, int first, KeyTerms terms)
      : scale(a.scale * kLog2E), count(keys.count), table(a.bias, h), terms(terms) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = first + row_of_lane(i);
      if (Kind::kLimited) limit[i] = limit_of(a.groups, queries, keys, query);
      if (Kind::kBiased)
        offset[i] = query < queries.count ? offset_of(a.bias, queries.row(query)) : 0;
    }
  }

  // So many keys are seen by any query of the warp.
  __device__ __forceinline__ int most() const {
    return Kind::kLimited ? max_of_warp(max(limit[0], limit[1])) : count;
  }
  // A query whose log-sum-exp is -inf sees no key: key_bias hides them.
  __device__ __forceinline__ void hide(const float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (Kind::kBiased && lse[i] == -INFINITY) limit[i] = 0;
    }
  }
  // The same for keys from `start` on, whose terms are `terms`.
  __device__ __forceinline__ QueryLogits from(int start, KeyTerms block) const {
    QueryLogits moved = *this;
    moved.count -= start;
    if (Kind::kLimited) moved.limit[0] -= start, moved.limit[1] -= start;
    moved.terms = block;
    return moved;
  }

  __device__ __forceinline__ bool sees(int i, int column) const {
    return column < (Kind::kLimited ? limit[i] : count);
  }
  __device__ __forceinline__ bool sees_none(int i) const { return Kind::kLimited && limit[i] == 0; }
  __device__ __forceinline__ float scaled(int i, int column, float x) const {
    if (!Kind::kBiased) return x * scale;
    const float added = table.at(terms.codes[column], offset[i]) + terms.bias[column];
    return x * scale + added * kLog2E;
  }
};

// The logits of the lane's two keys.
template <class Kind>
struct KeyLogits {
  float scale;
  int key[2];
  int code[2];  // Biased
  float bias[2];
  Table table;

  // Of 16 keys from `first` on.
  template <class Call>
  __device__ __forceinline__ KeyLogits(const Call& a, int h, const Members& keys, int first)
      : scale(a.scale * kLog2E), table(a.bias, h) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      key[i] = first + row_of_lane(i);
      if (!Kind::kBiased) continue;
      const int64_t row = key[i] < keys.count ? keys.row(key[i]) : -1;
      code[i] = row < 0 || a.bias.table == nullptr ? 0 : a.bias.key_codes[row];
      bias[i] = row < 0 || a.bias.key_bias == nullptr ? 0.0f : a.bias.key_bias[row];
    }
  }

  __device__ __forceinline__ float scaled(int i, int offset, float x) const {
    if (!Kind::kBiased) return x * scale;
    return x * scale + (table.at(code[i], offset) + bias[i]) * kLog2E;
  }
};

// Makes the sums of queries without keys zero: a weight of zero does not stop NaN.
template <class Kind, int D>
__device__ __forceinline__ void clear_rows(Square (&sums)[D / 16], bool first, bool second) {
  if constexpr (Kind::kLimited) {
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        if (e / 2 % 2 == 0 ? first : second) sums[n][e / 4][e % 4] = 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace vidl
