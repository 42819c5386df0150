// select_tokens, forward and backward, on the CPU, and the host side of the CUDA kernels in
// cuda.cu. Schema and contract: kernels/select_tokens/op.py.
//
// The CPU takes three steps, all of them parallel: rank the tokens of every sample by 64-bit keys
// in the total order of the contract; copy the kept rows; sum the dropped rows, in float32 and in
// an order that does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "select_tokens/interface.h"

#ifndef VIDL_EMULATED
#include "select_tokens/cpu.h"
#endif
#include "torch/dtype.h"

namespace vidl {
namespace {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

// The offsets of the samples; x becomes contiguous.
const int32_t* offsets_of(OptionalTensor& x, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Int && x->dim() == 1, "select_tokens: need ",
                  name, " [B + 1] in int32");
  x = contiguous_of(*x);
  return x->const_data_ptr<int32_t>();
}

Numbers numbers_of(const OptionalTensor& x, bool packed) {
  if (!x) return {nullptr, 0, 0};
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == (packed ? 1 : 2),
                  "select_tokens: need scores [B, N] or [total] in float32");
  return {x->const_data_ptr<float>(), packed ? 0 : x->stride(0), x->stride(packed ? 0 : 1)};
}

// x [B, prefix + N, C] or [total, C], as a contiguous copy if the elements of a row are not.
TokenRows rows_of(OptionalTensor& x, bool packed) {
  if (!x) return {nullptr, 0, 0};
  if (x->stride(-1) != 1) x = contiguous_of(*x);
  return {x->data_ptr(), packed ? 0 : x->stride(0), x->stride(-2)};
}

float* floats(Tensor& x, bool exists) { return exists ? x.mutable_data_ptr<float>() : nullptr; }

// In `means` stand the means [B, C] and then the sums of weights [B].
float* sums_of_weights(const Samples& samples, float* means) {
  return means == nullptr ? nullptr : means + samples.B * samples.C;
}

#ifndef VIDL_EMULATED
// Samples with the positions of their rows and numbers.
struct OnHost : Samples {
  int64_t begin(int64_t b) const {
    return cu_seqlens != nullptr ? cu_seqlens[b] : b * (prefix + N);
  }
  int64_t tokens(int64_t b) const { return begin(b + 1) - begin(b) - prefix; }
  int64_t first_kept(int64_t b) const { return cu_kept != nullptr ? cu_kept[b] : b * K; }
  // Where the numbers of a sample begin in an array of the shape of the scores. If packed, that has
  // numbers for the prefix too.
  int64_t scored(int64_t b) const { return cu_seqlens != nullptr ? cu_seqlens[b] + prefix : b * N; }
  const float* in(const Numbers& numbers, int64_t b) const {
    return numbers.data + (cu_seqlens != nullptr ? scored(b) * numbers.token : b * numbers.sample);
  }
  int64_t sample_of(int64_t row) const {
    if (cu_seqlens == nullptr) return row / (prefix + N);
    const int32_t* const end = cu_seqlens + B + 1;
    return std::upper_bound(cu_seqlens, end, static_cast<int32_t>(row)) - cu_seqlens - 1;
  }
  // Where a row of x begins, in elements.
  int64_t start(const TokenRows& x, int64_t b, int64_t row) const {
    return cu_seqlens != nullptr ? row * x.row : b * x.sample + (row - begin(b)) * x.row;
  }
};

