// masked_patch_loss: one pass over the masked patches forward, and one backward. Schema:
// kernels/masked_patch_loss/op.py.
//
// A warp computes one patch. It copies the pixels, in the order of the clip's memory, and the
// prediction to shared memory, 16 bytes per lane if their addresses allow it, with all copies in
// flight at once. Then it computes mean and variance of every channel: for bytes from exact sums of
// integers, for other numbers from differences from the channel's first pixel, in two passes. The
// prediction is compared in its order (t, h, w, C_in): with three channels a lane takes 48 bytes of
// it at a time, so that the channel of every number is known at compile time, otherwise one number.
// The backward overwrites the prediction in shared memory with its result and stores that, 16 bytes
// per lane. Every sum has a fixed order.
//
// Limits: bytes. A patch of n numbers reads n bytes of a uint8 clip, and moves 2 n bytes of a
// 16-bit prediction forward and 4 n backward; about 12 instructions per number. On an H200:
//   VideoMAE-B, 64 clips, 90 % masked   415 MB, 87 us forward; 692 MB, 144 us backward
//   SMAUG, 64 clips of 4 frames, 65 %    75 MB, 16 us forward; 126 MB, 26 us backward
//   MAE, 256 images, 75 %                87 MB, 18 us forward; 145 MB, 30 us backward
#include <algorithm>
#include <type_traits>

#include "masked_patch_loss/interface.h"
#include "patches/device.h"

namespace vidl {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kSharedBytes = 48 * 1024;  // of a block, unless one patch needs more

struct Task {
  Clip clip;
  Walk walk;
  Rows rows;
  Predictions predictions;
  Statistics statistics;
  Channels channels;

  __device__ __forceinline__ int32_t pixels() const { return clip.t * clip.h * clip.w; }
  // Number of means and variances per patch.
  __device__ __forceinline__ int32_t parts() const {
    return statistics == Statistics::kNone ? 0 : statistics == Statistics::kPatch ? 1 : clip.C;
  }
};

// One channel of one patch: a pixel x becomes (x * scale + shift - mean) * factor. Between
// measure() and normalise(), `mean` is the mean of x - first pixel, and `factor` the sum of (x -
// mean of x)^2.
struct alignas(16) Channel {
  float scale, shift, mean, factor;
};

int64_t bytes_of_warp(const Task& task, int64_t pixel, int64_t number) {
  return task.clip.C * (sizeof(Channel) + task.walk.pitch * (pixel + number));
}

template <class T>
__device__ __forceinline__ T warp_sum_of_integers(T x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, d);
  return x;
}

// A word with ones in its first `count` bytes.
__device__ __forceinline__ uint32_t first_bytes(int32_t count) {
  return count >= 4 ? ~0u : (1u << 8 * max(count, 0)) - 1;
}

// A word with ones in the bytes of a channel, if the first byte is number `first` of three
// interleaved channels.
__device__ __forceinline__ constexpr uint32_t bytes_of_channel(int first, int channel) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; i++) bytes |= (first + i) % 3 == channel ? 0xFFu << 8 * i : 0;
  return bytes;
}

// Copies a row from global to shared memory, 16 or 4 bytes at a time or one number. The warp can
// read it after cp_async_commit, cp_async_wait and __syncwarp.
template <class T>
__device__ __forceinline__ void fetch_row(const T* from, T* to, int32_t numbers) {
  const int lane = static_cast<int>(lane_id());
  const auto address = reinterpret_cast<uintptr_t>(from);
  const int32_t wide = address % 16 == 0 ? 16 / sizeof(T) : address % 4 == 0 ? 4 / sizeof(T) : 1;
  const int32_t even = numbers / wide * wide;
  for (int32_t i = lane * wide; i < even && wide > 1; i += 32 * wide) {
    if (wide * sizeof(T) == 16) {
      cp_async_16(to + i, from + i);
    } else {
      cp_async_4(to + i, from + i);
    }
  }
  for (int32_t i = (wide > 1 ? even : 0) + lane; i < numbers; i += 32) to[i] = from[i];
}

