// Arguments and arrays of the programs profile_<op>.cpp, which launch the kernels of an op once at
// the sizes of a model. Only a few blocks of a launch run, so arrays of any size are cheap.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "cuda/primitives.h"

class Arguments {  // name=number
 public:
  Arguments(int count, char** texts) {
    for (int i = 1; i < count; i++) {
      const std::string text = texts[i];
      const size_t sign = text.find('=');
      values_[text.substr(0, sign)] = std::stoll(text.substr(sign + 1));
    }
  }
  int64_t operator[](const char* name) const {
    const auto at = values_.find(name);
    if (at != values_.end()) return at->second;
    std::fprintf(stderr, "missing argument: %s\n", name);
    std::exit(2);
  }

 private:
  std::map<std::string, int64_t> values_;
};

template <class T>
T* array(const char* name, int64_t n) {
  return static_cast<T*>(cuda_on_cpu::profile::buffer(name, size_t(n) * sizeof(T)));
}

// In [0, 1), the same in every run.
inline float draw() {
  static cuda_on_cpu::Rng rng{1};
  return float(rng() >> 40) * 0x1p-24f;
}

inline int expect_success(int error) {
  if (error != 0) std::fprintf(stderr, "error %d\n", error);
  return error != 0;
}
