// Runs CUDA C++ kernels on the CPU for unit tests, compiled by a host compiler.
//
// Kernels include "cuda/primitives.h", which includes this file when the compiler is not nvcc:
//     nvcc -arch=sm_90 kernel.cu                      the GPU build
//     g++ -std=c++20 -pthread -x c++ kernel.cu        the emulated build
//
// How it works. A block runs on one OS thread; every CUDA thread of it is a fiber with its own
// stack. A fiber runs until it reaches a collective (barrier, shuffle, vote, ldmatrix, mma, ...),
// stores its operands and switches to another ready fiber; the last one to arrive computes the
// result for all. The next fiber depends on options().seed, so that code that relies on an order
// without synchronization gives different (wrong) results.
//
// Which bugs are detected, and how they are reported:
// - Divergent barriers, deadlocks, mismatched collectives, lanes missing from a mask: an Error that
//   names the source lines.
// - Writes past the end of a SHARED array: an Error when the block ends (canary); at once under
//   AddressSanitizer.
// - Reads of uninitialized shared memory: it starts as 0xFF bytes, which is NaN or -1.
// - Reads of cp.async data before the wait: the destination holds 0xFF until then.
// - Misaligned 16-byte accesses through cuda/primitives.h: an Error.
// - Output elements that no block writes, or two blocks: Watch.
// - Races in shared and global memory, a missing __syncwarp: -fsanitize=thread, where every CUDA
//   thread is a fiber of its own to ThreadSanitizer.
// - Products of warpgroups: operands and registers that are touched in flight, missing fences and
//   waits, warps that disagree: an Error (warpgroups.h).
// An Error is a C++ exception thrown out of launch().
//
// A profile build (profile.h) counts bank conflicts, sectors and instructions of the tensor cores.
//
// Not emulated: timing, the weak memory model, TMA, clusters, blocks that wait for one another. A
// thread that spins on memory must call __nanosleep() in the loop, or the block never makes
// progress.
#pragma once
#ifdef __CUDACC__
#error "cuda_on_cpu.h is for host compilers; include cuda/primitives.h instead"
#endif
#if !defined(__cplusplus) || __cplusplus < 202002L
#error "cuda_on_cpu.h needs C++20"
#endif

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
// PROFILE(f(...)) calls cuda_on_cpu::profile::f in a profile build.
#if defined(CUDA_ON_CPU_PROFILE)
#include "profile.h"
#define PROFILE(call) ::cuda_on_cpu::profile::call
#else
#define PROFILE(call) static_cast<void>(0)
#endif
#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT 1
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// A plain `__shared__ T x[N]` works (one copy per worker, so per running block), but is neither
// poisoned nor bounds checked, and `extern __shared__` cannot be spelled. Kernels should use SHARED
// and DYNAMIC_SHARED instead.
#define __shared__ static thread_local
#define SHARED(T, name, dims)                                                                  \
  static const char name##_tag = 0;                                                            \
  typedef T name##_type dims;                                                                  \
  [[maybe_unused]] name##_type& name = *static_cast<name##_type*>(::cuda_on_cpu::shared_array( \
      &name##_tag, sizeof(name##_type), #name, ::cuda_on_cpu::Site::current()))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::cuda_on_cpu::dynamic_shared())

#define CUDA_ON_CPU_VECTOR(T, name, align)                           \
  struct alignas(2 * align) name##2 { T x, y; };                     \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(4 * align) name##4 { T x, y, z, w; };               \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(signed char, char, 1)
CUDA_ON_CPU_VECTOR(unsigned char, uchar, 1)
CUDA_ON_CPU_VECTOR(short, short, 2)
CUDA_ON_CPU_VECTOR(unsigned short, ushort, 2)
CUDA_ON_CPU_VECTOR(int, int, 4)
CUDA_ON_CPU_VECTOR(unsigned, uint, 4)
CUDA_ON_CPU_VECTOR(float, float, 4)
#undef CUDA_ON_CPU_VECTOR
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Built-in variables. A fiber never leaves its OS thread, so plain thread_locals do; fiber switches
// set threadIdx.
inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

