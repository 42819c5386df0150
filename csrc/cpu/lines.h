// Lines of numbers on the CPU, in any dtype: convert, scale, add. Every function is compiled for
// three levels of x86-64 and chosen at run time. Arithmetic is in float32.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "dtype.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VIDL_EVERY_LEVEL \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), unused))
#else
#define VIDL_EVERY_LEVEL __attribute__((unused))
#endif
// Clones do not reach into what they call, unless it is inlined.
#define VIDL_INLINE __attribute__((always_inline)) inline

namespace vidl {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t itemsize(Dtype dtype) {
  return dtype == Dtype::kUInt8 ? 1 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Whether this CPU has instructions for bf16 matmuls, which torch then uses. VIDL_CPU_BF16=0 or 1
// overrides the answer.
[[maybe_unused]] bool cpu_multiplies_bf16() {
  static const bool answer = [] {
    if (const char* forced = std::getenv("VIDL_CPU_BF16")) return forced[0] == '1';
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return false;
#endif
  }();
  return answer;
}

// Runs `statement` with `type` standing for the C++ type of a floating `dtype`.
#define VIDL_FLOATING(dtype, type, statement) \
  switch (dtype) {                            \
    case Dtype::kFloat32: {                   \
      using type = float;                     \
      statement;                              \
      break;                                  \
    }                                         \
    case Dtype::kFloat16: {                   \
      using type = Half;                      \
      statement;                              \
      break;                                  \
    }                                         \
    default: {                                \
      using type = BFloat16;                  \
      statement;                              \
    }                                         \
  }

// The same, also for uint8.
#define VIDL_ANY(dtype, type, statement)  \
  if (dtype == Dtype::kUInt8) {           \
    using type = uint8_t;                 \
    statement;                            \
  } else {                                \
    VIDL_FLOATING(dtype, type, statement) \
  }

template <class S, class T, int kStride, int kWidth>
VIDL_INLINE void pack_lines(const S* from, int64_t stride_h, int64_t stride_w, int64_t h, int64_t w,
                            float centre, float scale, float shift, T* to) {
  const int64_t step = kStride ? kStride : stride_w, width = kWidth ? kWidth : w;
  for (int64_t y = 0; y < h; y++) {
    const S* line = from + y * stride_h;
    for (int64_t x = 0; x < width; x++) {
      to[y * width + x] =
          static_cast<T>((static_cast<float>(line[x * step]) - centre) * scale + shift);
    }
  }
}

template <class S, class T>
VIDL_INLINE void pack_any(const S* from, int64_t stride_h, int64_t stride_w, int64_t h, int64_t w,
                          float centre, float scale, float shift, T* to) {
  if (stride_w == 1 && w == 16) {
    pack_lines<S, T, 1, 16>(from, stride_h, stride_w, h, w, centre, scale, shift, to);
  } else if (stride_w == 1) {
    pack_lines<S, T, 1, 0>(from, stride_h, stride_w, h, w, centre, scale, shift, to);
  } else if (stride_w == 3) {  // channels last
    pack_lines<S, T, 3, 0>(from, stride_h, stride_w, h, w, centre, scale, shift, to);
  } else {
    pack_lines<S, T, 0, 0>(from, stride_h, stride_w, h, w, centre, scale, shift, to);
  }
}

// to[at + y * w + x] = (from[start + y * stride_h + x * stride_w] - centre) * scale + shift;
// `to_dtype` is float32 or bfloat16, the dtypes of matmuls on the CPU.
VIDL_EVERY_LEVEL void pack_plane(const void* from, Dtype from_dtype, int64_t start,
                                 int64_t stride_h, int64_t stride_w, int64_t h, int64_t w,
                                 float centre, float scale, float shift, void* to, Dtype to_dtype,
                                 int64_t at) {
  if (to_dtype == Dtype::kFloat32) {
    VIDL_ANY(from_dtype, S,
             (pack_any(static_cast<const S*>(from) + start, stride_h, stride_w, h, w, centre, scale,
                       shift, static_cast<float*>(to) + at)))
  } else {
    VIDL_ANY(from_dtype, S,
             (pack_any(static_cast<const S*>(from) + start, stride_h, stride_w, h, w, centre, scale,
                       shift, static_cast<BFloat16*>(to) + at)))
  }
}

template <class S, class T>
VIDL_INLINE float fold_any(const S* from, T* to, int64_t count, float scale) {
  constexpr int kLanes = 16;  // separate sums, so that the loop is vectorised
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; lane++) {
      to[i + lane] = static_cast<T>(static_cast<float>(from[i + lane]) * scale);
      sums[lane] += static_cast<float>(to[i + lane]);
    }
  }
  float sum = 0.0f;
  for (; i < count; i++) {
    to[i] = static_cast<T>(static_cast<float>(from[i]) * scale);
    sum += static_cast<float>(to[i]);
  }
  for (float lane : sums) sum += lane;
  return sum;
}

