// The kernels of select_tokens on small samples, against a sort and loops; every output is watched.
// tests/test_cuda_on_cpu.py also plants bugs in the kernels: this program must find them. Numbers
// are small integers and powers of two, so that results are equal to the bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "select_tokens/interface.h"

namespace {

using vidl::Dtype;
using vidl::Numbers;
using vidl::Samples;
using vidl::Selection;
using vidl::SelectionGrad;
using vidl::TokenRows;

constexpr size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Numbers of a dtype: NaN until they are set.
class Tensor : public Buffer {
 public:
  Tensor(Dtype dtype, size_t n) : Buffer(n * size_of(dtype)), dtype(dtype) {
    std::memset(data(), 0xFF, bytes());
  }
  float operator[](size_t i) const {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data())[i];
    if (dtype == Dtype::kFloat16) return static_cast<const fp16*>(data())[i];
    return static_cast<const bf16*>(data())[i];
  }
  void set(size_t i, float x) {
    if (dtype == Dtype::kFloat32) static_cast<float*>(data())[i] = x;
    if (dtype == Dtype::kFloat16) static_cast<fp16*>(data())[i] = x;
    if (dtype == Dtype::kBFloat16) static_cast<bf16*>(data())[i] = x;
  }
  float* floats() const { return static_cast<float*>(data()); }
  const Dtype dtype;
};

float rounded(Dtype dtype, float x) {
  if (dtype == Dtype::kFloat16) return fp16(x);
  return dtype == Dtype::kFloat32 ? x : float(bf16(x));
}

enum Fuse { kNone, kSum, kMean };

constexpr Numbers kNoNumbers = {};

struct Case {
  std::vector<int> lengths, kept;  // of every sample, without the prefix
  int prefix, C;
  Dtype dtype;
  bool by_score;
  Fuse fuse;
  bool packed;
  int pad = 0;        // elements between rows of x
  bool ties = false;  // equal scores around the K-th
};

// The inputs of a case, and the kept tokens of every sample.
struct Problem {
  explicit Problem(const Case& c)
      : c(c), B(int(c.lengths.size())), extra(c.prefix + (c.fuse != kNone)) {
    for (int b = 0; b < B; b++) {
      cu_seqlens.push_back(cu_seqlens.back() + c.prefix + c.lengths[b]);
      cu_kept.push_back(cu_kept.back() + c.kept[b]);
    }
    cu_seqlens.shrink_to_fit(), cu_kept.shrink_to_fit();
    total = cu_seqlens.back();
    scored = c.packed ? total : total - B * c.prefix;
    // x ends with its last element.
    x = std::make_unique<Tensor>(c.dtype, std::max(total * (c.C + c.pad) - c.pad, 0));
    ranks = std::make_unique<Tensor>(Dtype::kFloat32, scored);
    weights = std::make_unique<Tensor>(Dtype::kFloat32, scored);
    for (int row = 0; row < total; row++) {
      for (int i = 0; i < c.C; i++) x->set(row * (c.C + c.pad) + i, number(row * c.C + i, 1));
    }
    const float hard[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, -1e-45f};
    for (int i = 0; i < scored; i++) {
      ranks->set(i, c.ties ? float(i * 7919 % 3) : float(i * 7919 % 1009) - 400);
      weights->set(i, i % 5 == 4 ? 0.5f : 2.0f);
      if (i % 4 == 3) ranks->set(i, hard[i / 4 % 7]);
      if (i % 9 == 7) weights->set(i, hard[i % 2]);
    }
  }
  static float number(size_t i, int which) {
    return float(int((i * 7919 + i / 13) * which % 17)) - 8;
  }

  int begin(int b) const { return cu_seqlens[b]; }
  int first(int b) const { return c.packed ? begin(b) + c.prefix : begin(b) - b * c.prefix; }
  int first_out(int b) const { return cu_kept[b] + b * extra; }

  Samples samples() const {
    const bool packed = c.packed;
    return {packed ? cu_seqlens.data() : nullptr,
            packed ? cu_kept.data() : nullptr,
            B,
            packed ? 0 : c.lengths[0],
            packed ? 0 : c.kept[0],
            total,
            cu_kept.back(),
            c.prefix,
            c.C,
            c.dtype,
            c.fuse != kNone};
  }
  TokenRows rows() const {
    const int row = c.C + c.pad;
    return {x->data(), c.packed ? 0 : (c.prefix + c.lengths[0]) * row, row};
  }
  Numbers numbers(const Tensor& of) const { return {of.floats(), c.packed ? 0 : c.lengths[0], 1}; }