namespace cuda_on_cpu {

using Site = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Read from the environment; may change between launches.
struct Options {
  uint64_t seed =
      env("CUDA_ON_CPU_SEED", 1);  // 0: blocks and threads run in index order; else shuffled
  uint64_t workers = env("CUDA_ON_CPU_WORKERS", 0);  // OS threads that run blocks; 0: one per core
  uint64_t stack = env("CUDA_ON_CPU_STACK", 256 * 1024);  // bytes per fiber, mapped lazily

  static uint64_t env(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::strtoull(text, nullptr, 0) : otherwise;
  }
};
inline Options& options() {
  static Options o;
  return o;
}
// The bytes of shared memory of a block of a kernel that asked for them: 227 KB on sm_90, 163 on
// sm_80, 99 on sm_86. Read at every launch.
inline size_t max_shared() { return Options::env("CUDA_ON_CPU_MAX_SHARED", 227 * 1024); }
// What a kernel has that did not ask.
constexpr size_t kFreeShared = 48 * 1024;

struct Rng {  // splitmix64
  uint64_t state;
  uint64_t operator()() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};

inline std::string where(const Site& s) {
  const char* slash = std::strrchr(s.file_name(), '/');
  return std::string(slash ? slash + 1 : s.file_name()) + ":" + std::to_string(s.line());
}
inline bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && same(a.file_name(), b.file_name());
}

// Hides the emulator's own bookkeeping from ThreadSanitizer; the kernel's accesses stay visible to
// it.
struct TsanIgnore {
#if defined(__SANITIZE_THREAD__)
  TsanIgnore() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~TsanIgnore() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
#else
  TsanIgnore() {}
#endif
};
inline void tsan_release([[maybe_unused]] void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
}
inline void tsan_acquire([[maybe_unused]] void* p) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
}

struct Context {
  char* stack = nullptr;  // lowest address; with `size`, for AddressSanitizer
  size_t size = 0;
  void* tsan = nullptr;
#ifdef CUDA_ON_CPU_UCONTEXT
  ucontext_t u;
#else
  void* sp = nullptr;
#endif
};

