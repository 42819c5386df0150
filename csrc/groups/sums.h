// Sums over heads and over entries on the CPU, in ascending order.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/lines.h"
#include "groups/interface.h"
#include "torch/device.h"

namespace vidl {
namespace {

constexpr int64_t kMostParts = 64;  // of the groups, with a gradient of the bias each

// means[e] = the mean over the H heads of by_head[h, e]
[[maybe_unused]] void mean_over_heads(const float* by_head, int64_t H, int64_t E, float* means) {
  torch::stable::parallel_for(0, E, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e++) means[e] = 0.0f;
    for (int64_t h = 0; h < H; h++) {
      add_line(by_head, Dtype::kFloat32, h * E + begin, means + begin, end - begin);
    }
    for (int64_t e = begin; e < end; e++) means[e] /= static_cast<float>(H);
  });
}

// sums[i] = the sum over the parts of by_part[part, i]
[[maybe_unused]] void sum_parts(const float* by_part, int64_t parts, int64_t count, float* sums) {
  torch::stable::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
    std::fill(sums + begin, sums + end, 0.0f);
    for (int64_t part = 0; part < parts; part++) {
      add_line(by_part, Dtype::kFloat32, part * count + begin, sums + begin, end - begin);
    }
  });
}

// The gradient of every row of keys or values, [num_keys, line]: the sum over its entries.
[[maybe_unused]] void sum_entries(const Groups& groups, const float* entry_grads, int64_t line,
                                  void* grads, Dtype dtype) {
  torch::stable::parallel_for(0, groups.num_keys, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(line);
    for (int64_t row = begin; row < end; row++) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int32_t i = groups.entry_offsets[row]; i < groups.entry_offsets[row + 1]; i++) {
        add_line(entry_grads, Dtype::kFloat32, groups.entries[i] * line, sum.data(), line);
      }
      add_three(sum.data(), nullptr, Dtype::kFloat32, 0, nullptr, Dtype::kFloat32, 0, grads, dtype,
                row * line, line);
    }
  });
}

}  // namespace
}  // namespace vidl
