// Working memory of a CPU thread.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace vidl {
namespace {

// Memory that a thread reuses: reset() ends the use of all that was taken since the last reset().
class Scratch {
 public:
  void reset() {
    if (used_ > size_) {  // from now on one allocation holds all that was taken
      size_ = used_;
      memory_.reset(new float[size_]);
    }
    used_ = 0;
    extra_.clear();
  }
  // Never null, as null is undefined for memset even if the size is zero.
  float* take(int64_t count) {
    count = count == 0 ? 16 : (count + 15) / 16 * 16;
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

}  // namespace
}  // namespace vidl