#ifndef CUDA_ON_CPU_UCONTEXT
// Saves the callee-saved registers on this stack, moves to the other one and restores them from
// there.
[[maybe_unused]] __attribute__((naked, noinline, no_sanitize("thread"))) static void switch_stack(
    void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// Switches from one context to another; `last` says that `from` will never be resumed.
__attribute__((no_sanitize("thread"), noinline)) inline void switch_context(
    Context& from, Context& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, to.stack, to.size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, 1 /* no synchronisation */);
#endif
  std::atomic_signal_fence(
      std::memory_order_seq_cst);  // the compiler must not carry values of memory across
#ifdef CUDA_ON_CPU_UCONTEXT
  swapcontext(&from.u, &to.u);
#else
  switch_stack(&from.sp, to.sp);
#endif
  std::atomic_signal_fence(std::memory_order_seq_cst);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

struct PendingCopy {  // one cp.async
  void* to;
  const void* from;
  unsigned bytes, valid;  // bytes past `valid` are filled with zeros
  unsigned group;
};

struct Fiber : Context {
  uint3 index;
  unsigned warp, lane;
  // What it waits for: nullptr while it runs.
  const char* waits_for;
  Site site;
  uint32_t mask;
  void* operands;
  int result;
  // cp.async
  std::vector<PendingCopy> copies;
  unsigned groups;
};

struct Barrier {
  const char* name;
  Site site;
  unsigned arrived, waiting, expected, votes;
  uint32_t lanes[32];
};

struct Launch {
  void (*invoke)(void*);
  void* args;
  dim3 grid, block;
  size_t shared, most_shared;  // dynamic; static and dynamic that it may have
  char begun = 0, ended = 0;   // for TSan: before every block, and after every block
};

// What works beside the threads of a block: products that an instruction only starts. warpgroups.h
// is one.
struct Beside {
  virtual ~Beside() = default;
  virtual void begin() = 0;  // a block begins
  virtual void leave() = 0;  // the current thread returns from the kernel
  virtual void end() = 0;    // all threads have returned
  virtual void wrote(const void* p, size_t bytes) = 0;  // the current thread, by cp.async
};
inline std::unique_ptr<Beside> (*make_beside)() = nullptr;

struct Block;
inline constinit thread_local Block* block = nullptr;
inline constinit thread_local Fiber* self = nullptr;
[[noreturn]] void fail(const std::string& what);

struct Block {
  static constexpr size_t guard = 128;  // bytes of canary around every shared array
  // Arrays start at multiples of 1024 bytes: the low bits of an address are those of the shared
  // window, on which swizzles depend.
  static constexpr size_t align = 1024;
  static constexpr size_t arena_bytes = 512 * 1024;
  static constexpr unsigned char canary = 0xFD;
  struct Array {
    const void* tag;
    char* data;
    size_t bytes;
    const char* name;
    Site site;
  };

  Launch* launch = nullptr;
  unsigned threads = 0, live = 0;
  Context host;
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  size_t stacks_bytes = 0, stack_bytes = 0;  // of all stacks, of one
  std::exception_ptr error;
  bool abandoned = false;  // the last run left unfinished fibers behind
  // Scheduling: one bit per lane and per warp; a warp's bit in ready_slots is its priority,
  // slot_of[warp].
  uint32_t ready_slots = 0, ready[32], exists[32], exited[32], waiting[32];
  unsigned slot_of[32], warp_of[32];
  bool in_order = true, by_priority = true;
  Rng rng{0};
  Barrier barriers[16];
  // Shared memory
  char* arena;
  size_t arena_used = 0, shared_used = 0;
  std::vector<Array> arrays;
  std::unique_ptr<Beside> beside = make_beside != nullptr ? make_beside() : nullptr;

  Block() { arena = map(arena_bytes); }
  ~Block() { unmap(); }
  void unmap() {
    munmap(arena, arena_bytes);
    if (stacks) munmap(std::exchange(stacks, nullptr), std::exchange(stacks_bytes, 0));
  }
  Block(const Block&) = delete;

  static char* map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
      throw Error("cuda_on_cpu: out of memory for fiber stacks or shared memory");
    return static_cast<char*>(p);
  }

  void make_ready(unsigned warp, uint32_t lanes) {
    ready[warp] |= lanes;
    if (ready[warp]) ready_slots |= 1u << slot_of[warp];
  }
  unsigned random_bit(uint32_t bits) {
    unsigned turn = rng() & 31;
    return (std::countr_zero(std::rotr(bits, turn)) + turn) & 31;
  }
  Fiber* next() {  // takes a ready fiber out of the queue; nullptr when there is none
    if (!ready_slots) return nullptr;
    unsigned slot = by_priority ? std::countr_zero(ready_slots) : random_bit(ready_slots);
    unsigned warp = warp_of[slot];
    unsigned lane = in_order ? std::countr_zero(ready[warp]) : random_bit(ready[warp]);
    if (!(ready[warp] &= ~(1u << lane))) ready_slots &= ~(1u << slot);
    return &fibers[warp * 32 + lane];
  }
  // Runs other fibers until this one is ready again and its turn comes.
  __attribute__((always_inline)) void wait() {
    Fiber* me = self;
    Fiber* to = next();
    if (!to) fail("deadlock: no thread can continue." + who_waits());
    if (to != me) {
      resume(to);
      switch_context(*me, *to, false);
    }
  }
  void resume(Fiber* f) {
    self = f, threadIdx = f->index;
    PROFILE(run_lane(f->warp, f->lane));
  }

  std::string who_waits() const {  // groups the blocked threads by what they wait for
    std::map<std::string, std::pair<unsigned, unsigned>> groups;
    for (unsigned i = 0; i < threads; i++)
      if (fibers[i].waits_for) {
        auto& g = groups[std::string(fibers[i].waits_for) + " (" + where(fibers[i].site) + ")"];
        if (!g.first++) g.second = i;
      }
    std::string text;
    for (auto& [name, g] : groups)
      text += "\n    " + std::to_string(g.first) + " threads wait at " + name +
              ", the first is thread " + std::to_string(g.second);
    return text + "\n    " + std::to_string(threads - live) + " threads have exited";
  }

  static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!block->host.size)
      block->host.stack = (char*)bottom, block->host.size = size;  // came from run()
