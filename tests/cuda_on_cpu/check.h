// CHECK(condition), and raises(text, function) for launches that must report a bug.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/primitives.h"

inline int failures = 0;
// Counts a failure that was printed. STOP_AT_FAILURE ends the program, too: the test of a planted
// bug needs no more.
inline void fail() {
  failures++;
  if (std::getenv("STOP_AT_FAILURE") == nullptr) return;
  std::fflush(stdout);
  std::_Exit(1);
}
#define CHECK(c) \
  ((c) ? void(0) : (std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #c), fail()))

template <class F>
bool raises(const char* text, F f) {
  try {
    f();
  } catch (const cuda_on_cpu::Error& e) {
    if (std::strstr(e.what(), text)) {
      if (std::getenv("VERBOSE")) std::printf("  %s\n", e.what());
      return true;
    }
    std::printf("another error than '%s': %s\n", text, e.what());
    return false;
  }
  std::printf("no error, expected '%s'\n", text);
  return false;
}
// Runs f with seeds 0 (in order), 1, 2, ...; returns how many times it returned true.
template <class F>
int count_seeds(int n, F f) {
  auto saved = cuda_on_cpu::options();
  int hits = 0;
  for (int s = 0; s < n; s++) {
    cuda_on_cpu::options().seed = s;
    hits += f();
  }
  cuda_on_cpu::options() = saved;
  return hits;
}
// Zeroed memory, 16-byte aligned, of exactly this size: AddressSanitizer detects every access past
// its end.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&data_, 16, bytes)) std::abort();
    std::memset(data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_;
};
inline int report(const char* name) {
  std::printf("%-16s %s\n", name, failures ? "FAILED" : "ok");
  return failures != 0;
}
