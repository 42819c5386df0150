// Code in vectors, compiled once for each instruction set and chosen at run time.
//
// #define VIDL_SOURCE "op_cpu.h" and include this file, in the place where the functions belong;
// op_cpu.h is then included after cpu/vectors.h in a namespace for each instruction set, and
// VIDL_FOR_THIS_CPU(function) is the best that this CPU can run.

// Vectors never cross a call that is not inlined, so how they would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#define VIDL_VECTOR_INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define VIDL_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // GCC has the other one from version 12 on
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
