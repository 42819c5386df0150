// Kernels with planted bugs, which must be reported or give a wrong result; the same kernels
// without the bug must pass. VERBOSE=1 shows the reports.
#include "check.h"

__global__ void reverse(const float* in, float* out, bool bug) {
  SHARED(float, s, [128]);
  s[threadIdx.x] = in[threadIdx.x];
  if (!bug) __syncthreads();
  out[threadIdx.x] = s[127 - threadIdx.x];
}
__global__ void reuse(const float* in, float* out,
                      bool bug) {  // the barrier that protects s from the next round
  SHARED(float, s, [128]);
  for (int round = 0; round < 4; round++) {
    s[threadIdx.x] = in[round * 128 + threadIdx.x];
    __syncthreads();
    out[round * 128 + threadIdx.x] = warp_sum(s[127 - threadIdx.x]);
    if (!bug) __syncthreads();
  }
}
__global__ void divergent(int bug) {
  if (bug == 1) {  // two barriers in the source
    if (threadIdx.x < 16)
      __syncthreads();
    else
      __syncthreads();
  } else if (bug == 2) {  // half a warp leaves
    if (threadIdx.x < 16) return;
    __syncthreads();
  } else if (bug == 3) {  // one thread goes round once more
    for (int i = 0; i < 3 + (threadIdx.x == 5); i++) __syncthreads();
  } else if (bug == 4) {  // a warp function inside a divergent branch
    if (threadIdx.x % 2)
      __shfl_sync(~0u, 1, 0);
    else
      __syncthreads();
  } else if (bug == 5) {  // two different warp functions
    if (threadIdx.x % 2)
      __ballot_sync(~0u, 1);
    else
      __shfl_sync(~0u, 1, 0);
  } else if (bug == 6) {  // a mask without the caller
    __shfl_sync(1u, 1, 0);
  } else if (bug == 7) {
    if (threadIdx.x % 32 == 3) return;
    __syncwarp();
  } else {  // fine: a whole warp leaves
    if (threadIdx.x < 32) return;
    __syncthreads();
  }
}
__global__ void async(const float* in, float* out, int bug) {
  SHARED(float, s, [128]);
  cp_async_16(s + threadIdx.x * 4, in + threadIdx.x * 4);
  cp_async_commit();
  if (bug == 1) cp_async_wait<1>();  // leaves the only group unfinished
  if (bug != 1) cp_async_wait<0>();
  if (bug != 2) __syncthreads();
  for (int i = 0; i < 4; i++) out[i * 32 + threadIdx.x] = s[127 - i * 32 - threadIdx.x];
  if (bug == 1) cp_async_wait<0>();
}
__global__ void rows(float* out, int n, int bug) {  // 32 elements per block
  int i = blockIdx.x * 32 + threadIdx.x;
  if (bug == 1 && i == n - 1) return;  // the last element is forgotten
  if (bug == 2 && blockIdx.x && !threadIdx.x)
    i--;  // a block also writes its neighbour's last element
  if (i < n) out[i] = 1.0f;
}
__global__ void shared_bounds(float* out, int bug) {
  SHARED(float, a, [32]);
  SHARED(float, b, [32]);
  DYNAMIC_SHARED(float, c);
  a[threadIdx.x] = b[threadIdx.x] = c[threadIdx.x] = 1.0f;
  if (bug == 1) a[threadIdx.x + 1] = 2.0f;
  if (bug == 2) c[threadIdx.x + 1] = 2.0f;
  out[threadIdx.x] = a[threadIdx.x];
  if (bug == 3) out[threadIdx.x] = a[threadIdx.x + 1];  // a read: for AddressSanitizer
}
__global__ void uninitialised(float* out, bool bug) {
  SHARED(float, s, [64]);
  if (threadIdx.x < (bug ? 31 : 32)) s[threadIdx.x] = 1.0f;
  __syncthreads();
  out[0] = warp_sum(s[threadIdx.x]);
}
__global__ void misuse(const float* in, int bug) {
  SHARED(float, s, [64]);
  uint32_t r[1];
  if (bug == 1) load_16(in + 1);
  if (bug == 2) ldmatrix<1>(r, in);
  if (bug == 3) ldmatrix<1>(r, s + 1);
  if (bug == 4) cp_async_16(s, in);  // never waited for
  if (bug == 5) assert(threadIdx.x != 7);
  if (bug == 6 && threadIdx.x == 7) __trap();
}
__global__ void nothing() {}
__global__ void never_asked() {}

