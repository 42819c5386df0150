// Tells the emulator of every access of a kernel to shared memory and to arrays of registers, so
// that it knows the thread that wrote a byte, and what is touched while a product is in flight
// (warpgroups.h). The kernels are compiled with -fsanitize=thread; tsan.h takes the place of its
// library.
#include <cstddef>

extern "C" void cuda_on_cpu_accessed(const void* p, size_t bytes, bool write);

namespace {

int host_ignores = 0;
int* ignores = &host_ignores;  // of the current fiber: scopes in which its accesses do not count

void on_access(const void* p, unsigned bytes, bool write, const void*) {
  if (*ignores != 0) return;
  int* const mine = ignores;  // what follows is compiled with these calls, too
  ++*mine;
  cuda_on_cpu_accessed(p, bytes, write);
  --*mine;
}

}  // namespace

#include "tsan.h"
