// masked_patch_embed: forward and backward on the CPU, and the host side of the CUDA kernels in
// cuda.cu. Schema and contract: kernels/masked_patch_embed/op.py.
//
// Only the visible patches are gathered, into the rows of a matrix, which is multiplied with the
// weight: by torch, or on some CPUs in float32 by cpu.h. Bias and position are written to the
// output before and the matmul is added (beta = 1), so that all is summed in float32 and rounded
// once.
//
// A uint8 pixel x of channel c is normalised to (x / 255 - mean_c) / std_c. In 16 bits the matmul
// reads (x - s_c) / 128 with s_c = round(255 mean_c), which is exact. The weight is multiplied by
// 128 / (255 std_c); the difference between s_c and 255 mean_c goes into the bias, by way of the
// rounded weight. In float32 the pixel is normalised as it is packed, also from x - s_c.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/lines.h"
#include "masked_patch_embed/interface.h"
#include "patches/host.h"

namespace vidl {
namespace {

using torch::stable::parallel_for;

constexpr double kPixelScale = 128.0;
constexpr const char* kOp = "masked_patch_embed";

Affine identity() {
  Affine affine = {};
  for (float& scale : affine.scale) scale = 1.0f;
  return affine;
}

// s_c, in the range of a pixel, so that the difference fits the 8 bits of a bfloat16.
double centre_of(double mean) {
  return std::min(std::max(std::nearbyint(255.0 * mean), 0.0), 255.0);
}

void check_weight(const Tensor& video, const Tensor& weight) {
  STD_TORCH_CHECK(
      video.dim() == 5 && weight.dim() == 5 && weight.size(1) == video.size(1),
      "masked_patch_embed: need video [B, C_in, T, H, W] and weight [C, C_in, t, h, w]");
}

void check_channels(const std::vector<double>& mean, const std::vector<double>& std, int32_t C_in) {
  STD_TORCH_CHECK(mean.size() == std.size() && (mean.empty() || int32_t(mean.size()) == C_in),
                  "masked_patch_embed: need ", C_in, " numbers in mean and std");
  STD_TORCH_CHECK(mean.empty() || C_in <= kMaxChannels,
                  "masked_patch_embed: a uint8 clip may have ", kMaxChannels, " channels, got ",
                  C_in);
}

void check_position(const OptionalTensor& bias, const OptionalTensor& time,
                    const OptionalTensor& space, const Clip& clip, int64_t C) {
  const auto check = [&](const OptionalTensor& x, const char* name, int64_t rows) {
    STD_TORCH_CHECK(!x || (x->dim() == 2 && x->size(0) == rows && x->size(1) == C),
                    "masked_patch_embed: need ", name, " [", rows, ", ", C, "]");
  };
  const int64_t P = int64_t{clip.grid_h} * clip.grid_w;
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == C),
                  "masked_patch_embed: need bias [", C, "]");
  STD_TORCH_CHECK(!time || space, "masked_patch_embed: need space where time is given");
  check(time, "time", clip.grid_t);
  check(space, "space", time ? P : P * clip.grid_t);
}

// How pixels are packed if the weight is not folded: normalised.
Affine normalising(const std::vector<double>& mean, const std::vector<double>& std) {
  Affine affine = identity();
  for (size_t c = 0; c < mean.size(); c++) {
    affine.centre[c] = static_cast<float>(centre_of(mean[c]));
    affine.scale[c] = static_cast<float>(1.0 / (255.0 * std[c]));
    affine.shift[c] = static_cast<float>((centre_of(mean[c]) / 255.0 - mean[c]) / std[c]);
  }
  return affine;
}

// How pixels are packed for a folded weight: (x - s_c) / 128.
Affine centring(const std::vector<double>& mean) {
  Affine affine = identity();
  for (size_t c = 0; c < mean.size(); c++) {
    affine.centre[c] = static_cast<float>(centre_of(mean[c]));
    affine.scale[c] = static_cast<float>(1.0 / kPixelScale);
  }
  return affine;
}

