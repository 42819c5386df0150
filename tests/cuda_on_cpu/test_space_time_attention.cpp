// The kernels of space_time_attention on small groups of every size class, against loops in double;
// every output is watched. tests/test_cuda_on_cpu.py also plants bugs in the kernels: this program
// must find them.
#include "check.h"
#include "space_time_attention/interface.h"

namespace {

using vidl::Backward;
using vidl::Dtype;
using vidl::Forward;
using vidl::Scores;
using vidl::Size;
using vidl::SpaceTimeAttention;
using Numbers = std::vector<double>;

// [rows, H, D] of a dtype. Rows are padded with NaN.
class Tensor : public Buffer {
 public:
  Tensor(Dtype dtype, size_t n) : Buffer(n * (dtype == Dtype::kFloat32 ? 4 : 2)), dtype(dtype) {
    std::memset(data(), 0xFF, bytes());
  }
  double operator[](size_t i) const {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data())[i];
    if (dtype == Dtype::kFloat16) return float(static_cast<const fp16*>(data())[i]);
    return float(static_cast<const bf16*>(data())[i]);
  }
  void set(size_t i, float x) {
    if (dtype == Dtype::kFloat32) static_cast<float*>(data())[i] = x;
    if (dtype == Dtype::kFloat16) static_cast<fp16*>(data())[i] = x;
    if (dtype == Dtype::kBFloat16) static_cast<bf16*>(data())[i] = x;
  }
  float* floats() const { return static_cast<float*>(data()); }
  const Dtype dtype;
};

enum Rows { kInOrder, kGathered, kShared };

struct Case {
  std::vector<int> queries, keys;  // of every group
  int64_t H, D;
  Dtype dtype;
  Scores scores;
  Rows rows;
  float scale;
  int poisoned = -1;  // a group with NaN and infinity in it
};

std::vector<int32_t> offsets_of(const std::vector<int>& sizes) {
  std::vector<int32_t> offsets = {0};
  for (const int size : sizes) offsets.push_back(offsets.back() + size);
  return offsets;
}
int64_t longest(const std::vector<int>& sizes) {
  return *std::max_element(sizes.begin(), sizes.end());
}

// The inputs of a case, and the results of the kernels.
struct Problem {
  explicit Problem(const Case& c)
      : c(c),
        query_offsets(offsets_of(c.queries)),
        key_offsets(offsets_of(c.keys)),
        num_queries(query_offsets.back()),
        E(key_offsets.back()),
        num_keys(c.rows == kShared ? (E + 1) / 2 : E),
        line(c.H * c.D + 8) {
    for (int i = 0; i < num_queries; i++) query_rows.push_back(num_queries - 1 - i);
    for (int e = 0; e < E; e++)
      key_rows.push_back(c.rows == kShared ? e * 5 % num_keys : E - 1 - e);
    if (c.rows == kInOrder) {
      for (int i = 0; i < num_queries; i++) query_rows[i] = i;
      for (int e = 0; e < E; e++) key_rows[e] = e;
    }
    entry_offsets = {0};
    for (int row = 0; row < num_keys; row++) {
      for (int e = 0; e < E; e++) {
        if (key_rows[e] == row) entries.push_back(e);
      }
      entry_offsets.push_back(int(entries.size()));
    }
    for (auto* list : {&query_rows, &key_rows, &entry_offsets, &entries}) list->shrink_to_fit();
    fill(q, 1), fill(k, 2), fill(v, 3);
    for (size_t i = 0; i < size_t(num_queries * c.H * c.D); i++) grad_out.set(i, number(i, 4));
    for (int e = 0; e < E; e++) grad_scores.set(e, number(e, 5));
    if (c.poisoned < 0) return;
    const float bad[] = {NAN, INFINITY};
    for (int e = key_offsets[c.poisoned]; e < key_offsets[c.poisoned + 1]; e++) {
      k.set(key_rows[e] * line + e % 2, bad[e % 2]), v.set(key_rows[e] * line, bad[e % 2]);
    }
    for (int i = query_offsets[c.poisoned]; i < query_offsets[c.poisoned + 1]; i++) {
      q.set(query_rows[i] * line, bad[i % 2]), grad_out.set(query_rows[i] * c.H * c.D, bad[0]);
    }
  }