// The weighted sum or mean of the dropped rows of every sample, by slices of columns.
void fuse_rows(const OnHost& samples, const TokenRows& x, const Numbers& weights,
               const Selection& out) {
  const int64_t C = samples.C;
  // Whole rows if there are enough samples for all threads; the result is the same.
  const int64_t threads = std::max<int64_t>(get_num_threads(), 1);
  const int64_t width = samples.B >= threads ? std::max<int64_t>(C, 1) : 256;
  const int64_t slices = (C + width - 1) / width;
  parallel_for(0, samples.B * slices, 1, [&](int64_t first, int64_t last) {
    std::vector<float> sums(width), scales;
    std::vector<int64_t> lines;
    for (int64_t item = first; item < last; item++) {
      const int64_t b = item / slices, column = item % slices * width;
      const int64_t columns = std::min(width, C - column);
      const int64_t* const places = out.inverse + samples.scored(b);
      const float* const weight = samples.in(weights, b);
      const int64_t row = samples.begin(b) + samples.prefix;
      scales.clear();
      lines.clear();
      double total = 0.0;
      for (int64_t n = 0; n < samples.tokens(b); n++) {
        const float scale = weight[n * weights.token];
        if (places[n] >= 0 || !std::isfinite(scale)) continue;
        scales.push_back(scale);
        lines.push_back(samples.start(x, b, row + n) + column);
        total += scale;
      }
      add_scaled_lines(x.data, samples.dtype, lines.data(), scales.data(),
                       static_cast<int64_t>(lines.size()), sums.data(), columns);
      const float divisor = static_cast<float>(total);
      if (out.mean != nullptr) {
        for (int64_t c = 0; c < columns; c++) {
          sums[c] = divisor == 0.0f ? 0.0f : sums[c] / divisor;
          out.mean[b * C + column + c] = sums[c];
        }
        out.mass[b] = divisor;
      }
      scale_to(sums.data(), 1.0f, out.tokens, samples.dtype,
               (int64_t{out.offsets[b + 1]} - 1) * C + column, columns);
    }
  });
}

// The gradients of the fused tokens.
struct Fused {
  std::vector<float> grads;  // [B, C]
  std::vector<float> scale;  // [B]: 1, or 1 / (the sum of the weights)
  std::vector<float> shift;  // [B]: the mean times its gradient, subtracted for every weight
};

Fused fused_gradients(const Samples& samples, const SelectionGrad& grad) {
  const int64_t B = samples.B, C = samples.C;
  Fused fused = {std::vector<float>(B * C), std::vector<float>(B, 1.0f), std::vector<float>(B)};
  parallel_for(0, B, grain(C * 4), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      float* const line = fused.grads.data() + b * C;
      widen(grad.tokens, samples.dtype, (int64_t{grad.offsets[b + 1]} - 1) * C, line, C);
      if (grad.mean == nullptr) continue;
      const float sum = grad.mass[b];
      fused.scale[b] = sum == 0.0f ? 0.0f : 1.0f / sum;
      fused.shift[b] = dot(grad.mean, Dtype::kFloat32, b * C, line, C);
    }
  });
  return fused;
}

struct Cpu {
  static void check(const Samples& s) {
    if (s.cu_seqlens == nullptr) return;
    const OnHost samples = {s};
    bool ascending = samples.begin(0) == 0 && samples.begin(samples.B) == samples.total;
    for (int64_t b = 0; b < samples.B; b++) ascending = ascending && samples.tokens(b) >= 0;
    STD_TORCH_CHECK(ascending, "select_tokens: cu_seqlens must ascend from 0 to ", samples.total,
                    ", by at least prefix = ", samples.prefix);
    if (samples.cu_kept == nullptr) return;
    STD_TORCH_CHECK(samples.first_kept(0) == 0 && samples.first_kept(samples.B) == samples.num_kept,
                    "select_tokens: the samples keep ", samples.first_kept(samples.B),
                    " tokens, and num_kept is ", samples.num_kept);
    for (int64_t b = 0; b < samples.B; b++) {
      const int64_t K = samples.first_kept(b + 1) - samples.first_kept(b);
      STD_TORCH_CHECK(K >= 0 && K <= samples.tokens(b), "select_tokens: sample ", b, " has ",
                      samples.tokens(b), " tokens and cannot keep ", K);
    }
  }

