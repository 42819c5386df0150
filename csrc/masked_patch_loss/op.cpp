// masked_patch_loss on the CPU, one masked patch at a time, and the host side of the CUDA kernels
// in cuda.cu. Schema and contract: kernels/masked_patch_loss/op.py.
//
// A patch is read into planes of channels, as differences from its first pixel: for uint8 these are
// small integers, so that mean and deviation are as exact as float32 allows, and for a patch of one
// colour they are zero. The planes are then put into the order of the prediction and compared.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/lines.h"
#include "masked_patch_loss/interface.h"
#include "patches/host.h"

namespace vidl {
namespace {

using torch::stable::parallel_for;

constexpr const char* kOp = "masked_patch_loss";
constexpr int64_t kGrain = 8;  // patches that are worth a thread

// Clip, statistics and numbers of every channel, as masked_patch_loss/interface.h explains them.
struct Targets {
  Clip clip;
  Statistics statistics;
  std::vector<float> scale, shift, eps;
  int64_t pixels, numbers;  // of a patch: in one channel, in all channels
  int64_t count;            // means and variances per patch
};

Targets targets_of(const Tensor& video, const std::vector<int64_t>& patch,
                   const std::string& statistics, const std::vector<double>& scale,
                   const std::vector<double>& shift, double eps) {
  STD_TORCH_CHECK(patch.size() == 3, kOp, ": need patch (t, h, w)");
  Targets to;
  to.clip = clip_of(kOp, video, patch[0], patch[1], patch[2]);
  const int64_t C = to.clip.C;
  STD_TORCH_CHECK(C > 0 && static_cast<int64_t>(scale.size()) == C && shift.size() == scale.size(),
                  kOp, ": need ", C, " numbers in scale and shift");
  to.statistics = statistics == "patch"     ? Statistics::kPatch
                  : statistics == "channel" ? Statistics::kChannel
                                            : Statistics::kNone;
  to.pixels = patch[0] * patch[1] * patch[2];
  to.numbers = to.pixels * C;
  to.count = to.statistics == Statistics::kNone ? 0 : to.statistics == Statistics::kPatch ? 1 : C;
  for (int64_t c = 0; c < C; c++) {
    const bool plain = to.statistics == Statistics::kNone;
    const double unit = plain ? 1.0 : scale[to.statistics == Statistics::kPatch ? 0 : c];
    const double origin = plain ? 0.0 : shift[to.statistics == Statistics::kPatch ? 0 : c];
    to.scale.push_back(static_cast<float>(scale[c] / unit));
    to.shift.push_back(static_cast<float>((shift[c] - origin) / unit));
    const bool squared = to.statistics == Statistics::kPatch;
    to.eps.push_back(static_cast<float>(eps / (squared ? unit * unit : unit)));
  }
  return to;
}

// A prediction whose rows are contiguous: x, or a copy of it.
Tensor with_rows(const Tensor& x, const Rows& rows, int64_t numbers) {
  const bool rows_fit = x.dim() == 2 ? rows.cu_seqlens && x.size(0) == rows.total
                        : x.dim() == 3
                            ? !rows.cu_seqlens && x.size(0) == rows.B && x.size(1) == rows.K
                            : false;
  STD_TORCH_CHECK(rows_fit && x.size(-1) == numbers, kOp, ": need a prediction with one row of ",
                  numbers, " numbers for every id");
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Byte, kOp, ": need a floating-point prediction");
  return x.stride(-1) == 1 || numbers == 1 ? x : contiguous_of(x);
}

Predictions predictions_of(const Tensor& x) {
  return {x.data_ptr(), dtype_of(x), x.dim() == 3 ? x.stride(0) : 0, x.stride(-2)};
}

#ifndef VIDL_EMULATED
// The pixels of a patch, [C, pixels], as differences from its first.
void read(const Targets& targets, const Place& place, float* planes) {
  const Clip& clip = targets.clip;
  const int64_t start = corner(clip, place);
  const float first = first_of(clip.data, clip.dtype, start);
  for (int64_t c = 0; c < clip.C; c++) {
    const int64_t plane = start + c * clip.stride_c;
    float centre = 0.0f, shift = targets.shift[c];
    if (targets.statistics == Statistics::kPatch) shift -= first;
    if (targets.statistics == Statistics::kChannel) {
      centre = first_of(clip.data, clip.dtype, plane);
    }
    for (int64_t t = 0; t < clip.t; t++) {
      pack_plane(clip.data, clip.dtype, plane + t * clip.stride_t, clip.stride_h, clip.stride_w,
                 clip.h, clip.w, centre, targets.scale[c], shift, planes, Dtype::kFloat32,
                 (c * clip.t + t) * clip.h * clip.w);
    }
  }
}

// Mean and 1 / deviation of every part of a patch, [count, 2].
void measure(const Targets& targets, const float* planes, float* moments) {
  const bool whole = targets.statistics == Statistics::kPatch;
  const int64_t part = whole ? targets.numbers : targets.pixels;
  for (int64_t i = 0; i < targets.count; i++) {
    const float mean = sum_line(planes + i * part, part) / static_cast<float>(part);
    const float var = sum_squares(planes + i * part, mean, part) /
                      static_cast<float>(std::max<int64_t>(part - 1, 1));
    moments[2 * i] = mean;
    moments[2 * i + 1] =
        1.0f / (whole ? std::sqrt(var + targets.eps[i]) : std::sqrt(var) + targets.eps[i]);
  }
}

// Computes the target of one patch at a time, in the memory of one thread.
class Reader {
 public:
  explicit Reader(const Targets& targets)
      : targets_(targets),
        planes_(targets.numbers),
        target_(targets.numbers),
        mean_(targets.clip.C, 0.0f),
        factor_(targets.clip.C, 1.0f) {}