// The factor of the weight, and the factor of its sum in the bias.
Affine folding(const std::vector<double>& mean, const std::vector<double>& std) {
  Affine affine = identity();
  for (size_t c = 0; c < mean.size(); c++) {
    affine.scale[c] = static_cast<float>(kPixelScale / (255.0 * std[c]));
    affine.shift[c] = static_cast<float>((centre_of(mean[c]) - 255.0 * mean[c]) / kPixelScale);
  }
  return affine;
}

// `Cpu` and `Cuda` have the same steps: fold, check, pack, Embedding, Products, Lists,
// position_grad, unpack. pack and unpack take `count` rows from row `first` on. An Embedding
// multiplies rows with the weight, Products sum the gradient of the weight, Lists are the rows of
// each patch.
#ifndef VIDL_EMULATED
constexpr int64_t ceil_div(int64_t count, int64_t step) { return (count + step - 1) / step; }

constexpr int64_t kWidest = 16;  // floats in a register, at most

// A matmul of cpu.h: c = a @ b, or c += a @ b.
struct Product {
  const float* a;
  int64_t a_block, a_row, a_depth;  // strides: of a block of rows, of a row, along the depth
  const float* panels;              // of b
  float* c;                         // [rows, c_row]
  int64_t c_row, rows, columns, depth;
  bool add;
};

#define VIDL_SOURCE "masked_patch_embed/cpu.h"
#include "cpu/levels.h"

struct Cpu {
  // Enough rows for the matmul to run at full speed, few enough to stay in the cache.
  static constexpr int64_t kChunk = 1024;
  static constexpr bool kUnpackWritesAll = false;

  // 16-bit matmuls are fast only on CPUs with instructions for them; elsewhere those of torch are
  // several times slower than in float32 (docs/contributors/measured.md).
  static ScalarType matmul_dtype(ScalarType dtype) {
    return dtype == ScalarType::BFloat16 && cpu_multiplies_bf16() ? dtype : ScalarType::Float;
  }

