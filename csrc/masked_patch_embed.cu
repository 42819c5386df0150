// masked_patch_embed: fold, gather + normalise + pack, and the two scatters of the backward.
// The matrix products between them are cuBLAS's (masked_patch_embed.cpp). Schema: kernels/
// masked_patch_embed/op.py.
//
// Limits, at G1 (M = 17408 rows of kdim = 768 uint8 pixels, D = 768, bf16):
//   pack      reads 13.4 MB of visible pixels (31.5 MB in 64-byte fills), writes 26.7 MB of patches
//             and 26.7 MB of positions: no arithmetic to speak of
//   fold      reads and writes the weight once: 2.4 MB
//   position  reads grad_out once, 26.7 MB, and the ids N / 8 * D / 256 times from L2
//   unpack    reads grad_patches once, writes the clip once
#undef NDEBUG  // device assertions guard the indices in release builds too
#include "device_floats.h"
#include "masked_patch_embed.h"

namespace vidl {
namespace {

constexpr int kThreads = 256;
constexpr int kUnpackThreads = 128;
constexpr int kRowsPerBlock = 4;

__device__ __forceinline__ float load_any(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kUInt8:
      return to_float(static_cast<const uint8_t*>(p)[i]);
    case Dtype::kFloat32:
      return static_cast<const float*>(p)[i];
    case Dtype::kFloat16:
      return to_float(static_cast<const fp16*>(p)[i]);
    default:
      return to_float(static_cast<const bf16*>(p)[i]);
  }
}

__device__ __forceinline__ void store_any(void* p, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(p)[i] = x;
  } else if (dtype == Dtype::kFloat16) {
    static_cast<fp16*>(p)[i] = from_float<fp16>(x);
  } else {
    static_cast<bf16*>(p)[i] = from_float<bf16>(x);
  }
}

struct Place {
  int64_t sample, patch;
};

__device__ Place locate(const Rows& rows, int64_t m) {
  Place place;
  if (rows.cu_seqlens == nullptr) {
    place.sample = m / rows.K;
  } else {
    int64_t low = 0, high = rows.B;  // the last b with cu_seqlens[b] <= m
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (rows.cu_seqlens[middle] <= m ? low : high) = middle;
    }
    place.sample = low;
  }
  place.patch = rows.ids == nullptr ? m % rows.K : rows.ids[m];
  // ids_keep must lie in [0, N)
  assert(place.patch >= 0 && place.patch < rows.N);
  return place;
}

// cu_seqlens must ascend from 0 to M. Called by all threads of one block.
__device__ void check_offsets(const Rows& rows) {
  if (rows.cu_seqlens == nullptr) return;
  assert(rows.cu_seqlens[0] == 0 && rows.cu_seqlens[rows.B] == rows.M);
  for (int64_t b = threadIdx.x; b < rows.B; b += kThreads) {
    assert(rows.cu_seqlens[b] <= rows.cu_seqlens[b + 1]);
  }
}

// The first pixel of a patch, in elements from the start of the clip.
__device__ int64_t corner(const Clip& clip, const Place& place) {
  const int32_t id = static_cast<int32_t>(place.patch);
  const int32_t frame = clip.grid_h * clip.grid_w;
  return place.sample * clip.stride_b + int64_t{id / frame} * clip.t * clip.stride_t +
         int64_t{id % frame / clip.grid_w} * clip.h * clip.stride_h +
         int64_t{id % clip.grid_w} * clip.w * clip.stride_w;
}

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
// A thread moves kVec neighbouring pixels: 16 bytes of Src where the lines of a patch are
// contiguous and aligned, one pixel of any dtype (Src = void) elsewhere.
template <class Src, class T, int kVec>
__device__ __forceinline__ void pack_vector(const Clip& clip, int64_t from, float centre,
                                            float scale, float shift, T* to) {
  if constexpr (kVec == 1) {
    *to = from_float<T>(fmaf(load_any(clip.data, clip.dtype, from) - centre, scale, shift));
  } else {
    static_assert(kVec * sizeof(Src) == 16, "one 16-byte load");
    const uint4 words = load_16(static_cast<const Src*>(clip.data) + from);
    alignas(16) Src in[kVec];
    alignas(16) T packed[kVec];
    memcpy(in, &words, 16);
#pragma unroll
    for (int i = 0; i < kVec; i++)
      packed[i] = from_float<T>(fmaf(to_float(in[i]) - centre, scale, shift));
    if constexpr (kVec * sizeof(T) >= 16) {
#pragma unroll
      for (int i = 0; i < int(kVec * sizeof(T) / 16); i++) {
        uint4 out;
        memcpy(&out, reinterpret_cast<const char*>(packed) + 16 * i, 16);
        store_16(reinterpret_cast<char*>(to) + 16 * i, out);
      }
    } else {
      uint2 out;
      memcpy(&out, packed, 8);
      *reinterpret_cast<uint2*>(to) = out;
    }
  }
}