  // If `measured`, `moments` are read (those of the forward); otherwise they are written.
  const float* target(const Place& place, float* moments, bool measured) {
    read(targets_, place, planes_.data());
    if (!measured) measure(targets_, planes_.data(), moments);
    for (int64_t c = 0; c < targets_.clip.C && targets_.count > 0; c++) {
      const int64_t i = targets_.count == 1 ? 0 : c;
      mean_[c] = moments[2 * i];
      factor_[c] = moments[2 * i + 1];
    }
    interleave(planes_.data(), targets_.clip.C, targets_.pixels, mean_.data(), factor_.data(),
               target_.data());
    return target_.data();
  }

 private:
  const Targets& targets_;
  std::vector<float> planes_, target_, mean_, factor_;
};

struct Cpu {
  static void check(const Targets&) {}
  static void check(const Rows& rows) { check_offsets(kOp, rows); }

  static void forward(const Targets& targets, const Rows& rows, const Predictions& p,
                      Tensor& losses, Tensor& moments) {
    float* const loss = static_cast<float*>(losses.data_ptr());
    for_targets(targets, rows, p, moments, false, [&](int64_t m, int64_t at, const float* target) {
      loss[m] = squared_distance(p.data, p.dtype, at, target, targets.numbers) /
                static_cast<float>(targets.numbers);
    });
  }

  static void backward(const Targets& targets, const Rows& rows, const Predictions& p,
                       const Tensor& grad, Tensor& moments, Tensor& out) {
    const float* const grads = static_cast<const float*>(grad.data_ptr());
    for_targets(targets, rows, p, moments, true, [&](int64_t m, int64_t at, const float* target) {
      const float factor = 2.0f * grads[m] / static_cast<float>(targets.numbers);
      scaled_difference(p.data, p.dtype, at, target, factor, out.data_ptr(), m * targets.numbers,
                        targets.numbers);
    });
  }

 private:
  // Calls f(m, start of the row in the prediction, target) for every row m.
  template <class F>
  static void for_targets(const Targets& targets, const Rows& rows, const Predictions& p,
                          Tensor& moments, bool measured, F f) {
    float* const moment = static_cast<float*>(moments.data_ptr());
    const std::vector<Place> places = locate(kOp, rows, 0, rows.total);
    parallel_for(0, rows.total, kGrain, [&](int64_t begin, int64_t end) {
      Reader reader(targets);
      for (int64_t m = begin; m < end; m++) {
        const int64_t b = rows.cu_seqlens == nullptr ? places[m].sample : 0;
        f(m, b * p.stride_b + (m - b * rows.K) * p.stride_m,
          reader.target(places[m], moment + m * targets.count * 2, measured));
      }
    });
  }
};
#endif

#if defined(VIDL_CUDA) || defined(VIDL_EMULATED)
struct Cuda {
  static void check(const Targets& targets) {
    STD_TORCH_CHECK(targets.numbers <= kMaxNumbers && targets.clip.C <= kMaxChannels, kOp,
                    ": need at most ", kMaxNumbers, " numbers in a patch and ", kMaxChannels,
                    " channels");
  }
  static void check(const Rows&) {}  // the kernels assert

  static void forward(const Targets& targets, const Rows& rows, const Predictions& p,
                      Tensor& losses, Tensor& moments) {
    const Channels channels = channels_of(targets);
    check_cuda(vidl_masked_patch_loss_cuda(&targets.clip, &rows, &p, targets.statistics, &channels,
                                           static_cast<float*>(losses.data_ptr()),
                                           static_cast<float*>(moments.data_ptr()),
                                           current_stream(losses)));
  }