  static void fold(const Tensor& weight, const float* bias, Tensor& weight_out, float* bias_out,
                   const Affine& affine) {
    const int64_t C = weight.size(0), numbers = weight.numel() / std::max<int64_t>(C, 1);
    const int64_t per_channel = numbers / std::max<int64_t>(weight.size(1), 1);
    const Dtype from = dtype_of(weight), to = dtype_of(weight_out);
    parallel_for(0, C, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        float sum = bias == nullptr ? 0.0f : bias[row];
        for (int64_t i = 0; i < numbers; i += per_channel) {
          const int64_t c = std::min<int64_t>(i / per_channel, kMaxChannels - 1);
          sum += affine.shift[c] * fold_line(weight.data_ptr(), from, weight_out.data_ptr(), to,
                                             row * numbers + i, per_channel, affine.scale[c]);
        }
        if (bias_out != nullptr) bias_out[row] = sum;
      }
    });
  }

  static void check(const Rows& rows) { check_offsets(kOp, rows); }

  // Whether cpu.h multiplies `rows` rows. It is for the CPUs with AVX-512 on which MKL, which torch
  // calls, runs its AVX2 code: those of other vendors than Intel. Few rows are not worth the panels
  // of the weight. VIDL_CPU_MKL=1 leaves all matmuls to MKL, 0 none.
  static bool multiplies(ScalarType compute, int64_t rows) {
    static const int64_t fewest = [] {
      constexpr int64_t kNever = INT64_MAX;
      if (const char* forced = std::getenv("VIDL_CPU_MKL")) return forced[0] == '0' ? 1 : kNever;
#if defined(__x86_64__)
      return __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel") ? 64 : kNever;
#else
      return kNever;
#endif
    }();
    return compute == ScalarType::Float && rows >= fewest;
  }

  static int64_t panel() { return VIDL_FOR_THIS_CPU(panel_columns)(); }
  static int64_t block() { return VIDL_FOR_THIS_CPU(block_rows)(); }
  static float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

  static void multiply(const Product& product) {
    const auto tasks = VIDL_FOR_THIS_CPU(multiply_tasks);
    parallel_for(0, VIDL_FOR_THIS_CPU(tasks_of)(product.rows, product.columns), 1,
                 [&](int64_t begin, int64_t end) { tasks(product, begin, end); });
  }

  class Embedding {
   public:
    // For `rows` rows in all; weight: [C, numbers].
    Embedding(const Tensor& weight, int64_t C, int64_t numbers, int64_t rows)
        : columns_(matrix_of(weight, numbers, C, 0, /*transposed=*/true)) {
      if (!multiplies(weight.scalar_type(), rows) || C % kWidest != 0) return;
      panels_ = new_tensor(weight, {ceil_div(C, panel()) * panel(), numbers});
      const auto panels = VIDL_FOR_THIS_CPU(panels_of_transpose);
      parallel_for(0, ceil_div(C, panel()), 1, [&](int64_t begin, int64_t end) {
        panels(floats(weight), C, numbers, floats(*panels_), begin, end);
      });
    }

    // sum = patches @ weight^T, or sum += that.
    void run(Tensor& sum, const Tensor& patches, bool add) const {
      if (!panels_) return addmm(sum, patches, columns_, add ? 1.0 : 0.0);
      const int64_t rows = patches.size(0), numbers = patches.size(1), C = sum.size(1);
      multiply({floats(patches), block() * numbers, numbers, 1, floats(*panels_), floats(sum), C,
                rows, C, numbers, add});
    }

   private:
    Tensor columns_;
    OptionalTensor panels_;
  };

  class Products {
   public:
    // For chunks of at most `rows` rows.
    Products(const Tensor& weight, ScalarType compute, int64_t C, int64_t numbers, int64_t rows)
        : sum_(new_tensor(weight, {C, numbers}, compute)) {
      if (!multiplies(compute, rows)) return;
      columns_ = ceil_div(numbers, kWidest) * kWidest;
      if (columns_ != numbers) sum_ = new_tensor(weight, {C, columns_}, compute);
      panels_ = new_tensor(weight, {ceil_div(numbers, panel()) * panel(), rows}, compute);
      blocks_ = new_tensor(weight, {ceil_div(C, block()) * block(), rows}, compute);
    }

    // Add grad^T @ patches; the first time, to nothing.
    void add(const Tensor& grad, const Tensor& patches, bool first) {
      const int64_t rows = grad.size(0), C = grad.size(1), numbers = patches.size(1);
      if (!panels_) {
        return addmm(sum_, matrix_of(grad, C, rows, 0, /*transposed=*/true), patches,
                     first ? 0.0 : 1.0);
      }
      const auto panels = VIDL_FOR_THIS_CPU(panels_of);
      parallel_for(0, ceil_div(numbers, panel()), 1, [&](int64_t begin, int64_t end) {
        panels(floats(patches), numbers, rows, floats(*panels_), begin, end);
      });
      const auto blocks = VIDL_FOR_THIS_CPU(blocks_of_transpose);
      parallel_for(0, ceil_div(C, block()), 1, [&](int64_t begin, int64_t end) {
        blocks(floats(grad), C, rows, floats(*blocks_), begin, end);
      });
      multiply({floats(*blocks_), block() * rows, 1, block(), floats(*panels_), floats(sum_),
                columns_, C, numbers, rows, !first});
    }

    // [C, numbers]
    Tensor sum(int64_t numbers) {
      return columns_ > numbers ? contiguous_of(torch::stable::narrow(sum_, 1, 0, numbers)) : sum_;
    }

   private:
    Tensor sum_;
    int64_t columns_ = 0;
    OptionalTensor panels_, blocks_;
  };

  static void pack(const Clip& clip, const Rows& rows, const Affine& affine,
                   const Position* position, int64_t first, int64_t count, Tensor& patches,
                   Tensor* out) {
    const std::vector<Place> places = locate(kOp, rows, first, count);
    const int64_t numbers = patches.size(1);
    const Dtype to = dtype_of(patches);
    char* const patch_rows = static_cast<char*>(patches.data_ptr());
    const int64_t patch_bytes = numbers * itemsize(to);
    parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        pack_patch(clip, corner(clip, places[i]), affine, patch_rows + i * patch_bytes, to);
        if (out != nullptr) add_position(*position, places[i].patch, i, *out);
      }
    });
  }

  struct Lists {  // position_grad makes its own, unpack needs none
    Lists(const Rows&, const Tensor&) {}
  };

  // Every thread sums a slice of columns, patch by patch, over the rows that show it, in order.
  static void position_grad(const Tensor& grad_out, const Rows& rows, const Lists&,
                            Tensor& grad_position, int64_t C) {
    const std::vector<Place> places = locate(kOp, rows, 0, rows.total);
    std::vector<int64_t> ends(rows.N + 1), starts(rows.total);
    for (const Place& place : places) ends[place.patch + 1]++;
    for (int64_t n = 0; n < rows.N; n++) ends[n + 1] += ends[n];  // of the rows of patch n
    std::vector<int64_t> next(ends.begin() + 1, ends.end());
    for (int64_t m = rows.total - 1; m >= 0; m--) starts[--next[places[m].patch]] = m * C;
    float* const sums = static_cast<float*>(grad_position.data_ptr());
    const Dtype from = dtype_of(grad_out);
    parallel_for(0, (C + kSlice - 1) / kSlice, 1, [&](int64_t begin, int64_t end) {
      for (int64_t column = begin * kSlice; column < std::min(end * kSlice, C); column += kSlice) {
        for (int64_t n = 0; n < rows.N; n++) {
          sum_lines(grad_out.data_ptr(), from, starts.data() + ends[n], ends[n + 1] - ends[n],
                    column, sums + n * C + column, std::min(kSlice, C - column));
        }
      }
    });
  }

  // Adds rows of patches to the clip. Every thread takes a slice of the patch and visits all rows.
  static void unpack(const Tensor& grad_patches, const Clip& clip, const Rows& rows, const Lists&,
                     int64_t first, int64_t count, Tensor& video) {
    const std::vector<Place> places = locate(kOp, rows, first, count);
    const Dtype from = dtype_of(grad_patches), to = clip.dtype;
    const int64_t lines = int64_t{clip.C} * clip.t * clip.h, numbers = lines * clip.w;
    parallel_for(0, lines, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t start = corner(clip, places[i]);
        for (int64_t line = begin; line < end; line++) {
          const int64_t at = start + line / (clip.t * clip.h) * clip.stride_c +
                             line / clip.h % clip.t * clip.stride_t + line % clip.h * clip.stride_h;
          accumulate_line(grad_patches.data_ptr(), from, i * numbers + line * clip.w,
                          video.data_ptr(), to, at, clip.w);
        }
      }
    });
  }

 private:
  static void pack_patch(const Clip& clip, int64_t start, const Affine& affine, char* to_row,
                         Dtype to) {
    int64_t at = 0;
    for (int32_t c = 0; c < clip.C; c++) {
      const int known = std::min(c, kMaxChannels - 1);
      for (int32_t t = 0; t < clip.t; t++) {
        const int64_t from = start + c * clip.stride_c + t * clip.stride_t;
        pack_plane(clip.data, clip.dtype, from, clip.stride_h, clip.stride_w, clip.h, clip.w,
                   affine.centre[known], affine.scale[known], affine.shift[known], to_row, to, at);
        at += int64_t{clip.h} * clip.w;
      }
    }
  }

  static void add_position(const Position& position, int64_t id, int64_t row, Tensor& out) {
    const int64_t C = position.C, P = position.P;
    add_three(position.bias, position.space, position.space_dtype, id % P * C, position.time,
              position.time_dtype, id / P * C, out.data_ptr(), dtype_of(out), row * C, C);
  }
};
#endif