  // The kept tokens of a sample, in the order of the result.
  std::vector<int> chosen(int b) const {
    const float* const score = ranks->floats() + first(b);
    std::vector<int> best(c.lengths[b]);
    for (int n = 0; n < c.lengths[b]; n++) best[n] = n;
    std::stable_sort(best.begin(), best.end(), [&](int i, int j) {
      if (std::isnan(score[i]) || std::isnan(score[j]))
        return std::isnan(score[j]) > std::isnan(score[i]);
      return score[i] > score[j];
    });
    best.resize(c.kept[b]);
    if (!c.by_score) std::sort(best.begin(), best.end());
    return best;
  }

  const Case& c;
  const int B, extra;
  int total = 0, scored = 0;
  std::vector<int32_t> cu_seqlens = {0}, cu_kept = {0};
  std::unique_ptr<Tensor> x, ranks, weights;
};

struct Results {
  explicit Results(const Problem& p)
      : tokens(p.c.dtype, size_t(p.cu_kept.back() + p.B * p.extra) * p.c.C),
        ids(p.cu_kept.back() * 8),
        inverse(p.scored * 8),
        offsets(size_t(p.B + 1) * 4),
        mean(Dtype::kFloat32, size_t(p.B) * p.c.C),
        mass(Dtype::kFloat32, p.B),
        divides(p.c.fuse == kMean) {
    std::memset(inverse.data(), 0x77, inverse.bytes());  // -1 looks to Watch as if not written
  }
  int64_t id(int i) const { return static_cast<const int64_t*>(ids.data())[i]; }
  int64_t place(int i) const { return static_cast<const int64_t*>(inverse.data())[i]; }
  int32_t offset(int b) const { return static_cast<const int32_t*>(offsets.data())[b]; }
  Selection selection() const {
    return {tokens.data(),
            static_cast<int64_t*>(ids.data()),
            static_cast<int64_t*>(inverse.data()),
            static_cast<int32_t*>(offsets.data()),
            divides ? mean.floats() : nullptr,
            divides ? mass.floats() : nullptr};
  }
  Tensor tokens;
  Buffer ids, inverse, offsets;
  Tensor mean, mass;
  const bool divides;
};

// Runs `kernel`, which must write every element of these buffers exactly once.
template <class F>
void watched(const std::vector<std::pair<const Buffer*, size_t>>& buffers, F kernel) {
  std::vector<std::unique_ptr<cuda_on_cpu::Watch>> watches;
  for (const auto& [buffer, size] : buffers) {
    if (buffer->bytes() == 0) continue;
    watches.push_back(
        std::make_unique<cuda_on_cpu::Watch>(buffer->data(), buffer->bytes(), size, "output"));
  }
  CHECK(kernel() == 0);
  for (const auto& watch : watches) watch->expect_all_written();
}

// The weight of a dropped token in the fused token: 0 if it is not finite.
float usable(float weight) { return std::isfinite(weight) ? weight : 0.0f; }

void check_backward(const Problem& p, const Results& r) {
  const Case& c = p.c;
  Tensor grad(c.dtype, r.tokens.bytes() / size_of(c.dtype));
  for (size_t i = 0; i < grad.bytes() / size_of(c.dtype); i++) grad.set(i, p.number(i, 3));
  Tensor grad_x(c.dtype, size_t(p.total) * c.C), grad_weights(Dtype::kFloat32, p.scored);
  const Samples samples = p.samples();
  const Selection out = r.selection();
  const SelectionGrad given = {grad.data(), out.inverse, out.offsets, out.mean, out.mass};
  const bool fuses = c.fuse != kNone;
  const TokenRows rows = fuses ? p.rows() : TokenRows{};
  const Numbers weights = fuses ? p.numbers(*p.weights) : Numbers{};
  std::vector<std::pair<const Buffer*, size_t>> outputs = {{&grad_x, size_of(c.dtype)}};
  if (fuses) outputs.push_back({&grad_weights, 4});
  watched(outputs, [&] {
    return vidl_select_tokens_bwd_cuda(&samples, &given, &rows, &weights, grad_x.data(),
                                       fuses ? grad_weights.floats() : nullptr, nullptr);
  });
  for (int b = 0; b < p.B; b++) {
    const int fused = r.offset(b + 1) - 1;
    const float share = c.fuse != kMean ? 1 : r.mass[b] == 0 ? 0 : 1 / r.mass[b];
    for (int row = 0; row < c.prefix + c.lengths[b]; row++) {
      const int n = row - c.prefix, in = p.begin(b) + row;
      const int64_t place = n < 0 ? n : r.place(p.first(b) + n);
      float product = 0;
      for (int i = 0; i < c.C; i++) {
        const float passed = fuses ? grad[fused * c.C + i] : 0;
        float expected = 0;
        if (n < 0 || place >= 0) {
          expected = grad[(p.first_out(b) + c.prefix + place) * c.C + i];
        } else if (fuses) {
          const float weight = (*p.weights)[p.first(b) + n];
          expected = rounded(c.dtype, passed * (usable(weight) * share));
          const float centre = c.fuse == kMean ? r.mean[b * c.C + i] : 0;
          const float x = (*p.x)[in * (c.C + c.pad) + i];
          product += std::isfinite(weight) ? passed * (x - centre) : 0;
        }
        CHECK(grad_x[in * c.C + i] == expected);
      }
      if (fuses && (n >= 0 || c.packed)) {
        const float result = grad_weights[c.packed ? in : p.first(b) + n];
        const float error = std::abs(result - product * share);
        CHECK(error == 0 || (c.fuse == kMean && error < 1e-3f * (1 + std::abs(result))));
      }
    }
  }
}

