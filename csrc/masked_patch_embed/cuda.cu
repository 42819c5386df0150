// masked_patch_embed: fold, pack (gather and normalise), and the two scatters of the backward. The
// matmuls between them are torch's (op.cpp). Schema: kernels/masked_patch_embed/op.py.
//
// Limits, for 17408 rows of 768 uint8 pixels and C = 768 in bf16:
//   pack      reads 13.4 MB of visible pixels (31.5 MB in 64-byte sectors), writes 26.7 MB of
//             patches and 26.7 MB of positions, 18 us on an H200; a warp writes 16 neighbouring
//             bytes per lane, and reads the pixels for them together if there are three channels
//   fold      reads and writes the weight once: 2.4 MB
//   invert    reads the ids once, 0.1 MB, writes and reads a number per patch of the clips, 0.2 MB
//   position  reads grad_out once, 26.7 MB
//   unpack    reads grad_patches once, 26.7 MB, writes the clip once
#include <algorithm>
#include <cfloat>
#include <initializer_list>
#include <type_traits>

#include "masked_patch_embed/interface.h"
#include "patches/device.h"

namespace vidl {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSharedBytes = 48 * 1024;  // of a block
constexpr int kPackingWarps = 4;             // of a block: a few rows of each, in many blocks
constexpr int kMostRows = 4;                 // that a warp packs

// The second number of launch bounds, blocks of a multiprocessor, allows 64 registers a thread:
// without it ptxas keeps fewer registers and spills some values.

// One block per output channel. The sum has a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const T* __restrict__ weight,    // [C, numbers]
                const float* __restrict__ bias,  // [C] or null
                T* __restrict__ weight_out,      // [C, numbers]
                float* __restrict__ bias_out,    // [C]
                int64_t numbers, int32_t per_channel, Affine affine) {
  SHARED(float, partial, [kThreads / 32]);
  const int64_t row = blockIdx.x;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < numbers; i += kThreads) {
    const int32_t c = static_cast<int32_t>(i) / per_channel;
    const T folded = from_float<T>(to_float(weight[row * numbers + i]) * affine.scale[c]);
    weight_out[row * numbers + i] = folded;
    sum = fmaf(to_float(folded), affine.shift[c], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = bias == nullptr ? 0.0f : bias[row];
    for (int i = 0; i < kThreads / 32; i++) total += partial[i];
    bias_out[row] = total;
  }
}

struct Packing {
  Clip clip;
  Walk walk;
  Rows rows;
  Affine affine;
  Position position;
  int32_t pixels_of_lane;  // that it writes together: 16 bytes, 8 bytes or one
  bool wide_position;      // whether positions can be written 16 bytes at a time
  int32_t rows_of_warp;

  __device__ __forceinline__ int32_t pixels() const { return clip.t * clip.h * clip.w; }
  // Only float clips have more than kMaxChannels channels, with the same numbers for all.
  __device__ __forceinline__ float affine_of(int32_t c, float x) const {
    const int known = min(c, kMaxChannels - 1);
    return fmaf(x - affine.centre[known], affine.scale[known], affine.shift[known]);
  }
};

// with_type for kernels: calls f with a null pointer of the type that `dtype` names.
template <class F>
__device__ __forceinline__ void with_numbers(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == Dtype::kFloat16) {
    f(static_cast<fp16*>(nullptr));
  } else {
    f(static_cast<bf16*>(nullptr));
  }
}

// sum[i] += table[at + i]; a null table counts as zeros.
template <int n>
__device__ __forceinline__ void add_numbers(const void* table, Dtype dtype, int64_t at,
                                            float (&sum)[n]) {
  if (table == nullptr) return;
  with_numbers(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto part = *reinterpret_cast<const Chunk<T, n>*>(static_cast<const T*>(table) + at);
#pragma unroll
    for (int i = 0; i < n; i++) sum[i] += to_float(part.x[i]);
  });
}

// table[at + i] = x[i]
template <int n>
__device__ __forceinline__ void store_numbers(void* table, Dtype dtype, int64_t at,
                                              const float (&x)[n]) {
  with_numbers(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Chunk<T, n> part;
#pragma unroll
    for (int i = 0; i < n; i++) part.x[i] = from_float<T>(x[i]);
    *reinterpret_cast<Chunk<T, n>*>(static_cast<T*>(table) + at) = part;
  });
}