// Copies a row from shared to global memory.
template <class T>
__device__ __forceinline__ void write_row(const T* from, T* to, int32_t numbers) {
  constexpr int kWide = 16 / sizeof(T);
  const int lane = static_cast<int>(lane_id());
  const int32_t even = reinterpret_cast<uintptr_t>(to) % 16 == 0 ? numbers / kWide * kWide : 0;
  for (int32_t i = lane * kWide; i < even; i += 32 * kWide) {
    uint4 words;
    memcpy(&words, from + i, 16);
    store_16(to + i, words);
  }
  for (int32_t i = even + lane; i < numbers; i += 32) to[i] = from[i];
}

// The patch of a warp in shared memory. A lane takes kPixels neighbouring pixels in kC channels at
// a time: 48 bytes of a prediction if a clip has three channels, otherwise one number.
template <class Pixel, class T, int kC>
struct Patch {
  static constexpr int kPixels = kC == 1 ? 1 : 16 / sizeof(T);
  static constexpr bool kBytes = std::is_same_v<Pixel, uint8_t>;
  using Numbers = Chunk<T, kPixels * kC>;

  const Task& task;
  const int32_t C, count;  // number of channels, of pixels
  Channel* channels;       // [C]
  Pixel* pixels;           // [C * pitch]
  T* row;                  // [C * pitch]; the prediction takes C * count of it

  __device__ __forceinline__ Patch(const Task& task, unsigned char* memory)
      : task(task), C(task.clip.C), count(task.pixels()) {
    channels = reinterpret_cast<Channel*>(memory);
    pixels = reinterpret_cast<Pixel*>(channels + C);
    row = reinterpret_cast<T*>(pixels + C * task.walk.pitch);
  }

  // Copies row m to shared memory; false if its id is out of range.
  __device__ __forceinline__ bool load(int64_t m) {
    const Place place = locate(task.rows, m);
    if (place.patch < 0) return false;
    const Predictions& p = task.predictions;
    const int64_t first = task.rows.cu_seqlens == nullptr ? place.sample * task.rows.K : 0;
    const int64_t sample = task.rows.cu_seqlens == nullptr ? place.sample : 0;
    stage(task.clip, task.walk, corner(task.clip, place), pixels);
    fetch_row(static_cast<const T*>(p.data) + sample * p.stride_b + (m - first) * p.stride_m, row,
              C * count);
    cp_async_commit();
    cp_async_wait();
    __syncwarp();  // all lanes' pixels and numbers are there
    return true;
  }

  __device__ __forceinline__ float first_of(int32_t c) const {
    return to_float(pixels[task.walk.interleaved ? c : c * task.walk.pitch]);
  }

  // Calls f(x, p) for this lane's pixels from p on, x[kPixels][kC], in the channels from c on.
  template <class F>
  __device__ __forceinline__ void for_pixels(int32_t c, F f) const {
    for (int32_t p = static_cast<int32_t>(lane_id()) * kPixels; p < count; p += 32 * kPixels) {
      Pixel x[kPixels][kC];
      pixels_of<kPixels, kC>(pixels, task.walk, C, p, c, x);
      f(x, p);
    }
  }

  // Adds this lane's bytes of kC channels from c on, and their squares: four bytes per instruction
  // if there are three channels.
  __device__ __forceinline__ void add_bytes(int32_t c, uint32_t (&sum)[kC],
                                            uint32_t (&square)[kC]) const {
    if constexpr (kC == 1) {
      for_pixels(c, [&](const auto& x, int32_t) {
        sum[0] += x[0][0], square[0] += uint32_t{x[0][0]} * x[0][0];
      });
    } else {
      constexpr uint32_t kOnes = 0x01010101u;
      using Words = Chunk<uint32_t, kPixels / 4>;
      const bool interleaved = task.walk.interleaved;
      for (int32_t p = static_cast<int32_t>(lane_id()) * kPixels; p < count; p += 32 * kPixels) {
#pragma unroll
        for (int part = 0; part < 3; part++) {
          const int32_t begin = interleaved ? 3 * p + part * kPixels : p;
          const int32_t end = interleaved ? 3 * count : count;
          const Words words = *reinterpret_cast<const Words*>(
              pixels + begin + (interleaved ? 0 : part * task.walk.pitch));
#pragma unroll
          for (int i = 0; i < kPixels / 4; i++) {
            const uint32_t word = words.x[i] & first_bytes(end - begin - 4 * i);
            if (!interleaved) {
              sum[part] = __dp4a(word, kOnes, sum[part]);
              square[part] = __dp4a(word, word, square[part]);
              continue;
            }
#pragma unroll
            for (int j = 0; j < 3; j++) {
              const uint32_t mine = bytes_of_channel(part * kPixels + 4 * i, j);
              sum[j] = __dp4a(word, mine & kOnes, sum[j]);
              square[j] = __dp4a(word, word & mine, square[j]);
            }
          }
        }
      }
    }
  }

