// select_tokens on the CPU: forward and backward. Schema and contract: kernels/select_tokens/op.py.
//
// Three steps, each in parallel: rank the tokens of every sample by 64-bit keys whose order is the
// total order of the contract; copy the kept rows; add up the dropped ones, in float32 and in an
// order that does not depend on the threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_lines.h"
#include "torch_device.h"

namespace vidl {
namespace {

using torch::stable::get_num_threads;
using torch::stable::new_empty;
using torch::stable::parallel_for;

// One number for each token of a sample; strides count elements.
struct Numbers {
  const float* data;
  int64_t sample, token;
};

// B samples of rows of x; each begins with its prefix. Packed where there are offsets.
struct Samples {
  const int32_t* offsets;  // [B + 1] or null
  int64_t B, rows;         // `rows` of each sample, without offsets
  int64_t prefix;

  int64_t begin(int64_t b) const { return offsets != nullptr ? offsets[b] : b * rows; }
  int64_t tokens(int64_t b) const { return begin(b + 1) - begin(b) - prefix; }
  int64_t total() const { return begin(B); }
  // Where a sample's numbers begin in an array in the shape of the scores: packed ones have a
  // number for the prefix too.
  int64_t scored(int64_t b) const {
    return offsets != nullptr ? offsets[b] + prefix : b * (rows - prefix);
  }
  const float* in(const Numbers& numbers, int64_t b) const {
    return numbers.data + (offsets != nullptr ? scored(b) * numbers.token : b * numbers.sample);
  }
  int64_t sample_of(int64_t row) const {
    if (offsets == nullptr) return row / rows;
    return std::upper_bound(offsets, offsets + B + 1, static_cast<int32_t>(row)) - offsets - 1;
  }
};

bool fuses(const std::string& fuse) { return !fuse.empty(); }

Dtype dtype_of(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || is_16bit(dtype),
                  "select_tokens: need x in float32, float16 or bfloat16");
  return dtype == ScalarType::Float  ? Dtype::kFloat32
         : dtype == ScalarType::Half ? Dtype::kFloat16
                                     : Dtype::kBFloat16;
}

const int32_t* offsets_of(const OptionalTensor& x, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Int && x->is_contiguous() && x->dim() == 1,
                  "select_tokens: need ", name, " [B + 1] in int32, contiguous");
  return x->const_data_ptr<int32_t>();
}

Numbers numbers_of(const Tensor& x, bool packed) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == (packed ? 1 : 2),
                  "select_tokens: need scores [B, N] or [total] in float32");
  return {x.const_data_ptr<float>(), packed ? 0 : x.stride(0), x.stride(packed ? 0 : 1)};
}

void check_offsets(const Samples& samples, const int32_t* kept, int64_t total, int64_t num_kept) {
  const int32_t* const offsets = samples.offsets;
  bool ascending = offsets[0] == 0 && offsets[samples.B] == total;
  for (int64_t b = 0; b < samples.B; b++) ascending = ascending && samples.tokens(b) >= 0;
  STD_TORCH_CHECK(ascending, "select_tokens: cu_seqlens must ascend from 0 to ", total,
                  ", by at least prefix = ", samples.prefix);
  STD_TORCH_CHECK(kept[0] == 0 && kept[samples.B] == num_kept, "select_tokens: the samples keep ",
                  kept[samples.B], " tokens, and num_kept is ", num_kept);
  for (int64_t b = 0; b < samples.B; b++) {
    const int64_t K = int64_t{kept[b + 1]} - kept[b];
    STD_TORCH_CHECK(K >= 0 && K <= samples.tokens(b), "select_tokens: sample ", b, " has ",
                    samples.tokens(b), " tokens and cannot keep ", K);
  }
}

// ---- Rank ---------------------------------------------------------------------------------------

// Keys have the order of the contract, the best the largest: by score, then by the lower index.
uint64_t key_of(float score, int64_t n) {
  uint32_t bits = 0;
  if (!std::isnan(score)) {
    if (score == 0.0f) score = 0.0f;  // not -0.0f
    std::memcpy(&bits, &score, sizeof(bits));
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  }
  return uint64_t{bits} << 32 | (0xffffffffu - static_cast<uint32_t>(n));
}