  static void select(const Samples& s, const TokenRows& x, const Numbers& ranks,
                     const Numbers& weights, bool by_score, const Selection& out, const Tensor&) {
    const OnHost samples = {s};
    const int64_t B = samples.B, prefix = samples.prefix, extra = prefix + samples.fuses;
    const int64_t count = samples.num_kept + B * extra;
    std::vector<int64_t> sources(count, -1);  // where rows begin in x; -1: is fused
    for (int64_t b = 0; b <= B; b++) {
      out.offsets[b] = static_cast<int32_t>(samples.first_kept(b) + b * extra);
    }
    parallel_for(0, B, 1, [&](int64_t first, int64_t last) {
      std::vector<uint64_t> keys;
      for (int64_t b = first; b < last; b++) {
        const int64_t row = samples.begin(b), to = out.offsets[b];
        const int64_t K = samples.first_kept(b + 1) - samples.first_kept(b);
        int64_t* const ids = out.ids + samples.first_kept(b);
        int64_t* const inverse = out.inverse + samples.scored(b);
        if (samples.cu_seqlens != nullptr) std::fill(inverse - prefix, inverse, -1);
        rank(samples.in(ranks, b), ranks.token, samples.tokens(b), K, by_score, keys, ids, inverse);
        for (int64_t i = 0; i < prefix; i++) sources[to + i] = samples.start(x, b, row + i);
        for (int64_t k = 0; k < K; k++) {
          sources[to + prefix + k] = samples.start(x, b, row + prefix + ids[k]);
        }
      }
    });

    const int64_t size = itemsize(samples.dtype), bytes = samples.C * size;
    const char* const from = static_cast<const char*>(x.data);
    char* const tokens = static_cast<char*>(out.tokens);
    // Without channels the pointers may be null, which memcpy does not allow.
    parallel_for(0, bytes > 0 ? count : 0, grain(bytes), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        if (sources[row] < 0) continue;
        std::memcpy(tokens + row * bytes, from + sources[row] * size, bytes);
      }
    });
    if (samples.fuses) fuse_rows(samples, x, weights, out);
  }

  static void backward(const Samples& s, const SelectionGrad& grad, const TokenRows& x,
                       const Numbers& weights, void* grad_x, float* grad_weights, const Tensor&) {
    const OnHost samples = {s};
    const int64_t C = samples.C, prefix = samples.prefix, bytes = C * itemsize(samples.dtype);
    const Dtype dtype = samples.dtype;
    const Fused fused = samples.fuses ? fused_gradients(samples, grad) : Fused{};
    const char* const from = static_cast<const char*>(grad.tokens);
    char* const to = static_cast<char*>(grad_x);
    parallel_for(0, samples.total, grain(bytes), [&](int64_t first, int64_t last) {
      int64_t b = first < last ? samples.sample_of(first) : 0;
      for (int64_t row = first; row < last; row++) {
        while (row >= samples.begin(b + 1)) b++;
        const int64_t n = row - samples.begin(b) - prefix, scored = samples.scored(b) + n;
        const int64_t place = n < 0 ? n : grad.inverse[scored];
        const bool stays = n < 0 || place >= 0;
        const float weight =
            stays || !samples.fuses ? 0.0f : samples.in(weights, b)[n * weights.token];
        const bool used = !stays && samples.fuses && std::isfinite(weight);
        if (to != nullptr && stays) {
          std::memcpy(to + row * bytes, from + (grad.offsets[b] + prefix + place) * bytes, bytes);
        } else if (to != nullptr && used) {
          scale_to(fused.grads.data() + b * C, weight * fused.scale[b], to, dtype, row * C, C);
        } else if (to != nullptr) {
          std::memset(to + row * bytes, 0, bytes);
        }
        if (grad_weights == nullptr || (n < 0 && samples.cu_seqlens == nullptr)) continue;
        float product = 0.0f;
        if (used) {
          const float* const line = fused.grads.data() + b * C;
          product = dot(x.data, dtype, samples.start(x, b, row), line, C);
          product = (product - fused.shift[b]) * fused.scale[b];
        }
        grad_weights[scored] = product;
      }
    });
  }
};
#endif

#if defined(VIDL_CUDA) || defined(VIDL_EMULATED)
struct Cuda {
  static void check(const Samples& samples) {  // the kernels limit the offsets
    const int64_t longest = samples.cu_seqlens != nullptr ? samples.total : samples.N;
    STD_TORCH_CHECK(longest <= int64_t{1} << 30 && samples.C <= int64_t{1} << 30,
                    "select_tokens: need samples of at most 2^30 tokens of at most 2^30 elements, "
                    "got ",
                    longest, " and ", samples.C);
  }

