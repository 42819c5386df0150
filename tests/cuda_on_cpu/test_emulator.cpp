// The emulator itself: conversions, warp functions, barriers, tensor-core fragments.
#include <random>

#include "check.h"

// The nearest of the two neighbours, ties to even, checked with exact arithmetic in double.
template <class ToFloat>
bool nearest(float f, uint16_t h, ToFloat to_float) {
  double x = f, got = to_float(h);
  if (x != x) return h == 0x7FFF;
  for (int d = -1; d <= 1; d += 2) {
    uint16_t other = uint16_t(h + d);
    if ((other ^ h) & 0x8000) continue;
    double o = to_float(other);
    if (std::isinf(o)) continue;
    if (std::isinf(got)) {  // overflow starts half a place above the largest finite value
      double below = to_float(uint16_t(h - 2));
      if (std::fabs(x) < std::fabs(o) + std::fabs(o - below) / 2) return false;
    } else if (std::fabs(o - x) < std::fabs(got - x) ||
               (std::fabs(o - x) == std::fabs(got - x) && h & 1)) {
      return false;
    }
  }
  return std::signbit(f) == bool(h & 0x8000);
}
void conversions() {
  using namespace cuda_on_cpu;
  for (uint32_t h = 0; h < 65536; h++) {
    float a = half_to_float(uint16_t(h)), b = bf16_to_float(uint16_t(h));
    CHECK(a != a || float_to_half(a) == h);
    CHECK(b != b || float_to_bf16(b) == h);
#ifdef __FLT16_MAX__
    CHECK(a != a || a == float(std::bit_cast<_Float16>(uint16_t(h))));
#endif
  }
  std::mt19937 rng(1);
  for (int i = 0; i < 2000000; i++) {
    uint32_t u = rng();
    if (i % 2)
      u = (u & 0x8FFFFFFF) | 0x30000000 | (u & 0x0F000000);  // mostly within the range of a half
    if (i % 5 == 0) u &= ~0xFFFu;                            // many ties
    float f = std::bit_cast<float>(u);
    if (!nearest(f, float_to_bf16(f), bf16_to_float)) {
      CHECK(!"bf16 rounding");
      break;
    }
    if (!nearest(f, float_to_half(f), half_to_float)) {
      CHECK(!"half rounding");
      break;
    }
  }
  CHECK(float_to_half(65519.996f) == 0x7BFF && float_to_half(65520.0f) == 0x7C00 &&
        float_to_half(-1e9f) == 0xFC00);
  CHECK(float_to_bf16(3.4e38f) == 0x7F80 && float_to_half(0x1p-25f) == 0 &&
        float_to_half(0x1.8p-25f) == 1);
  CHECK(float(__half(1.0f) + __half(0x1p-12f)) == 1.0f);  // arithmetic rounds to 16 bits
}

