// Groups of packed rows: what the host code of the ops that take them checks and shares.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/lines.h"
#include "groups/interface.h"
#include "torch/device.h"

namespace vidl {
namespace {

// Memory of one thread, kept from item to item.
class Scratch {
 public:
  void reset() {
    if (used_ > size_) {  // all that the last item took comes in one piece from now on
      size_ = used_;
      memory_.reset(new float[size_]);
    }
    used_ = 0;
    extra_.clear();
  }
  float* take(int64_t count) {
    count = (count + 15) / 16 * 16;
    const int64_t begin = used_;
    used_ += count;
    if (used_ <= size_) return memory_.get() + begin;
    extra_.emplace_back(new float[count]);
    return extra_.back().get();
  }

 private:
  std::unique_ptr<float[]> memory_;
  std::vector<std::unique_ptr<float[]>> extra_;
  int64_t size_ = 0, used_ = 0;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Dtype floating_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Float  ? Dtype::kFloat32
         : x.scalar_type() == ScalarType::Half ? Dtype::kFloat16
                                               : Dtype::kBFloat16;
}

inline Strided strided(const std::string& op, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1), op, ": need ", name,
                  " [rows, H, D] with a contiguous D");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

inline const int32_t* index(const std::string& op, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.dim() == 1, op,
                  ": need ", name, " in int32, contiguous");
  return x.const_data_ptr<int32_t>();
}

inline void check_groups(const std::string& op, const char* name, const int32_t* offsets, int64_t G,
                         const int32_t* rows, int64_t members, int64_t count) {
  bool ascending = offsets[0] == 0 && offsets[G] == members;
  for (int64_t g = 0; g < G; g++) ascending = ascending && offsets[g] <= offsets[g + 1];
  STD_TORCH_CHECK(ascending, op, ": ", name, "_offsets must ascend from 0 to ", members);
  for (int64_t i = 0; rows != nullptr && i < members; i++) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < count, op, ": ", name, "_rows must lie in [0, ",
                    count, "), got ", rows[i]);
  }
}

}  // namespace
}  // namespace vidl
