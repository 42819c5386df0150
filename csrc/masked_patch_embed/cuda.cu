// masked_patch_embed: fold, gather + normalise + pack, and the two scatters of the backward.
// The matrix products between them are cuBLAS's (masked_patch_embed/op.cpp). Schema: kernels/
// masked_patch_embed/op.py.
//
// Limits, at G1 (M = 17408 rows of kdim = 768 uint8 pixels, D = 768, bf16):
//   pack      reads 13.4 MB of visible pixels (31.5 MB in 64-byte fills), writes 26.7 MB of patches
//             and 26.7 MB of positions, 18 us on an H200; planar or channels-last, a warp reads and
//             writes 16 bytes a lane, side by side
//   fold      reads and writes the weight once: 2.4 MB
//   position  reads grad_out once, 26.7 MB, and the ids N / 8 * D / 256 times from L2
//   unpack    reads grad_patches once, writes the clip once
#undef NDEBUG  // device assertions guard the indices in release builds too
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "masked_patch_embed/interface.h"
#include "patches/device.h"

namespace vidl {
namespace {

constexpr int kThreads = 256;
constexpr int kUnpackThreads = 128;
constexpr int64_t kSharedBytes = 48 * 1024;  // of a block that packs

// ---- fold --------------------------------------------------------------------------------------
// One block an output channel d. The sum is taken in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const T* __restrict__ weight,    // [D, kdim]
                const float* __restrict__ bias,  // [D] or null
                T* __restrict__ weight_out,      // [D, kdim]
                float* __restrict__ bias_out,    // [D]
                int64_t kdim, int32_t per_channel, Affine affine) {
  SHARED(float, partial, [kThreads / 32]);
  const int64_t d = blockIdx.x;
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < kdim; k += kThreads) {
    const int32_t c = static_cast<int32_t>(k) / per_channel;
    const T folded = from_float<T>(to_float(weight[d * kdim + k]) * affine.scale[c]);
    weight_out[d * kdim + k] = folded;
    sum = fmaf(to_float(folded), affine.shift[c], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = bias == nullptr ? 0.0f : bias[d];
    for (int i = 0; i < kThreads / 32; i++) total += partial[i];
    bias_out[d] = total;
  }
}

// ---- pack --------------------------------------------------------------------------------------
struct Packing {
  Clip clip;
  Walk walk;
  Rows rows;
  Affine affine;
  Position position;
  bool wide_patches, wide_position;  // whether rows can be written 16 bytes at a time

  __device__ __forceinline__ int32_t pixels() const { return clip.t * clip.h * clip.w; }
  // Beyond the channels that are known only float clips have more, all alike.
  __device__ __forceinline__ float affine_of(int32_t c, float x) const {
    const int known = min(c, kMaxChannels - 1);
    return fmaf(x - affine.centre[known], affine.scale[known], affine.shift[known]);
  }
};

// sum[i] += table[at + i]; a table that is not there counts as zeros.
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

// A warp writes the position of a patch to its row of `out`, n columns a lane.
template <int n, class T>
__device__ __forceinline__ void write_position(const Position& position, int64_t id, T* out) {
  const uint32_t frame = static_cast<uint32_t>(position.S), patch = static_cast<uint32_t>(id);
  const int64_t space = patch % frame * position.D, time = patch / frame * position.D;
  for (int64_t d = lane_id() * n; d < position.D; d += 32 * n) {
    float sum[n] = {};
    add_numbers(position.bias, Dtype::kFloat32, d, sum);
    add_numbers(position.space, position.space_dtype, space + d, sum);
    add_numbers(position.time, position.time_dtype, time + d, sum);
    Chunk<T, n> result;
#pragma unroll
    for (int i = 0; i < n; i++) result.x[i] = from_float<T>(sum[i]);
    *reinterpret_cast<Chunk<T, n>*>(out + d) = result;
  }
}

// A warp writes a staged patch to its row of patches, n pixels of a channel a lane.
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

// A warp has a row. Its pixels pass through shared memory: they are read in the order of the clip's
// memory and written in that of the weight (C, t, h, w), each 16 bytes a lane wherever possible.
template <class Pixel, class T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Packing task,
                                                        T* __restrict__ patches,  // [M, kdim]
                                                        T* __restrict__ out) {    // [M, D] or null
  constexpr int kWide = 16 / sizeof(T);
  if (blockIdx.x == 0) check_offsets(task.rows);
  const int warp = threadIdx.x / 32;
  const int64_t m = blockIdx.x * int64_t{blockDim.x / 32} + warp;
  if (m >= task.rows.M) return;
  DYNAMIC_SHARED(Pixel, memory);
  Pixel* const patch = memory + warp * task.clip.C * task.walk.pitch;
  const Place place = locate(task.rows, m);
  stage(task.clip, task.walk, corner(task.clip, place), patch);
  cp_async_commit();
  if (out != nullptr) {
    T* const row = out + m * task.position.D;
    if (task.wide_position) {
      write_position<kWide>(task.position, place.patch, row);
    } else {
      write_position<1>(task.position, place.patch, row);
    }
  }
  cp_async_wait();
  __syncwarp();  // all lanes' pixels are there
  T* const row = patches + m * task.pixels() * task.clip.C;
  if (task.wide_patches) {
    write_patch<kWide>(task, patch, row);
  } else {
    write_patch<1>(task, patch, row);
  }
}

