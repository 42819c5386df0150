// select_tokens on the CPU: ranks of scores, and sums over rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/lines.h"

namespace vidl {
namespace {

// Keys in the order of the contract, larger is better: by score, then by the lower index.
uint64_t key_of(float score, int64_t n) {
  uint32_t bits = 0;
  if (!std::isnan(score)) {
    if (score == 0.0f) score = 0.0f;  // not -0.0f
    std::memcpy(&bits, &score, sizeof(bits));
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  }
  return uint64_t{bits} << 32 | (0xffffffffu - static_cast<uint32_t>(n));
}

// Writes the K kept tokens of one sample, and the place of every token among them, or -1.
void rank(const float* scores, int64_t stride, int64_t N, int64_t K, bool by_score,
          std::vector<uint64_t>& keys, int64_t* ids, int64_t* inverse) {
  keys.resize(N);
  for (int64_t n = 0; n < N; n++) keys[n] = key_of(scores[n * stride], n);
  const auto best = [](uint64_t a, uint64_t b) { return a > b; };
  if (K > 0 && K < N) std::nth_element(keys.begin(), keys.begin() + K - 1, keys.end(), best);
  if (by_score) std::sort(keys.begin(), keys.begin() + K, best);
  std::fill(inverse, inverse + N, -1);
  for (int64_t k = 0; k < K; k++) {
    ids[k] = 0xffffffffu - static_cast<uint32_t>(keys[k]);
    inverse[ids[k]] = k;
  }
  if (by_score) return;
  int64_t k = 0;
  for (int64_t n = 0; n < N; n++) {
    if (inverse[n] < 0) continue;
    ids[k] = n;
    inverse[n] = k++;
  }
}

constexpr int kRows = 8;      // summed at a time, as a tree: fewer loads, smaller rounding errors
constexpr int kLanes = 16;    // separate sums, so that the loop is vectorised
constexpr int kBlock = 1024;  // products summed in float32, before the sum goes into a double

template <class S>
VIDL_INLINE void add_rows(const S* const* rows, const float* scales, float* sums, int64_t count) {
  const S *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const S *e = rows[4], *f = rows[5], *g = rows[6], *h = rows[7];
  for (int64_t i = 0; i < count; i++) {
    const float ab = static_cast<float>(a[i]) * scales[0] + static_cast<float>(b[i]) * scales[1];
    const float cd = static_cast<float>(c[i]) * scales[2] + static_cast<float>(d[i]) * scales[3];
    const float ef = static_cast<float>(e[i]) * scales[4] + static_cast<float>(f[i]) * scales[5];
    const float gh = static_cast<float>(g[i]) * scales[6] + static_cast<float>(h[i]) * scales[7];
    sums[i] += (ab + cd) + (ef + gh);
  }
}

// sums[i] = sum over rows r of scales[r] * data[starts[r] + i]
VIDL_EVERY_LEVEL void add_scaled_lines(const void* data, Dtype dtype, const int64_t* starts,
                                       const float* scales, int64_t lines, float* sums,
                                       int64_t count) {
  for (int64_t i = 0; i < count; i++) sums[i] = 0.0f;
  VIDL_FLOATING(dtype, S, {
    int64_t r = 0;
    for (; r + kRows <= lines; r += kRows) {
      const S* rows[kRows];
      float by[kRows];
      for (int j = 0; j < kRows; j++) {
        rows[j] = static_cast<const S*>(data) + starts[r + j];
        by[j] = scales[r + j];
      }
      add_rows(rows, by, sums, count);
    }
    for (; r < lines; r++) {
      const S* row = static_cast<const S*>(data) + starts[r];
      const float scale = scales[r];
      for (int64_t i = 0; i < count; i++) sums[i] += static_cast<float>(row[i]) * scale;
    }
  })
}

// to[at + i] = from[i] * scale
VIDL_EVERY_LEVEL void scale_to(const float* from, float scale, void* to, Dtype dtype, int64_t at,
                               int64_t count){VIDL_FLOATING(dtype, T,
                                                            {
                                                              T* line = static_cast<T*>(to) + at;
                                                              for (int64_t i = 0; i < count; i++)
                                                                line[i] =
                                                                    static_cast<T>(from[i] * scale);
                                                            })}

// to[i] = from[start + i]
VIDL_EVERY_LEVEL
    void widen(const void* from, Dtype dtype, int64_t start, float* to, int64_t count) {
  VIDL_FLOATING(dtype, S, {
    const S* line = static_cast<const S*>(from) + start;
    for (int64_t i = 0; i < count; i++) to[i] = static_cast<float>(line[i]);
  })
}

template <class S>
VIDL_INLINE double dot_block(const S* a, const float* b, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; j++) sums[j] += static_cast<float>(a[i + j]) * b[i + j];
  }
  double sum = 0.0;
  for (; i < count; i++) sum += static_cast<double>(static_cast<float>(a[i])) * b[i];
  for (float lane : sums) sum += lane;
  return sum;
}

// The sum of a[start + i] * b[i].
VIDL_EVERY_LEVEL float dot(const void* a, Dtype dtype, int64_t start, const float* b,
                           int64_t count) {
  double sum = 0.0;
  VIDL_FLOATING(dtype, S, {
    const S* line = static_cast<const S*>(a) + start;
    for (int64_t i = 0; i < count; i += kBlock) {
      sum += dot_block(line + i, b + i, std::min<int64_t>(kBlock, count - i));
    }
  })
  return static_cast<float>(sum);
}

// Rows that are worth a thread, by their bytes.
int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, 65536 / (row_bytes + 1)); }

}  // namespace
}  // namespace vidl
