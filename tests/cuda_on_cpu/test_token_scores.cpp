// The kernels of token_scores on small groups, against loops in double; every output is watched.
// tests/test_cuda_on_cpu.py also plants bugs in the kernels: this program must find them.
#include "groups.h"
#include "token_scores/interface.h"

namespace {

using vidl::Score;
using vidl::ScoresBackward;
using vidl::ScoresForward;
using vidl::TokenScores;

struct Case {
  std::vector<int> queries, keys;  // of every group
  int64_t H, D;
  Dtype dtype;
  Score kind;
  Rows rows;
  float scale;
  Limits limits = kAll;
  int table_rows = 0;  // 0: no table
  bool key_bias = false;
  bool given = false;  // the log-sum-exp
  int poisoned = -1;   // a group with NaN and infinity in it
  float size = 1.0f;   // of the gradients of the scores
};

// The inputs of a case, and the results of the kernels.
struct Problem : Lists {
  explicit Problem(const Case& c)
      : Lists(c.queries, c.keys, c.rows, c.limits, c.table_rows), c(c), line(c.H * c.D + 8) {
    for (size_t i = 0; i < size_t(c.H * c.table_rows); i++) table.set(i, 2 * number(i, 6));
    for (int i = 0; i < num_keys; i++) key_bias.set(i, bias_of_key(i));
    fill(q, 1), fill(k, 2), fill(v, 3);
    for (int e = 0; e < E; e++) grad_scores.set(e, number(e, 5) * c.size);
    std::memset(grad_q.data(), 0, grad_q.bytes());  // of "cls" the first queries alone are written
    if (c.poisoned < 0) return;
    const float bad[] = {NAN, INFINITY};
    for (int e = key_offsets[c.poisoned]; e < key_offsets[c.poisoned + 1]; e++) {
      k.set(key_rows[e] * line + e % 2, bad[e % 2]), v.set(key_rows[e] * line, bad[e % 2]);
    }
    for (int i = query_offsets[c.poisoned]; i < query_offsets[c.poisoned + 1]; i++) {
      q.set(query_rows[i] * line, bad[i % 2]);
    }
  }

  void fill(Tensor& x, int which) {
    const int64_t count = int64_t(x.bytes()) / 2 / line;
    for (int64_t i = 0; i < count * c.H * c.D; i++) {
      x.set(i / (c.H * c.D) * line + i % (c.H * c.D), number(i, which));
    }
  }
  int64_t parts() const {
    const int64_t groups = int64_t(c.queries.size());
    const int64_t blocks = groups * ((longest(c.queries) + 63) / 64);
    return std::min<int64_t>(c.kind == Score::kMean ? (blocks + 3) / 4 * 4 : groups, 64);
  }

  TokenScores token_scores() const {
    const auto strided = [&](const Tensor& x) { return vidl::Strided{x.data(), line, c.D}; };
    return {groups(),   bias(table.floats(), c.key_bias ? key_bias.floats() : nullptr),
            strided(q), strided(k),
            strided(v), c.H,
            c.D,        0,
            c.scale,    c.dtype};
  }

  void run(bool watch = true) {
    const TokenScores s = token_scores();
    const bool mean = c.kind == Score::kMean, value = c.kind == Score::kValue;
    watch = watch && c.poisoned < 0;  // a watch takes NaN for not written
    const ScoresForward f = {scores.floats(), by_head.floats(), lse.floats(),
                             c.given,         norms.floats(),   directions.data()};
    std::vector<Tensor*> outputs = {&scores};
    if (!watch) outputs.clear();
    watched(outputs, [&] { return vidl_token_scores_cuda(&s, c.kind, &f, nullptr); });
    if (c.kind == Score::kSimilarity) return;

    const bool shared = c.rows == kShared;
    const ScoresBackward b = {grad_scores.floats(),
                              mean ? lse.floats() : by_head.floats(),
                              norms.floats(),
                              grad_q.data(),
                              grad_k.data(),
                              grad_v.data(),
                              value ? grad_attention.floats() : nullptr,
                              value ? grad_norms.floats() : nullptr,
                              shared && !mean ? grad_logits.floats() : nullptr,
                              shared && mean ? entry_grad_k.floats() : nullptr,
                              total.floats(),
                              delta.floats(),
                              c.table_rows > 0 ? grad_bias.floats() : nullptr,
                              c.table_rows > 0 ? bias_parts.floats() : nullptr,
                              parts()};
    outputs = {&grad_k};
    if (mean) outputs.push_back(&grad_q);
    if (value) outputs.push_back(&grad_v);
    if (c.table_rows > 0) outputs.push_back(&grad_bias);
    if (!watch) outputs.clear();
    watched(outputs, [&] { return vidl_token_scores_bwd_cuda(&s, c.kind, &b, nullptr); });
  }