  static float number(size_t i, int which) {  // an eighth of an integer, in [-1, 1]
    return float(int((i * 7919 * which + i / 13 + which) % 17) - 8) / 8;
  }
  void fill(Tensor& x, int which) {
    const int64_t rows = int64_t(x.bytes()) / 2 / line;
    for (int64_t i = 0; i < rows * c.H * c.D; i++) {
      x.set(i / (c.H * c.D) * line + i % (c.H * c.D), number(i, which));
    }
  }

  SpaceTimeAttention attention() const {
    const auto strided = [&](const Tensor& x) { return vidl::Strided{x.data(), line, c.D}; };
    const bool gathered = c.rows != kInOrder;
    const bool shared = c.rows == kShared;
    return {{query_offsets.data(), key_offsets.data(), gathered ? query_rows.data() : nullptr,
             gathered ? key_rows.data() : nullptr, shared ? entry_offsets.data() : nullptr,
             shared ? entries.data() : nullptr, int64_t(c.queries.size()), E, num_queries, num_keys,
             longest(c.queries), longest(c.keys)},
            {},  // no bias
            strided(q),
            strided(k),
            strided(v),
            c.H,
            c.D,
            c.scale,
            c.scores,
            c.dtype};
  }

  // Runs `kernel`, which must write every element of the outputs exactly once.
  template <class F>
  static void watched(std::vector<Tensor*> outputs, F kernel) {
    std::vector<std::unique_ptr<cuda_on_cpu::Watch>> watches;
    for (Tensor* x : outputs) {
      const size_t element = x->dtype == Dtype::kFloat32 ? 4 : 2;
      if (x->bytes() == 0) continue;
      watches.emplace_back(new cuda_on_cpu::Watch(x->data(), x->bytes(), element, "output"));
    }
    CHECK(kernel() == 0);
    for (const auto& watch : watches) watch->expect_all_written();
  }

  void run(bool watch = true) {
    const SpaceTimeAttention a = attention();
    const bool scored = c.scores != Scores::kNone;
    const bool blocked = vidl::size_of(a.groups.max_queries, a.groups.max_keys) == Size::kBlocked;
    const Forward f = {out.data(), lse.floats(), scored ? scores.floats() : nullptr,
                       scored ? mean_scores.floats() : nullptr};
    std::vector<Tensor*> outputs = {&out};
    if (scored) outputs.push_back(&mean_scores);
    if (!(blocked && scored)) outputs.push_back(&lse);  // which another kernel reads then
    watch = watch && c.poisoned < 0;                    // a watch takes NaN for not written
    if (!watch) outputs.clear();
    watched(outputs, [&] { return vidl_space_time_attention_cuda(&a, &f, nullptr); });

    const bool shared = c.rows == kShared;
    const Backward b = {grad_out.data(),
                        out.data(),
                        lse.floats(),
                        scored ? grad_scores.floats() : nullptr,
                        grad_q.data(),
                        grad_k.data(),
                        grad_v.data(),
                        shared ? entry_grad_k.floats() : nullptr,
                        shared ? entry_grad_v.floats() : nullptr,
                        delta.floats(),
                        nullptr,
                        0};
    outputs = {&grad_q, &grad_k, &grad_v};
    if (!watch) outputs.clear();
    watched(outputs, [&] { return vidl_space_time_attention_bwd_cuda(&a, &b, nullptr); });
  }

  const Case c;
  std::vector<int32_t> query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries;
  const int num_queries, E, num_keys;
  const int64_t line;
  Tensor q{c.dtype, size_t(num_queries * line)}, k{c.dtype, size_t(num_keys * line)},
      v{c.dtype, size_t(num_keys * line)};
  Tensor out{c.dtype, size_t(num_queries * c.H * c.D)},
      lse{Dtype::kFloat32, size_t(c.H * num_queries)};
  Tensor scores{Dtype::kFloat32, size_t(c.H * E)}, mean_scores{Dtype::kFloat32, size_t(E)};
  Tensor grad_out{c.dtype, size_t(num_queries * c.H * c.D)},
      grad_scores{Dtype::kFloat32, size_t(E)};
  Tensor grad_q{c.dtype, size_t(num_queries * c.H * c.D)},
      delta{Dtype::kFloat32, size_t(c.H * num_queries)};
  Tensor grad_k{c.dtype, size_t(num_keys * c.H * c.D)},
      grad_v{c.dtype, size_t(num_keys * c.H * c.D)};
  Tensor entry_grad_k{Dtype::kFloat32, size_t(E * c.H * c.D)};
  Tensor entry_grad_v{Dtype::kFloat32, size_t(E * c.H * c.D)};
};

