// The kernels of masked_patch_loss on small shapes, against loops in double; every output is
// watched.
#include <cmath>
#include <optional>

#include "clips.h"
#include "masked_patch_loss/interface.h"

namespace {

using vidl::Channels;
using vidl::Predictions;
using vidl::Statistics;

struct Case {
  Layout layout;
  Which which;
  Dtype video, dtype;
  int C, t, h, w;
  Statistics statistics;
  int margin;  // numbers between two rows of the prediction
};

bool near(double x, double y) { return std::abs(x - y) <= 1e-4 * (1 + std::abs(y)); }

Channels channels_of(const Case& c) {
  Channels channels{};
  for (int i = 0; i < c.C; i++) {
    const bool own = c.statistics == Statistics::kChannel;  // then both cancel
    channels.scale[i] = own || i == 0 ? 1.0f : 0.5f + 0.25f * static_cast<float>(i);
    channels.shift[i] = own ? 0.0f : static_cast<float>(i) - 0.5f;
    channels.eps[i] = 1e-6f * static_cast<float>(i + 1);
  }
  if (c.statistics == Statistics::kPatch) channels.shift[0] = 0.0f;
  return channels;
}

// The target of row m, in the order (t, h, w, C).
std::vector<double> target_of(const Case& c, const Patches& p, const Channels& channels,
                              int64_t m) {
  std::vector<double> target(p.numbers);
  for (int i = 0; i < p.numbers; i++) {
    const int channel = i % c.C, x = i / c.C % c.w, y = i / c.C / c.w % c.h,
              t = i / c.C / c.w / c.h;
    const double pixel = p.video[p.place(p.clip, p.sample(m), p.patch(m), channel, t, y, x)];
    target[i] = pixel * channels.scale[channel] + channels.shift[channel];
  }
  const int parts = c.statistics == Statistics::kChannel ? c.C : 1, n = p.numbers / parts;
  for (int part = 0; part < parts && c.statistics != Statistics::kNone; part++) {
    double mean = 0, squares = 0;
    for (int i = part; i < p.numbers; i += parts) mean += target[i] / n;
    for (int i = part; i < p.numbers; i += parts)
      squares += (target[i] - mean) * (target[i] - mean);
    const double var = squares / (n - 1), eps = channels.eps[part];
    const double deviation = parts == 1 ? std::sqrt(var + eps) : std::sqrt(var) + eps;
    for (int i = part; i < p.numbers; i += parts) target[i] = (target[i] - mean) / deviation;
  }
  return target;
}

void check(const Case& c) {
  const Patches p(c.layout, c.which, c.video, c.C, c.t, c.h, c.w);
  const Channels channels = channels_of(c);
  const int64_t total = p.rows.total, K = p.rows.K, wide = p.numbers + c.margin;
  const int parts = c.statistics == Statistics::kNone    ? 0
                    : c.statistics == Statistics::kPatch ? 1
                                                         : c.C;
  // Samples are further apart than their rows need.
  const int64_t between = (K + 1) * wide;
  const auto start = [&](int64_t m) { return K ? m / K * between + m % K * wide : m * wide; };
  Tensor prediction(c.dtype, start(total - 1) + p.numbers), out(c.dtype, total * p.numbers);
  prediction.fill(5);
  const Predictions predictions{prediction.data(), c.dtype, K ? between : 0, wide};

  Tensor losses(Dtype::kFloat32, total), moments(Dtype::kFloat32, total * parts * 2);
  auto* const moment = static_cast<float*>(moments.data());
  watched(losses, "losses", [&] {
    std::optional<cuda_on_cpu::Watch> watch;
    if (parts > 0) watch.emplace(moment, moments.bytes(), 4, "moments");
    const int error =
        vidl_masked_patch_loss_cuda(&p.clip, &p.rows, &predictions, c.statistics, &channels,
                                    static_cast<float*>(losses.data()), moment, nullptr);
    if (watch) watch->expect_all_written();
    return error;
  });
  Tensor grad(Dtype::kFloat32, total);
  grad.fill(3);
  watched(out, "out", [&] {
    return vidl_masked_patch_loss_bwd_cuda(static_cast<const float*>(grad.data()), moment, &p.clip,
                                           &p.rows, &predictions, c.statistics, &channels,
                                           out.data(), nullptr);
  });

  const double rounding = c.dtype == Dtype::kFloat32   ? 1e-4
                          : c.dtype == Dtype::kFloat16 ? 2e-3
                                                       : 1e-2;
  for (int64_t m = 0; m < total; m++) {
    const std::vector<double> target = target_of(c, p, channels, m);
    double loss = 0;
    for (int i = 0; i < p.numbers; i++) {
      const double error = prediction[start(m) + i] - target[i];
      loss += error * error / p.numbers;
      const double wanted = 2 * error * grad[m] / p.numbers;
      CHECK(std::abs(out[m * p.numbers + i] - wanted) <=
            rounding * (1.0 / p.numbers + std::abs(wanted)));
    }
    CHECK(near(losses[m], loss));
  }
}

// Ids and offsets out of range give NaN, and nothing out of range is read: AddressSanitizer sees
// it.
void check_bad_indices(Statistics statistics) {
  const Case c{kPlanar, kUniform, Dtype::kUInt8, Dtype::kFloat32, 3, 1, 4, 4, statistics, 0};
  Patches p(c.layout, c.which, c.video, c.C, c.t, c.h, c.w);
  Patches ragged(c.layout, kRagged, c.video, c.C, c.t, c.h, c.w);
  const Channels channels = channels_of(c);
  const int64_t total = p.rows.total, K = p.rows.K;
  Tensor prediction(c.dtype, total * p.numbers), out(c.dtype, total * p.numbers);
  Tensor losses(Dtype::kFloat32, total), moments(Dtype::kFloat32, total * c.C * 2);
  Tensor grad(Dtype::kFloat32, total);
  grad.fill(3);
  const auto run = [&](const Patches& p) {
    const Predictions predictions{prediction.data(), c.dtype, K * p.numbers, p.numbers};
    auto* const moment = static_cast<float*>(moments.data());
    vidl_masked_patch_loss_cuda(&p.clip, &p.rows, &predictions, statistics, &channels,
                                static_cast<float*>(losses.data()), moment, nullptr);
    vidl_masked_patch_loss_bwd_cuda(static_cast<const float*>(grad.data()), moment, &p.clip,
                                    &p.rows, &predictions, statistics, &channels, out.data(),
                                    nullptr);
  };
  const std::vector<int64_t> ids = p.ids;
  for (const int64_t x : kBadIds) {
    p.ids = ids, p.ids[2] = p.ids[11] = x;
    run(p);
    for (int64_t m = 0; m < total; m++) {
      const bool bad = m == 2 || m == 11;
      CHECK(std::isnan(losses[m]) == bad);
      CHECK(is_nan(out, m * p.numbers, (m + 1) * p.numbers) == bad);
    }
  }
  for (const auto& offsets : kBadOffsets) {
    ragged.offsets.assign(offsets, offsets + kB + 1);
    run(ragged);
    CHECK(std::isnan(losses[0]) && is_nan(out, 0, p.numbers));
  }
  p.rows.N = 0;  // a clip without patches
  run(p);
  CHECK(is_nan(losses, 0, total) && is_nan(out, 0, out.n));
}

}  // namespace