  const Case c;
  const int64_t line;
  Tensor q{c.dtype, size_t(num_queries * line)}, k{c.dtype, size_t(num_keys * line)},
      v{c.dtype, size_t(num_keys * line)};
  Tensor scores{Dtype::kFloat32, size_t(E)}, by_head{Dtype::kFloat32, size_t(c.H * E)},
      lse{Dtype::kFloat32, size_t(c.H * num_queries)}, norms{Dtype::kFloat32, size_t(num_keys)};
  Tensor directions{Dtype::kFloat16, size_t(E * 2 * c.D)};
  Tensor grad_scores{Dtype::kFloat32, size_t(E)}, grad_attention{Dtype::kFloat32, size_t(E)},
      grad_norms{Dtype::kFloat32, size_t(E)}, grad_logits{Dtype::kFloat32, size_t(c.H * E)};
  Tensor grad_q{c.dtype, size_t(num_queries * c.H * c.D)},
      grad_k{c.dtype, size_t(num_keys * c.H * c.D)}, grad_v{c.dtype, size_t(num_keys * c.H * c.D)};
  Tensor entry_grad_k{Dtype::kFloat32, size_t(E * c.H * c.D)};
  Tensor total{Dtype::kFloat32, size_t(c.H * num_queries)},
      delta{Dtype::kFloat32, size_t(c.H * num_queries)};
  Tensor table{Dtype::kFloat32, size_t(c.H * c.table_rows)},
      grad_bias{Dtype::kFloat32, size_t(c.H * c.table_rows)},
      bias_parts{Dtype::kFloat32, size_t(parts() * c.H * c.table_rows)},
      key_bias{Dtype::kFloat32, size_t(num_keys)};
};

// The expected results, group by group.
struct Truth {
  explicit Truth(const Problem& p)
      : p(p),
        H(p.c.H),
        D(p.c.D),
        scores(p.E),
        lse(H * p.num_queries),
        grad_q(p.num_queries * H * D),
        grad_k(p.num_keys * H * D),
        grad_v(p.num_keys * H * D),
        grad_bias(H * p.c.table_rows) {
    for (int g = 0; g < int(p.c.queries.size()); g++) {
      if (p.c.kind == Score::kSimilarity) {
        similarity(g);
      } else {
        group(g);
      }
    }
  }

  // Element d of head h of a key or a value of an entry.
  double of(const Tensor& x, int entry, int64_t h, int64_t d) const {
    return x[p.key_rows[entry] * p.line + h * D + d];
  }

  // The weights of query i of a group for all its keys; zero for those it does not see.
  Numbers weights(int g, int64_t h, int i) {
    const int row = p.query_rows[p.query_offsets[g] + i], first = p.key_offsets[g];
    Numbers weight(p.c.keys[g]);
    double sum = 0;
    for (int j = 0; j < p.limits[row]; j++) {
      double x = 0;
      for (int d = 0; d < D; d++) x += p.q[row * p.line + h * D + d] * of(p.k, first + j, h, d);
      x *= p.c.scale;
      const int key = p.key_rows[first + j];
      if (p.c.table_rows > 0) x += p.table[h * p.c.table_rows + p.row_of(row, key)];
      if (p.c.key_bias) x += p.key_bias[key];
      sum += weight[j] = std::exp(x);
    }
    lse[h * p.num_queries + row] = std::log(sum);
    for (double& x : weight) x = sum == 0 ? 0 : x / sum;
    return weight;
  }

  void group(int g) {
    const int first = p.key_offsets[g], keys = p.c.keys[g];
    const int queries = p.c.kind == Score::kMean ? p.c.queries[g] : std::min(p.c.queries[g], 1);
    Numbers attention(keys), grad(keys), norms(keys);
    for (int64_t h = 0; h < H; h++) {
      for (int i = 0; i < queries; i++) {
        const Numbers weight = weights(g, h, i);
        for (int j = 0; j < keys; j++) attention[j] += weight[j] / (H * queries);
      }
    }
    for (int j = 0; j < keys; j++) grad[j] = p.grad_scores[first + j];
    for (int j = 0; j < keys; j++) scores[first + j] = attention[j];
    if (p.c.kind == Score::kValue) weigh(first, attention, grad);
    for (int64_t h = 0; h < H; h++) {
      for (int i = 0; i < queries; i++) differentiate(g, h, i, queries, weights(g, h, i), grad);
    }
  }