// The expected results, group by group.
struct Truth {
  explicit Truth(const Problem& p)
      : out(p.num_queries * p.c.H * p.c.D),
        lse(p.c.H * p.num_queries),
        scores(p.E),
        grad_q(p.num_queries * p.c.H * p.c.D),
        grad_k(p.num_keys * p.c.H * p.c.D),
        grad_v(p.num_keys * p.c.H * p.c.D) {
    for (size_t g = 0; g < p.c.queries.size(); g++) {
      for (int64_t h = 0; h < p.c.H; h++) group(p, int(g), h);
    }
  }

  void group(const Problem& p, int g, int64_t h) {
    const int64_t H = p.c.H, D = p.c.D;
    const int queries = p.c.queries[g], keys = p.c.keys[g];
    for (int i = 0; i < queries; i++) {
      const int64_t row = p.query_rows[p.query_offsets[g] + i];
      const bool scored = p.c.scores == Scores::kMean || (p.c.scores == Scores::kCls && i == 0);
      const double share = !scored ? 0 : p.c.scores == Scores::kMean ? 1.0 / queries : 1.0;
      Numbers weight(keys), grad(keys);
      double sum = 0, total = 0;
      for (int j = 0; j < keys; j++) {
        const int entry = p.key_offsets[g] + j;
        double product = 0;
        for (int d = 0; d < D; d++) {
          product += p.q[row * p.line + h * D + d] * p.k[key(p, entry) * p.line + h * D + d];
          grad[j] += p.grad_out[(row * H + h) * D + d] * p.v[key(p, entry) * p.line + h * D + d];
        }
        sum += weight[j] = std::exp(product * p.c.scale);
        grad[j] += p.grad_scores[entry] * share / H;
      }
      lse[h * p.num_queries + row] = std::log(sum);
      for (int j = 0; j < keys; j++) total += (weight[j] /= sum) * grad[j];
      for (int j = 0; j < keys; j++) {
        const int entry = p.key_offsets[g] + j;
        const double logit = weight[j] * (grad[j] - total) * p.c.scale;
        scores[entry] += weight[j] * share / H;
        for (int d = 0; d < D; d++) {
          const int64_t here = (row * H + h) * D + d, there = (key(p, entry) * H + h) * D + d;
          const int64_t from = key(p, entry) * p.line + h * D + d;
          out[here] += weight[j] * p.v[from];
          grad_q[here] += logit * p.k[from];
          grad_k[there] += logit * p.q[row * p.line + h * D + d];
          grad_v[there] += weight[j] * p.grad_out[here];
        }
      }
    }
  }
  static int64_t key(const Problem& p, int entry) { return p.key_rows[entry]; }

  Numbers out, lse, scores, grad_q, grad_k, grad_v;
};

// Equal up to rounding of the inputs of products to 16 bits; infinite alike.
void expect_close(const char* name, const Tensor& x, const Numbers& truth, Dtype dtype) {
  double most = 0.1;
  for (const double t : truth) most = std::isfinite(t) ? std::max(most, std::abs(t)) : most;
  const double allowed = most * (dtype == Dtype::kFloat16 ? 0.004 : 0.03);
  for (size_t i = 0; i < truth.size(); i++) {
    if (x[i] == truth[i] || std::abs(x[i] - truth[i]) <= allowed) continue;
    failures++;
    std::printf("%s[%zu] is %g, not %g\n", name, i, x[i], truth[i]);
    return;
  }
}

void check(const Case& c) {
  const int before = failures;
  Problem p(c);
  p.run();
  const Truth truth(p);
  expect_close("out", p.out, truth.out, c.dtype);
  expect_close("lse", p.lse, truth.lse, c.dtype);
  if (c.scores != Scores::kNone) expect_close("scores", p.mean_scores, truth.scores, c.dtype);
  expect_close("grad_q", p.grad_q, truth.grad_q, c.dtype);
  expect_close("grad_k", p.grad_k, truth.grad_k, c.dtype);
  expect_close("grad_v", p.grad_v, truth.grad_v, c.dtype);
  if (failures == before) return;
  std::printf("  in groups of");
  for (size_t g = 0; g < c.queries.size(); g++) std::printf(" %dx%d", c.queries[g], c.keys[g]);
  std::printf(", D = %d, scores %d\n", int(c.D), int(c.scores));
}