// A warp writes the positions of `count` patches to their rows of `out`, n columns per lane. Bias
// and time are added once for all of them, unless the time changes. Rows without a patch are left.
template <int n, int kRows, class T>
__device__ __forceinline__ void write_positions(const Position& position,
                                                const int32_t (&patches)[kRows], int count,
                                                T* out) {
  const int32_t frame = static_cast<int32_t>(position.P);
  for (int64_t c = lane_id() * n; c < position.C; c += 32 * n) {
    int32_t time = -1;
    float shared[n] = {};
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (r >= count || patches[r] < 0) continue;
      if (const int32_t own = patches[r] / frame; own != time) {
        time = own;
#pragma unroll
        for (int i = 0; i < n; i++) shared[i] = 0.0f;
        add_numbers(position.bias, Dtype::kFloat32, c, shared);
        add_numbers(position.time, position.time_dtype, time * position.C + c, shared);
      }
      float sum[n];
#pragma unroll
      for (int i = 0; i < n; i++) sum[i] = shared[i];
      add_numbers(position.space, position.space_dtype, patches[r] % frame * position.C + c, sum);
      Chunk<T, n> result;
#pragma unroll
      for (int i = 0; i < n; i++) result.x[i] = from_float<T>(sum[i]);
      *reinterpret_cast<Chunk<T, n>*>(out + r * position.C + c) = result;
    }
  }
}

// A warp writes a staged patch to its row of patches, n pixels of a channel per lane.
template <int n, class Pixel, class T>
__device__ __forceinline__ void write_patch(const Packing& task, const Pixel* patch, T* row) {
  const int32_t C = task.clip.C, pixels = task.pixels();
  for (int32_t c = 0; c < C; c++) {
    for (int32_t p = static_cast<int32_t>(lane_id()) * n; p < pixels; p += 32 * n) {
      Chunk<Pixel, n> x;
      if (task.walk.interleaved) {
#pragma unroll
        for (int i = 0; i < n; i++) x.x[i] = patch[(p + i) * C + c];
      } else {
        x = *reinterpret_cast<const Chunk<Pixel, n>*>(patch + c * task.walk.pitch + p);
      }
      Chunk<T, n> result;
#pragma unroll
      for (int i = 0; i < n; i++) {
        result.x[i] = from_float<T>(task.affine_of(c, to_float(x.x[i])));
      }
      *reinterpret_cast<Chunk<T, n>*>(row + c * pixels + p) = result;
    }
  }
}

// The same for three channels, of which a lane reads its n pixels together.
template <int n, class Pixel, class T>
__device__ __forceinline__ void write_colours(const Packing& task, const Pixel* patch, T* row) {
  const int32_t pixels = task.pixels();
  for (int32_t p = static_cast<int32_t>(lane_id()) * n; p < pixels; p += 32 * n) {
    Pixel x[n][3];
    pixels_of<n, 3>(patch, task.walk, 3, p, 0, x);
#pragma unroll
    for (int c = 0; c < 3; c++) {
      Chunk<T, n> result;
#pragma unroll
      for (int i = 0; i < n; i++) {
        result.x[i] = from_float<T>(task.affine_of(c, to_float(x[i][c])));
      }
      *reinterpret_cast<Chunk<T, n>*>(row + c * pixels + p) = result;
    }
  }
}

template <int n, class Pixel, class T>
__device__ __forceinline__ void write_wide(const Packing& task, const Pixel* patch, T* row) {
  if (task.clip.C == 3) {
    write_colours<n>(task, patch, row);
  } else {
    write_patch<n>(task, patch, row);
  }
}

// The row of an id or an offset that is out of range: NaN, so that its token is NaN.
template <class T>
__device__ void write_nan_row(const Packing& task, int64_t m, T* patches, T* out) {
  const int64_t numbers = int64_t{task.pixels()} * task.clip.C, C = task.position.C;
  write_nan(patches + m * numbers, numbers, lane_id(), 32);
  if (out != nullptr) write_nan(out + m * C, C, lane_id(), 32);
}

