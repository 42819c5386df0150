// Clips and their rows of patches for the programs profile_<op>.cpp: [B, 3, T, 224, 224] by frames,
// in patches of `tubelet` x `side` x `side` pixels, of which `kept` of every slice are rows.
// Arguments: B, T, tubelet, side, kept.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "patches/interface.h"
#include "profile_inputs.h"

struct Clips {
  static constexpr int64_t kSide = 224, kChannels = 3;
  int64_t B, T, tubelet, side, kept, grid, P, slices, N, K, total, numbers, pixels;

  explicit Clips(const Arguments& given)
      : B(given["B"]),
        T(given["T"]),
        tubelet(given["tubelet"]),
        side(given["side"]),
        kept(given["kept"]),
        grid(kSide / side),
        P(grid * grid),
        slices(T / tubelet),
        N(slices * P),
        K(slices * kept),
        total(B * K),
        numbers(kChannels * tubelet * side * side),
        pixels(B * T * kChannels * kSide * kSide) {}

  // Clips of one frame per tubelet are stored [B, T, C, H, W], others [B, C, T, H, W].
  vidl::Clip clip(const void* video, vidl::Dtype dtype) const {
    const int64_t plane = kSide * kSide;
    const bool by_frame = tubelet == 1;
    return {video,
            dtype,
            kChannels * T * plane,
            by_frame ? plane : T * plane,
            by_frame ? kChannels * plane : plane,
            kSide,
            1,
            int32_t(kChannels),
            int32_t(tubelet),
            int32_t(side),
            int32_t(side),
            int32_t(slices),
            int32_t(grid),
            int32_t(grid)};
  }

  // Ascending ids, drawn without replacement; null if all patches are kept.
  vidl::Rows rows() const {
    auto* const ids = array<int64_t>("ids", total);
    std::vector<int64_t> order(P);
    for (int64_t s = 0; s < B * slices; s++) {
      std::iota(order.begin(), order.end(), 0);
      for (int64_t k = 0; k < kept; k++) {
        std::swap(order[k], order[k + int64_t(draw() * float(P - k))]);
        ids[s * kept + k] = s % slices * P + order[k];
      }
      std::sort(ids + s * kept, ids + (s + 1) * kept);
    }
    return {kept == P ? nullptr : ids, nullptr, B, K, total, N};
  }
};