// Writes the K kept tokens of one sample, and each token's place among them or -1.
void rank(const float* scores, int64_t stride, int64_t N, int64_t K, bool by_score,
          std::vector<uint64_t>& keys, int64_t* ids, int64_t* inverse) {
  keys.resize(N);
  for (int64_t n = 0; n < N; n++) keys[n] = key_of(scores[n * stride], n);
  const auto best = [](uint64_t a, uint64_t b) { return a > b; };
  if (K > 0 && K < N) std::nth_element(keys.begin(), keys.begin() + K - 1, keys.end(), best);
  if (by_score) std::sort(keys.begin(), keys.begin() + K, best);
  std::fill(inverse, inverse + N, -1);
  for (int64_t k = 0; k < K; k++) {
    ids[k] = 0xffffffffu - static_cast<uint32_t>(keys[k]);
    inverse[ids[k]] = k;
  }
  if (by_score) return;
  int64_t k = 0;
  for (int64_t n = 0; n < N; n++) {
    if (inverse[n] < 0) continue;
    ids[k] = n;
    inverse[n] = k++;
  }
}

// ---- Lines of numbers ---------------------------------------------------------------------------

constexpr int kRows = 8;      // added at a time, as a tree: fewer sums to load, smaller errors
constexpr int kLanes = 16;    // separate sums, so that a loop over them is vectorised
constexpr int kBlock = 1024;  // numbers whose products are added in float32, before a double

template <class S>
VIDL_INLINE void add_rows(const S* const* rows, const float* scales, float* sums, int64_t count) {
  const S *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const S *e = rows[4], *f = rows[5], *g = rows[6], *h = rows[7];
  for (int64_t i = 0; i < count; i++) {
    const float ab = static_cast<float>(a[i]) * scales[0] + static_cast<float>(b[i]) * scales[1];
    const float cd = static_cast<float>(c[i]) * scales[2] + static_cast<float>(d[i]) * scales[3];
    const float ef = static_cast<float>(e[i]) * scales[4] + static_cast<float>(f[i]) * scales[5];
    const float gh = static_cast<float>(g[i]) * scales[6] + static_cast<float>(h[i]) * scales[7];
    sums[i] += (ab + cd) + (ef + gh);
  }
}

// sums[i] = sum over rows r of scales[r] * data[starts[r] + i]
VIDL_EACH_CPU void add_scaled_lines(const void* data, Dtype dtype, const int64_t* starts,
                                    const float* scales, int64_t lines, float* sums,
                                    int64_t count) {
  for (int64_t i = 0; i < count; i++) sums[i] = 0.0f;
  VIDL_FLOATING(dtype, S, {
    int64_t r = 0;
    for (; r + kRows <= lines; r += kRows) {
      const S* rows[kRows];
      float by[kRows];
      for (int j = 0; j < kRows; j++) {
        rows[j] = static_cast<const S*>(data) + starts[r + j];
        by[j] = scales[r + j];
      }
      add_rows(rows, by, sums, count);
    }
    for (; r < lines; r++) {
      const S* row = static_cast<const S*>(data) + starts[r];
      const float scale = scales[r];
      for (int64_t i = 0; i < count; i++) sums[i] += static_cast<float>(row[i]) * scale;
    }
  })
}

// to[at + i] = from[i] * scale
VIDL_EACH_CPU void scale_to(const float* from, float scale, void* to, Dtype dtype, int64_t at,
                            int64_t count){VIDL_FLOATING(dtype, T,
                                                         {
                                                           T* line = static_cast<T*>(to) + at;
                                                           for (int64_t i = 0; i < count; i++)
                                                             line[i] =
                                                                 static_cast<T>(from[i] * scale);
                                                         })}

// to[i] = from[start + i]
VIDL_EACH_CPU void widen(const void* from, Dtype dtype, int64_t start, float* to, int64_t count) {
  VIDL_FLOATING(dtype, S, {
    const S* line = static_cast<const S*>(from) + start;
    for (int64_t i = 0; i < count; i++) to[i] = static_cast<float>(line[i]);
  })
}

template <class S>
VIDL_INLINE double dot_block(const S* a, const float* b, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; j++) sums[j] += static_cast<float>(a[i + j]) * b[i + j];
  }
  double sum = 0.0;
  for (; i < count; i++) sum += static_cast<double>(static_cast<float>(a[i])) * b[i];
  for (float lane : sums) sum += lane;
  return sum;
}