#endif
    Block* b = block;
    try {
      tsan_acquire(&b->launch->begun);
      b->launch->invoke(b->launch->args);
      tsan_release(&b->launch->ended);
      TsanIgnore ignore;
      b->leave();
    } catch (...) {
      b->error = std::current_exception();
    }
    Fiber *me, *to;
    {
      TsanIgnore ignore;
      me = self;
      to = b->error ? nullptr : b->next();
      if (to) b->resume(to);
    }
    switch_context(*me, to ? *static_cast<Context*>(to) : b->host, true);
    std::abort();  // a finished fiber is never resumed
  }

  void leave() {  // the current thread returns from the kernel
    Fiber& me = *self;
    if (!me.copies.empty()) fail("thread exits with cp.async copies it never waited for");
    if (beside) beside->leave();
    exited[me.warp] |= 1u << me.lane;
    live--;
    if (live && barriers[0].waiting == live && !barriers[0].expected) release(barriers[0]);
    if (live && !ready_slots) fail("deadlock: no thread can continue." + who_waits());
  }

  void start(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)  // finished and abandoned fibers leave poisoned frames behind
    size_t stale = abandoned ? f.size : std::min<size_t>(f.size, 8192);
    __asan_unpoison_memory_region(f.stack + f.size - stale, stale);
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
    getcontext(&f.u);
    f.u.uc_stack.ss_sp = f.stack, f.u.uc_stack.ss_size = f.size, f.u.uc_link = nullptr;
    makecontext(&f.u, fiber_main, 0);
#else
    size_t colour = (&f - fibers.data()) * 704 %
                    4096;  // keeps the stacks' tops out of one another's cache sets
    void** top = reinterpret_cast<void**>(f.stack + f.size - colour);
    *--top = nullptr;  // where fiber_main would return to
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int r = 0; r < 6; r++) *--top = nullptr;
    f.sp = top;