#if defined(VIDL_CUDA) || defined(VIDL_EMULATED)
struct Cuda {
  static constexpr int64_t kChunk = int64_t{1} << 62;  // one launch for all rows
  static constexpr bool kUnpackWritesAll = true;

  static ScalarType matmul_dtype(ScalarType dtype) { return dtype; }

  static void fold(const Tensor& weight, const float* bias, Tensor& weight_out, float* bias_out,
                   const Affine& affine) {
    const int64_t C = weight.size(0);
    if (C == 0) return;
    check_cuda(vidl_masked_patch_embed_fold_cuda(
        weight.data_ptr(), dtype_of(weight), bias, weight_out.data_ptr(), bias_out, C,
        weight.numel() / C, static_cast<int32_t>(weight.size(1)), &affine, current_stream(weight)));
  }

  static void check(const Rows&) {}  // the kernels limit what they read

  class Embedding {
   public:
    Embedding(const Tensor& weight, int64_t C, int64_t numbers, int64_t)
        : columns_(matrix_of(weight, numbers, C, 0, /*transposed=*/true)) {}

    void run(Tensor& sum, const Tensor& patches, bool add) const {
      addmm(sum, patches, columns_, add ? 1.0 : 0.0);
    }

   private:
    Tensor columns_;
  };

