// The kernels of masked_patch_embed on small shapes, against loops; every output is watched. All
// numbers are small integers or eighths of a power of two, so that results are equal to the bit.
#include "check.h"
#include "masked_patch_embed.h"

namespace {

using vidl::Affine;
using vidl::Clip;
using vidl::Dtype;
using vidl::Position;
using vidl::Rows;

constexpr size_t size_of(Dtype dtype) {
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

struct Case {
  Layout layout;
  Which which;
  Dtype video, dtype;
  int t, h, w;
  int64_t D;
};

constexpr int kB = 3, kC = 3, kGridT = 2, kGridH = 2, kGridW = 2, kN = kGridT * kGridH * kGridW;

// Runs `kernel`, which must write every element of `out`, and once.
template <class F>
void watched(Tensor& out, const char* name, F kernel) {
  cuda_on_cpu::Watch watch(out.data(), out.bytes(), size_of(out.dtype), name);
  CHECK(kernel() == 0);
  watch.expect_all_written();
}

void check(const Case& c) {
  const int T = kGridT * c.t, H = kGridH * c.h, W = kGridW * c.w;
  const int kdim = kC * c.t * c.h * c.w;
  const int pitch = c.layout == kPadded ? W + 3 : W;

  Clip clip{nullptr, c.video, 0, 0, 0, 0, 0, kC, c.t, c.h, c.w, kGridT, kGridH, kGridW};
  if (c.layout == kChannelsLast) {
    clip.stride_c = 1, clip.stride_w = kC, clip.stride_h = kC * W, clip.stride_t = kC * W * H;
    clip.stride_b = clip.stride_t * T;
  } else {
    clip.stride_w = 1, clip.stride_h = pitch, clip.stride_t = pitch * H;
    clip.stride_c = clip.stride_t * T, clip.stride_b = clip.stride_c * kC;
  }
  // A padded clip ends with its last pixel, within the last line.
  Tensor video(c.video, size_t(kB) * clip.stride_b - (pitch - W));
  clip.data = video.fill(251).data();

  std::vector<int64_t> ids;
  const std::vector<int32_t> offsets{0, 5, 5, 7};
  Rows rows{nullptr, nullptr, kB, kN, kB * kN, kN};
  if (c.which == kUniform) {
    ids = {3, 0, 3, 7, 1, 2, 4, 4, 4, 6, 5, 0};  // 3 and 4 more than once
    rows.K = 4;
  } else if (c.which == kRagged) {
    ids = {7, 6, 0, 7, 7, 2, 1};
    rows.K = 0, rows.cu_seqlens = offsets.data();
  }
  if (c.which != kDense) {
    ids.shrink_to_fit();
    rows.ids = ids.data(), rows.M = static_cast<int64_t>(ids.size());
  }
  const auto sample = [&](int64_t m) {
    if (c.which != kRagged) return m / rows.K;
    return int64_t{m < 5 ? 0 : 2};
  };
  const auto patch = [&](int64_t m) { return rows.ids ? ids[m] : m % kN; };
  // Where pixel k of a patch lies in a clip with these strides.
  const auto place = [&](const Clip& s, int64_t b, int64_t n, int k) {
    const int x = k % c.w, y = k / c.w % c.h, t = k / c.w / c.h % c.t,
              channel = k / c.w / c.h / c.t;
    return b * s.stride_b + channel * s.stride_c + (n / (kGridH * kGridW) * c.t + t) * s.stride_t +
           (n / kGridW % kGridH * c.h + y) * s.stride_h + (n % kGridW * c.w + x) * s.stride_w;
  };

  Affine affine{};
  for (int i = 0; i < kC; i++) {
    affine.scale[i] = c.video == Dtype::kUInt8 ? 1.0f / 128 : 1.0f;
    affine.centre[i] = c.video == Dtype::kUInt8 ? static_cast<float>(100 + i) : 0.0f;
    affine.shift[i] = static_cast<float>(i) * affine.scale[i];
  }
  Tensor bias(Dtype::kFloat32, c.D), space(c.dtype, kN / 2 * c.D), time(Dtype::kFloat32, 2 * c.D);
  bias.fill(11), space.fill(13), time.fill(7);
  const Position position{static_cast<const float*>(bias.data()),
                          space.data(),
                          time.data(),
                          space.dtype,
                          time.dtype,
                          kN / 2,
                          c.D};
  Tensor patches(c.dtype, rows.M * kdim), out(c.dtype, rows.M * c.D);
  {
    cuda_on_cpu::Watch watch(out.data(), out.bytes(), size_of(c.dtype), "out");
    watched(patches, "patches", [&] {
      return vidl_pack_patches_cuda(&clip, &rows, &affine, &position, patches.data(), out.data(),
                                    c.dtype, nullptr);
    });
    watch.expect_all_written();
  }
  for (int64_t m = 0; m < rows.M; m++) {
    for (int k = 0; k < kdim; k++) {
      const int channel = k / (kdim / kC);
      const float pixel = video[place(clip, sample(m), patch(m), k)];
      const float scaled = (pixel - affine.centre[channel]) * affine.scale[channel];
      CHECK(patches[m * kdim + k] == scaled + affine.shift[channel]);
    }
    for (int64_t d = 0; d < c.D; d++) {
      const float sum =
          bias[d] + space[patch(m) % (kN / 2) * c.D + d] + time[patch(m) / (kN / 2) * c.D + d];
      CHECK(out[m * c.D + d] == sum);
    }
  }

  Tensor grad_out(c.dtype, rows.M * c.D), grad_position(Dtype::kFloat32, kN * c.D);
  grad_out.fill(17);
  watched(grad_position, "grad_position", [&] {
    return vidl_position_grad_cuda(grad_out.data(), c.dtype, &rows,
                                   static_cast<float*>(grad_position.data()), c.D, nullptr);
  });
  for (int64_t n = 0; n < kN; n++) {
    for (int64_t d = 0; d < c.D; d++) {
      float sum = 0;
      for (int64_t m = 0; m < rows.M; m++) sum += patch(m) == n ? grad_out[m * c.D + d] : 0;
      CHECK(grad_position[n * c.D + d] == sum);
    }
  }

  if (c.video == Dtype::kUInt8) return;
  Clip dense = clip;
  dense.stride_w = 1, dense.stride_h = W, dense.stride_t = W * H, dense.stride_c = W * H * T;
  dense.stride_b = dense.stride_c * kC;
  Tensor grad_video(c.video, kB * dense.stride_b);
  patches.fill(19);
  watched(grad_video, "grad_video", [&] {
    return vidl_unpack_patches_cuda(patches.data(), c.dtype, &dense, &rows, grad_video.data(),
                                    nullptr);
  });
  for (int64_t b = 0; b < kB; b++) {
    for (int64_t n = 0; n < kN; n++) {
      for (int k = 0; k < kdim; k++) {
        float sum = 0;
        for (int64_t m = 0; m < rows.M; m++) {
          if (sample(m) == b && patch(m) == n) sum += patches[m * kdim + k];
        }
        CHECK(grad_video[place(dense, b, n, k)] == sum);
      }
    }
  }
}

void check_fold(Dtype dtype) {
  constexpr int kRows = 5, kColumns = kC * 100;
  Tensor weight(dtype, kRows * kColumns), bias(Dtype::kFloat32, kRows);
  Tensor folded(dtype, weight.n), folded_bias(Dtype::kFloat32, kRows);
  weight.fill(31), bias.fill(5);
  Affine affine{};
  for (int i = 0; i < kC; i++) affine.scale[i] = 0.5f, affine.shift[i] = static_cast<float>(i - 1);
  for (const bool has_bias : {true, false}) {
    cuda_on_cpu::Watch watch(folded.data(), folded.bytes(), size_of(dtype), "weight");
    watched(folded_bias, "bias", [&] {
      return vidl_fold_cuda(weight.data(), dtype,
                            has_bias ? static_cast<const float*>(bias.data()) : nullptr,
                            folded.data(), static_cast<float*>(folded_bias.data()), kRows, kColumns,
                            kC, &affine, nullptr);
    });
    watch.expect_all_written();
    for (int d = 0; d < kRows; d++) {
      float sum = has_bias ? bias[d] : 0;
      for (int k = 0; k < kColumns; k++) {
        CHECK(folded[d * kColumns + k] == weight[d * kColumns + k] * 0.5f);
        sum += folded[d * kColumns + k] * affine.shift[k / 100];
      }
      CHECK(folded_bias[d] == sum);
    }
  }
}

[[maybe_unused]] void check_bad_indices() {
  Tensor video(Dtype::kUInt8, kB * 48 * kN), patches(Dtype::kFloat32, 2 * 48);
  const Clip clip{video.data(), Dtype::kUInt8, 48 * kN, 16 * kN, 32, 8, 1, kC, 1, 4, 4, 2, 2, 2};
  const Affine affine{};
  const Position none{};
  const auto pack = [&](std::vector<int64_t> ids, std::vector<int32_t> offsets) {
    const Rows rows{ids.data(), offsets.empty() ? nullptr : offsets.data(), kB, 2, 2, kN};
    vidl_pack_patches_cuda(&clip, &rows, &affine, &none, patches.data(), nullptr, Dtype::kFloat32,
                           nullptr);
  };
  CHECK(raises("assertion failed", [&] { pack({0, kN}, {}); }));
  CHECK(raises("assertion failed", [&] { pack({-1, 0}, {}); }));
  CHECK(raises("assertion failed", [&] { pack({0, 1}, {0, 1, 1, 1}); }));
  CHECK(raises("assertion failed", [&] { pack({0, 1}, {1, 2, 2, 2}); }));
}

}  // namespace

int main() {
  using enum Dtype;
  const Case cases[] = {
      {kPlanar, kUniform, kUInt8, kBFloat16, 1, 16, 16, 40},  // 16 bytes at a time
      {kPlanar, kRagged, kUInt8, kFloat32, 2, 2, 16, 300},
      {kPadded, kDense, kUInt8, kFloat16, 2, 3, 5, 8},
      {kChannelsLast, kRagged, kUInt8, kBFloat16, 1, 4, 4, 33},
      {kPlanar, kUniform, kFloat32, kFloat32, 2, 4, 4, 16},
      {kPlanar, kRagged, kBFloat16, kBFloat16, 1, 8, 8, 16},
      {kPlanar, kDense, kFloat16, kFloat16, 1, 8, 8, 1},
      {kPadded, kUniform, kFloat32, kBFloat16, 1, 3, 7, 9},
      {kChannelsLast, kRagged, kFloat16, kFloat32, 2, 2, 3, 5},
  };
  count_seeds(3, [&] {
    for (const Case& c : cases) check(c);
    for (const Dtype dtype : {kFloat32, kFloat16, kBFloat16}) check_fold(dtype);
    return true;
  });
#ifndef __SANITIZE_THREAD__  // to which the threads of an abandoned launch never end
  check_bad_indices();
#endif
  return report("masked_patch_embed");
}