int main(int argc, char**) {
  alignas(16) static float in[512], out[512];
  for (int i = 0; i < 512; i++) in[i] = float(i % 97);
  auto reversed = [&](auto run) {
    run();
    for (int i = 0; i < 128; i++)
      if (!(out[i] == in[127 - i])) return false;
    return true;
  };
  if (argc > 1) {  // under AddressSanitizer: must end the program
    launch(shared_bounds, 1, 32, 128, nullptr, out, 3);
    return 0;
  }

  // A missing barrier: wrong in all orders, or in most.
  const int seeds = 50;
  auto hits = [&](auto kernel, bool bug, auto expected) {
    return count_seeds(seeds, [&] {
      launch(kernel, 1, 128, 0, nullptr, in, out, bug);
      return expected();
    });
  };
  auto reverse_right = [&] { return reversed([] {}); };
  auto reuse_right = [&] {
    for (int i = 0; i < 512; i++) {
      float sum = 0;
      for (int j = 0; j < 32; j++) sum += in[i / 128 * 128 + 127 - (i % 128 / 32 * 32 + j)];
      if (out[i] != sum) return false;
    }
    return true;
  };
  CHECK(hits(reverse, false, reverse_right) == seeds);
  CHECK(hits(reverse, true, reverse_right) == 0);
  CHECK(hits(reuse, false, reuse_right) == seeds);
  int survived = hits(reuse, true, reuse_right);
  std::printf("missing barrier at the end of a loop: %d of %d orders give a wrong result\n",
              seeds - survived, seeds);
  CHECK(survived < seeds / 2);

  count_seeds(10, [&] {
    CHECK(raises("divergent barrier", [] { launch(divergent, 1, 64, 0, nullptr, 1); }));
    CHECK(raises("lanes have exited", [] { launch(divergent, 1, 64, 0, nullptr, 2); }));
    CHECK(raises("divergent barrier", [] { launch(divergent, 1, 64, 0, nullptr, 3); }));
    CHECK(raises("deadlock", [] { launch(divergent, 1, 64, 0, nullptr, 4); }));
    CHECK(raises("diverged", [] { launch(divergent, 1, 64, 0, nullptr, 5); }));
    CHECK(raises("not in its own mask", [] { launch(divergent, 1, 64, 0, nullptr, 6); }));
    CHECK(raises("", [] { launch(divergent, 1, 64, 0, nullptr, 7); }));
    launch(divergent, 1, 64, 0, nullptr, 8);

    CHECK(reversed([&] { launch(async, 1, 32, 0, nullptr, in, out, 0); }));
    CHECK(!reversed([&] { launch(async, 1, 32, 0, nullptr, in, out, 1); }));
    CHECK(!reversed([&] { launch(async, 1, 32, 0, nullptr, in, out, 2); }));

    std::vector<float> many(1000, 7.0f);
    auto watched = [&](int bug) {
      cuda_on_cpu::Watch w(many.data(), many.size() * 4, 4, "out");
      launch(rows, 32, 32, 0, nullptr, many.data(), 1000, bug);
      w.expect_all_written();
    };
    watched(0);
    CHECK(many == std::vector<float>(1000, 1.0f));
    CHECK(raises("out: 1 of 1000 elements were never written, the first is element 999",
                 [&] { watched(1); }));
    CHECK(raises("is written by block", [&] { watched(2); }));

#ifndef __SANITIZE_ADDRESS__  // which stops at the access itself
    CHECK(raises("outside shared array 'a'",
                 [&] { launch(shared_bounds, 1, 32, 128, nullptr, out, 1); }));
    CHECK(raises("outside shared array 'dynamic",
                 [&] { launch(shared_bounds, 1, 32, 128, nullptr, out, 2); }));
#endif
    launch(shared_bounds, 1, 32, 128, nullptr, out, 0);
    launch(uninitialised, 1, 32, 0, nullptr, out, false);
    CHECK(out[0] == 32.0f);
    launch(uninitialised, 1, 32, 0, nullptr, out, true);
    CHECK(out[0] != out[0]);

    CHECK(
        raises("load_16: address not aligned", [&] { launch(misuse, 1, 32, 0, nullptr, in, 1); }));
    CHECK(raises("outside shared memory", [&] { launch(misuse, 1, 32, 0, nullptr, in, 2); }));
    CHECK(raises("not aligned", [&] { launch(misuse, 1, 32, 0, nullptr, in, 3); }));
    CHECK(raises("never waited for", [&] { launch(misuse, 1, 32, 0, nullptr, in, 4); }));
    CHECK(raises("assertion failed: threadIdx.x != 7",
                 [&] { launch(misuse, 1, 32, 0, nullptr, in, 5); }));
    CHECK(raises("thread (7,0,0): __trap", [&] { launch(misuse, 1, 32, 0, nullptr, in, 6); }));
    CHECK(raises("more than the 49152 bytes",
                 [] { cuda_on_cpu::launch(never_asked, 1, 32, 49153); }));
    CHECK(raises("bad grid", [] { cuda_on_cpu::launch(nothing, 0, 32, 0); }));
    CHECK(raises("bad block", [] { launch(nothing, 1, 2048, 0, nullptr); }));
    return true;
  });
  return report("bugs");
}