#endif
    f.waits_for = nullptr;
    f.copies.clear();
    f.groups = 0;
  }

  // Threads of TSan are expensive, so blocks share four sets of them: a race between two blocks is
  // missed only if both used the same set and the same thread index. Another seed pairs blocks
  // differently.
  void* tsan_fiber([[maybe_unused]] unsigned i) {
#if defined(__SANITIZE_THREAD__)
    static std::vector<void*> sets[4];
    static unsigned turn = 0;
    if (i == 0 && abandoned) sets[turn].clear();  // TSan believes that these threads still run
    auto& set = sets[i ? turn : turn = (turn + 1) % 4];
    if (set.size() <= i) set.push_back(__tsan_create_fiber(0));
    return set[i];
#else
    return nullptr;
#endif
  }

  void run(Launch& l, uint3 index, uint64_t seed) {
    TsanIgnore ignore;
    launch = &l;
    threads = live = l.block.x * l.block.y * l.block.z;
    constexpr size_t page = 4096;  // an inaccessible page lies below every stack
    const size_t stack = (options().stack + page - 1) / page * page;
#if defined(__SANITIZE_THREAD__)  // new memory, which TSan does not associate with the last block
    unmap();
    arena = map(arena_bytes);
#endif
    if (stacks_bytes < threads * (page + stack) || stack != stack_bytes) {
      if (stacks) munmap(stacks, stacks_bytes);
      stacks = map(stacks_bytes = threads * (page + stack));
      stack_bytes = stack;
      for (size_t i = 0; i < threads; i++) mprotect(stacks + i * (page + stack), page, PROT_NONE);
      if (fibers.size() < threads) fibers.resize(threads);
    }
    rng = {seed};
    in_order = seed == 0;
    by_priority = in_order || (rng() & 1);  // let some warps race far ahead, or mix all of them
    ready_slots = 0;
    unsigned warps = (threads + 31) / 32;
    for (unsigned w = 0; w < warps; w++) warp_of[w] = w;
    for (unsigned w = warps; !in_order && w > 1; w--) std::swap(warp_of[w - 1], warp_of[rng() % w]);
    for (unsigned w = 0; w < warps; w++) {
      slot_of[warp_of[w]] = w;
      exited[w] = waiting[w] = ready[w] = 0;
    }
    for (unsigned w = 0; w < warps; w++) {
      exists[w] = threads - w * 32 >= 32 ? ~0u : (1u << (threads - w * 32)) - 1;
      make_ready(w, exists[w]);
    }
    for (unsigned i = 0; i < threads; i++) {
      Fiber& f = fibers[i];
      f.stack = stacks + i * (page + stack) + page, f.size = stack;
      f.index = {i % l.block.x, i / l.block.x % l.block.y, i / (l.block.x * l.block.y)};
      f.warp = i / 32, f.lane = i % 32;
      f.tsan = tsan_fiber(i);
      start(f);
    }
    for (Barrier& b : barriers) b = {};
    arena_used = align, shared_used = 0;
    arrays.clear();
    std::memset(arena, canary, align);
    error = nullptr;
    add_array(nullptr, l.shared, "dynamic shared memory", Site::current());
    block = this;
    if (beside) beside->begin();
    blockIdx = index, blockDim = l.block, gridDim = l.grid;
    host.size = 0;
#if defined(__SANITIZE_THREAD__)
    host.tsan = __tsan_get_current_fiber();
#endif
    PROFILE(begin_block(arena, arena_bytes, threads));
    Fiber* first = next();
    resume(first);
    switch_context(host, *first, false);
    PROFILE(end_block(shared_used - l.shared));
    block = nullptr, self = nullptr;
    abandoned = error != nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(arena, arena_bytes);
#endif
    if (error) std::rethrow_exception(error);
    if (beside) beside->end();
    for (Array& a : arrays)
      for (size_t i = 0; i < guard; i++)
        if (a.data[i - guard] != (char)canary || a.data[a.bytes + i] != (char)canary)
          throw Error("block (" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
                      std::to_string(index.z) + "): write outside shared array '" + a.name + "' (" +
                      where(a.site) + "), " + std::to_string(a.bytes) + " bytes");
  }

  // Shared memory: [canary] array [canary] array [canary] ...
  char* add_array(const void* tag, size_t bytes, const char* name, Site site) {
    size_t end = (arena_used + bytes + 2 * guard + align - 1) / align * align;
    if ((shared_used += bytes) > launch->most_shared || end > arena_bytes)
      fail("shared memory of " + std::to_string(shared_used) + " bytes is more than the " +
           std::to_string(launch->most_shared) + " bytes that a block of this kernel has");
    char* data = arena + arena_used;
    std::memset(data, 0xFF, bytes);
    std::memset(data + bytes, canary, arena + end - data - bytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(data - guard, guard);
    __asan_poison_memory_region(data + bytes, arena + end - data - bytes);
#endif
    arena_used = end;
    arrays.push_back({tag, data, bytes, name, site});
    return data;
  }

  // Barriers: id 0 without a count is __syncthreads
  int barrier(const char* name, unsigned id, unsigned count, bool waits, bool vote, Site site) {
    TsanIgnore ignore;
    Fiber& me = *self;
    Barrier& b = barriers[id];
    if (!b.arrived)
      b.name = name, b.site = site, b.expected = count;
    else if (b.expected != count)
      fail("barrier " + std::to_string(id) + " used with two different thread counts");
    else if (!count && !(same(b.site, site) && same(b.name, name)))
      fail(std::string("divergent barrier: some threads are at ") + b.name + " (" + where(b.site) +
           "), this one at " + name + " (" + where(site) + ")");
    tsan_release(arena + 8 * id);  // an address that is new for every block
    b.arrived++;
    b.votes += vote;
    if (!waits) {
      if (b.arrived == count) release(b);
      return 0;
    }
    b.waiting++;
    b.lanes[me.warp] |= 1u << me.lane;
    me.waits_for = name, me.site = site;
    if (b.arrived == (count ? count : live)) release(b);
    wait();  // a completed barrier has made all threads ready, this one too
    tsan_acquire(arena + 8 * id);
    return me.result;
  }
  void release(Barrier& b) {
    for (unsigned w = 0; w < (threads + 31) / 32; w++) {
      if (!b.lanes[w]) continue;
      if (exited[w] && !b.expected)
        fail(std::string("divergent barrier: warp ") + std::to_string(w) + " is at " + b.name +
             " (" + where(b.site) + ") but some of its lanes have exited");
      for (uint32_t m = b.lanes[w]; m; m &= m - 1) {
        Fiber& f = fibers[w * 32 + std::countr_zero(m)];
        f.result = static_cast<int>(b.votes), f.waits_for = nullptr;
      }
      PROFILE(join_lanes(b.name, w, b.lanes[w], exists[w] & ~exited[w]));
      make_ready(w, std::exchange(b.lanes[w], 0));
    }
    b.arrived = b.waiting = b.votes = 0;
  }

  // Warp collectives. Every lane in `mask` stores its operands; the last one calls finish(lanes,
  // operands).
  template <class Operands, class Finish>
  void collective(const char* name, uint32_t mask, Operands& mine, Site site, bool aligned,
                  Finish finish) {
    TsanIgnore ignore;
    Fiber& me = *self;
    const unsigned w = me.warp;
    const uint32_t need = mask & exists[w];
    if (!(need >> me.lane & 1))
      fail(std::string(name) + ": the calling lane is not in its own mask");
    if (need & exited[w]) fail(std::string(name) + ": the mask names lanes that have exited");
    me.waits_for = name, me.site = site, me.mask = need, me.operands = &mine;
    waiting[w] |= 1u << me.lane;
    Operands* all[32] = {};
    bool complete = (waiting[w] & need) == need;
    for (uint32_t m = complete ? need : 0; m; m &= m - 1) {
      Fiber& f = fibers[w * 32 + std::countr_zero(m)];
      if (f.mask != need)
        complete = false;  // it waits for another set of lanes first
      else if (!same(f.waits_for, name) || (aligned && !same(f.site, site)))
        fail("lanes of one warp diverged: lane " + std::to_string(f.lane) + " is at " +
             f.waits_for + " (" + where(f.site) + "), lane " + std::to_string(me.lane) + " at " +
             name + " (" + where(site) + ")");
      else
        all[f.lane] = static_cast<Operands*>(f.operands);
    }
    if (complete) {
      finish(need, all);
      PROFILE(join_lanes(name, w, need, exists[w] & ~exited[w]));
      for (uint32_t m = need; m; m &= m - 1)
        fibers[w * 32 + std::countr_zero(m)].waits_for = nullptr;
      waiting[w] &= ~need;
      make_ready(w, need);
    }
    wait();
  }
};