// NaN in one group leaves the others unchanged, bit for bit.
void check_poison(Case c) {
  Problem clean(c);
  clean.run();
  c.poisoned = 1;
  Problem poisoned(c);
  poisoned.run();
  const auto equal = [&](const Tensor& x, const Tensor& y, const std::vector<int32_t>& offsets,
                         const std::vector<int32_t>& rows) {
    for (size_t g = 0; g + 1 < offsets.size(); g++) {
      for (int i = offsets[g]; i < offsets[g + 1] && g != 1; i++) {
        for (int64_t d = 0; d < c.H * c.D; d++) {
          if (x[rows[i] * c.H * c.D + d] != y[rows[i] * c.H * c.D + d]) return false;
        }
      }
    }
    return true;
  };
  CHECK(equal(clean.out, poisoned.out, clean.query_offsets, clean.query_rows));
  CHECK(equal(clean.grad_q, poisoned.grad_q, clean.query_offsets, clean.query_rows));
  CHECK(equal(clean.grad_k, poisoned.grad_k, clean.key_offsets, clean.key_rows));
  CHECK(equal(clean.grad_v, poisoned.grad_v, clean.key_offsets, clean.key_rows));
  CHECK(std::isnan(poisoned.out[clean.query_rows[clean.query_offsets[1]] * c.H * c.D]));
}

// Lists that `Groups` would refuse: kernels stay within their buffers, as AddressSanitizer shows.
void check_bad_lists() {
  const int32_t bad[] = {-1, INT32_MIN, INT32_MAX, 1 << 20, 0};
  for (const int size : {7, 30, 140, 270}) {  // of every class
    for (const Rows rows : {kShared, kInOrder}) {
      for (const int32_t x : bad) {
        Problem p({{size, 5, 6}, {size, 4, 7}, 1, 32, Dtype::kBFloat16, Scores::kMean, rows, 0.3f});
        p.query_offsets[1] = p.key_offsets[2] = p.key_offsets[0] = x;
        p.query_offsets[3] = x;
        for (auto* list : {&p.query_rows, &p.key_rows, &p.entries, &p.entry_offsets}) {
          for (size_t i = 1; i < list->size(); i += 3) (*list)[i] = x;
        }
        p.run(false);
      }
    }
  }
}

}  // namespace

int main() {
  using enum Dtype;
  using enum Scores;
  const Case cases[] = {
      // packed: two groups of eight in a warp, one of sixteen, five of three; some without members
      {{8, 7, 8, 0, 3}, {8, 8, 5, 4, 0}, 2, 32, kBFloat16, kMean, kGathered, 0.3f},
      {{16, 1}, {9, 16}, 3, 32, kFloat16, kCls, kInOrder, -0.2f},
      {{1, 2, 3, 3, 2, 1}, {3, 2, 1, 3, 3, 3}, 1, 32, kFloat16, kNone, kShared, 0.3f},
      // whole: one tile, several, another number of keys
      {{17, 0, 5}, {17, 3, 0}, 2, 32, kBFloat16, kCls, kInOrder, 0.3f},
      {{70, 33}, {81, 20}, 1, 32, kBFloat16, kMean, kGathered, -0.2f},
      {{20, 50}, {100, 7}, 1, 32, kFloat16, kMean, kShared, 0.3f},
      // wide: more queries than keys, fewer, none
      {{129, 64, 0}, {50, 128, 3}, 2, 32, kBFloat16, kCls, kInOrder, 0.3f},
      {{40, 17, 5}, {197, 40, 0}, 1, 32, kFloat16, kMean, kShared, -0.2f},
      // blocked: equal groups and very unequal ones, with a tail or none
      {{257, 64}, {130, 128}, 1, 32, kBFloat16, kCls, kInOrder, 0.3f},
      {{3, 2, 0, 5, 1, 4, 2, 2, 3},
       {5, 1, 7, 0, 300, 2, 3, 1, 4},
       1,
       32,
       kFloat16,
       kMean,
       kShared,
       -0.2f},
      {{20}, {280}, 1, 32, kBFloat16, kNone, kGathered, 0.2f},
  };
  count_seeds(2, [&] {
    for (const Case& c : cases) check(c);
    check_poison({{5, 3, 4}, {5, 3, 4}, 1, 32, kBFloat16, kNone, kGathered, 0.3f});
    check_poison({{5, 7, 8}, {2, 7, 8}, 1, 32, kFloat16, kMean, kInOrder, 0.3f});
    return true;
  });
#ifndef __SANITIZE_THREAD__  // groups that overlap write a row twice
  check_bad_lists();
#endif
  return report("space_time_attention");
}