  // Writes mean and sum of squares of kC channels from c on.
  __device__ __forceinline__ void measure(int32_t c) const {
    float mean[kC], squares[kC];
    if constexpr (kBytes) {
      uint32_t sum[kC] = {}, square[kC] = {};
      add_bytes(c, sum, square);
#pragma unroll
      for (int j = 0; j < kC; j++) {
        const int64_t s = warp_sum_of_integers(sum[j]), q = warp_sum_of_integers(square[j]);
        const auto n = static_cast<float>(count);
        mean[j] = static_cast<float>(s - count * static_cast<int64_t>(first_of(c + j))) / n;
        squares[j] = static_cast<float>(count * q - s * s) / n;
      }
    } else {
      float first[kC], sum[kC] = {};
#pragma unroll
      for (int j = 0; j < kC; j++) first[j] = first_of(c + j), squares[j] = 0.0f;
      for_pixels(c, [&](const auto& x, int32_t p) {
#pragma unroll
        for (int i = 0; i < kPixels; i++) {
#pragma unroll
          for (int j = 0; j < kC; j++) sum[j] += p + i < count ? x[i][j] - first[j] : 0.0f;
        }
      });
#pragma unroll
      for (int j = 0; j < kC; j++) mean[j] = warp_sum(sum[j]) / static_cast<float>(count);
      for_pixels(c, [&](const auto& x, int32_t p) {
#pragma unroll
        for (int i = 0; i < kPixels; i++) {
#pragma unroll
          for (int j = 0; j < kC; j++) {
            const float away = p + i < count ? x[i][j] - first[j] - mean[j] : 0.0f;
            squares[j] = fmaf(away, away, squares[j]);
          }
        }
      });
#pragma unroll
      for (int j = 0; j < kC; j++) squares[j] = warp_sum(squares[j]);
    }
    if (lane_id() == 0) {
#pragma unroll
      for (int j = 0; j < kC; j++) channels[c + j] = {1.0f, 0.0f, mean[j], squares[j]};
    }
  }

  // Calls f(c) for every channel, in one lane each.
  template <class F>
  __device__ __forceinline__ void for_channels(F f) const {
    for (int32_t c = static_cast<int32_t>(lane_id()); c < C; c += 32) f(c);
  }

  // Scale and shift of channel c, relative to the first pixel if the patch is normalised.
  __device__ __forceinline__ Channel differences(int32_t c) const {
    if (task.statistics == Statistics::kChannel) return {1.0f, -first_of(c), 0.0f, 1.0f};
    float shift = task.channels.shift[c];
    if (task.statistics == Statistics::kPatch) shift -= first_of(0);
    return {task.channels.scale[c], shift, 0.0f, 1.0f};
  }