inline void fail(const std::string& what) {
  std::string at;
  if (block && self) {
    auto three = [](unsigned x, unsigned y, unsigned z) {
      return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
    };
    at = "block " + three(blockIdx.x, blockIdx.y, blockIdx.z) + " thread " +
         three(self->index.x, self->index.y, self->index.z) + ": ";
  }
  throw Error(at + what + "  [seed " + std::to_string(options().seed) + "]");
}

inline void finish_copies(unsigned pending) {  // cp.async.wait_group
  std::vector<PendingCopy> due;
  {
    TsanIgnore ignore;
    auto& copies = self->copies;
    auto late = std::find_if(copies.begin(), copies.end(), [&](const PendingCopy& c) {
      return c.group + pending >= self->groups;
    });
    due.assign(copies.begin(), late);
    copies.erase(copies.begin(), late);
  }
  for (const PendingCopy& c : due) {
    std::memset(c.to, 0, c.bytes);
    std::memcpy(c.to, c.from, c.valid);
    if (block->beside) block->beside->wrote(c.to, c.bytes);
  }
}
inline void* shared_array(const void* tag, size_t bytes, const char* name, Site site) {
  TsanIgnore ignore;
  for (auto& a : block->arrays)
    if (a.tag == tag) return a.data;
  return block->add_array(tag, bytes, name, site);
}
inline void* dynamic_shared() {
  TsanIgnore ignore;
  return block->arrays[0].data;
}
inline void check_shared(const void* p, size_t bytes, const char* what) {
  TsanIgnore ignore;
  for (auto& a : block->arrays)
    if (p >= a.data && static_cast<const char*>(p) + bytes <= a.data + a.bytes) return;
  fail(std::string(what) + ": the address is outside shared memory");
}
inline void check_aligned(const void* p, size_t align, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % align) fail(std::string(what) + ": address not aligned");
}
template <unsigned bytes>
void start_copy(const char* name, void* to, const void* from, bool valid) {  // cp.async
  check_aligned(to, bytes, name);
  check_aligned(from, bytes, name);
  check_shared(to, bytes, name);
  PROFILE(copy(to, from, bytes, valid, __builtin_return_address(0)));
  std::memset(to, 0xFF, bytes);  // undefined until the wait
  TsanIgnore ignore;
  self->copies.push_back({to, from, bytes, valid ? bytes : 0u, self->groups});
}
[[noreturn]] inline void assert_failed(const char* text, const char* file, int line) {
  std::string message =
      std::string("assertion failed: ") + text + " at " + file + ":" + std::to_string(line);
  if (block && self) fail(message);
  std::fprintf(stderr, "%s\n", message.c_str());
  std::abort();
}