// to[i] = from[i] * scale for `count` numbers from `at` on; returns the sum of the written numbers.
VIDL_EVERY_LEVEL float fold_line(const void* from, Dtype from_dtype, void* to, Dtype to_dtype,
                                 int64_t at, int64_t count, float scale) {
  float sum = 0.0f;
  VIDL_FLOATING(from_dtype, S,
                VIDL_FLOATING(to_dtype, T,
                              sum = fold_any(static_cast<const S*>(from) + at,
                                             static_cast<T*>(to) + at, count, scale)))
  return sum;
}

// sums[i] += from[start + i]
VIDL_EVERY_LEVEL void add_line(const void* from, Dtype from_dtype, int64_t start, float* sums,
                               int64_t count) {
  VIDL_FLOATING(from_dtype, S, {
    const S* line = static_cast<const S*>(from) + start;
    for (int64_t i = 0; i < count; i++) sums[i] += static_cast<float>(line[i]);
  })
}

constexpr int64_t kSlice = 64;  // columns that sum_lines() takes at most

// sums[i] = the sum of from[starts[line] + column + i] over all lines, for up to kSlice columns.
// Blocks of lines are summed in float32 and added in float64: rounding errors grow with the terms
// of one sum.
VIDL_EVERY_LEVEL void sum_lines(const void* from, Dtype from_dtype, const int64_t* starts,
                                int64_t lines, int64_t column, float* sums, int64_t columns) {
  constexpr int64_t kBlock = 64;
  double totals[kSlice] = {};
  for (int64_t begin = 0; begin < lines; begin += kBlock) {
    const int64_t end = begin + kBlock < lines ? begin + kBlock : lines;
    float block[kSlice] = {};
    VIDL_FLOATING(from_dtype, S, {
      for (int64_t line = begin; line < end; line++) {
        const S* const row = static_cast<const S*>(from) + starts[line] + column;
        for (int64_t i = 0; i < columns; i++) block[i] += static_cast<float>(row[i]);
      }
    })
    for (int64_t i = 0; i < columns; i++) totals[i] += block[i];
  }
  for (int64_t i = 0; i < columns; i++) sums[i] = static_cast<float>(totals[i]);
}

// to[at + i] += from[start + i]
VIDL_EVERY_LEVEL void accumulate_line(const void* from, Dtype from_dtype, int64_t start, void* to,
                                      Dtype to_dtype, int64_t at, int64_t count){
    VIDL_FLOATING(from_dtype, S,
                  VIDL_FLOATING(to_dtype, T,
                                {
                                  const S* line = static_cast<const S*>(from) + start;
                                  T* sums = static_cast<T*>(to) + at;
                                  for (int64_t i = 0; i < count; i++) {
                                    sums[i] = static_cast<T>(static_cast<float>(sums[i]) +
                                                             static_cast<float>(line[i]));
                                  }
                                }))}

// to[at + i] = first[i] + second[start + i] + third[begin + i]; a null pointer counts as zeros.
VIDL_EVERY_LEVEL void add_three(const float* first, const void* second, Dtype second_dtype,
                                int64_t start, const void* third, Dtype third_dtype, int64_t begin,
                                void* to, Dtype to_dtype, int64_t at, int64_t count) {
  constexpr int64_t kBlock = 256;
  for (int64_t done = 0; done < count; done += kBlock) {
    const int64_t part = count - done < kBlock ? count - done : kBlock;
    float sums[kBlock];
    for (int64_t i = 0; i < part; i++) sums[i] = first == nullptr ? 0.0f : first[done + i];
    if (second != nullptr) {
      VIDL_FLOATING(second_dtype, S, {
        const S* line = static_cast<const S*>(second) + start + done;
        for (int64_t i = 0; i < part; i++) sums[i] += static_cast<float>(line[i]);
      })
    }
    if (third != nullptr) {
      VIDL_FLOATING(third_dtype, S, {
        const S* line = static_cast<const S*>(third) + begin + done;
        for (int64_t i = 0; i < part; i++) sums[i] += static_cast<float>(line[i]);
      })
    }
    VIDL_FLOATING(to_dtype, T, {
      T* line = static_cast<T*>(to) + at + done;
      for (int64_t i = 0; i < part; i++) line[i] = static_cast<T>(sums[i]);
    })
  }
}

