// Patches of a clip in CUDA kernels: the patch of a row, and the copy of its pixels to shared
// memory by a warp.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "cuda/floats.h"
#include "patches/place.h"

namespace vidl {
namespace {

// The place of row m; its patch is -1 if there is none, since the id is not in [0, N).
__device__ Place locate(const Rows& rows, int64_t m) {
  const Place place = place_of(rows, m);
  const bool real = place.sample < rows.B && place.patch >= 0 && place.patch < rows.N;
  return {place.sample, real ? place.patch : -1};
}

// Whether cu_seqlens ascend from 0 to the number of rows. Only the first block knows, and writes
// NaN if they do not. Called by all threads of every block.
__device__ bool offsets_fit(const Rows& rows) {
  if (rows.cu_seqlens == nullptr || blockIdx.x != 0) return true;
  return __syncthreads_and(offsets_ascend(rows, threadIdx.x, blockDim.x));
}

// n / divisor as a multiplication, for numbers below 2^31. Source: Granlund and Montgomery,
// Division by invariant integers using multiplication, 1994.
struct Divider {
  uint32_t divisor, multiplier, shift;

  explicit Divider(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while (uint64_t{1} << shift < divisor) shift++;
    multiplier = static_cast<uint32_t>(
        (uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * multiplier >> 32) + n) >> shift;
  }
};

// The order in which a warp reads a patch, which is that of memory: planes of channels [C, t, h,
// w], or interleaved channels [t, h, w, C]. A step is the most numbers, a power of two of at
// most 16 bytes, that the alignment of all patches allows. In shared memory planes are `pitch`
// numbers apart.
struct Walk {
  bool interleaved;
  int32_t step, steps;   // numbers per step, steps per patch
  int32_t pitch, extra;  // from the start of a plane to that of the next; from its end to there
  Divider inner[3];      // sizes of the three inner dimensions, in steps
  int64_t stride[4];     // of all four dimensions in the clip, innermost first
};

[[maybe_unused]] VIDL_HOST_DEVICE int64_t itemsize_of(Dtype dtype) {
  return dtype == Dtype::kUInt8 ? 1 : dtype == Dtype::kFloat32 ? 4 : 2;
}

[[maybe_unused]] Walk walk_of(const Clip& clip) {
  const bool interleaved = clip.C > 1 && std::llabs(clip.stride_c) < std::llabs(clip.stride_w);
  const int64_t pixels = int64_t{clip.t} * clip.h * clip.w, pitch = (pixels + 15) / 16 * 16;
  int64_t size[4] = {clip.w, clip.h, clip.t, clip.C};
  int64_t stride[4] = {clip.stride_w, clip.stride_h, clip.stride_t, clip.stride_c};
  const int64_t grid[4] = {clip.grid_w, clip.grid_h, clip.grid_t, 1};
  for (int i = 1; i < 4; i++) stride[i] *= size[i] * grid[i] > 1;      // else without a meaning
  if (interleaved && clip.stride_c == 1 && clip.stride_w == clip.C) {  // contiguous lines
    size[0] *= clip.C, size[3] = 1;
    stride[0] = 1, stride[3] = 0;
  } else if (interleaved) {
    std::rotate(size, size + 3, size + 4);
    std::rotate(stride, stride + 3, stride + 4);
  }
  const int64_t itemsize = itemsize_of(clip.dtype);
  const auto fits = [&](int64_t step) {
    bool aligned = size[0] % step == 0 && clip.stride_b % step == 0 &&
                   reinterpret_cast<uintptr_t>(clip.data) % (step * itemsize) == 0;
    for (int i = 1; i < 4; i++) aligned = aligned && stride[i] % step == 0;
    return aligned;
  };
  int64_t step = stride[0] == 1 ? 16 / itemsize : 1;
  while (!fits(step)) step /= 2;
  size[0] /= step, stride[0] *= step;
  return {interleaved,
          static_cast<int32_t>(step),
          static_cast<int32_t>(pixels * clip.C / step),
          static_cast<int32_t>(pitch),
          static_cast<int32_t>(interleaved ? 0 : pitch - pixels),
          {Divider(size[0]), Divider(size[1]), Divider(size[2])},
          {stride[0], stride[1], stride[2], stride[3]}};
}

// Neighbouring elements that are loaded or stored together.
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Chunk {
  T x[n];
};

// Copies n neighbouring numbers of the clip, as `stage` does.
template <int n, class Pixel>
__device__ __forceinline__ void copy_numbers(const Clip& clip, int64_t from, Pixel* to) {
  using Numbers = Chunk<Pixel, n>;
  Numbers numbers;
  if (clip.dtype == Dtype::kUInt8 || clip.dtype == Dtype::kFloat32) {
    numbers = *reinterpret_cast<const Numbers*>(static_cast<const Pixel*>(clip.data) + from);
  } else {
    const auto words = *reinterpret_cast<const Chunk<uint32_t, n / 2>*>(
        static_cast<const uint16_t*>(clip.data) + from);
#pragma unroll
    for (int j = 0; j < n / 2; j++) {
      const float2 pair =
          clip.dtype == Dtype::kFloat16 ? unpack2<fp16>(words.x[j]) : unpack2<bf16>(words.x[j]);
      numbers.x[2 * j] = static_cast<Pixel>(pair.x);
      numbers.x[2 * j + 1] = static_cast<Pixel>(pair.y);
    }
  }
  *reinterpret_cast<Numbers*>(to) = numbers;
}

// Copies the patch that begins at `corner` to `patch`, in the order of the walk: bytes unchanged,
// other numbers in float32. The whole warp can read them after cp_async_commit, cp_async_wait and
// __syncwarp.
template <class Pixel>
__device__ __forceinline__ void stage(const Clip& clip, const Walk& walk, int64_t corner,
                                      Pixel* patch) {
  const bool whole = walk.step * itemsize_of(clip.dtype) == 16;  // 16 bytes of the clip
  for (int32_t i = static_cast<int32_t>(lane_id()); i < walk.steps; i += 32) {
    uint32_t rest = static_cast<uint32_t>(i);
    int64_t from = corner;
#pragma unroll
    for (int d = 0; d < 3; d++) {
      const uint32_t above = walk.inner[d].quotient(rest);
      from += (rest - above * walk.inner[d].divisor) * walk.stride[d];
      rest = above;
    }
    from += rest * walk.stride[3];
    Pixel* const to = patch + i * walk.step + static_cast<int32_t>(rest) * walk.extra;
    if (walk.step == 1) {
      *to = static_cast<Pixel>(load_any(clip.data, clip.dtype, from));
    } else if (walk.step == 2) {
      copy_numbers<2>(clip, from, to);
    } else if (walk.step * sizeof(Pixel) == 16 && whole) {
      cp_async_16(to, static_cast<const Pixel*>(clip.data) + from);
    } else if (walk.step == 4) {
      copy_numbers<4>(clip, from, to);
    } else {
      copy_numbers<8>(clip, from, to);
    }
  }
}

// Reads kPixels neighbouring pixels from `p` on, in kC channels from `c` on, from a staged patch.
// With more than one pixel, the patch must have kC channels.
template <int kPixels, int kC, class Pixel>
__device__ __forceinline__ void pixels_of(const Pixel* patch, const Walk& walk, int32_t C,
                                          int32_t p, int32_t c, Pixel (&x)[kPixels][kC]) {
  if constexpr (kPixels == 1) {
#pragma unroll
    for (int j = 0; j < kC; j++) {
      x[0][j] = patch[walk.interleaved ? p * C + c + j : (c + j) * walk.pitch + p];
    }
  } else {
    Chunk<Pixel, kPixels> part[kC];
#pragma unroll
    for (int j = 0; j < kC; j++) {
      const int32_t at = walk.interleaved ? p * kC + j * kPixels : j * walk.pitch + p;
      part[j] = *reinterpret_cast<const Chunk<Pixel, kPixels>*>(patch + at);
    }
    if (walk.interleaved) {
#pragma unroll
      for (int i = 0; i < kPixels * kC; i++) x[i / kC][i % kC] = part[i / kPixels].x[i % kPixels];
    } else {
#pragma unroll
      for (int i = 0; i < kPixels * kC; i++) x[i / kC][i % kC] = part[i % kC].x[i / kC];
    }
  }
}

}  // namespace
}  // namespace vidl