// A warp packs `task.rows_of_warp` rows. Their pixels pass through shared memory: they are read in
// the order of the clip's memory and written in that of the weight (C_in, t, h, w), 16 bytes per
// lane if possible.
template <class Pixel, class T>
__global__ void __launch_bounds__(32 * kPackingWarps, 8)
    pack_kernel(const __grid_constant__ Packing task,
                T* __restrict__ patches,  // [total, numbers]
                T* __restrict__ out) {    // [total, C] or null
  constexpr int kWide = 16 / sizeof(T);
  const bool fits = offsets_fit(task.rows);
  const int64_t warp = threadIdx.x / 32;
  const int64_t first = (blockIdx.x * int64_t{blockDim.x / 32} + warp) * task.rows_of_warp;
  if (first >= task.rows.total) return;
  DYNAMIC_SHARED(Pixel, memory);
  const int32_t size = task.clip.C * task.walk.pitch;
  Pixel* const staged = memory + warp * task.rows_of_warp * size;
  const int64_t left = task.rows.total - first;
  const int count = left < task.rows_of_warp ? static_cast<int>(left) : task.rows_of_warp;
  // Lane r finds the place of row r: their ids are loaded together.
  Place place = {0, -1};
  if (fits && static_cast<int>(lane_id()) < count) place = locate(task.rows, first + lane_id());
  const int64_t begin = place.patch < 0 ? 0 : corner(task.clip, place);
  const bool is_bad = static_cast<int>(lane_id()) < count && place.patch < 0;
  uint32_t bad = __ballot_sync(0xFFFFFFFFu, is_bad);
  int32_t ids[kMostRows];
#pragma unroll
  for (int r = 0; r < kMostRows; r++) {
    ids[r] = __shfl_sync(0xFFFFFFFFu, static_cast<int32_t>(place.patch), r);
    const int64_t from = __shfl_sync(0xFFFFFFFFu, begin, r);
    if (ids[r] >= 0) stage(task.clip, task.walk, from, staged + r * size);
  }
  cp_async_commit();
  if (out != nullptr) {
    T* const rows = out + first * task.position.C;
    if (task.wide_position) {
      write_positions<kWide>(task.position, ids, count, rows);
    } else {
      write_positions<1>(task.position, ids, count, rows);
    }
  }
  cp_async_wait();
#pragma unroll
  for (int r = 0; r < kMostRows; r++) {
    if (ids[r] < 0) continue;
    __syncwarp();  // all lanes' pixels are there, and the lanes of a row stay together
    T* const row = patches + (first + r) * task.pixels() * task.clip.C;
    const Pixel* const patch = staged + r * size;
    if (task.pixels_of_lane == kWide) {
      write_wide<kWide>(task, patch, row);
    } else if (task.pixels_of_lane == kWide / 2) {
      write_wide<kWide / 2>(task, patch, row);
    } else {
      write_patch<1>(task, patch, row);
    }
  }
  for (; bad != 0; bad &= bad - 1) {
    write_nan_row(task, first + __ffs(static_cast<int>(bad)) - 1, patches, out);
  }
}

// The same for patches that do not fit into shared memory, one pixel per lane.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    pack_large_kernel(const __grid_constant__ Packing task,
                      T* __restrict__ patches,  // [total, numbers]
                      T* __restrict__ out) {    // [total, C] or null
  const Clip& clip = task.clip;
  const bool fits = offsets_fit(task.rows);
  const int64_t m = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (m >= task.rows.total) return;
  const Place place = locate(task.rows, m);
  if (!fits || place.patch < 0) return write_nan_row(task, m, patches, out);
  if (out != nullptr) {
    const int32_t ids[1] = {static_cast<int32_t>(place.patch)};
    write_positions<1>(task.position, ids, 1, out + m * task.position.C);
  }
  const int64_t start = corner(clip, place);
  const int32_t pixels = task.pixels();
  for (int32_t c = 0; c < clip.C; c++) {
    T* const to = patches + (m * clip.C + c) * pixels;
    for (uint32_t p = lane_id(); p < static_cast<uint32_t>(pixels); p += 32) {
      const uint32_t w = clip.w, h = clip.h, line = p / w;
      const int64_t from = start + c * clip.stride_c + line / h * clip.stride_t +
                           line % h * clip.stride_h + p % w * clip.stride_w;
      to[p] = from_float<T>(task.affine_of(c, load_any(clip.data, clip.dtype, from)));
    }
  }
}

// Whether the first rows of a sample's patches fit into the shared memory of `invert_kernel`.
VIDL_HOST_DEVICE bool heads_fit(const Rows& rows) {
  return rows.N <= kSharedBytes / int64_t{sizeof(int32_t)};
}