// One number, as float32.
[[maybe_unused]] float first_of(const void* from, Dtype dtype, int64_t at) {
  float value = 0.0f;
  VIDL_ANY(dtype, S, (value = static_cast<float>(static_cast<const S*>(from)[at])))
  return value;
}

// Returns the sum of `term` over i in [0, count), in separate lanes so that the loop is vectorised,
// and in blocks: rounding errors grow with the terms of one sum.
#define VIDL_SUM_OF(count, term)                                               \
  constexpr int kLanes = 32;                                                   \
  constexpr int64_t kBlock = 128 * kLanes;                                     \
  double total = 0.0;                                                          \
  for (int64_t begin = 0; begin < (count); begin += kBlock) {                  \
    const int64_t end = begin + kBlock < (count) ? begin + kBlock : (count);   \
    float sums[kLanes] = {};                                                   \
    int64_t done = begin;                                                      \
    for (; done + kLanes <= end; done += kLanes) {                             \
      for (int lane = 0; lane < kLanes; lane++) {                              \
        const int64_t i = done + lane;                                         \
        sums[lane] += (term);                                                  \
      }                                                                        \
    }                                                                          \
    for (int64_t i = done; i < end; i++) sums[0] += (term);                    \
    for (int half = kLanes / 2; half > 0; half /= 2) {                         \
      for (int lane = 0; lane < half; lane++) sums[lane] += sums[lane + half]; \
    }                                                                          \
    total += sums[0];                                                          \
  }                                                                            \
  return static_cast<float>(total);

VIDL_EVERY_LEVEL float sum_line(const float* x, int64_t count){VIDL_SUM_OF(count, x[i])}

// Sum of (x - centre)^2.
VIDL_EVERY_LEVEL float sum_squares(const float* x, float centre, int64_t count) {
  VIDL_SUM_OF(count, (x[i] - centre) * (x[i] - centre))
}

template <class S>
VIDL_INLINE float squared_distance_of(const S* a, const float* b, int64_t count){
    VIDL_SUM_OF(count, (static_cast<float>(a[i]) - b[i]) * (static_cast<float>(a[i]) - b[i]))}

// Sum of (a[start + i] - b[i])^2.
VIDL_EVERY_LEVEL float squared_distance(const void* a, Dtype dtype, int64_t start, const float* b,
                                        int64_t count) {
  float sum = 0.0f;
  VIDL_FLOATING(dtype, S, sum = squared_distance_of(static_cast<const S*>(a) + start, b, count))
  return sum;
}

// to[at + i] = (a[start + i] - b[i]) * factor, both in `dtype`.
VIDL_EVERY_LEVEL void scaled_difference(const void* a, Dtype dtype, int64_t start, const float* b,
                                        float factor, void* to, int64_t at, int64_t count) {
  VIDL_FLOATING(dtype, S, {
    const S* line = static_cast<const S*>(a) + start;
    S* out = static_cast<S*>(to) + at;
    for (int64_t i = 0; i < count; i++) {
      out[i] = static_cast<S>((static_cast<float>(line[i]) - b[i]) * factor);
    }
  })
}

template <int kChannels>
VIDL_INLINE void interleave_planes(const float* planes, int64_t channels, int64_t pixels,
                                   const float* centre, const float* factor, float* to) {
  const int64_t C = kChannels ? kChannels : channels;
  for (int64_t i = 0; i < pixels; i++) {
    for (int64_t c = 0; c < C; c++) {
      to[i * C + c] = (planes[c * pixels + i] - centre[c]) * factor[c];
    }
  }
}

// to[i * channels + c] = (planes[c * pixels + i] - centre[c]) * factor[c]
VIDL_EVERY_LEVEL void interleave(const float* planes, int64_t channels, int64_t pixels,
                                 const float* centre, const float* factor, float* to) {
  if (channels == 3) {
    interleave_planes<3>(planes, channels, pixels, centre, factor, to);
  } else if (channels == 1) {
    interleave_planes<1>(planes, channels, pixels, centre, factor, to);
  } else {
    interleave_planes<0>(planes, channels, pixels, centre, factor, to);
  }
}

}  // namespace
}  // namespace vidl
