// Vector code that is compiled for several instruction sets and chosen at run time.
//
// #define VIDL_SOURCE "<op>/cpu.h" and include this file inside the namespace of the op. It
// includes cpu/vectors.h and VIDL_SOURCE once for each instruction set, in a namespace of its own;
// VIDL_FOR_THIS_CPU(function) is the fastest version that this CPU can run.

// Every call with a vector argument is inlined, so the ABI for vectors does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#define VIDL_VECTOR_INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define VIDL_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // GCC before version 12 lacks __builtin_shufflevector
#define VIDL_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, EightIntegers{__VA_ARGS__})
#endif

namespace any_cpu {
#define VIDL_WIDTH 4
#include "cpu/vectors.h"
#include VIDL_SOURCE
#undef VIDL_WIDTH
}  // namespace any_cpu

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define VIDL_WIDTH 8
#include "cpu/vectors.h"
#include VIDL_SOURCE
#undef VIDL_WIDTH
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define VIDL_WIDTH 16
#include "cpu/vectors.h"
#include VIDL_SOURCE
#undef VIDL_WIDTH
}  // namespace avx512
#pragma GCC pop_options
#define VIDL_FOR_THIS_CPU(function)                                                    \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&          \
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")    \
       ? &avx512::function                                                             \
   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::function \
                                                                     : &any_cpu::function)
#else
#define VIDL_FOR_THIS_CPU(function) (&any_cpu::function)
#endif