  static void backward(const Targets& targets, const Rows& rows, const Predictions& p,
                       const Tensor& grad, Tensor& moments, Tensor& out) {
    const Channels channels = channels_of(targets);
    check_cuda(vidl_masked_patch_loss_bwd_cuda(static_cast<const float*>(grad.data_ptr()),
                                               static_cast<const float*>(moments.data_ptr()),
                                               &targets.clip, &rows, &p, targets.statistics,
                                               &channels, out.data_ptr(), current_stream(out)));
  }

 private:
  static Channels channels_of(const Targets& targets) {
    Channels channels = {};
    std::copy(targets.scale.begin(), targets.scale.end(), channels.scale);
    std::copy(targets.shift.begin(), targets.shift.end(), channels.shift);
    std::copy(targets.eps.begin(), targets.eps.end(), channels.eps);
    return channels;
  }
};
#endif

// The checked inputs of forward and backward. prediction, ids and cu_seqlens become contiguous, as
// far as is needed.
struct Inputs {
  Targets targets;
  Rows rows;
};

template <class Device>
Inputs inputs_of(Tensor& prediction, const Tensor& video, Tensor& ids, OptionalTensor& cu_seqlens,
                 const std::vector<int64_t>& patch, const std::string& statistics,
                 const std::vector<double>& scale, const std::vector<double>& shift, double eps) {
  Targets targets = targets_of(video, patch, statistics, scale, shift, eps);
  Device::check(targets);
  ids = contiguous_of(ids);
  cu_seqlens = packed(cu_seqlens);
  const Rows rows = rows_of(kOp, video, targets.clip, ids, cu_seqlens);
  Device::check(rows);
  prediction = with_rows(prediction, rows, targets.numbers);
  return {std::move(targets), rows};
}

template <class Device>
std::tuple<Tensor, Tensor> masked_patch_loss(Tensor prediction, Tensor video, Tensor ids,
                                             OptionalTensor cu_seqlens, std::vector<int64_t> patch,
                                             std::string statistics, std::vector<double> scale,
                                             std::vector<double> shift, double eps) {
  const DeviceScope scope(video);
  const auto [targets, rows] =
      inputs_of<Device>(prediction, video, ids, cu_seqlens, patch, statistics, scale, shift, eps);
  std::vector<int64_t> shape = {rows.total};
  if (!cu_seqlens) shape = {rows.B, rows.K};
  Tensor losses = new_tensor(prediction, shape, ScalarType::Float);
  shape.insert(shape.end(), {targets.count, 2});
  Tensor moments = new_tensor(prediction, shape, ScalarType::Float);
  Device::forward(targets, rows, predictions_of(prediction), losses, moments);
  return {losses, moments};
}

template <class Device>
Tensor masked_patch_loss_bwd(Tensor grad, Tensor moments, Tensor prediction, Tensor video,
                             Tensor ids, OptionalTensor cu_seqlens, std::vector<int64_t> patch,
                             std::string statistics, std::vector<double> scale,
                             std::vector<double> shift, double eps) {
  const DeviceScope scope(video);
  const auto [targets, rows] =
      inputs_of<Device>(prediction, video, ids, cu_seqlens, patch, statistics, scale, shift, eps);
  grad = contiguous_of(grad);
  moments = contiguous_of(moments);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.numel() == rows.total &&
                      moments.scalar_type() == ScalarType::Float &&
                      moments.numel() == rows.total * targets.count * 2,
                  "masked_patch_loss_bwd: need grad of ", rows.total,
                  " rows and the moments of the forward");
  std::vector<int64_t> shape = {rows.total, targets.numbers};
  if (!cu_seqlens) shape = {rows.B, rows.K, targets.numbers};
  Tensor out = new_tensor(prediction, shape);
  Device::backward(targets, rows, predictions_of(prediction), grad, moments, out);
  return out;
}

}  // namespace
}  // namespace vidl

#ifdef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("masked_patch_loss_emulated", TORCH_BOX(&vidl::masked_patch_loss<vidl::Cuda>));
  m.impl("masked_patch_loss_bwd_emulated", TORCH_BOX(&vidl::masked_patch_loss_bwd<vidl::Cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("masked_patch_loss", TORCH_BOX(&vidl::masked_patch_loss<vidl::Cpu>));
  m.impl("masked_patch_loss_bwd", TORCH_BOX(&vidl::masked_patch_loss_bwd<vidl::Cpu>));
}
#ifdef VIDL_CUDA
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  m.impl("masked_patch_loss", TORCH_BOX(&vidl::masked_patch_loss<vidl::Cuda>));
  m.impl("masked_patch_loss_bwd", TORCH_BOX(&vidl::masked_patch_loss_bwd<vidl::Cuda>));
}
#endif
#endif