  class Products {
   public:
    Products(const Tensor& weight, ScalarType compute, int64_t C, int64_t numbers, int64_t)
        : sum_(new_tensor(weight, {C, numbers}, compute)) {}

    void add(const Tensor& grad, const Tensor& patches, bool first) {
      addmm(sum_, matrix_of(grad, grad.size(1), grad.size(0), 0, /*transposed=*/true), patches,
            first ? 0.0 : 1.0);
    }

    Tensor sum(int64_t) { return sum_; }

   private:
    Tensor sum_;
  };

  static void pack(const Clip& clip, const Rows& rows, const Affine& affine,
                   const Position* position, int64_t, int64_t, Tensor& patches, Tensor* out) {
    const Position none = {};
    check_cuda(vidl_masked_patch_embed_pack_cuda(
        &clip, &rows, &affine, position ? position : &none, patches.data_ptr(),
        out ? out->data_ptr() : nullptr, dtype_of(patches), current_stream(patches)));
  }

  class Lists {
   public:
    Lists(const Rows& rows, const Tensor& like) {
      STD_TORCH_CHECK(rows.total <= INT32_MAX, kOp, ": need fewer than 2^31 rows, got ",
                      rows.total);
      if (rows.ids == nullptr) return;
      first_ = new_tensor(like, {rows.B, rows.N}, ScalarType::Int);
      next_ = new_tensor(like, {rows.total}, ScalarType::Int);
      int32_t* const first = static_cast<int32_t*>(first_->data_ptr());
      int32_t* const next = static_cast<int32_t*>(next_->data_ptr());
      inverse_ = {first, next};
      check_cuda(vidl_masked_patch_embed_invert_cuda(&rows, first, next, current_stream(like)));
    }

    const Inverse* inverse() const { return &inverse_; }

   private:
    OptionalTensor first_, next_;
    Inverse inverse_ = {};
  };

  static void position_grad(const Tensor& grad_out, const Rows& rows, const Lists& lists,
                            Tensor& grad_position, int64_t C) {
    check_cuda(vidl_masked_patch_embed_position_grad_cuda(
        grad_out.data_ptr(), dtype_of(grad_out), &rows, lists.inverse(),
        static_cast<float*>(grad_position.data_ptr()), C, current_stream(grad_out)));
  }

  static void unpack(const Tensor& grad_patches, const Clip& clip, const Rows& rows,
                     const Lists& lists, int64_t, int64_t, Tensor& video) {
    check_cuda(vidl_masked_patch_embed_unpack_cuda(grad_patches.data_ptr(), dtype_of(grad_patches),
                                                   &clip, &rows, lists.inverse(), video.data_ptr(),
                                                   current_stream(video)));
  }
};
#endif