// One warp per sample lists the rows of each patch, from the last row to the first, so that every
// list ascends.
__global__ void __launch_bounds__(32) invert_kernel(Rows rows,
                                                    int32_t* __restrict__ first,   // [B, N]
                                                    int32_t* __restrict__ next) {  // [total]
  constexpr uint32_t kAll = 0xFFFFFFFFu;
  DYNAMIC_SHARED(int32_t, memory);
  const int64_t b = blockIdx.x, lane = lane_id();
  int32_t* const row = first + b * rows.N;
  int32_t* const heads = heads_fit(rows) ? memory : row;
  for (int64_t n = lane; n < rows.N; n += 32) heads[n] = -1;
  __syncwarp();
  int64_t begin = b * rows.K, end = begin + rows.K;
  if (rows.cu_seqlens != nullptr) {  // samples that overlap would write the same rows
    const bool ascend = __all_sync(kAll, offsets_ascend(rows, lane, 32));
    begin = ascend ? rows.cu_seqlens[b] : 0;
    end = ascend ? rows.cu_seqlens[b + 1] : 0;
  }
  const auto id_of = [&](int64_t m) { return m >= begin ? rows.ids[m] : -1; };
  int64_t id = id_of(end - 32 + lane);
  for (int64_t start = end - 32; start > begin - 32; start -= 32) {
    const int64_t coming = id_of(start - 32 + lane);  // is loaded meanwhile
    const bool real = id >= 0 && id < rows.N;
    const uint32_t same = __match_any_sync(kAll, id), later = same & ~((2u << lane) - 1);
    if (real) {
      next[start + lane] =
          later == 0 ? heads[id] : static_cast<int32_t>(start) + __ffs(static_cast<int>(later)) - 1;
    }
    __syncwarp();  // all lanes have read their heads
    if (real && (same & ((1u << lane) - 1)) == 0) heads[id] = static_cast<int32_t>(start + lane);
    __syncwarp();  // the heads are written
    id = coming;
  }
  if (heads == row) return;
  for (int64_t n = lane; n < rows.N; n += 32) row[n] = heads[n];
}

// sum[i] += x[i], with Kahan's compensation: rounding errors would grow with the rows that show a
// patch, of which there are as many as samples. An infinite sum stays infinite.
template <int n, class T>
__device__ __forceinline__ void add_compensated(const Chunk<T, n>& x, float (&sum)[n],
                                                float (&lost)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    const float term = to_float(x.x[i]) - lost[i], next = sum[i] + term;
    const float rest = (next - sum[i]) - term;
    lost[i] = fabsf(rest) <= FLT_MAX ? rest : 0.0f;
    sum[i] = next;
  }
}

// A block sums the rows of eight neighbouring patches: one patch per warp, n neighbouring columns
// per lane. The rows of a patch in 32 samples are found together, and kInFlight of them are loaded
// and summed together. The order of the sum is that of the rows.
template <int n, class T>
__global__ void __launch_bounds__(kThreads, 4)
    position_grad_kernel(const T* __restrict__ grad_out,  // [total, C]
                         Rows rows, Inverse inverse,
                         float* __restrict__ grad_position,  // [N, C]
                         int64_t C, unsigned column_blocks) {
  constexpr int kPatches = kThreads / 32, kInFlight = 8;
  constexpr uint32_t kAll = 0xFFFFFFFFu;
  SHARED(int32_t, heads, [kPatches][32 + 4]);  // of all patches; the padding avoids bank conflicts
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t block = int64_t{blockIdx.x / column_blocks} * kPatches, patch = block + warp;
  const int64_t column = (int64_t{blockIdx.x % column_blocks} * 32 + lane) * n;
  const int64_t from = column < C ? column : 0;  // lanes past the last column read the first
  const auto load = [&](int64_t m) {
    return *reinterpret_cast<const Chunk<T, n>*>(grad_out + m * C + from);
  };
  float sum[n] = {}, lost[n] = {};
  for (int64_t start = 0; start < rows.B; start += 32) {
    int32_t own = -1;  // the first row of this warp's patch in sample start + lane
    if (rows.ids == nullptr) {
      const int64_t row = (start + lane) * rows.N + patch;
      if (row < rows.total && patch < rows.N) own = static_cast<int32_t>(row);
    } else {
      const int64_t b = start + threadIdx.x / kPatches, at = block + threadIdx.x % kPatches;
      const bool real = b < rows.B && at < rows.N;
      heads[threadIdx.x % kPatches][threadIdx.x / kPatches] =
          real ? inverse.first[b * rows.N + at] : -1;
      __syncthreads();  // the heads are there
      own = heads[warp][lane];
      __syncthreads();  // and may be overwritten
    }
    uint32_t matches = __ballot_sync(kAll, own >= 0);
    if (__any_sync(kAll, own >= 0 && rows.ids != nullptr && inverse.next[own] >= 0)) {
      for (; matches != 0; matches &= matches - 1) {
        int32_t m = __shfl_sync(kAll, own, __ffs(static_cast<int>(matches)) - 1);
        for (; m >= 0; m = inverse.next[m]) add_compensated(load(m), sum, lost);
      }
    }
    while (matches != 0) {
      Chunk<T, n> part[kInFlight] = {};  // zeros where rows are missing
#pragma unroll
      for (int j = 0; j < kInFlight; j++) {
        if (matches == 0) continue;
        part[j] = load(__shfl_sync(kAll, own, __ffs(static_cast<int>(matches)) - 1));
        matches &= matches - 1;
      }
      Chunk<float, n> batch = {};
#pragma unroll
      for (int j = 0; j < kInFlight; j++) {
#pragma unroll
        for (int i = 0; i < n; i++) batch.x[i] += to_float(part[j].x[i]);
      }
      add_compensated(batch, sum, lost);
    }
  }
  if (patch >= rows.N || column >= C) return;
  Chunk<float, n> result;
#pragma unroll
  for (int i = 0; i < n; i++) result.x[i] = sum[i];
  *reinterpret_cast<Chunk<float, n>*>(grad_position + patch * C + column) = result;
}