// The product of a[start + i] and b[i], summed.
VIDL_EACH_CPU float dot(const void* a, Dtype dtype, int64_t start, const float* b, int64_t count) {
  double sum = 0.0;
  VIDL_FLOATING(dtype, S, {
    const S* line = static_cast<const S*>(a) + start;
    for (int64_t i = 0; i < count; i += kBlock) {
      sum += dot_block(line + i, b + i, std::min<int64_t>(kBlock, count - i));
    }
  })
  return static_cast<float>(sum);
}

// Rows for one thread: enough bytes to be worth it.
int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, 65536 / (row_bytes + 1)); }

// ---- Forward ------------------------------------------------------------------------------------

// The weighted sums or means of the dropped rows, one for each sample, by slices of columns.
void fuse_rows(const Tensor& x, const Samples& samples, const Numbers& weights,
               const int64_t* inverse, const std::vector<int64_t>& starts, const int32_t* offsets,
               void* tokens, float* mean, float* mass) {
  const int64_t C = x.size(-1);
  const Dtype dtype = dtype_of(x);
  // Whole rows where there are samples enough for all threads; the result is the same.
  const int64_t threads = std::max<int64_t>(get_num_threads(), 1);
  const int64_t width = samples.B >= threads ? std::max<int64_t>(C, 1) : 256;
  const int64_t slices = (C + width - 1) / width;
  parallel_for(0, samples.B * slices, 1, [&](int64_t first, int64_t last) {
    std::vector<float> sums(width), scales;
    std::vector<int64_t> lines;
    for (int64_t item = first; item < last; item++) {
      const int64_t b = item / slices, column = item % slices * width;
      const int64_t columns = std::min(width, C - column);
      const int64_t* const places = inverse + samples.scored(b);
      const float* const weight = samples.in(weights, b);
      const int64_t row = samples.begin(b) + samples.prefix;
      scales.clear();
      lines.clear();
      double total = 0.0;
      for (int64_t n = 0; n < samples.tokens(b); n++) {
        const float scale = weight[n * weights.token];
        if (places[n] >= 0 || !std::isfinite(scale)) continue;
        scales.push_back(scale);
        lines.push_back(starts[row + n] + column);
        total += scale;
      }
      add_scaled_lines(x.data_ptr(), dtype, lines.data(), scales.data(),
                       static_cast<int64_t>(lines.size()), sums.data(), columns);
      const float divisor = static_cast<float>(total);
      if (mean != nullptr) {
        for (int64_t c = 0; c < columns; c++) {
          sums[c] = divisor == 0.0f ? 0.0f : sums[c] / divisor;
          mean[b * C + column + c] = sums[c];
        }
        mass[b] = divisor;
      }
      scale_to(sums.data(), 1.0f, tokens, dtype, (int64_t{offsets[b + 1]} - 1) * C + column,
               columns);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_tokens(
    Tensor x, Tensor ranks, OptionalTensor weights, OptionalTensor cu_seqlens,
    OptionalTensor cu_kept, int64_t keep, int64_t prefix, std::string order, std::string fuse) {
  const bool packed = cu_seqlens.has_value();
  STD_TORCH_CHECK(x.dim() == (packed ? 2 : 3) && cu_kept.has_value() == packed &&
                      weights.has_value() == fuses(fuse) && prefix >= 0,
                  "select_tokens: need x [B, prefix + N, C], or [total, C] with offsets");
  if (x.stride(-1) != 1) x = torch::stable::contiguous(x);
  const Numbers rank_by = numbers_of(ranks, packed);
  const int64_t C = x.size(-1), B = packed ? cu_seqlens->size(0) - 1 : x.size(0);
  const Samples samples = {offsets_of(cu_seqlens, "cu_seqlens"), B, packed ? 0 : x.size(1), prefix};
  const int32_t* const kept = offsets_of(cu_kept, "cu_kept");
  const int64_t total = packed ? x.size(0) : B * x.size(1);
  if (packed) {
    STD_TORCH_CHECK(cu_kept->size(0) == B + 1 && ranks.size(0) == total,
                    "select_tokens: need scores [total] and offsets [B + 1]");
    check_offsets(samples, kept, total, keep);
  } else {
    STD_TORCH_CHECK(ranks.size(0) == B && ranks.size(1) + prefix == x.size(1) && keep >= 0 &&
                        keep <= ranks.size(1),
                    "select_tokens: need scores [B, N] for x [B, prefix + N, C], and keep <= N");
  }

  const int64_t extra = prefix + fuses(fuse);
  const int64_t rows = packed ? keep + B * extra : B * (keep + extra);
  Tensor tokens = packed ? new_empty(x, {rows, C}) : new_empty(x, {B, keep + extra, C});
  Tensor ids =
      packed ? new_empty(x, {keep}, ScalarType::Long) : new_empty(x, {B, keep}, ScalarType::Long);
  Tensor inverse = new_empty(x, ranks.sizes(), ScalarType::Long);
  Tensor offsets = new_empty(x, {B + 1}, ScalarType::Int);
  const bool divides = fuse == "mean";
  Tensor mean =
      divides ? new_empty(x, {B, C}, ScalarType::Float) : new_empty(x, {0}, ScalarType::Float);
  Tensor mass = new_empty(x, {divides ? B : 0}, ScalarType::Float);

  int64_t* const all_ids = ids.mutable_data_ptr<int64_t>();
  int64_t* const all_places = inverse.mutable_data_ptr<int64_t>();
  int32_t* const ends = offsets.mutable_data_ptr<int32_t>();
  const auto first_kept = [&](int64_t b) { return packed ? int64_t{kept[b]} : b * keep; };
  std::vector<int64_t> starts(total), sources(rows, -1);  // where rows begin in x; -1: is fused
  for (int64_t b = 0; b <= B; b++) ends[b] = static_cast<int32_t>(first_kept(b) + b * extra);
  parallel_for(0, B, 1, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> keys;
    for (int64_t b = first; b < last; b++) {
      const int64_t row = samples.begin(b), N = samples.tokens(b);
      const int64_t K = first_kept(b + 1) - first_kept(b);
      const int64_t start = packed ? row * x.stride(0) : b * x.stride(0);
      for (int64_t i = 0; i < prefix + N; i++) starts[row + i] = start + i * x.stride(-2);
      int64_t* const sample_ids = all_ids + first_kept(b);
      if (packed) std::fill(all_places + row, all_places + row + prefix, -1);
      rank(samples.in(rank_by, b), rank_by.token, N, K, order == "score", keys, sample_ids,
           all_places + samples.scored(b));
      for (int64_t i = 0; i < prefix; i++) sources[ends[b] + i] = starts[row + i];
      for (int64_t k = 0; k < K; k++) {
        sources[ends[b] + prefix + k] = starts[row + prefix + sample_ids[k]];
      }
    }
  });

  const int64_t size = itemsize(dtype_of(x)), bytes = C * size;
  const char* const from = static_cast<const char*>(x.data_ptr());
  char* const to = static_cast<char*>(tokens.data_ptr());
  parallel_for(0, rows, grain(bytes), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      if (sources[row] >= 0) std::memcpy(to + row * bytes, from + sources[row] * size, bytes);
    }
  });
  if (fuses(fuse)) {
    fuse_rows(x, samples, numbers_of(*weights, packed), all_places, starts, ends, to,
              divides ? mean.mutable_data_ptr<float>() : nullptr,
              divides ? mass.mutable_data_ptr<float>() : nullptr);
  }
  return {tokens, ids, inverse, offsets, mean, mass};
}

// ---- Backward -----------------------------------------------------------------------------------

// What the fused token of each sample passes back.
struct Fused {
  std::vector<float> grads;  // [B, C]
  std::vector<float> scale;  // [B]: 1, or 1 / (the sum of the weights)
  std::vector<float> shift;  // [B]: the mean times its gradient, which each weight's loses
};

Fused fused_gradients(const Tensor& grad_tokens, const int32_t* ends, int64_t B, const Tensor& mean,
                      const Tensor& mass, bool divides) {
  const int64_t C = grad_tokens.size(-1);
  Fused fused = {std::vector<float>(B * C), std::vector<float>(B, 1.0f), std::vector<float>(B)};
  parallel_for(0, B, grain(C * 4), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
      float* const grad = fused.grads.data() + b * C;
      widen(grad_tokens.data_ptr(), dtype_of(grad_tokens), (int64_t{ends[b + 1]} - 1) * C, grad, C);
      if (!divides) continue;
      const float sum = mass.const_data_ptr<float>()[b];
      fused.scale[b] = sum == 0.0f ? 0.0f : 1.0f / sum;
      fused.shift[b] = dot(mean.data_ptr(), Dtype::kFloat32, b * C, grad, C);
    }
  });
  return fused;
}