  // Completes the channels from means and squares, and writes the moments of this patch.
  __device__ __forceinline__ void normalise(float* moments) const {
    const auto n = static_cast<float>(count);
    float total = 0.0f;
    for_channels([&](int32_t c) {
      Channel it = differences(c);
      if (task.statistics == Statistics::kChannel) {
        it.mean = channels[c].mean;
        const float var = channels[c].factor / fmaxf(n - 1.0f, 1.0f);
        it.factor = 1.0f / (sqrtf(var) + task.channels.eps[c]);
        moments[2 * c] = it.mean, moments[2 * c + 1] = it.factor;
      } else if (task.statistics == Statistics::kPatch) {
        it.mean = fmaf(it.scale, channels[c].mean, fmaf(first_of(c), it.scale, it.shift));
        it.factor = it.scale * it.scale * channels[c].factor;
        total += it.mean;
      }
      channels[c] = it;
    });
    if (task.statistics == Statistics::kPatch) {
      const float mean = warp_sum(total) / static_cast<float>(C);
      float squares = 0.0f;
      for_channels([&](int32_t c) {
        const float away = channels[c].mean - mean;
        squares += channels[c].factor + n * away * away;
      });
      const float var = warp_sum(squares) / fmaxf(n * static_cast<float>(C) - 1.0f, 1.0f);
      const float factor = 1.0f / sqrtf(var + task.channels.eps[0]);
      for_channels([&](int32_t c) { channels[c].mean = mean, channels[c].factor = factor; });
      if (lane_id() == 0) moments[0] = mean, moments[1] = factor;
    }
  }

  // Completes the channels from the moments of the forward.
  __device__ __forceinline__ void recall(const float* moments) const {
    for_channels([&](int32_t c) {
      Channel it = differences(c);
      if (task.statistics != Statistics::kNone) {
        const int32_t part = task.statistics == Statistics::kPatch ? 0 : c;
        it.mean = moments[2 * part], it.factor = moments[2 * part + 1];
      }
      channels[c] = it;
    });
  }

  // Calls f(numbers, error, valid) for this lane's parts of the prediction: the predicted numbers,
  // their difference from the target, and how many of the kPixels pixels exist.
  template <class F>
  __device__ __forceinline__ void compare(F f) const {
    for (int32_t c = 0; c < C; c += kC) {
      Channel channel[kC];
#pragma unroll
      for (int j = 0; j < kC; j++) channel[j] = channels[c + j];
      for_pixels(c, [&](const auto& x, int32_t p) {
        Numbers* const at = reinterpret_cast<Numbers*>(row + p * C + c);
        Numbers numbers = *at;
        float error[kPixels * kC];
#pragma unroll
        for (int i = 0; i < kPixels * kC; i++) {
          const Channel& it = channel[i % kC];
          const float away = fmaf(to_float(x[i / kC][i % kC]), it.scale, it.shift) - it.mean;
          error[i] = fmaf(-away, it.factor, to_float(numbers.x[i]));
        }
        f(at, error, count - p);
      });
    }
  }
};

template <class Pixel, class T>
__device__ __forceinline__ unsigned char* memory_of_warp(const Task& task) {
  DYNAMIC_SHARED(unsigned char, memory);
  const int64_t bytes = sizeof(Channel) + task.walk.pitch * (sizeof(Pixel) + sizeof(T));
  return memory + threadIdx.x / 32 * bytes * task.clip.C;
}

template <class Pixel, class T, int kC>
__global__ void __launch_bounds__(kMaxWarps * 32)
    forward_kernel(const __grid_constant__ Task task,
                   float* __restrict__ losses,     // [total]
                   float* __restrict__ moments) {  // [total, parts, 2]
  const bool fits = offsets_fit(task.rows);
  const int64_t m = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (m >= task.rows.total) return;
  moments += m * task.parts() * 2;
  Patch<Pixel, T, kC> patch(task, memory_of_warp<Pixel, T>(task));
  if (!fits || !patch.load(m)) {
    write_nan(moments, task.parts() * 2, lane_id(), 32);
    write_nan(losses + m, 1, lane_id(), 32);
    return;
  }
  if (task.statistics != Statistics::kNone) {
    for (int32_t c = 0; c < patch.C; c += kC) patch.measure(c);
    __syncwarp();  // lane 0 has left means and squares
  }
  patch.normalise(moments);
  __syncwarp();  // every channel is complete
  float sum = 0.0f;
  patch.compare([&](auto*, const auto& error, int32_t valid) {
#pragma unroll
    for (int i = 0; i < patch.kPixels * kC; i++) {
      if (i / kC < valid) sum = fmaf(error[i], error[i], sum);
    }
  });
  sum = warp_sum(sum);
  if (lane_id() == 0) losses[m] = sum / static_cast<float>(patch.C * patch.count);
}