struct Unpacking {
  Clip clip;  // of the gradient, contiguous
  Rows rows;
  Inverse inverse;
  Divider chunks, lines, planes;  // of a line, a plane and a channel of a patch
  int32_t size;                   // of a patch, in chunks
};

// One warp per patch of the clip, n neighbouring numbers of a line per lane. The sum over the rows
// that show the patch has the order of the rows.
template <int n, class T>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const __grid_constant__ Unpacking task,
                  const T* __restrict__ grad_patches,  // [total, numbers]
                  void* __restrict__ video) {          // [B, C, T, H, W]
  const Clip& clip = task.clip;
  const int64_t at = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  if (at >= task.rows.B * task.rows.N) return;
  const int64_t to = corner(clip, {at / task.rows.N, at % task.rows.N});
  int64_t first = at, second = -1;  // rows of the patch
  if (task.rows.ids != nullptr) {
    first = task.inverse.first[at];
    second = first < 0 ? -1 : task.inverse.next[first];
  }
  for (int32_t i = static_cast<int32_t>(lane_id()); i < task.size; i += 32) {
    float sum[n] = {};
    const auto add = [&](int64_t m) {
      const auto part =
          *reinterpret_cast<const Chunk<T, n>*>(grad_patches + (m * task.size + i) * n);
#pragma unroll
      for (int j = 0; j < n; j++) sum[j] += to_float(part.x[j]);
    };
    if (first >= 0) add(first);
    for (int64_t m = second; m >= 0; m = task.inverse.next[m]) add(m);
    const uint32_t line = task.chunks.quotient(i), plane = task.lines.quotient(line);
    const uint32_t channel = task.planes.quotient(plane);
    store_numbers(video, clip.dtype,
                  to + channel * clip.stride_c +
                      (plane - channel * task.planes.divisor) * clip.stride_t +
                      (line - plane * task.lines.divisor) * clip.stride_h +
                      (i - line * task.chunks.divisor) * n,
                  sum);
  }
}

template <class T>
int pack(Packing task, T* patches, T* out, void* stream) {
  const int64_t itemsize = task.clip.dtype == Dtype::kUInt8 ? 1 : 4;
  const int64_t bytes = task.clip.C * task.walk.pitch * itemsize;
  const int64_t fitting = kSharedBytes / std::max<int64_t>(bytes, 1);  // rows
  task.rows_of_warp =
      static_cast<int32_t>(std::clamp<int64_t>(fitting / kPackingWarps, 1, kMostRows));
  const int64_t warps = std::min<int64_t>(fitting > 0 ? fitting : kPackingWarps, kPackingWarps);
  const int64_t rows = warps * (fitting > 0 ? task.rows_of_warp : 1);  // of a block
  const int64_t blocks = (task.rows.total + rows - 1) / rows;
  const auto start = [&](auto kernel, int64_t shared) {
    return launch(kernel, blocks, 32 * warps, shared, stream, task, patches, out);
  };
  if (fitting == 0) return start(pack_large_kernel<T>, 0);
  if (itemsize == 1) return start(pack_kernel<uint8_t, T>, rows * bytes);
  return start(pack_kernel<float, T>, rows * bytes);
}