  // The scores of "value", the gradients of the values, and that of the attention in `grad`.
  void weigh(int first, const Numbers& attention, Numbers& grad) {
    const int keys = int(attention.size());
    Numbers norm(keys);
    double sum = 0, mean = 0;
    for (int j = 0; j < keys; j++) {
      for (int64_t h = 0; h < H; h++) {
        for (int d = 0; d < D; d++) norm[j] += std::pow(of(p.v, first + j, h, d), 2);
      }
      norm[j] = std::sqrt(norm[j]);
      sum += attention[j] * norm[j];
      mean += grad[j] * attention[j] * norm[j];
    }
    for (int j = 0; j < keys; j++) {
      scores[first + j] = sum == 0 ? 0 : attention[j] * norm[j] / sum;
      const double of_product = sum == 0 ? 0 : (grad[j] - mean / sum) / sum;
      grad[j] = of_product * norm[j];
      for (int64_t i = 0; i < H * D && norm[j] > 0; i++) {
        grad_v[p.key_rows[first + j] * H * D + i] +=
            of_product * attention[j] * of(p.v, first + j, 0, i) / norm[j];
      }
    }
  }

  void differentiate(int g, int64_t h, int i, int queries, const Numbers& weight,
                     const Numbers& grad) {
    const int row = p.query_rows[p.query_offsets[g] + i], first = p.key_offsets[g];
    double mean = 0;
    for (size_t j = 0; j < weight.size(); j++) mean += weight[j] * grad[j];
    for (int j = 0; j < int(weight.size()); j++) {
      const double logit = weight[j] * (grad[j] - mean) / (H * queries);
      const int key = p.key_rows[first + j];
      if (p.c.table_rows > 0) grad_bias[h * p.c.table_rows + p.row_of(row, key)] += logit;
      for (int d = 0; d < D; d++) {
        const double q = p.q[row * p.line + h * D + d];
        grad_q[(row * H + h) * D + d] += logit * p.c.scale * of(p.k, first + j, h, d);
        grad_k[(key * H + h) * D + d] += logit * p.c.scale * q;
      }
    }
  }

  void similarity(int g) {
    const int first = p.key_offsets[g], keys = p.c.keys[g];
    std::vector<Numbers> directions(keys, Numbers(D));
    for (int j = 0; j < keys; j++) {
      double squares = 0;
      for (int d = 0; d < D; d++) {
        for (int64_t h = 0; h < H; h++) directions[j][d] += of(p.k, first + j, h, d) / H;
        squares += std::pow(directions[j][d], 2);
      }
      for (double& x : directions[j]) x /= std::max(std::sqrt(squares), 1e-12);
    }
    for (int j = 0; j < keys; j++) {
      double most = -INFINITY;
      for (int i = 1; i < keys && j % 2 == 0; i += 2) {
        double cosine = 0;
        for (int d = 0; d < D; d++) cosine += directions[j][d] * directions[i][d];
        most = std::max(most, cosine);
      }
      scores[first + j] = -most;
    }
  }