template <class Pixel, class T, int kC>
__global__ void __launch_bounds__(kMaxWarps * 32)
    backward_kernel(const __grid_constant__ Task task,
                    const float* __restrict__ grad,     // [total]
                    const float* __restrict__ moments,  // [total, parts, 2]
                    T* __restrict__ out) {              // [total, numbers]
  const bool fits = offsets_fit(task.rows);
  const int64_t m = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (m >= task.rows.total) return;
  Patch<Pixel, T, kC> patch(task, memory_of_warp<Pixel, T>(task));
  const int32_t numbers = patch.C * patch.count;
  if (!fits || !patch.load(m)) return write_nan(out + m * numbers, numbers, lane_id(), 32);
  patch.recall(moments + m * task.parts() * 2);
  __syncwarp();  // every channel is there
  const float factor = 2.0f * grad[m] / static_cast<float>(numbers);
  patch.compare([&](auto* at, const auto& error, int32_t) {
    std::remove_pointer_t<decltype(at)> result;
#pragma unroll
    for (int i = 0; i < patch.kPixels * kC; i++) result.x[i] = from_float<T>(error[i] * factor);
    *at = result;
  });
  __syncwarp();  // all lanes' results are there
  write_row(patch.row, out + m * numbers, numbers);
}

// Calls f(pixel, number, channels): null pointers to the types of a kernel, and its kC as an
// integral_constant.
template <class F>
int with_types(const Task& task, F f) {
  return with_type(task.predictions.dtype, [&](auto* number) {
    const auto with_channels = [&](auto* pixel) {
      if (task.clip.C == 3) return f(pixel, number, std::integral_constant<int, 3>());
      return f(pixel, number, std::integral_constant<int, 1>());
    };
    if (task.clip.dtype == Dtype::kUInt8) return with_channels(static_cast<uint8_t*>(nullptr));
    return with_channels(static_cast<float*>(nullptr));
  });
}

template <class K, class... A>
int start(K kernel, const Task& task, int64_t bytes, void* stream, A... arguments) {
  const int64_t warps = std::min<int64_t>(std::max<int64_t>(kSharedBytes / bytes, 1), kMaxWarps);
  const int64_t blocks = (task.rows.total + warps - 1) / warps;
  return launch(kernel, blocks, warps * 32, warps * bytes, stream, task, arguments...);
}

}  // namespace
}  // namespace vidl

using namespace vidl;

int vidl_masked_patch_loss_cuda(const Clip* clip, const Rows* rows, const Predictions* predictions,
                                Statistics statistics, const Channels* channels, float* losses,
                                float* moments, void* stream) {
  if (rows->total == 0) return 0;
  const Task task{*clip, walk_of(*clip), *rows, *predictions, statistics, *channels};
  return with_types(task, [&](auto* pixel, auto* number, auto channel_count) {
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    using T = std::remove_pointer_t<decltype(number)>;
    return start(forward_kernel<Pixel, T, channel_count()>, task,
                 bytes_of_warp(task, sizeof(Pixel), sizeof(T)), stream, losses, moments);
  });
}

int vidl_masked_patch_loss_bwd_cuda(const float* grad, const float* moments, const Clip* clip,
                                    const Rows* rows, const Predictions* predictions,
                                    Statistics statistics, const Channels* channels, void* out,
                                    void* stream) {
  if (rows->total == 0) return 0;
  const Task task{*clip, walk_of(*clip), *rows, *predictions, statistics, *channels};
  return with_types(task, [&](auto* pixel, auto* number, auto channel_count) {
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    using T = std::remove_pointer_t<decltype(number)>;
    return start(backward_kernel<Pixel, T, channel_count()>, task,
                 bytes_of_warp(task, sizeof(Pixel), sizeof(T)), stream, grad, moments,
                 static_cast<T*>(out));
  });
}
