// Clips and rows of patches for the tests of kernels that read them: small, in buffers of exactly
// the right size.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "patches/interface.h"

using vidl::Clip;
using vidl::Dtype;
using vidl::Rows;

inline constexpr size_t size_of(Dtype dtype) {
  return dtype == Dtype::kUInt8 ? 1 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Numbers of a dtype.
class Tensor : public Buffer {
 public:
  Tensor(Dtype dtype, size_t n) : Buffer(n * size_of(dtype)), dtype(dtype), n(n) {}
  float operator[](size_t i) const {
    if (dtype == Dtype::kUInt8) return static_cast<const uint8_t*>(data())[i];
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data())[i];
    if (dtype == Dtype::kFloat16) return static_cast<const fp16*>(data())[i];
    return static_cast<const bf16*>(data())[i];
  }
  void set(size_t i, float x) {
    if (dtype == Dtype::kUInt8) static_cast<uint8_t*>(data())[i] = static_cast<uint8_t>(x);
    if (dtype == Dtype::kFloat32) static_cast<float*>(data())[i] = x;
    if (dtype == Dtype::kFloat16) static_cast<fp16*>(data())[i] = x;
    if (dtype == Dtype::kBFloat16) static_cast<bf16*>(data())[i] = x;
  }
  Tensor& fill(int below) {  // with integers in [0, below)
    for (size_t i = 0; i < n; i++) set(i, static_cast<float>((i * 7919 + i / 13) % below));
    return *this;
  }
  const Dtype dtype;
  const size_t n;
};

enum Layout { kPlanar, kPadded, kChannelsLast };
enum Which { kDense, kUniform, kRagged };

constexpr int kB = 3, kGridT = 2, kGridH = 2, kGridW = 2, kN = kGridT * kGridH * kGridW;

// Ids and cu_seqlens of kUniform and kRagged rows that are out of range.
constexpr int64_t kBadIds[] = {-1, kN, INT64_MIN, INT64_MAX, int64_t{1} << 40};
constexpr int32_t kBadOffsets[][kB + 1] = {{0, 9, 5, 7},
                                           {1, 5, 5, 7},
                                           {0, 5, 5, 6},
                                           {0, 5, 5, 8},
                                           {-9, INT32_MIN, INT32_MAX, 7},
                                           {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX}};

// Whether numbers [begin, end) of a tensor are NaN.
inline bool is_nan(const Tensor& x, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i++) {
    if (!std::isnan(x[i])) return false;
  }
  return begin < end;
}

// Runs `kernel`, which must write every element of `out` exactly once.
template <class F>
void watched(Tensor& out, const char* name, F kernel) {
  cuda_on_cpu::Watch watch(out.data(), out.bytes(), size_of(out.dtype), name);
  CHECK(kernel() == 0);
  watch.expect_all_written();
}

// A clip of kB samples in patches of t x h x w pixels, and the rows: which of the patches.
struct Patches {
  Patches(Layout layout, Which which, Dtype dtype, int C, int t, int h, int w)
      : clip{nullptr, dtype, 0, 0, 0, 0, 0, C, t, h, w, kGridT, kGridH, kGridW},
        numbers(C * t * h * w),
        T(kGridT * t),
        H(kGridH * h),
        W(kGridW * w),
        pitch(layout == kPadded ? W + 3 : W),
        video(dtype, size_of_video(layout)) {
    clip.data = video.fill(251).data();
    if (which == kUniform) {
      ids = {3, 0, 3, 7, 1, 2, 4, 4, 4, 6, 5, 0};  // 3 and 4 more than once
      rows.K = 4;
    } else if (which == kRagged) {
      ids = {7, 6, 0, 7, 7, 2, 1};
      rows.K = 0, rows.cu_seqlens = offsets.data();
    }
    if (which != kDense) {
      ids.shrink_to_fit();
      rows.ids = ids.data(), rows.total = static_cast<int64_t>(ids.size());
    }
  }
  Patches(const Patches&) = delete;

  int64_t sample(int64_t m) const { return rows.cu_seqlens ? (m < 5 ? 0 : 2) : m / rows.K; }
  int64_t patch(int64_t m) const { return rows.ids ? ids[m] : m % kN; }
  // Where pixel (t, y, x) of a channel of patch n lies in a clip with the strides of `of`.
  int64_t place(const Clip& of, int64_t b, int64_t n, int channel, int t, int y, int x) const {
    return b * of.stride_b + channel * of.stride_c +
           (n / (kGridH * kGridW) * clip.t + t) * of.stride_t +
           (n / kGridW % kGridH * clip.h + y) * of.stride_h +
           (n % kGridW * clip.w + x) * of.stride_w;
  }

  Clip clip;
  const int numbers, T, H, W, pitch;
  Tensor video;
  std::vector<int64_t> ids;
  std::vector<int32_t> offsets{0, 5, 5, 7};
  Rows rows{nullptr, nullptr, kB, kN, kB * kN, kN};

 private:
  size_t size_of_video(Layout layout) {
    if (layout == kChannelsLast) {
      clip.stride_c = 1, clip.stride_w = clip.C, clip.stride_h = clip.C * W;
      clip.stride_t = clip.stride_h * H, clip.stride_b = clip.stride_t * T;
    } else {
      clip.stride_w = 1, clip.stride_h = pitch, clip.stride_t = pitch * H;
      clip.stride_c = clip.stride_t * T, clip.stride_b = clip.stride_c * clip.C;
    }
    // A padded clip ends with its last pixel, within the last line.
    return static_cast<size_t>(kB * clip.stride_b - (pitch - W));
  }
};