int main() {
  using enum Dtype;
  using enum Statistics;
  const Case cases[] = {
      {kPlanar, kUniform, kUInt8, kBFloat16, 3, 1, 16, 16, kPatch, 0},  // 16 bytes at a time
      {kPlanar, kRagged, kUInt8, kFloat16, 3, 2, 2, 16, kChannel, 0},
      {kChannelsLast, kUniform, kUInt8, kFloat32, 3, 2, 3, 16, kChannel, 4},
      {kPadded, kDense, kUInt8, kBFloat16, 3, 1, 14, 14, kPatch,
       0},  // every other row 4 bytes at a time
      {kPlanar, kUniform, kUInt8, kBFloat16, 3, 1, 14, 14, kPatch, 0},  // 2 bytes of the clip
      {kChannelsLast, kRagged, kUInt8, kFloat16, 3, 1, 5, 7, kNone, 1},
      {kPlanar, kUniform, kFloat32, kFloat32, 3, 2, 4, 4, kPatch, 3},
      {kPlanar, kRagged, kBFloat16, kBFloat16, 3, 1, 8, 8, kChannel, 0},
      {kChannelsLast, kDense, kFloat16, kFloat16, 3, 1, 8, 8, kPatch, 8},
      {kPadded, kRagged, kFloat32, kBFloat16, 1, 1, 3, 7, kChannel, 0},
      {kPadded, kUniform, kFloat32, kBFloat16, 3, 1, 3, 7, kChannel, 0},
      {kPlanar, kUniform, kUInt8, kFloat32, 5, 1, 4, 4, kPatch, 0},
      {kChannelsLast, kUniform, kFloat16, kFloat32, 4, 2, 2, 3, kChannel, 1},
      {kPlanar, kUniform, kFloat32, kFloat32, 3, 1, 64, 32, kPatch, 0},  // one warp per block
  };
  count_seeds(2, [&] {
    for (const Case& c : cases) check(c);
    return true;
  });
  for (const Statistics statistics : {kNone, kPatch, kChannel}) check_bad_indices(statistics);
  return report("masked_patch_loss");
}