void check(const Case& c) {
  const Problem p(c);
  const Results r(p);
  const Samples samples = p.samples();
  const TokenRows rows = p.rows();
  const Numbers ranks = p.numbers(*p.ranks), weights = p.numbers(*p.weights);
  const Selection out = r.selection();
  std::vector<std::pair<const Buffer*, size_t>> outputs = {
      {&r.tokens, size_of(c.dtype)}, {&r.ids, 8}, {&r.offsets, 4}};
  if (c.fuse == kMean) outputs.insert(outputs.end(), {{&r.mean, 4}, {&r.mass, 4}});
  watched(outputs, [&] {
    return vidl_select_tokens_cuda(&samples, &rows, &ranks, &weights, c.by_score, &out, nullptr);
  });

  for (int b = 0; b <= p.B; b++) CHECK(r.offset(b) == p.first_out(b));
  for (int b = 0; b < p.B; b++) {
    const std::vector<int> chosen = p.chosen(b);
    std::vector<int> places(c.lengths[b], -1);
    for (size_t k = 0; k < chosen.size(); k++) {
      CHECK(r.id(p.cu_kept[b] + int(k)) == chosen[k]);
      places[chosen[k]] = int(k);
    }
    const auto element = [&](int row, int i) {
      return (*p.x)[(p.begin(b) + row) * (c.C + c.pad) + i];
    };
    float mass = 0;
    std::vector<float> sums(c.C);
    for (int n = 0; n < c.lengths[b]; n++) {
      CHECK(r.place(p.first(b) + n) == places[n]);
      const float weight = usable((*p.weights)[p.first(b) + n]);
      if (places[n] >= 0) continue;
      mass += weight;
      for (int i = 0; i < c.C; i++) sums[i] += weight * element(c.prefix + n, i);
    }
    for (int i = 0; c.packed && i < c.prefix; i++) CHECK(r.place(p.begin(b) + i) == -1);
    for (int i = 0; i < c.C; i++) {
      const auto token = [&](int row) { return r.tokens[(p.first_out(b) + row) * c.C + i]; };
      for (int row = 0; row < c.prefix; row++) CHECK(token(row) == element(row, i));
      for (int k = 0; k < c.kept[b]; k++) {
        CHECK(token(c.prefix + k) == element(c.prefix + chosen[k], i));
      }
      if (c.fuse == kNone) continue;
      const float fused = c.fuse == kSum ? sums[i] : mass == 0 ? 0 : sums[i] / mass;
      CHECK(token(c.prefix + c.kept[b]) == rounded(c.dtype, fused));
      if (c.fuse == kMean) CHECK(r.mean[b * c.C + i] == fused);
    }
    if (c.fuse == kMean) CHECK(r.mass[b] == mass);
  }
  check_backward(p, r);
}