bool multiples_of_16(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

}  // namespace
}  // namespace vidl

using vidl::Affine;
using vidl::Clip;
using vidl::Dtype;
using vidl::Inverse;
using vidl::Position;
using vidl::Rows;

int vidl_masked_patch_embed_fold_cuda(const void* weight, Dtype dtype, const float* bias,
                                      void* weight_out, float* bias_out, int64_t C, int64_t numbers,
                                      int32_t C_in, const Affine* affine, void* stream) {
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(vidl::fold_kernel<T>, C, vidl::kThreads, 0, stream, static_cast<const T*>(weight),
                  bias, static_cast<T*>(weight_out), bias_out, numbers,
                  static_cast<int32_t>(numbers / C_in), *affine);
  });
}

int vidl_masked_patch_embed_pack_cuda(const Clip* clip, const Rows* rows, const Affine* affine,
                                      const Position* position, void* patches, void* out,
                                      Dtype dtype, void* stream) {
  if (rows->total == 0) return 0;
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kWide = 16 / sizeof(T);
    const int64_t pixels = int64_t{clip->t} * clip->h * clip->w;
    int32_t together = vidl::multiples_of_16({patches}) ? kWide : 1;
    if (together > 1 && pixels % kWide != 0) together = pixels % (kWide / 2) == 0 ? kWide / 2 : 1;
    const vidl::Packing task{
        *clip,
        vidl::walk_of(*clip),
        *rows,
        *affine,
        *position,
        together,
        position->C % kWide == 0 &&
            vidl::multiples_of_16({position->bias, position->space, position->time, out}),
        1};
    return vidl::pack(task, static_cast<T*>(patches), static_cast<T*>(out), stream);
  });
}

int vidl_masked_patch_embed_invert_cuda(const Rows* rows, int32_t* first, int32_t* next,
                                        void* stream) {
  const int64_t shared = vidl::heads_fit(*rows) ? rows->N * int64_t{sizeof(int32_t)} : 0;
  return launch(vidl::invert_kernel, rows->B, 32, shared, stream, *rows, first, next);
}

int vidl_masked_patch_embed_unpack_cuda(const void* grad_patches, Dtype dtype, const Clip* clip,
                                        const Rows* rows, const Inverse* inverse, void* video,
                                        void* stream) {
  constexpr int64_t kPatches = vidl::kThreads / 32;
  const int64_t blocks = (rows->B * rows->N + kPatches - 1) / kPatches;
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = clip->w % kWide == 0 && vidl::multiples_of_16({grad_patches, video});
    const int32_t chunks = clip->w / (wide ? kWide : 1);
    const vidl::Unpacking task{*clip,
                               *rows,
                               *inverse,
                               vidl::Divider(chunks),
                               vidl::Divider(clip->h),
                               vidl::Divider(clip->t),
                               clip->C * clip->t * clip->h * chunks};
    const auto start = [&](auto kernel) {
      return launch(kernel, blocks, vidl::kThreads, 0, stream, task,
                    static_cast<const T*>(grad_patches), video);
    };
    return wide ? start(vidl::unpack_kernel<kWide, T>) : start(vidl::unpack_kernel<1, T>);
  });
}

int vidl_masked_patch_embed_position_grad_cuda(const void* grad_out, Dtype dtype, const Rows* rows,
                                               const Inverse* inverse, float* grad_position,
                                               int64_t C, void* stream) {
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWide = 8 / sizeof(T);  // 16 bytes would leave too few blocks
    const bool wide = C % kWide == 0 && vidl::multiples_of_16({grad_out, grad_position});
    const int64_t columns = 32 * (wide ? kWide : 1), column_blocks = (C + columns - 1) / columns;
    constexpr int64_t kPatches = vidl::kThreads / 32;
    const int64_t blocks = (rows->N + kPatches - 1) / kPatches * column_blocks;
    const auto start = [&](auto kernel) {
      return launch(kernel, blocks, vidl::kThreads, 0, stream, static_cast<const T*>(grad_out),
                    *rows, *inverse, grad_position, C, static_cast<unsigned>(column_blocks));
    };
    return wide ? start(vidl::position_grad_kernel<kWide, T>)
                : start(vidl::position_grad_kernel<1, T>);
  });
}