// Watch: which block writes which element of an output.
// While a Watch exists, launches run their blocks one after another, and every block sees the
// buffer filled with 0xFF bytes. The elements that it changes are recorded; an element changed by
// two blocks is an Error. For buffers that a kernel only writes. (Writing the value 0xFF.. itself
// is not seen.)
class Watch {
 public:
  Watch(void* data, size_t bytes, size_t element, const char* name)
      : data_(static_cast<unsigned char*>(data)),
        bytes_(bytes),
        element_(element),
        name_(name),
        result_(data_, data_ + bytes),
        owner_(bytes / element),
        written_(bytes / element) {
    all().push_back(this);
  }
  ~Watch() { std::erase(all(), this); }
  Watch(const Watch&) = delete;
  void expect_all_written() const {
    size_t missing = std::count(written_.begin(), written_.end(), false);
    size_t first = std::find(written_.begin(), written_.end(), false) - written_.begin();
    if (missing)
      throw Error(name_ + ": " + std::to_string(missing) + " of " +
                  std::to_string(written_.size()) +
                  " elements were never written, the first is element " + std::to_string(first));
  }
  static std::vector<Watch*>& all() {
    static std::vector<Watch*> watches;
    return watches;
  }
  // Called by the launcher.
  void before_launch() {
    std::memset(data_, 0xFF, bytes_);
    std::fill(owner_.begin(), owner_.end(), 0);
  }
  void after_block(size_t block) {
    static const std::vector<unsigned char> blank(4096, 0xFF);
    for (size_t chunk = 0; chunk < bytes_; chunk += blank.size()) {
      size_t end = std::min(bytes_, chunk + blank.size());
      if (!std::memcmp(data_ + chunk, blank.data(), end - chunk)) continue;
      for (size_t e = chunk / element_; e * element_ < end; e++) {
        unsigned char* p = data_ + e * element_;
        if (!std::memcmp(p, blank.data(), element_)) continue;
        if (owner_[e])
          throw Error(name_ + ": element " + std::to_string(e) + " is written by block " +
                      std::to_string(owner_[e] - 1) + " and by block " + std::to_string(block));
        owner_[e] = block + 1;
        written_[e] = true;
        std::memcpy(&result_[e * element_], p, element_);
        std::memset(p, 0xFF, element_);
      }
    }
  }
  void after_launch() { std::memcpy(data_, result_.data(), bytes_); }

 private:
  unsigned char* data_;
  size_t bytes_, element_;
  std::string name_;
  std::vector<unsigned char> result_;
  std::vector<size_t> owner_;  // block + 1, in this launch
  std::vector<bool> written_;
};

inline std::unique_ptr<Block> take_block(std::unique_ptr<Block> put_back = nullptr) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Block>> idle;
  std::lock_guard lock(mutex);
  if (put_back) return idle.push_back(std::move(put_back)), nullptr;
  if (idle.empty()) return std::make_unique<Block>();
  auto b = std::move(idle.back());
  idle.pop_back();
  return b;
}