  const Problem& p;
  const int64_t H, D;
  Numbers scores, lse, grad_q, grad_k, grad_v, grad_bias;
};

// Scores are sums in float32.
void expect_scores(const Problem& p, const Numbers& truth) {
  double most = 0;
  for (const double t : truth) most = std::isfinite(t) ? std::max(most, std::abs(t)) : most;
  const double allowed = most * (p.c.kind == Score::kSimilarity ? 4e-7 : 1e-4);
  for (int e = 0; e < p.E; e++) {
    if (p.scores[e] == truth[e] || std::abs(p.scores[e] - truth[e]) <= allowed) continue;
    std::printf("scores[%d] is %.9g, not %.9g\n", e, p.scores[e], truth[e]);
    return fail();
  }
}

void check(const Case& c) {
  const int before = failures;
  Problem p(c);
  const Truth truth(p);
  for (size_t i = 0; i < truth.lse.size() && c.given; i++) p.lse.set(i, float(truth.lse[i]));
  p.run();
  expect_scores(p, truth.scores);
  if (c.kind != Score::kSimilarity) {
    expect_close("grad_q", p.grad_q, truth.grad_q, c.dtype);
    expect_close("grad_k", p.grad_k, truth.grad_k, c.dtype);
    expect_close("grad_bias", p.grad_bias, truth.grad_bias, Dtype::kFloat16);
  }
  if (c.kind == Score::kValue) expect_close("grad_v", p.grad_v, truth.grad_v, c.dtype);
  if (failures == before) return;
  std::printf("  kind %d in groups of", int(c.kind));
  for (size_t g = 0; g < c.queries.size(); g++) std::printf(" %dx%d", c.queries[g], c.keys[g]);
  std::printf(", rows %d, limits %d, table %d, key bias %d\n", int(c.rows), int(c.limits),
              c.table_rows, int(c.key_bias));
}

// Every order of threads and blocks gives the same bits.
void check_bits(const Case& c) {
  Problem first(c), second(c);
  cuda_on_cpu::options().seed = 1, first.run();
  cuda_on_cpu::options().seed = 2, second.run();
  for (auto x : {&Problem::scores, &Problem::grad_q, &Problem::grad_k, &Problem::grad_bias}) {
    CHECK(std::memcmp((first.*x).data(), (second.*x).data(), (first.*x).bytes()) == 0);
  }
}

// NaN in one group leaves the others unchanged, bit for bit.
void check_poison(Case c) {
  Problem clean(c);
  clean.run();
  c.poisoned = 1;
  Problem poisoned(c);
  poisoned.run();
  const auto equal = [&](const Tensor& x, const Tensor& y, const std::vector<int32_t>& offsets,
                         const std::vector<int32_t>& rows, int64_t width) {
    for (size_t g = 0; g + 1 < offsets.size(); g++) {
      for (int i = offsets[g]; i < offsets[g + 1] && g != 1; i++) {
        const char* const one = static_cast<const char*>(x.data()) + rows[i] * width;
        if (std::memcmp(one, static_cast<const char*>(y.data()) + rows[i] * width, width) != 0) {
          return false;
        }
      }
    }
    return true;
  };
  std::vector<int32_t> entries;
  for (int e = 0; e < clean.E; e++) entries.push_back(e);
  const int64_t width = c.H * c.D * 2;
  CHECK(equal(clean.scores, poisoned.scores, clean.key_offsets, entries, 4));
  CHECK(std::isnan(poisoned.scores[clean.key_offsets[1]]));
  if (c.kind == Score::kSimilarity) return;
  CHECK(equal(clean.grad_q, poisoned.grad_q, clean.query_offsets, clean.query_rows, width));
  CHECK(equal(clean.grad_k, poisoned.grad_k, clean.key_offsets, clean.key_rows, width));
  if (c.kind != Score::kValue) return;
  CHECK(equal(clean.grad_v, poisoned.grad_v, clean.key_offsets, clean.key_rows, width));
}

// A query that sees no key has a gradient of zeros, whatever is in the keys.
void check_no_keys(Case c) {
  c.poisoned = 0;
  Problem p(c);
  for (const int32_t row : p.query_rows) {
    p.q.set(row * p.line, 1.0f);
    p.limits[row] = row % 2 == 0 ? 0 : p.limits[row];
  }
  p.run();
  for (int row = 0; row < p.num_queries; row += 2) {
    for (int64_t d = 0; d < c.H * c.D; d++) CHECK(p.grad_q[row * c.H * c.D + d] == 0.0);
  }
}

// Lists that `Groups` would refuse: kernels stay within their buffers, as AddressSanitizer shows.
void check_bad_lists(Score kind) {
  const int32_t bad[] = {-1, INT32_MIN, INT32_MAX, 1 << 20, 0};
  for (const int size : {7, 70}) {
    for (const Rows rows : {kShared, kInOrder}) {
      for (const int32_t x : bad) {
        Problem p(
            {{size, 5, 6}, {size, 4, 7}, 1, 32, Dtype::kBFloat16, kind, rows, 0.3f, kDrawn, 9});
        p.query_offsets[1] = p.key_offsets[2] = p.key_offsets[0] = x;
        p.query_offsets[3] = x;
        for (auto* list : {&p.query_rows, &p.key_rows, &p.entries, &p.entry_offsets, &p.limits}) {
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
  using enum Score;
  const Case cases[] = {
      // a warp for a group, then a block; one without queries, one without keys
      {{8, 7, 0, 3}, {8, 33, 4, 0}, 3, 32, kBFloat16, kCls, kGathered, 0.3f},
      {{1, 1}, {64, 1}, 2, 32, kFloat16, kCls, kInOrder, -0.2f},
      {{5, 0, 2, 1}, {130, 7, 65, 0}, 2, 32, kFloat16, kCls, kShared, 0.3f},
      {{4, 0, 3}, {20, 5, 9}, 2, 32, kFloat16, kValue, kGathered, 0.3f},
      {{4, 0, 3}, {120, 5, 9}, 2, 32, kBFloat16, kValue, kShared, 0.3f},
      {{6, 6, 6}, {40, 6, 20}, 2, 32, kFloat16, kCls, kInOrder, 0.3f, kDrawn, 20, true},
      {{6, 6, 6}, {140, 6, 20}, 2, 32, kBFloat16, kCls, kShared, 0.3f, kAll, 50, true},
      {{6, 3}, {90, 10}, 1, 32, kFloat16, kValue, kInOrder, 0.3f, kPadded, 3},
      // blocks: one, several, a tail or none, very unequal groups
      {{17, 0, 5, 1}, {17, 3, 0, 1}, 2, 32, kBFloat16, kMean, kInOrder, 0.3f},
      {{70, 128}, {81, 64}, 1, 32, kFloat16, kMean, kGathered, -0.2f},
      {{20, 90}, {130, 7}, 2, 32, kFloat16, kMean, kShared, 0.3f},
      {{3, 2, 0, 5, 1, 140}, {5, 1, 150, 0, 3, 2}, 1, 32, kFloat16, kMean, kShared, -0.2f},
      {{70, 33}, {81, 20}, 1, 32, kBFloat16, kMean, kGathered, -0.2f, kAll, 0, false, true},
      // small and large gradients
      {{70, 9}, {81, 20}, 1, 32, kFloat16, kMean, kInOrder, 0.3f, kAll, 0, false, false, -1, 1e-6f},
      {{70, 9}, {81, 20}, 1, 32, kFloat16, kMean, kInOrder, 0.3f, kAll, 0, false, false, -1, 1e6f},
      // limits, a table, numbers for the keys
      {{17, 5, 70}, {17, 3, 100}, 2, 32, kBFloat16, kMean, kInOrder, 0.3f, kCausal},
      {{90, 33}, {81, 140}, 1, 32, kFloat16, kMean, kShared, -0.2f, kDrawn},
      {{70, 33}, {81, 20}, 2, 32, kFloat16, kMean, kGathered, -0.2f, kDrawn, 90, true, true},
      {{40, 50}, {130, 49}, 1, 32, kFloat16, kMean, kShared, 0.3f, kPadded, 30},
      {{20, 1}, {49, 1}, 1, 32, kBFloat16, kMean, kInOrder, 0.3f, kAll, 0, true},
      {{70, 30, 5}, {81, 20, 5}, 1, 32, kFloat16, kMean, kGathered, 0.3f, kAll, 12000},
      // even and odd keys
      {{1, 1, 1, 1}, {8, 1, 0, 7}, 3, 32, kBFloat16, kSimilarity, kGathered, 0.3f},
      {{1, 0}, {300, 129}, 2, 32, kFloat16, kSimilarity, kShared, 0.3f},
      {{1, 1, 1, 1, 1}, {2, 3, 200, 1, 4}, 1, 32, kFloat16, kSimilarity, kInOrder, 0.3f},
  };
  count_seeds(2, [&] {
    for (const Case& c : cases) check(c);
    for (const Score kind : {kCls, kMean, kValue, kSimilarity}) {
      check_poison({{5, 3, 4}, {5, 3, 4}, 1, 32, kBFloat16, kind, kGathered, 0.3f});
      check_poison({{5, 17, 40}, {70, 80, 8}, 1, 32, kFloat16, kind, kInOrder, 0.3f, kCausal});
      check_poison({{5, 7}, {70, 8}, 1, 32, kFloat16, kind, kInOrder, 0.3f, kAll, 9});
    }
    check_no_keys({{70}, {81}, 1, 32, kFloat16, kMean, kInOrder, 0.3f, kDrawn});
    check_no_keys({{1}, {81}, 1, 32, kFloat16, kCls, kInOrder, 0.3f, kDrawn, 20});
    check_bits({{70, 33}, {81, 20}, 2, 32, kFloat16, kMean, kShared, -0.2f, kAll, 90, true});
    check_bits({{70, 33}, {81, 20}, 2, 32, kFloat16, kCls, kShared, -0.2f, kAll, 90, true});
    return true;
  });
#ifndef __SANITIZE_THREAD__  // groups that overlap write a row twice
  for (const Score kind : {kCls, kMean, kValue, kSimilarity}) check_bad_lists(kind);
#endif
  return report("token_scores");
}