  static void select(const Samples& samples, const TokenRows& x, const Numbers& ranks,
                     const Numbers& weights, bool by_score, const Selection& out,
                     const Tensor& tokens) {
    check_cuda(vidl_select_tokens_cuda(&samples, &x, &ranks, &weights, by_score, &out,
                                       current_stream(tokens)));
  }

  static void backward(const Samples& samples, const SelectionGrad& grad, const TokenRows& x,
                       const Numbers& weights, void* grad_x, float* grad_weights,
                       const Tensor& tokens) {
    check_cuda(vidl_select_tokens_bwd_cuda(&samples, &grad, &x, &weights, grad_x, grad_weights,
                                           current_stream(tokens)));
  }
};
#endif

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> select_tokens(
    Tensor given, Tensor ranks, OptionalTensor weights, OptionalTensor cu_seqlens,
    OptionalTensor cu_kept, int64_t keep, int64_t prefix, std::string order, std::string fuse) {
  const DeviceScope scope(given);
  const bool packed = cu_seqlens.has_value();
  STD_TORCH_CHECK(given.dim() == (packed ? 2 : 3) && cu_kept.has_value() == packed &&
                      weights.has_value() == !fuse.empty() && prefix >= 0,
                  "select_tokens: need x [B, prefix + N, C], or [total, C] with offsets");
  OptionalTensor x = given;
  const TokenRows rows = rows_of(x, packed);
  const Numbers rank_by = numbers_of(ranks, packed), weight = numbers_of(weights, packed);
  Samples samples = {};
  samples.cu_seqlens = offsets_of(cu_seqlens, "cu_seqlens");
  samples.cu_kept = offsets_of(cu_kept, "cu_kept");
  samples.B = packed ? cu_seqlens->size(0) - 1 : x->size(0);
  samples.N = packed ? 0 : ranks.size(1);
  samples.K = packed ? 0 : keep;
  samples.total = packed ? x->size(0) : samples.B * x->size(1);
  samples.num_kept = packed ? keep : samples.B * keep;
  samples.prefix = prefix;
  samples.C = x->size(-1);
  samples.dtype = dtype_of(*x);
  STD_TORCH_CHECK(samples.dtype != Dtype::kUInt8, "select_tokens: need a floating-point x");
  samples.fuses = !fuse.empty();
  if (packed) {
    STD_TORCH_CHECK(cu_kept->size(0) == samples.B + 1 && ranks.size(0) == samples.total &&
                        (samples.B > 0 || samples.total == 0),
                    "select_tokens: need scores [total] and offsets [B + 1]");
  } else {
    STD_TORCH_CHECK(ranks.size(0) == samples.B && samples.N + prefix == x->size(1) && keep >= 0 &&
                        keep <= samples.N,
                    "select_tokens: need scores [B, N] for x [B, prefix + N, C], and keep <= N");
  }
  STD_TORCH_CHECK(!samples.fuses || weights->sizes().equals(ranks.sizes()),
                  "select_tokens: need weights in the shape of the scores");
  Device::check(samples);

  const int64_t B = samples.B, C = samples.C, extra = prefix + samples.fuses;
  const std::vector<int64_t> shape = {B, keep + extra, C}, ids_shape = {B, keep};
  const bool divides = fuse == "mean";
  Tensor tokens = packed ? new_tensor(*x, {keep + B * extra, C}) : new_tensor(*x, shape);
  Tensor ids = packed ? new_tensor(*x, {keep}, ScalarType::Long)
                      : new_tensor(*x, ids_shape, ScalarType::Long);
  Tensor inverse = new_tensor(*x, ranks.sizes(), ScalarType::Long);
  Tensor offsets = B == 0 ? torch::stable::new_zeros(*x, {1}, ScalarType::Int)
                          : new_tensor(*x, {B + 1}, ScalarType::Int);
  // Without channels no kernel writes the sums of weights.
  Tensor means = divides && C == 0 ? torch::stable::new_zeros(*x, {B}, ScalarType::Float)
                                   : new_tensor(*x, {divides ? B * (C + 1) : 0}, ScalarType::Float);
  float* const mean = floats(means, divides);
  const Selection out = {tokens.data_ptr(),
                         ids.mutable_data_ptr<int64_t>(),
                         inverse.mutable_data_ptr<int64_t>(),
                         offsets.mutable_data_ptr<int32_t>(),
                         mean,
                         sums_of_weights(samples, mean)};
  Device::select(samples, rows, rank_by, weight, order == "score", out, tokens);
  return {tokens, ids, inverse, offsets, means};
}

