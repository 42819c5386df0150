// frame_difference on the CPU: one row of patches of one slice at a time. Schema and contract:
// kernels/frame_difference/op.py.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "cpu/lines.h"
#include "torch/dtype.h"

namespace vidl {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kLanes = 16;  // separate sums of a patch, so that the loop is vectorised

// Lines of pixels of two frames, split into patches.
struct Lines {
  const void *a, *b;
  int64_t height, stride_h;          // number of lines
  int64_t patches, width, stride_w;  // a patch has `width` pixels of a line
};

// integers[p] += the sum of |a - b| over the pixels of patch p. With kWidth > 0 they are
// contiguous, and kWidth is their number in a line.
template <int64_t kWidth>
VIDL_INLINE void add_bytes(const Lines& lines, int64_t* integers) {
  constexpr int64_t kMost = 1 << 23;  // differences whose sum fits into 31 bits
  const uint8_t* a = static_cast<const uint8_t*>(lines.a);
  const uint8_t* b = static_cast<const uint8_t*>(lines.b);
  const int64_t width = kWidth ? kWidth : lines.width, stride = kWidth ? 1 : lines.stride_w;
  for (int64_t y = 0; y < lines.height; y++) {
    for (int64_t p = 0; p < lines.patches; p++) {
      const int64_t start = y * lines.stride_h + p * width * stride;
      for (int64_t first = 0; first < width; first += kMost) {
        const int64_t end = first + (width - first < kMost ? width - first : kMost);
        int32_t sum = 0;
        for (int64_t x = first; x < end; x++) {
          const int64_t at = start + x * stride;
          sum += std::abs(int{a[at]} - int{b[at]});
        }
        integers[p] += sum;
      }
    }
  }
}

// The same for lines of kLanes pixels: the sums of up to kMost lines fit into 16 bits.
VIDL_INLINE void add_narrow_bytes(const Lines& lines, int64_t* integers) {
  constexpr int64_t kMost = 65535 / 255;
  for (int64_t p = 0; p < lines.patches; p++) {
    const uint8_t* a = static_cast<const uint8_t*>(lines.a) + p * kLanes;
    const uint8_t* b = static_cast<const uint8_t*>(lines.b) + p * kLanes;
    for (int64_t start = 0; start < lines.height; start += kMost) {
      const int64_t end = start + kMost < lines.height ? start + kMost : lines.height;
      uint16_t sums[kLanes] = {};
      for (int64_t y = start; y < end; y++) {
        for (int64_t lane = 0; lane < kLanes; lane++) {
          const uint8_t one = a[lane], other = b[lane];
          const uint8_t apart = one > other ? one - other : other - one;
          sums[lane] = static_cast<uint16_t>(sums[lane] + apart);
        }
        a += lines.stride_h;
        b += lines.stride_h;
      }
      for (uint16_t sum : sums) integers[p] += sum;
    }
  }
}

// totals[p] += the sum of |a - b| over the pixels of patch p. The lanes are sums in float32 of a
// block of pixels: rounding errors grow with the terms of one sum.
template <class T>
VIDL_INLINE void add_floats(const Lines& lines, double* totals) {
  constexpr int64_t kMost = 128;  // additions to a lane, approximately
  const int64_t stride = lines.stride_w;
  for (int64_t p = 0; p < lines.patches; p++) {
    float sums[kLanes] = {};
    int64_t additions = 0;
    for (int64_t y = 0; y < lines.height; y++) {
      const int64_t first = y * lines.stride_h + p * lines.width * stride;
      const T* a = static_cast<const T*>(lines.a) + first;
      const T* b = static_cast<const T*>(lines.b) + first;
      for (int64_t start = 0; start < lines.width; start += kMost * kLanes) {
        const int64_t rest = lines.width - start;
        const int64_t end = start + (rest < kMost * kLanes ? rest : kMost * kLanes);
        int64_t x = start;
        for (; x + kLanes <= end && stride == 1; x += kLanes) {
          for (int64_t lane = 0; lane < kLanes; lane++) {
            sums[lane] +=
                std::fabs(static_cast<float>(a[x + lane]) - static_cast<float>(b[x + lane]));
          }
        }
        for (; x < end; x++) {
          sums[x % kLanes] +=
              std::fabs(static_cast<float>(a[x * stride]) - static_cast<float>(b[x * stride]));
        }
        additions += (end - start) / kLanes + 1;
        if (additions < kMost) continue;
        for (float& sum : sums) {
          totals[p] += sum;
          sum = 0.0f;
        }
        additions = 0;
      }
    }
    for (float sum : sums) totals[p] += sum;
  }
}

VIDL_EVERY_LEVEL void add_lines_of_bytes(const Lines& lines, int64_t* integers) {
  if (lines.stride_w == 1 && lines.width == kLanes) {
    add_narrow_bytes(lines, integers);
  } else if (lines.stride_w == 1 && lines.width == 32) {
    add_bytes<32>(lines, integers);
  } else if (lines.stride_w == 1 && lines.width == 48) {  // sixteen pixels, channels last
    add_bytes<48>(lines, integers);
  } else {
    add_bytes<0>(lines, integers);
  }
}

VIDL_EVERY_LEVEL void add_lines_of_floats(const Lines& lines, Dtype dtype, double* totals) {
  VIDL_FLOATING(dtype, T, add_floats<T>(lines, totals))
}

struct Frames {
  const char* data;
  Dtype dtype;
  int64_t C, t, h, w, slices, rows, columns;
  int64_t stride_b, stride_c, stride_t, stride_h, stride_w;  // count elements
  float divisor;
};

// The sums of the patches of a row, in the memory of one thread.
struct Sums {
  std::vector<int64_t> integers;  // of bytes
  std::vector<double> totals;     // of floats
};

// The scores of a row of patches of slice `s`, which is not the first.
void row_of_patches(const Frames& f, const std::vector<double>& std, int64_t b, int64_t s,
                    int64_t row, Sums& sums, float* out) {
  const bool bytes = f.dtype == Dtype::kUInt8;
  std::fill(sums.integers.begin(), sums.integers.end(), 0);
  std::fill(sums.totals.begin(), sums.totals.end(), 0.0);
  std::fill(out, out + f.columns, 0.0f);
  for (int64_t c = 0; c < f.C; c++) {
    const int64_t start = b * f.stride_b + c * f.stride_c + row * f.h * f.stride_h;
    const int64_t last = start + (s * f.t + f.t - 1) * f.stride_t;
    const int64_t first = start + (s - 1) * f.t * f.stride_t;
    const int64_t size = itemsize(f.dtype);
    const Lines lines = {
        f.data + last * size, f.data + first * size, f.h, f.stride_h, f.columns, f.w, f.stride_w};
    if (!bytes) {
      add_lines_of_floats(lines, f.dtype, sums.totals.data());
      continue;
    }
    add_lines_of_bytes(lines, sums.integers.data());
    for (int64_t p = 0; p < f.columns && !std.empty(); p++) {
      out[p] += static_cast<float>(sums.integers[p]) / static_cast<float>(std[c]);
      sums.integers[p] = 0;
    }
  }
  for (int64_t p = 0; p < f.columns; p++) {
    if (bytes && std.empty()) out[p] = static_cast<float>(sums.integers[p]);
    if (!bytes) out[p] = static_cast<float>(sums.totals[p]);
    out[p] /= f.divisor;
  }
}

Tensor frame_difference(Tensor video, std::vector<int64_t> patch, std::vector<double> std) {
  STD_TORCH_CHECK(video.dim() == 5 && patch.size() == 3,
                  "frame_difference: need video [B, C, T, H, W] and a patch of three numbers");
  for (int i = 0; i < 3; i++) {
    STD_TORCH_CHECK(patch[i] > 0 && video.size(2 + i) % patch[i] == 0,
                    "frame_difference: a patch of ", patch[i], " does not divide ",
                    video.size(2 + i));
  }
  STD_TORCH_CHECK(std.empty() || static_cast<int64_t>(std.size()) == video.size(1),
                  "frame_difference: need ", video.size(1), " numbers in std");
  Frames f = {};
  f.data = static_cast<const char*>(video.data_ptr());
  f.dtype = dtype_of(video);
  const int64_t B = video.size(0);
  f.C = video.size(1);
  f.t = patch[0];
  f.h = patch[1];
  f.w = patch[2];
  f.slices = video.size(2) / f.t;
  f.rows = video.size(3) / f.h;
  f.columns = video.size(4) / f.w;
  f.stride_b = video.stride(0);
  f.stride_c = video.stride(1);
  f.stride_t = video.stride(2);
  f.stride_h = video.stride(3);
  f.stride_w = video.stride(4);
  f.divisor = static_cast<float>(f.C * f.h * f.w * (f.dtype == Dtype::kUInt8 ? 255 : 1));
  if (std.empty() && video.stride(1) == 1 && f.stride_w == f.C) {
    // Channels last and without std: the channels of a pixel count as C pixels of one channel.
    f.w *= f.C;
    f.C = f.stride_w = 1;
  }
  Tensor out = new_tensor(video, {B, f.slices * f.rows * f.columns}, ScalarType::Float);
  float* const to = static_cast<float*>(out.data_ptr());
  const int64_t work = f.C * f.h * f.w * f.columns + 1;
  parallel_for(0, B * f.slices * f.rows, 65536 / work + 1, [&](int64_t begin, int64_t end) {
    Sums sums = {std::vector<int64_t>(f.columns), std::vector<double>(f.columns)};
    for (int64_t line = begin; line < end; line++) {
      const int64_t s = line / f.rows % f.slices;
      float* const scores = to + line * f.columns;
      if (s > 0) {
        row_of_patches(f, std, line / f.rows / f.slices, s, line % f.rows, sums, scores);
      } else {
        std::fill(scores, scores + f.columns, std::numeric_limits<float>::infinity());
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace vidl

#ifndef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("frame_difference", TORCH_BOX(&vidl::frame_difference));
}
#endif