inline void run_grid(Launch launch) {
  const dim3 g = launch.grid, b = launch.block;
  const size_t blocks = size_t(g.x) * g.y * g.z, threads = size_t(b.x) * b.y * b.z;
  if (!blocks || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535)
    throw Error("launch: bad grid size");
  if (!threads || threads > 1024 || b.z > 64) throw Error("launch: bad block size");
  if (block) throw Error("launch: called from a kernel");
  const Options o = options();
  auto& watches = Watch::all();
#if defined(__SANITIZE_THREAD__)
  size_t workers = 1;  // one worker is enough: TSan sees its fibers as threads
#else
  size_t workers = o.workers ? o.workers : std::thread::hardware_concurrency();
  workers = watches.empty() ? std::clamp<size_t>(workers, 1, blocks) : 1;
#endif
  std::vector<uint32_t> order(o.seed ? blocks : 0);
  Rng rng{o.seed};
  for (size_t i = 0; i < order.size(); i++) {  // Fisher-Yates, inside out
    size_t j = rng() % (i + 1);
    order[i] = order[j], order[j] = uint32_t(i);
  }
  for (Watch* w : watches) w->before_launch();
  std::atomic<size_t> ticket{0};
  std::exception_ptr error;
  std::mutex mutex;
  auto work = [&] {
    auto runner = take_block();
    try {
      for (size_t t; (t = ticket++) < blocks;) {
        size_t i = o.seed ? order[t] : t;
#if defined(CUDA_ON_CPU_PROFILE)
        if (!profile::takes_block(i)) continue;
#endif
        Rng mix{o.seed * 0x100000001b3u + i};
        runner->run(launch, {unsigned(i % g.x), unsigned(i / g.x % g.y), unsigned(i / g.x / g.y)},
                    o.seed ? mix() | 1 : 0);
        TsanIgnore ignore;
        for (Watch* w : watches) w->after_block(i);
      }
    } catch (...) {
      std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
      ticket = blocks;
    }
    take_block(std::move(runner));
  };
  tsan_release(&launch.begun);
  std::vector<std::thread> pool;
  for (size_t i = 1; i < workers; i++) pool.emplace_back(work);
  work();
  for (auto& t : pool) t.join();
  tsan_acquire(&launch.ended);
  for (Watch* w : watches) w->after_launch();
  if (error) std::rethrow_exception(error);
}

// Appends "<address of the kernel in its file, hexadecimal> <threads> <dynamic shared bytes>".
inline void note_launch(const char* file, const void* kernel, dim3 b, size_t shared_bytes) {
  Dl_info info;
  dladdr(kernel, &info);
  const uintptr_t address = uintptr_t(kernel) - uintptr_t(info.dli_fbase);
  std::FILE* const out = std::fopen(file, "a");
  std::fprintf(out, "%zx %u %zu\n", size_t(address), b.x * b.y * b.z, shared_bytes);
  std::fclose(out);
}

// The dynamic shared memory that kernels asked for.
inline size_t& asked_shared(const void* kernel) {
  static std::mutex mutex;
  static std::map<const void*, size_t> asked;
  const std::lock_guard lock(mutex);
  return asked[kernel];
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, {std::forward<A>(args)...}};
  auto invoke = [](void* p) {
    std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->args);
  };
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (const char* file = std::getenv("CUDA_ON_CPU_LAUNCHES")) {
    note_launch(file, address, block, shared_bytes);
  }
  const size_t most = asked_shared(address) == 0 ? kFreeShared : max_shared();
  PROFILE(begin_launch(address, size_t(grid.x) * grid.y * grid.z, block.x * block.y * block.z,
                       shared_bytes));
  run_grid({invoke, &call, grid, block, shared_bytes, most});
  PROFILE(end_launch());
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

// The parts of the CUDA runtime that launch() of cuda/primitives.h calls.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using cuda_on_cpu::Options;
  const auto capability = Options::env("CUDA_ON_CPU_CAPABILITY", 90);
  *value = static_cast<int>(
      attribute == cudaDevAttrMultiProcessorCount ? Options::env("CUDA_ON_CPU_MULTIPROCESSORS", 1)
      : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
      : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                       : cuda_on_cpu::max_shared());
  return cudaSuccess;
}
// The emulator knows a static array only once a block has declared it.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > cuda_on_cpu::max_shared()) {
    return cudaErrorInvalidValue;
  }
  cuda_on_cpu::asked_shared(kernel) = static_cast<size_t>(bytes);
  return cudaSuccess;
}
