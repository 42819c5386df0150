// masked_patch_embed: fold, pack (gather and normalise), and the two scatters of the backward. The
// matmuls between them are torch's (op.cpp). Schema: kernels/masked_patch_embed/op.py.
//
// Limits, for 17408 rows of 768 uint8 pixels and C = 768 in bf16:
//   pack      reads 13.4 MB of visible pixels (31.5 MB in 64-byte sectors), writes 26.7 MB of
//             patches and 26.7 MB of positions, 18 us on an H200; a warp writes 16 neighbouring
//             bytes per lane, and reads the pixels for them together if there are three channels
//   fold      reads and writes the weight once: 2.4 MB
//   position  reads grad_out once, 26.7 MB, and the ids N / 8 * C / 256 times from L2
//   unpack    reads grad_patches once, writes the clip once
#include <algorithm>
#include <cfloat>
#include <initializer_list>
#include <type_traits>

#include "masked_patch_embed/interface.h"
#include "patches/device.h"

namespace vidl {
namespace {

constexpr int kThreads = 256;
constexpr int kUnpackThreads = 128;
constexpr int64_t kSharedBytes = 48 * 1024;  // of a packing block
constexpr int kPackingWarps = 4;             // of a block: a few rows of each, in many blocks
constexpr int kMostRows = 4;                 // that a warp packs

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
  bool wide_patches, wide_position;  // whether rows can be written 16 bytes at a time
  int32_t rows_of_warp;

  __device__ __forceinline__ int32_t pixels() const { return clip.t * clip.h * clip.w; }
  // Only float clips have more than kMaxChannels channels, with the same numbers for all.
  __device__ __forceinline__ float affine_of(int32_t c, float x) const {
    const int known = min(c, kMaxChannels - 1);
    return fmaf(x - affine.centre[known], affine.scale[known], affine.shift[known]);
  }
};

// sum[i] += table[at + i]; a null table counts as zeros.
template <int n>
__device__ __forceinline__ void add_numbers(const void* table, Dtype dtype, int64_t at,
                                            float (&sum)[n]) {
  if (table == nullptr) return;
  const auto add = [&](const auto* numbers) {
    using Part = Chunk<std::decay_t<decltype(*numbers)>, n>;
    const Part part = *reinterpret_cast<const Part*>(numbers + at);
#pragma unroll
    for (int i = 0; i < n; i++) sum[i] += to_float(part.x[i]);
  };
  if (dtype == Dtype::kFloat32) {
    add(static_cast<const float*>(table));
  } else if (dtype == Dtype::kFloat16) {
    add(static_cast<const fp16*>(table));
  } else {
    add(static_cast<const bf16*>(table));
  }
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
    float shared[n];
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
__global__ void __launch_bounds__(32 * kPackingWarps)
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
    if (!task.wide_patches) {
      write_patch<1>(task, patch, row);
    } else if (task.clip.C == 3) {
      write_colours<kWide>(task, patch, row);
    } else {
      write_patch<kWide>(task, patch, row);
    }
  }
  for (; bad != 0; bad &= bad - 1) {
    write_nan_row(task, first + __ffs(static_cast<int>(bad)) - 1, patches, out);
  }
}

// The same for patches that do not fit into shared memory, one pixel per lane.
template <class T>
__global__ void __launch_bounds__(kThreads)
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

// One block per patch of the clip, n neighbouring numbers of a line per thread. The block selects
// the rows of the patch among those of its sample, 128 at a time, and adds them in order, so that
// the sum for a patch that several rows show is deterministic.
template <int n, class T>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_kernel(const T* __restrict__ grad_patches,  // [total, numbers]
                  Clip clip, Rows rows,
                  void* __restrict__ video) {  // [B, C, T, H, W], contiguous
  constexpr int kWarps = kUnpackThreads / 32;
  SHARED(uint32_t, matches, [2][kWarps]);
  const unsigned N = static_cast<unsigned>(rows.N);
  const int64_t b = blockIdx.x / N;
  const int64_t id = blockIdx.x % N;
  int64_t begin = b * rows.K, end = begin + rows.K;
  if (rows.cu_seqlens != nullptr) {
    begin = within(rows.cu_seqlens[b], rows.total);
    end = within(rows.cu_seqlens[b + 1], rows.total);
  }
  const int64_t to = corner(clip, {b, id});
  const int32_t plane = clip.h * clip.w, channel = clip.t * plane, patch = clip.C * channel;
  int parity = 0;
  for (int32_t start = 0; start < patch; start += kUnpackThreads * n) {
    const int32_t at = start + static_cast<int32_t>(threadIdx.x) * n;
    float sum[n] = {};
    const auto add = [&](int64_t m) {
      if (at >= patch) return;
      const auto part = *reinterpret_cast<const Chunk<T, n>*>(grad_patches + m * patch + at);
#pragma unroll
      for (int i = 0; i < n; i++) sum[i] += to_float(part.x[i]);
    };
    if (rows.ids == nullptr) add(begin + id);
    for (int64_t m = begin; m < end && rows.ids != nullptr; m += kUnpackThreads) {
      const int64_t mine = m + threadIdx.x;
      const uint32_t found = __ballot_sync(0xFFFFFFFFu, mine < end && rows.ids[mine] == id);
      if (lane_id() == 0) matches[parity][threadIdx.x / 32] = found;
      __syncthreads();  // all warps' matches are there
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        for (uint32_t rest = matches[parity][w]; rest != 0; rest &= rest - 1) {
          add(m + 32 * w + __ffs(static_cast<int>(rest)) - 1);
        }
      }
      parity ^= 1;
    }
    if (at >= patch) continue;
    const int64_t target = to + at / channel * clip.stride_c +
                           int64_t{at % channel / plane} * clip.stride_t +
                           int64_t{at % plane / clip.w} * clip.stride_h + at % clip.w;
    if constexpr (n == 1) {
      store_any(video, clip.dtype, target, sum[0]);
    } else {
      Chunk<T, n> result;
#pragma unroll
      for (int i = 0; i < n; i++) result.x[i] = from_float<T>(sum[i]);
      *reinterpret_cast<Chunk<T, n>*>(static_cast<T*>(video) + target) = result;
    }
  }
}