// The same for patches that do not fit into shared memory, one pixel a lane.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_large_kernel(const __grid_constant__ Packing task,
                      T* __restrict__ patches,  // [M, kdim]
                      T* __restrict__ out) {    // [M, D] or null
  const Clip& clip = task.clip;
  if (blockIdx.x == 0) check_offsets(task.rows);
  const int64_t m = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (m >= task.rows.M) return;
  const Place place = locate(task.rows, m);
  if (out != nullptr) write_position<1>(task.position, place.patch, out + m * task.position.D);
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

// ---- backward ----------------------------------------------------------------------------------
// One block a patch of the clip. It walks over its sample's rows in order, so that a patch shown
// twice adds up the same way in every run.
template <class T>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_kernel(const T* __restrict__ grad_patches,  // [M, kdim]
                  Clip clip, Rows rows,
                  void* __restrict__ video) {  // [B, C, T, H, W], contiguous
  const unsigned N = static_cast<unsigned>(rows.N);
  const int64_t b = blockIdx.x / N, n = blockIdx.x % N;
  const int64_t begin = rows.cu_seqlens == nullptr ? b * rows.K : rows.cu_seqlens[b];
  const int64_t end = rows.cu_seqlens == nullptr ? begin + rows.K : rows.cu_seqlens[b + 1];
  const int64_t to = corner(clip, {b, n});
  const int32_t plane = clip.h * clip.w, channel = clip.t * plane, patch = clip.C * channel;
  for (int32_t k = threadIdx.x; k < patch; k += kUnpackThreads) {
    float sum = 0.0f;
    if (rows.ids == nullptr) {
      sum = to_float(grad_patches[(begin + n) * patch + k]);
    } else {
      for (int64_t m = begin; m < end; m++) {
        if (rows.ids[m] == n) sum += to_float(grad_patches[m * patch + k]);
      }
    }
    store_any(video, clip.dtype,
              to + k / channel * clip.stride_c + int64_t{k % channel / plane} * clip.stride_t +
                  int64_t{k % plane / clip.w} * clip.stride_h + k % clip.w,
              sum);
  }
}

// A block sums for eight neighbouring patches, one a warp, over 256 columns, eight a lane. The ids
// pass through shared memory; each warp picks its rows out of them in ascending order.
constexpr int kColumns = 8;

template <class T>
__global__ void __launch_bounds__(kThreads)
    position_grad_kernel(const T* __restrict__ grad_out,  // [M, D]
                         Rows rows,
                         float* __restrict__ grad_position,  // [N, D]
                         int64_t D, unsigned column_blocks) {
  SHARED(int64_t, ids, [kThreads]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = int64_t{blockIdx.x / column_blocks} * (kThreads / 32) + warp;
  const int64_t column = int64_t{blockIdx.x % column_blocks} * (32 * kColumns) + lane;
  float sum[kColumns] = {};
  const auto add = [&](int64_t m) {
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int64_t d = column + 32 * i;
      if (d < D) sum[i] += to_float(grad_out[m * D + d]);
    }
  };
  if (rows.ids == nullptr) {
    for (int64_t m = n; m < rows.M && n < rows.N; m += rows.N) add(m);
  } else {
    for (int64_t start = 0; start < rows.M; start += kThreads) {
      const int64_t mine = start + threadIdx.x;
      ids[threadIdx.x] = mine < rows.M ? rows.ids[mine] : -1;
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
    const int64_t d = column + 32 * i;
    if (d < D) grad_position[n * D + d] = sum[i];
  }
}

template <class T>
int pack(const Packing& task, T* patches, T* out, cudaStream_t stream) {
  const int64_t itemsize = task.clip.dtype == Dtype::kUInt8 ? 1 : 4;
  const int64_t bytes = task.clip.C * task.walk.pitch * itemsize;
  const bool fits = bytes <= kSharedBytes;
  const int64_t most = fits ? kSharedBytes / std::max<int64_t>(bytes, 1) : kThreads / 32;
  const int64_t warps = std::min<int64_t>(most, kThreads / 32);
  const dim3 grid(static_cast<unsigned>((task.rows.M + warps - 1) / warps));
  const dim3 block(static_cast<unsigned>(32 * warps));
  const auto start = [&](auto kernel, int64_t shared) {
    return launch(kernel, grid, block, static_cast<size_t>(shared), stream, task, patches, out);
  };
  if (!fits) return start(pack_large_kernel<T>, 0);
  if (itemsize == 1) return start(pack_kernel<uint8_t, T>, warps * bytes);
  return start(pack_kernel<float, T>, warps * bytes);
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

int vidl_fold_cuda(const void* weight, Dtype dtype, const float* bias, void* weight_out,
                   float* bias_out, int64_t D, int64_t kdim, int32_t C, const Affine* affine,
                   void* stream) {
  if (D == 0) return 0;
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(vidl::fold_kernel<T>, dim3(static_cast<unsigned>(D)), dim3(vidl::kThreads), 0,
                  static_cast<cudaStream_t>(stream), static_cast<const T*>(weight), bias,
                  static_cast<T*>(weight_out), bias_out, kdim, static_cast<int32_t>(kdim / C),
                  *affine);
  });
}

int vidl_pack_patches_cuda(const Clip* clip, const Rows* rows, const Affine* affine,
                           const Position* position, void* patches, void* out, Dtype dtype,
                           void* stream) {
  if (rows->M == 0) return 0;
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
        position->D % kWide == 0 &&
            vidl::multiples_of_16({position->bias, position->space, position->time, out})};
    return vidl::pack(task, static_cast<T*>(patches), static_cast<T*>(out),
                      static_cast<cudaStream_t>(stream));
  });
}

int vidl_unpack_patches_cuda(const void* grad_patches, Dtype dtype, const Clip* clip,
                             const Rows* rows, void* video, void* stream) {
  const int64_t blocks = rows->B * rows->N;
  if (blocks == 0) return 0;
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(vidl::unpack_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                  dim3(vidl::kUnpackThreads), 0, static_cast<cudaStream_t>(stream),
                  static_cast<const T*>(grad_patches), *clip, *rows, video);
  });
}

int vidl_position_grad_cuda(const void* grad_out, Dtype dtype, const Rows* rows,
                            float* grad_position, int64_t D, void* stream) {
  const int64_t column_blocks = (D + 32 * vidl::kColumns - 1) / (32 * vidl::kColumns);
  const int64_t patches = vidl::kThreads / 32;
  const int64_t blocks = (rows->N + patches - 1) / patches * column_blocks;
  if (blocks == 0) return 0;
  return vidl::with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(vidl::position_grad_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                  dim3(vidl::kThreads), 0, static_cast<cudaStream_t>(stream),
                  static_cast<const T*>(grad_out), *rows, grad_position, D,
                  static_cast<unsigned>(column_blocks));
  });
}