// Offsets that do not fit give NaN, and nothing out of range is read or written: AddressSanitizer
// sees it.
[[maybe_unused]] void check_bad_offsets(int C, bool by_score, Fuse fuse) {
  const Case c = {{40, 5, 70}, {13, 2, 30}, 1, C, Dtype::kFloat32, by_score, fuse, true};
  constexpr int32_t kMost = INT32_MAX, kLeast = INT32_MIN;
  const std::vector<int32_t> good[] = {{0, 41, 47, 118}, {0, 13, 15, 45}};
  const std::vector<int32_t> bad_seqlens[] = {
      {1, 41, 47, 118},        {0, 41, 47, 117},
      {0, 41, 47, 119},        {0, 41, 41, 118},
      {0, 47, 41, 118},        {0, 0, 1, 118},
      {0, kMost, kLeast, 118}, {0, 118, 118, 118},
      {-5, 41, 47, 118},       {kMost, kMost, kMost, kMost},
  };
  const std::vector<int32_t> bad_kept[] = {
      {1, 13, 15, 45}, {0, 13, 15, 44},        {0, 13, 15, 46},  {0, 41, 42, 45},
      {0, 15, 13, 45}, {0, kMost, kLeast, 45}, {-5, 13, 15, 45},
  };
  const auto run = [&](const std::vector<int32_t>& seqlens, const std::vector<int32_t>& kept) {
    Problem p(c);
    const Results r(p);
    p.cu_seqlens = seqlens, p.cu_kept = kept;
    p.cu_seqlens.shrink_to_fit(), p.cu_kept.shrink_to_fit();
    Samples samples = p.samples();
    samples.num_kept = 45;
    std::memset(r.tokens.data(), 0, r.tokens.bytes());
    const TokenRows rows = p.rows();
    const Numbers ranks = p.numbers(*p.ranks), weights = p.numbers(*p.weights);
    const Selection out = r.selection();
    CHECK(vidl_select_tokens_cuda(&samples, &rows, &ranks, &weights, by_score, &out, nullptr) == 0);
    int missing = 0;
    for (size_t i = 0; i < r.tokens.bytes() / 4; i++) missing += std::isnan(r.tokens[i]);
    samples.cu_kept = nullptr;
    const Tensor grad(c.dtype, r.tokens.bytes() / 4), grad_x(c.dtype, size_t(p.total) * C);
    const Tensor grad_weights(Dtype::kFloat32, p.scored);
    const SelectionGrad given = {grad.data(), out.inverse, out.offsets, out.mean, out.mass};
    CHECK(vidl_select_tokens_bwd_cuda(&samples, &given, &rows, fuse ? &weights : &kNoNumbers,
                                      grad_x.data(), fuse ? grad_weights.floats() : nullptr,
                                      nullptr) == 0);
    return missing;
  };
  CHECK(run(good[0], good[1]) == 0);
  for (const auto& seqlens : bad_seqlens) CHECK(run(seqlens, good[1]) > 0);
  for (const auto& kept : bad_kept) {
    // Where they descend, samples have rows in common, and either may write them last.
    CHECK(run(good[0], kept) > 0 || !std::is_sorted(kept.begin(), kept.end()));
  }
}

}  // namespace

int main() {
  using enum Dtype;
  const Case cases[] = {
      {{40, 40}, {13, 13}, 1, 64, kFloat32, false, kSum, false},  // 16 bytes at a time
      {{70, 70, 70}, {40, 40, 40}, 2, 24, kBFloat16, true, kMean, false, 8},
      {{37}, {20}, 0, 9, kFloat16, true, kSum, false, 3},  // an element at a time
      {{300}, {150}, 1, 8, kFloat32, false, kNone, false, 0, true},
      {{1100}, {500}, 1, 4, kFloat32, true, kNone, false},  // only the kept tokens are compared
#ifndef __SANITIZE_THREAD__
      {{1030}, {700}, 0, 8, kBFloat16, true, kNone, false, 0, true},
      {{300}, {150}, 1, 8, kFloat16, true, kMean, false, 0, true},
#endif
      {{5, 0, 33, 1, 64}, {2, 0, 33, 0, 20}, 1, 16, kFloat16, false, kMean, true},
      {{9, 40, 2}, {0, 39, 1}, 3, 7, kFloat32, true, kSum, true, 5},
      {{6, 6}, {6, 6}, 0, 1031, kFloat32, true, kMean, false},  // long rows, nothing dropped
      {{3}, {1}, 1, 8200, kBFloat16, false, kNone, false},
      {{3}, {1}, 1, 1027, kBFloat16, false, kSum, true},
  };
#ifdef __SANITIZE_THREAD__  // which is slow
  constexpr int kSeeds = 1;
#else
  constexpr int kSeeds = 2;
#endif
  count_seeds(kSeeds, [&] {
    for (const Case& c : cases) check(c);
    return true;
  });
#ifndef __SANITIZE_THREAD__  // TSan believes that the threads of a failed launch never end
  // More tokens than are cached.
  check({{4100}, {1500}, 0, 1, kBFloat16, false, kSum, true, 0, true});
  check_bad_offsets(8, false, kNone);
  check_bad_offsets(7, true, kSum);
  check_bad_offsets(1032, false, kMean);
#endif
  return report("select_tokens");
}