// A block sums 256 columns for eight neighbouring patches: one patch per warp, eight columns per
// lane. The ids pass through shared memory; every warp selects its rows in ascending order.
constexpr int kColumns = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    position_grad_kernel(const T* __restrict__ grad_out,  // [total, C]
                         Rows rows,
                         float* __restrict__ grad_position,  // [N, C]
                         int64_t C, unsigned column_blocks) {
  SHARED(int64_t, ids, [kThreads]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = int64_t{blockIdx.x / column_blocks} * (kThreads / 32) + warp;
  const int64_t column = int64_t{blockIdx.x % column_blocks} * (32 * kColumns) + lane;
  // With Kahan's compensation: rounding errors would grow with the rows that show a patch. An
  // infinite sum stays infinite.
  float sum[kColumns] = {}, lost[kColumns] = {};
  const auto add = [&](int64_t m) {
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int64_t c = column + 32 * i;
      if (c >= C) continue;
      const float term = to_float(grad_out[m * C + c]) - lost[i], next = sum[i] + term;
      const float rest = (next - sum[i]) - term;
      lost[i] = fabsf(rest) <= FLT_MAX ? rest : 0.0f;
      sum[i] = next;
    }
  };
  if (rows.ids == nullptr) {
    for (int64_t m = n; m < rows.total && n < rows.N; m += rows.N) add(m);
  } else {
    for (int64_t start = 0; start < rows.total; start += kThreads) {
      const int64_t mine = start + threadIdx.x;
      ids[threadIdx.x] = mine < rows.total ? rows.ids[mine] : -1;
      __syncthreads();
      for (int group = 0; group < kThreads; group += 32) {
        uint32_t matches = __ballot_sync(0xFFFFFFFFu, ids[group + lane] == n);
        for (; matches != 0; matches &= matches - 1) {
          add(start + group + __ffs(static_cast<int>(matches)) - 1);
        }
      }
      __syncthreads();
    }
  }
  if (n >= rows.N) return;
#pragma unroll
  for (int i = 0; i < kColumns; i++) {
    const int64_t c = column + 32 * i;
    if (c < C) grad_position[n * C + c] = sum[i];
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
    const vidl::Packing task{
        *clip,
        vidl::walk_of(*clip),
        *rows,
        *affine,
        *position,
        pixels % kWide == 0 && vidl::multiples_of_16({patches}),
        position->C % kWide == 0 &&
            vidl::multiples_of_16({position->bias, position->space, position->time, out}),
        1};
    return vidl::pack(task, static_cast<T*>(patches), static_cast<T*>(out), stream);
  });
}

int vidl_masked_patch_embed_unpack_cuda(const void* grad_patches, Dtype dtype, const Clip* clip,
                                        const Rows* rows, void* video, void* stream) {
  const int64_t blocks = rows->B * rows->N;
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWide = 16 / sizeof(T);
    const auto start = [&](auto kernel) {
      return launch(kernel, blocks, vidl::kUnpackThreads, 0, stream,
                    static_cast<const T*>(grad_patches), *clip, *rows, video);
    };
    const bool wide = clip->dtype == dtype && clip->w % kWide == 0 &&
                      vidl::multiples_of_16({grad_patches, video});
    return wide ? start(vidl::unpack_kernel<kWide, T>) : start(vidl::unpack_kernel<1, T>);
  });
}

int vidl_masked_patch_embed_position_grad_cuda(const void* grad_out, Dtype dtype, const Rows* rows,
                                               float* grad_position, int64_t C, void* stream) {
  const int64_t column_blocks = (C + 32 * vidl::kColumns - 1) / (32 * vidl::kColumns);
  const int64_t patches = vidl::kThreads / 32;
  const int64_t blocks = (rows->N + patches - 1) / patches * column_blocks;
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(vidl::position_grad_kernel<T>, blocks, vidl::kThreads, 0, stream,
                  static_cast<const T*>(grad_out), *rows, grad_position, C,
                  static_cast<unsigned>(column_blocks));
  });
}
