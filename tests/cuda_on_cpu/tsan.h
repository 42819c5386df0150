// ThreadSanitizer's entry points, for a program whose kernels are compiled with -fsanitize=thread
// and linked without its library. The file that includes this defines before
//   void on_access(const void* p, unsigned bytes, bool write, const void* site);
//   int* ignores;  // of the current fiber: scopes in which its accesses do not count
// The return address is in the kernel.
#pragma once
#include <cstddef>
#include <cstdint>

#define SITE __builtin_return_address(0)
#define ACCESSES(n)                                                        \
  void __tsan_read##n(void* p) { on_access(p, n, false, SITE); }           \
  void __tsan_write##n(void* p) { on_access(p, n, true, SITE); }           \
  void __tsan_unaligned_read##n(void* p) { on_access(p, n, false, SITE); } \
  void __tsan_unaligned_write##n(void* p) { on_access(p, n, true, SITE); }
#define ATOMICS(T, n)                                                                             \
  T __tsan_atomic##n##_load(const volatile T* p, int) { return *p; }                              \
  void __tsan_atomic##n##_store(volatile T* p, T x, int) { *p = x; }                              \
  T __tsan_atomic##n##_fetch_add(volatile T* p, T x, int order) {                                 \
    return __atomic_fetch_add(p, x, order);                                                       \
  }                                                                                               \
  int __tsan_atomic##n##_compare_exchange_weak(volatile T* p, T* expected, T x, int, int) {       \
    return __atomic_compare_exchange_n(p, expected, x, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(uint8_t, 8)
ATOMICS(uint32_t, 32)
ATOMICS(uint64_t, 64)
void __tsan_read_range(void* p, size_t n) { on_access(p, unsigned(n), false, SITE); }
void __tsan_write_range(void* p, size_t n) { on_access(p, unsigned(n), true, SITE); }
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_acquire(void*) {}
void __tsan_release(void*) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
// A fiber is represented by the number of scopes in which its accesses do not count.
void* __tsan_create_fiber(unsigned) { return new int(0); }
void* __tsan_get_current_fiber() { return ignores; }
void __tsan_switch_to_fiber(void* fiber, unsigned) { ignores = static_cast<int*>(fiber); }
void AnnotateIgnoreReadsBegin(const char*, int) { ++*ignores; }
void AnnotateIgnoreReadsEnd(const char*, int) { --*ignores; }
void AnnotateIgnoreWritesBegin(const char*, int) {}
void AnnotateIgnoreWritesEnd(const char*, int) {}
}