__global__ void warp_functions(int* ok) {
  const int lane = threadIdx.x % 32;
  bool good = true;
  good &= __shfl_sync(~0u, lane * 3, 5) == 15;
  good &= __shfl_sync(~0u, lane, 2, 8) == lane / 8 * 8 + 2;
  good &= __shfl_xor_sync(~0u, lane, 9) == (lane ^ 9);
  good &= __shfl_up_sync(~0u, lane, 3) == (lane < 3 ? lane : lane - 3);
  good &= __shfl_down_sync(~0u, lane, 3, 16) == (lane % 16 > 12 ? lane : lane + 3);
  good &= __shfl_sync(~0u, double(lane), 31 - lane) == 31 - lane;
  good &= __ballot_sync(~0u, lane % 3 == 0) == 0x49249249u;
  good &= __any_sync(~0u, lane == 7) && !__any_sync(~0u, lane > 99);
  good &= __all_sync(~0u, lane < 32) && !__all_sync(~0u, lane == 7);
  good &= __match_any_sync(~0u, lane % 16) == 0x10001u << lane % 16;
  if (lane < 12)  // two halves of a warp in different collectives at once
    good &= __ballot_sync(0xFFFu, lane & 1) == 0xAAAu;
  else
    good &= __shfl_sync(0xFFFFF000u, lane, 12) == 12;
  __syncwarp();
  good &= __syncthreads_count(threadIdx.x < 40) == 40;
  good &= __syncthreads_or(threadIdx.x == 63) && !__syncthreads_or(0);
  good &= __syncthreads_and(1) && !__syncthreads_and(threadIdx.x != 50);
  good &= warp_sum(float(lane)) == 496.0f;
  good &= __popc(0xF0F0u) == 8 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 &&
          __brev(1) == 0x80000000u;
  ok[threadIdx.x] = good;
}
__global__ void partial_warp(int* out) {  // 40 threads: the last warp has 8 lanes
  out[threadIdx.x] = __popc(__ballot_sync(0xFFFFFFFFu, 1));
}
__global__ void producers_and_consumers(
    int* out) {  // two warps fill a buffer, two read it, without __syncthreads
  SHARED(int, buffer, [64]);
  const int t = threadIdx.x;
  for (int round = 0; round < 4; round++) {
    if (t < 64) {
      if (round) named_barrier_sync(2, 128);
      buffer[t] = round * 100 + t;
      named_barrier_arrive(1, 128);
    } else {
      named_barrier_sync(1, 128);
      out[round * 64 + t - 64] = buffer[127 - t];
      if (round < 3) named_barrier_arrive(2, 128);
    }
  }
}
__global__ void count_blocks(int* counter, float* sum, unsigned long long* largest, int* where) {
  __shared__ int plain[4];
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) plain[1] = int(blockIdx.y);
  __syncthreads();
  atomicAdd(counter, 1);
  atomicAdd(sum, 0.5f);
  const unsigned i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  atomicMax(largest, (1ull << 40) + i);
  where[blockIdx.y * 64 + i] = plain[1] * 64 + int(i);
}

// Fragments are compared with the index formulas of the PTX manual.
template <class T>
__global__ void fragments(const T* a, const T* b, float* d,
                          int* ok) {  // a: 16x16, b: 16x8, row major
  SHARED(T, sa, [16][24]);
  SHARED(T, sb, [16][8]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[i];
  __syncwarp();
  const int group = lane >> 2, in_group = lane % 4;
  auto bits = [](T x) { return std::bit_cast<uint16_t>(x); };
  auto word = [&](T lo, T hi) { return uint32_t(bits(lo)) | uint32_t(bits(hi)) << 16; };

  uint32_t fa[4], fb[2];
  ldmatrix<4>(fa, &sa[lane % 16][lane / 16 * 8]);
  ldmatrix<2, true>(fb, &sb[lane % 16][0]);
  bool good = true;
  for (int i = 0; i < 8; i += 2) {  // a0..a7
    int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, col = in_group * 2 + (i < 4 ? 0 : 8);
    good &= fa[i / 2] == word(sa[row][col], sa[row][col + 1]);
  }
  for (int i = 0; i < 4; i += 2) {  // b0..b3
    int row = in_group * 2 + (i < 2 ? 0 : 8);
    good &= fb[i / 2] == word(sb[row][group], sb[row + 1][group]);
  }
  uint32_t one[1], two[2], plain[1];
  ldmatrix<1, true>(one, &sa[lane % 8][8]);
  ldmatrix<1>(plain, &sa[lane % 8][8]);
  ldmatrix<2>(two, &sa[lane % 16][8]);
  good &= plain[0] == fa[2] && two[0] == fa[2] && two[1] == fa[3];
  good &= movmatrix_trans(plain[0]) == one[0] && movmatrix_trans(one[0]) == plain[0];
  float acc[4];
  for (int i = 0; i < 4; i++) acc[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  mma_m16n8k16<T>(acc, fa, fb);
  for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = acc[i];
  ok[lane] = good;
}
template <class T>
void check_fragments() {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<T> a(256), b(128);
  std::vector<float> d(128), expected(128);
  std::vector<int> ok(32);
  for (auto& x : a) x = T(normal(rng));
  for (auto& x : b) x = T(normal(rng));
  for (auto& x : d) x = normal(rng);
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 8; n++) {
      double sum = d[m * 8 + n];
      for (int k = 0; k < 16; k++)
        sum += double(float(a[m * 16 + k])) * double(float(b[k * 8 + n]));
      expected[m * 8 + n] = float(sum);
    }
  launch(fragments<T>, 1, 32, 0, nullptr, a.data(), b.data(), d.data(), ok.data());
  for (int i = 0; i < 128; i++) CHECK(std::fabs(d[i] - expected[i]) < 1e-5f);
  for (int i = 0; i < 32; i++) CHECK(ok[i]);
}

__global__ void pipeline(const float* in, float* out,
                         int stages) {  // double buffer: out = in, through shared memory
  SHARED(float, buffer, [2][128]);
  const int i = threadIdx.x * 4;
  cp_async_16(&buffer[0][i], in + i);
  cp_async_commit();
  for (int s = 0; s < stages; s++) {
    if (s + 1 < stages)
      cp_async_16(&buffer[(s + 1) % 2][i], in + (s + 1) * 128 + i, s + 2 < stages);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; j++)
      out[s * 128 + j * 32 + threadIdx.x] = buffer[s % 2][j * 32 + threadIdx.x];
    __syncthreads();
  }
}