std::tuple<Tensor, Tensor> select_tokens_bwd(Tensor grad_tokens, OptionalTensor x,
                                             OptionalTensor weights, Tensor inverse,
                                             OptionalTensor cu_seqlens, Tensor offsets, Tensor mean,
                                             Tensor mass, int64_t prefix, std::string fuse,
                                             bool need_x, bool need_weights) {
  const bool packed = cu_seqlens.has_value();
  grad_tokens = torch::stable::contiguous(grad_tokens);
  inverse = torch::stable::contiguous(inverse);
  if (x && x->stride(-1) != 1) x = torch::stable::contiguous(*x);
  const int64_t C = grad_tokens.size(-1), B = offsets.size(0) - 1;
  const Samples samples = {offsets_of(cu_seqlens, "cu_seqlens"), B,
                           packed ? 0 : prefix + inverse.size(1), prefix};
  const int64_t total = packed ? inverse.size(0) : B * samples.rows;
  STD_TORCH_CHECK(samples.total() == total && weights.has_value() == fuses(fuse) &&
                      (x.has_value() || !need_weights),
                  "select_tokens_bwd: need what select_tokens returned");
  Tensor grad_x = !need_x  ? new_empty(grad_tokens, {0})
                  : packed ? new_empty(grad_tokens, {total, C})
                           : new_empty(grad_tokens, {B, samples.rows, C});
  Tensor grad_weights = need_weights ? new_empty(inverse, inverse.sizes(), ScalarType::Float)
                                     : new_empty(inverse, {0}, ScalarType::Float);

  const int32_t* const ends = offsets_of(offsets, "offsets");
  const int64_t* const places = inverse.const_data_ptr<int64_t>();
  const Numbers weight = fuses(fuse) ? numbers_of(*weights, packed) : Numbers{nullptr, 0, 0};
  Fused fused;
  if (fuses(fuse)) {
    fused = fused_gradients(grad_tokens, ends, B, mean, mass, fuse == "mean");
  }
  const Dtype dtype = dtype_of(grad_tokens);
  const int64_t bytes = C * itemsize(dtype);
  const char* const from = static_cast<const char*>(grad_tokens.data_ptr());
  char* const to = need_x ? static_cast<char*>(grad_x.data_ptr()) : nullptr;
  float* const to_weights = need_weights ? grad_weights.mutable_data_ptr<float>() : nullptr;
  parallel_for(0, total, grain(bytes), [&](int64_t first, int64_t last) {
    int64_t b = first < last ? samples.sample_of(first) : 0;
    for (int64_t row = first; row < last; row++) {
      while (row >= samples.begin(b + 1)) b++;
      const int64_t n = row - samples.begin(b) - prefix, scored = samples.scored(b) + n;
      const int64_t place = n < 0 ? n : places[scored];
      const bool stays = n < 0 || place >= 0;
      const float given =
          stays || weight.data == nullptr ? 0.0f : samples.in(weight, b)[n * weight.token];
      const bool used = !stays && weight.data != nullptr && std::isfinite(given);
      if (need_x && stays) {
        std::memcpy(to + row * bytes, from + (ends[b] + prefix + place) * bytes, bytes);
      } else if (need_x && used) {
        scale_to(fused.grads.data() + b * C, given * fused.scale[b], to, dtype, row * C, C);
      } else if (need_x) {
        std::memset(to + row * bytes, 0, bytes);
      }
      if (!need_weights || (n < 0 && !packed)) continue;
      float grad = 0.0f;
      if (used) {
        const int64_t start =
            packed ? row * x->stride(0) : b * x->stride(0) + (prefix + n) * x->stride(1);
        grad = dot(x->data_ptr(), dtype, start, fused.grads.data() + b * C, C);
        grad = (grad - fused.shift[b]) * fused.scale[b];
      }
      to_weights[scored] = grad;
    }
  });
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace vidl

STABLE_TORCH_LIBRARY_IMPL(vidl, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&vidl::select_tokens));
  m.impl("select_tokens_bwd", TORCH_BOX(&vidl::select_tokens_bwd));
}