template <class Src, class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Clip clip, Rows rows, Affine affine, Position position,
                T* __restrict__ patches,  // [M, kdim]
                T* __restrict__ out) {    // [M, D] or null
  const int64_t first = blockIdx.x * int64_t{kRowsPerBlock};
  const int count =
      rows.M - first < kRowsPerBlock ? static_cast<int>(rows.M - first) : kRowsPerBlock;
  if (first == 0) check_offsets(rows);
  SHARED(int64_t, corners, [kRowsPerBlock]);
  SHARED(int64_t, ids, [kRowsPerBlock]);
  if (static_cast<int>(threadIdx.x) < count) {
    const Place place = locate(rows, first + threadIdx.x);
    corners[threadIdx.x] = corner(clip, place);
    ids[threadIdx.x] = place.patch;
  }
  __syncthreads();

  const int32_t line = clip.w / kVec;  // vectors in a line, a plane, a channel, a patch
  const int32_t plane = clip.h * line, channel = clip.t * plane, patch = clip.C * channel;
  for (int32_t i = threadIdx.x; i < count * patch; i += kThreads) {
    const int32_t row = i / patch, v = i % patch;
    const int32_t c = v / channel;
    const int64_t from =
        corners[row] + c * clip.stride_c + int64_t{v % channel / plane} * clip.stride_t +
        int64_t{v % plane / line} * clip.stride_h + int64_t{v % line} * kVec * clip.stride_w;
    const int known = min(c, kMaxChannels - 1);  // beyond it only float clips, all alike
    pack_vector<Src, T, kVec>(clip, from, affine.centre[known], affine.scale[known],
                              affine.shift[known], patches + ((first + row) * patch + v) * kVec);
  }
  if (out == nullptr) return;

  const int32_t D = static_cast<int32_t>(position.D);
  for (int32_t i = threadIdx.x; i < count * D; i += kThreads) {
    const int32_t row = i / D, d = i % D;
    float sum = position.bias == nullptr ? 0.0f : position.bias[d];
    if (position.space != nullptr) {
      sum += load_any(position.space, position.space_dtype, ids[row] % position.S * D + d);
    }
    if (position.time != nullptr) {
      sum += load_any(position.time, position.time_dtype, ids[row] / position.S * D + d);
    }
    out[(first + row) * D + d] = from_float<T>(sum);
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

template <class Src, class T, int kVec>
int pack(const Clip& clip, const Rows& rows, const Affine& affine, const Position& position,
         void* patches, void* out, void* stream) {
  const int64_t blocks = (rows.M + kRowsPerBlock - 1) / kRowsPerBlock;
  return launch(pack_kernel<Src, T, kVec>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                static_cast<cudaStream_t>(stream), clip, rows, affine, position,
                static_cast<T*>(patches), static_cast<T*>(out));
}

// Whether every line of every patch can be read 16 bytes at a time.
bool aligned(const Clip& clip, int64_t itemsize) {
  const int64_t vec = 16 / itemsize;
  return clip.stride_w == 1 && clip.w % vec == 0 &&
         reinterpret_cast<uintptr_t>(clip.data) % 16 == 0 && clip.stride_b % vec == 0 &&
         clip.stride_c % vec == 0 && clip.stride_t % vec == 0 && clip.stride_h % vec == 0;
}

template <class T>
int pack_to(const Clip& clip, const Rows& rows, const Affine& affine, const Position& position,
            void* patches, void* out, void* stream) {
  const auto run = [&](auto kernel) {
    return kernel(clip, rows, affine, position, patches, out, stream);
  };
  switch (clip.dtype) {
    case Dtype::kUInt8:
      if (aligned(clip, 1)) return run(pack<uint8_t, T, 16>);
      break;
    case Dtype::kFloat32:
      if (aligned(clip, 4)) return run(pack<float, T, 4>);
      break;
    case Dtype::kFloat16:
      if (aligned(clip, 2)) return run(pack<fp16, T, 8>);
      break;
    case Dtype::kBFloat16:
      if (aligned(clip, 2)) return run(pack<bf16, T, 8>);
      break;
  }
  return run(pack<void, T, 1>);
}

// Calls f with a null pointer of the type that `dtype` names.
template <class F>
int with_type(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f(static_cast<float*>(nullptr));
  if (dtype == Dtype::kFloat16) return f(static_cast<fp16*>(nullptr));
  return f(static_cast<bf16*>(nullptr));
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
    return vidl::pack_to<T>(*clip, *rows, *affine, *position, patches, out, stream);
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