__global__ void much_shared(int* last) {  // 1 KB of static and 48 KB of dynamic shared memory
  SHARED(int, own, [256]);
  DYNAMIC_SHARED(int, more);
  own[threadIdx.x] = more[384 * threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) *last = own[31] + more[384 * 31];
}
void limits_of_a_launch() {
  int last = 0;
  CHECK(launch(much_shared, 1, 32, 48 * 1024, nullptr, &last) == cudaSuccess && last == 62);
  CHECK(launch(much_shared, 1, 32, 228 * 1024, nullptr, &last) == cudaErrorInvalidValue);
  // A grid has 2^31 - 1 blocks at most; the kernel must not start on a truncated number of them.
  const int64_t too_many = int64_t{1} << 31;
  for (int64_t blocks : {too_many, 2 * too_many + 1, int64_t{-1}}) {
    CHECK(launch(partial_warp, blocks, 32, 0, nullptr, nullptr) == cudaErrorInvalidConfiguration);
  }
  CHECK(launch(partial_warp, 0, 32, 0, nullptr, nullptr) == cudaSuccess);
}

int main() {
  conversions();
  limits_of_a_launch();
  check_fragments<bf16>();
  check_fragments<fp16>();
  count_seeds(20, [] {
    std::vector<int> ok(64, 0), partial(40), out(256), where(640);
    launch(warp_functions, 1, 64, 0, nullptr, ok.data());
    for (int x : ok) CHECK(x == 1);
    launch(partial_warp, 1, 40, 0, nullptr, partial.data());
    CHECK(partial[0] == 32 && partial[39] == 8);
    launch(producers_and_consumers, 1, 128, 0, nullptr, out.data());
    for (int i = 0; i < 256; i++) CHECK(out[i] == i / 64 * 100 + 63 - i % 64);
    int counter = 0;
    float sum = 0;
    unsigned long long largest = 0;
    cuda_on_cpu::launch(count_blocks, dim3(1, 10), dim3(8, 4, 2), 0, &counter, &sum, &largest,
                        where.data());
    CHECK(counter == 640 && sum == 320.0f && largest == (1ull << 40) + 63);
    for (int i = 0; i < 640; i++) CHECK(where[i] == i);
    std::vector<float> in(8 * 128), copied(8 * 128);
    for (size_t i = 0; i < in.size(); i++) in[i] = float(i);
    launch(pipeline, 1, 32, 0, nullptr, in.data(), copied.data(), 8);
    for (size_t i = 0; i < in.size(); i++) CHECK(copied[i] == (i < 7 * 128 ? in[i] : 0.0f));
    return true;
  });
  return report("emulator");
}