// x in `dtype` and contiguous: x itself, or a copy.
Tensor as(const Tensor& x, ScalarType dtype) {
  return contiguous_of(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

template <class Device>
Tensor masked_patch_embed(Tensor video, Tensor weight, OptionalTensor bias, OptionalTensor time,
                          OptionalTensor space, OptionalTensor ids, OptionalTensor cu_seqlens,
                          std::vector<double> mean, std::vector<double> std) {
  const DeviceScope scope(video);
  check_weight(video, weight);
  weight = contiguous_of(weight);
  ids = packed(ids);
  cu_seqlens = packed(cu_seqlens);
  space = packed(space);
  time = packed(time);
  if (bias) bias = as(*bias, ScalarType::Float);
  const Clip clip = clip_of(kOp, video, weight.size(2), weight.size(3), weight.size(4));
  const Rows rows = rows_of(kOp, video, clip, ids, cu_seqlens);
  check_channels(mean, std, clip.C);
  const int64_t C = weight.size(0), numbers = int64_t{clip.C} * clip.t * clip.h * clip.w;
  check_position(bias, time, space, clip, C);
  Device::check(rows);

  const ScalarType dtype = weight.scalar_type(), compute = Device::matmul_dtype(dtype);
  std::vector<int64_t> shape = {rows.total, C};
  if (!cu_seqlens) shape = {rows.B, rows.K, C};
  Tensor result = new_tensor(weight, shape);
  if (rows.total == 0 || C == 0) return result;

  Tensor matrix = weight;  // the weight in the matmul, [C, numbers]
  Affine pixel = normalising(mean, std);
  if (is_16bit(dtype) && (clip.dtype == Dtype::kUInt8 || compute != dtype)) {
    const bool fold = clip.dtype == Dtype::kUInt8;
    matrix = new_tensor(weight, {C, numbers}, compute);
    Tensor folded_bias = new_tensor(weight, {C}, ScalarType::Float);
    Device::fold(weight, static_cast<const float*>(pointer(bias)), matrix,
                 static_cast<float*>(folded_bias.data_ptr()),
                 fold ? folding(mean, std) : identity());
    if (fold) {
      pixel = centring(mean);
      bias = folded_bias;
    }
  }
  const typename Device::Embedding embedding(matrix, C, numbers, rows.total);

  Position position = {};
  position.C = C;
  position.P = space ? space->size(0) : 1;
  position.bias = static_cast<const float*>(pointer(bias));
  position.space = pointer(space);
  position.time = pointer(time);
  if (space) position.space_dtype = dtype_of(*space);
  if (time) position.time_dtype = dtype_of(*time);
  const bool prefill = bias || space;

  const int64_t chunk = std::min(Device::kChunk, rows.total);
  Tensor patches = new_tensor(weight, {chunk, numbers}, compute);
  Tensor sums = compute == dtype ? result : new_tensor(weight, {chunk, C}, compute);
  for (int64_t first = 0; first < rows.total; first += chunk) {
    const int64_t count = std::min(chunk, rows.total - first);
    Tensor a = matrix_of(patches, count, numbers);
    Tensor part = matrix_of(result, count, C, first * C);
    Tensor sum = compute == dtype ? part : matrix_of(sums, count, C);
    Device::pack(clip, rows, pixel, &position, first, count, a, prefill ? &sum : nullptr);
    embedding.run(sum, a, prefill);
    if (compute != dtype) torch::stable::copy_(part, sum);
  }
  return result;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> masked_patch_embed_bwd(Tensor grad_out, Tensor video,
                                                          Tensor weight, OptionalTensor ids,
                                                          OptionalTensor cu_seqlens,
                                                          std::vector<double> mean,
                                                          std::vector<double> std, bool need_video,
                                                          bool need_weight, bool need_position) {
  const DeviceScope scope(video);
  check_weight(video, weight);
  weight = contiguous_of(weight);
  ids = packed(ids);
  cu_seqlens = packed(cu_seqlens);
  const Clip clip = clip_of(kOp, video, weight.size(2), weight.size(3), weight.size(4));
  const Rows rows = rows_of(kOp, video, clip, ids, cu_seqlens);
  check_channels(mean, std, clip.C);
  Device::check(rows);

  const int64_t C = weight.size(0), numbers = int64_t{clip.C} * clip.t * clip.h * clip.w;
  const ScalarType dtype = weight.scalar_type(), compute = Device::matmul_dtype(dtype);
  STD_TORCH_CHECK(grad_out.numel() == rows.total * C && grad_out.scalar_type() == dtype,
                  "masked_patch_embed_bwd: need grad_out of ", rows.total, " rows of ", C);
  grad_out = contiguous_of(grad_out);

  std::optional<typename Device::Lists> lists;
  if (need_position || need_video) lists.emplace(rows, grad_out);
  Tensor grad_position = new_tensor(grad_out, {0}, ScalarType::Float);
  if (need_position) {
    grad_position = new_tensor(grad_out, {rows.N, C}, ScalarType::Float);
    if (rows.N > 0 && C > 0) Device::position_grad(grad_out, rows, *lists, grad_position, C);
  }

  // Several chunks are summed in the dtype of the matmul, so only in float32.
  const int64_t chunk =
      std::max<int64_t>(is_16bit(compute) ? rows.total : std::min(Device::kChunk, rows.total), 1);
  // Calls f(first row, rows of grad_out in the dtype of the matmul) for every chunk.
  const auto in_chunks = [&](auto f) {
    for (int64_t first = 0; first < rows.total; first += chunk) {
      const int64_t count = std::min(chunk, rows.total - first);
      f(first, as(matrix_of(grad_out, count, C, first * C), compute));
    }
  };

  Tensor grad_weight = new_tensor(weight, {0});
  if (need_weight) {
    typename Device::Products products(weight, compute, C, numbers, chunk);
    Tensor patches = new_tensor(weight, {chunk, numbers}, compute);
    in_chunks([&](int64_t first, const Tensor& grad) {
      Tensor a = matrix_of(patches, grad.size(0), numbers);
      Device::pack(clip, rows, normalising(mean, std), nullptr, first, grad.size(0), a, nullptr);
      products.add(grad, a, first == 0);
    });
    grad_weight = rows.total == 0
                      ? torch::stable::new_zeros(weight, weight.sizes())
                      : torch::stable::view(as(products.sum(numbers), dtype), weight.sizes());
  }

  Tensor grad_video = new_tensor(video, {0});
  if (need_video) {
    const std::vector<int64_t> shape = {rows.B, video.size(1), video.size(2), video.size(3),
                                        video.size(4)};
    grad_video = Device::kUnpackWritesAll && rows.total > 0
                     ? new_tensor(video, shape)
                     : torch::stable::new_zeros(video, shape);
    Clip target = clip_of(kOp, grad_video, clip.t, clip.h, clip.w);
    const Tensor matrix = matrix_of(as(weight, compute), C, numbers);
    Tensor grad_patches = new_tensor(weight, {chunk, numbers}, compute);
    in_chunks([&](int64_t first, const Tensor& grad) {
      Tensor part = matrix_of(grad_patches, grad.size(0), numbers);
      addmm(part, grad, matrix, 0.0);
      Device::unpack(part, target, rows, *lists, first, grad.size(0), grad_video);
    });
  }
  return {grad_video, grad_weight, grad_position};
}

}  // namespace
}  // namespace vidl

#ifdef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("masked_patch_embed_emulated", TORCH_BOX(&vidl::masked_patch_embed<vidl::Cuda>));
  m.impl("masked_patch_embed_bwd_emulated", TORCH_BOX(&vidl::masked_patch_embed_bwd<vidl::Cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("masked_patch_embed", TORCH_BOX(&vidl::masked_patch_embed<vidl::Cpu>));
  m.impl("masked_patch_embed_bwd", TORCH_BOX(&vidl::masked_patch_embed_bwd<vidl::Cpu>));
}
#ifdef VIDL_CUDA
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  m.impl("masked_patch_embed", TORCH_BOX(&vidl::masked_patch_embed<vidl::Cuda>));
  m.impl("masked_patch_embed_bwd", TORCH_BOX(&vidl::masked_patch_embed_bwd<vidl::Cuda>));
}
#endif
#endif