template <class Device>
std::tuple<Tensor, Tensor> select_tokens_bwd(Tensor grad_tokens, OptionalTensor x,
                                             OptionalTensor weights, Tensor inverse,
                                             OptionalTensor cu_seqlens, Tensor offsets,
                                             OptionalTensor means, int64_t prefix, std::string fuse,
                                             bool need_x, bool need_weights) {
  const DeviceScope scope(grad_tokens);
  const bool packed = cu_seqlens.has_value();
  grad_tokens = contiguous_of(grad_tokens);
  inverse = contiguous_of(inverse);
  const TokenRows rows = rows_of(x, packed);
  Samples samples = {};
  samples.cu_seqlens = offsets_of(cu_seqlens, "cu_seqlens");
  samples.B = offsets.size(0) - 1;
  samples.N = packed ? 0 : inverse.size(1);
  samples.total = packed ? inverse.size(0) : samples.B * (prefix + samples.N);
  samples.prefix = prefix;
  samples.C = grad_tokens.size(-1);
  samples.dtype = dtype_of(grad_tokens);
  samples.fuses = !fuse.empty();
  const int64_t rows_of_tokens = packed ? grad_tokens.size(0) : samples.B * grad_tokens.size(1);
  samples.num_kept = rows_of_tokens - samples.B * (prefix + samples.fuses);
  STD_TORCH_CHECK((!packed || cu_seqlens->size(0) == samples.B + 1) &&
                      (samples.B > 0 || samples.total == 0) &&
                      weights.has_value() == samples.fuses && (x.has_value() || !need_weights),
                  "select_tokens_bwd: need the outputs of select_tokens");
  STD_TORCH_CHECK(!samples.fuses || weights->sizes().equals(inverse.sizes()),
                  "select_tokens_bwd: need weights in the shape of the scores");
  Device::check(samples);
  const std::vector<int64_t> shape = {samples.B, prefix + samples.N, samples.C};
  Tensor grad_x = !need_x  ? new_tensor(grad_tokens, {0})
                  : packed ? new_tensor(grad_tokens, {samples.total, samples.C})
                           : new_tensor(grad_tokens, shape);
  Tensor grad_weights = need_weights ? new_tensor(inverse, inverse.sizes(), ScalarType::Float)
                                     : new_tensor(inverse, {0}, ScalarType::Float);
  STD_TORCH_CHECK(
      means.has_value() == (fuse == "mean") &&
          (!means || (means->is_contiguous() && means->numel() == samples.B * (samples.C + 1))),
      "select_tokens_bwd: need the means of select_tokens with fuse 'mean' alone");
  float* const mean = means ? means->mutable_data_ptr<float>() : nullptr;
  OptionalTensor ends = offsets;
  const SelectionGrad grad = {grad_tokens.data_ptr(), inverse.const_data_ptr<int64_t>(),
                              offsets_of(ends, "offsets"), mean, sums_of_weights(samples, mean)};
  Device::backward(samples, grad, need_weights ? rows : TokenRows{}, numbers_of(weights, packed),
                   need_x ? grad_x.data_ptr() : nullptr, floats(grad_weights, need_weights),
                   grad_tokens);
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace vidl

#ifdef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("select_tokens_emulated", TORCH_BOX(&vidl::select_tokens<vidl::Cuda>));
  m.impl("select_tokens_bwd_emulated", TORCH_BOX(&vidl::select_tokens_bwd<vidl::Cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&vidl::select_tokens<vidl::Cpu>));
  m.impl("select_tokens_bwd", TORCH_BOX(&vidl::select_tokens_bwd<vidl::Cpu>));
}
#ifdef VIDL_CUDA
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  m.impl("select_tokens", TORCH_BOX(&vidl::select_tokens<vidl::Cuda>));
  m.impl("select_tokens_bwd", TORCH_BOX(&vidl::select_tokens_bwd<vidl::Cuda>));
}
#endif
#endif
