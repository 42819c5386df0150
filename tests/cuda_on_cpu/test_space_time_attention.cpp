// The kernels of space_time_attention on small groups of every size class, against loops in double;
// every output is watched. tests/test_cuda_on_cpu.py also plants bugs in the kernels: this program
// must find them.
#include "groups.h"
#include "space_time_attention/interface.h"

namespace {

using vidl::Backward;
using vidl::Forward;
using vidl::Scores;
using vidl::Size;
using vidl::SpaceTimeAttention;

constexpr int64_t kD = VIDL_HEAD_SIZES;  // the kernels are compiled for one head size

struct Case {
  std::vector<int> queries, keys;  // of every group
  int64_t H, D;
  Dtype dtype;
  Scores scores;
  Rows rows;
  float scale;
  Limits limits = kAll;
  int table_rows = 0;  // 0: no table
  bool key_bias = false;
  bool windows = false;  // neighbouring groups have the same positions
  int poisoned = -1;     // a group with NaN and infinity in it
};

// The sizes of groups, all but one of the same size.
std::vector<int> same(int groups, int size, int longest) {
  std::vector<int> sizes(groups, size);
  sizes[groups / 6 * 3] = longest;
  return sizes;
}

// The inputs of a case, and the results of the kernels.
struct Problem : Lists {
  explicit Problem(const Case& c)
      : Lists(c.queries, c.keys, c.rows, c.limits, c.table_rows), c(c), line(c.H * c.D + 8) {
    if (c.windows) place_windows();
    for (size_t i = 0; i < size_t(c.H * c.table_rows); i++) table.set(i, 2 * number(i, 6));
    for (int i = 0; i < num_keys; i++) key_bias.set(i, bias_of_key(i));
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

  int64_t parts() const { return vidl::table_plan(groups()).parts; }

  void fill(Tensor& x, int which) {
    const int64_t rows = int64_t(x.bytes()) / 2 / line;
    for (int64_t i = 0; i < rows * c.H * c.D; i++) {
      x.set(i / (c.H * c.D) * line + i % (c.H * c.D), number(i, which));
    }
  }

  SpaceTimeAttention attention() const {
    const auto strided = [&](const Tensor& x) { return vidl::Strided{x.data(), line, c.D}; };
    return {groups(),   bias(table.floats(), c.key_bias ? key_bias.floats() : nullptr),
            strided(q), strided(k),
            strided(v), c.H,
            c.D,        c.D,
            c.scale,    c.scores,
            c.dtype};
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
                        c.table_rows > 0 ? grad_bias.floats() : nullptr,
                        c.table_rows > 0 ? bias_parts.floats() : nullptr,
                        parts()};
    outputs = {&grad_q, &grad_k, &grad_v};
    if (c.table_rows > 0) outputs.push_back(&grad_bias);
    if (!watch) outputs.clear();
    watched(outputs, [&] { return vidl_space_time_attention_bwd_cuda(&a, &b, nullptr); });
  }

  const Case c;
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
  Tensor table{Dtype::kFloat32, size_t(c.H * c.table_rows)},
      grad_bias{Dtype::kFloat32, size_t(c.H * c.table_rows)},
      bias_parts{Dtype::kFloat32, size_t(parts() * c.H * c.table_rows)},
      key_bias{Dtype::kFloat32, size_t(num_keys)};
};

// The expected results, group by group.
struct Truth {
  explicit Truth(const Problem& p)
      : out(p.num_queries * p.c.H * p.c.D),
        lse(p.c.H * p.num_queries),
        scores(p.E),
        grad_q(p.num_queries * p.c.H * p.c.D),
        grad_k(p.num_keys * p.c.H * p.c.D),
        grad_v(p.num_keys * p.c.H * p.c.D),
        grad_bias(p.c.H * p.c.table_rows) {
    for (size_t g = 0; g < p.c.queries.size(); g++) {
      for (int64_t h = 0; h < p.c.H; h++) group(p, int(g), h);
    }
  }

  void group(const Problem& p, int g, int64_t h) {
    const int64_t H = p.c.H, D = p.c.D;
    const int queries = p.c.queries[g];
    for (int i = 0; i < queries; i++) {
      const int64_t row = p.query_rows[p.query_offsets[g] + i];
      const bool scored = p.c.scores == Scores::kMean || (p.c.scores == Scores::kCls && i == 0);
      const double share = !scored ? 0 : p.c.scores == Scores::kMean ? 1.0 / queries : 1.0;
      const int keys = p.limits[row];
      Numbers weight(keys), grad(keys);
      double sum = 0, total = 0;
      for (int j = 0; j < keys; j++) {
        const int entry = p.key_offsets[g] + j;
        double product = 0;
        for (int d = 0; d < D; d++) {
          product += p.q[row * p.line + h * D + d] * p.k[key(p, entry) * p.line + h * D + d];
          grad[j] += p.grad_out[(row * H + h) * D + d] * p.v[key(p, entry) * p.line + h * D + d];
        }
        product *= p.c.scale;
        if (p.c.table_rows > 0)
          product += p.table[h * p.c.table_rows + p.row_of(int(row), int(key(p, entry)))];
        if (p.c.key_bias) product += p.key_bias[key(p, entry)];
        sum += weight[j] = std::exp(product);
        grad[j] += p.grad_scores[entry] * share / H;
      }
      lse[h * p.num_queries + row] = std::log(sum);
      if (sum == 0) continue;
      for (int j = 0; j < keys; j++) total += (weight[j] /= sum) * grad[j];
      for (int j = 0; j < keys; j++) {
        const int entry = p.key_offsets[g] + j;
        const double logit = weight[j] * (grad[j] - total) * p.c.scale;
        if (p.c.table_rows > 0)
          grad_bias[h * p.c.table_rows + p.row_of(int(row), int(key(p, entry)))] +=
              weight[j] * (grad[j] - total);
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

  Numbers out, lse, scores, grad_q, grad_k, grad_v, grad_bias;
};

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
  expect_close("grad_bias", p.grad_bias, truth.grad_bias, c.dtype);
  if (failures == before) return;
  std::printf("  in groups of");
  for (size_t g = 0; g < c.queries.size(); g++) std::printf(" %dx%d", c.queries[g], c.keys[g]);
  std::printf(", D = %d, scores %d, limits %d, table %d, key bias %d\n", int(c.D), int(c.scores),
              int(c.limits), c.table_rows, int(c.key_bias));
}

// A query that sees no key gives zeros, whatever is in the keys.
void check_no_keys(Case c) {
  c.poisoned = 0;
  Problem p(c);
  for (const int32_t row : p.query_rows) {
    p.q.set(row * p.line, 1.0f), p.grad_out.set(row * c.H * c.D, 1.0f);
    p.limits[row] = row % 2 == 0 ? 0 : p.limits[row];
  }
  p.run();
  for (int row = 0; row < p.num_queries; row += 2) {
    for (int64_t d = 0; d < c.H * c.D; d++) {
      const int64_t at = row * c.H * c.D + d;
      if (p.out[at] == 0.0 && p.grad_q[at] == 0.0) continue;
      std::printf("query %d of %d without keys: %g, %g\n", row, p.num_queries, p.out[at],
                  p.grad_q[at]);
      return fail();
    }
  }
}

// Every order of threads and blocks gives the same bits.
void check_bits(const Case& c) {
  Problem first(c), second(c);
  cuda_on_cpu::options().seed = 1, first.run();
  cuda_on_cpu::options().seed = 2, second.run();
  for (auto x : {&Problem::grad_q, &Problem::grad_k, &Problem::grad_v, &Problem::grad_bias}) {
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

// The parts of the table's gradient: at most 64, and the tiles of a group cover it.
void check_plans() {
  for (const int64_t G : {0, 1, 3, 70, 5000}) {
    for (const int64_t n : {0, 1, 16, 80, 81, 160, 161, 500, 1569}) {
      for (const bool equal : {true, false}) {
        vidl::Groups groups = {};
        groups.G = G, groups.max_queries = groups.max_keys = n;
        groups.num_queries = groups.E = equal ? G * n : std::min(n, G);
        const vidl::TablePlan plan = vidl::table_plan(groups);
        const auto& axis = plan.queries;
        CHECK(plan.parts <= 64 && plan.parts <= plan.items && (plan.parts > 0) == (plan.items > 0));
        CHECK(axis.most <= vidl::kTableRows);
        CHECK(!plan.tiled || 16 * (axis.tiles * axis.squares + axis.more) == (n + 15) / 16 * 16);
        CHECK(plan.tiled || n > 2 * vidl::kTableRows);
      }
    }
  }
}

// Lists that `Groups` would refuse: kernels stay within their buffers, as AddressSanitizer shows.
void check_bad_lists(Scores scores, std::initializer_list<int> sizes) {
  const int32_t bad[] = {-1, INT32_MIN, INT32_MAX, 1 << 20, 0};
  for (const int size : sizes) {
    for (const Rows rows : {kShared, kInOrder}) {
      for (const int32_t x : bad) {
        Problem p({{size, 5, 6}, {size, 4, 7}, 1, kD, Dtype::kBFloat16, scores, rows, 0.3f});
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

// The calls that wgmma computes with a head size of 64: groups of 129 to 256 rows without scores.
int check_wgmma() {
  using enum Dtype;
  constexpr Scores kNone = Scores::kNone;
  const Case cases[] = {
      // several stages of queries, or one; other numbers of keys, none; shared keys
      {{197}, {197}, 1, kD, kBFloat16, kNone, kInOrder, 0.125f},
      {{129, 64, 0}, {50, 128, 3}, 2, kD, kBFloat16, kNone, kInOrder, 0.3f},
      {{40, 17, 5}, {197, 40, 0}, 1, kD, kFloat16, kNone, kShared, -0.2f},
      {{256, 1, 33}, {1, 256, 130}, 2, kD, kFloat16, kNone, kGathered, 0.3f},
  };
  count_seeds(2, [&] {
    for (const Case& c : cases) check(c);
    for (const char* multiprocessors : {"2", "5"}) {  // several heads of a block, or one
      setenv("CUDA_ON_CPU_MULTIPROCESSORS", multiprocessors, 1);
      check({{100, 33}, {70, 181}, 2, kD, kBFloat16, kNone, kGathered, 0.3f});
    }
    unsetenv("CUDA_ON_CPU_MULTIPROCESSORS");
    check_poison({{135, 7, 8}, {132, 7, 8}, 1, kD, kFloat16, kNone, kInOrder, 0.3f});
    check_bits({{170, 33}, {181, 20}, 2, kD, kFloat16, kNone, kGathered, -0.2f});
    return true;
  });
#ifndef __SANITIZE_THREAD__  // groups that overlap write a row twice
  check_bad_lists(kNone, {140});
#endif
  return report("wgmma");
}

}  // namespace

int main() {
  if (kD == 64) return check_wgmma();
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
      {{70, 33}, {75, 20}, 1, 32, kFloat16, kMean, kGathered, 0.3f},
      // several heads of a block of the forward
      {{33, 40, 17}, {30, 100, 20}, 5, 32, kBFloat16, kMean, kGathered, 0.3f},
      {{20, 5, 17}, {90, 100, 17}, 5, 32, kFloat16, kNone, kInOrder, 0.3f, kDrawn, 40, true},
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
      // limits, in every class
      {{8, 7, 8, 0, 3}, {8, 8, 5, 4, 0}, 2, 32, kBFloat16, kMean, kGathered, 0.3f, kCausal},
      {{16, 1, 5}, {9, 16, 5}, 1, 32, kFloat16, kCls, kInOrder, -0.2f, kDrawn},
      {{70, 33}, {81, 20}, 1, 32, kFloat16, kMean, kGathered, -0.2f, kDrawn},
      {{50, 50}, {49, 49}, 1, 32, kBFloat16, kNone, kShared, 0.3f, kCausal},
      {{80, 5}, {66, 7}, 1, 32, kBFloat16, kNone, kShared, 0.3f, kCausal},
      {{17, 0, 5}, {100, 3, 0}, 2, 32, kBFloat16, kCls, kInOrder, 0.3f, kPadded},
      {{140, 64, 0}, {150, 128, 3}, 1, 32, kFloat16, kMean, kInOrder, 0.3f, kCausal},
      {{40, 137}, {197, 40}, 1, 32, kBFloat16, kCls, kShared, -0.2f, kDrawn},
      {{200, 64}, {300, 128}, 1, 32, kFloat16, kCls, kInOrder, 0.3f, kCausal},
      {{300, 3}, {130, 128}, 1, 32, kBFloat16, kMean, kShared, 0.3f, kDrawn},
      {{70, 20}, {280, 260}, 1, 32, kBFloat16, kNone, kGathered, 0.2f, kPadded},
      // a table, numbers for the keys, or both
      {{8, 7, 8, 0, 3}, {8, 8, 5, 4, 0}, 2, 32, kFloat16, kMean, kGathered, 0.3f, kDrawn, 31, true},
      {{1, 2, 3, 3, 20}, {3, 2, 1, 3, 30}, 1, 32, kBFloat16, kNone, kInOrder, 0.3f, kAll, 1},
      {{16, 1}, {9, 16}, 1, 32, kFloat16, kCls, kInOrder, -0.2f, kAll, 0, true},
      {{70, 33}, {81, 20}, 2, 32, kFloat16, kMean, kGathered, -0.2f, kDrawn, 90, true},
      {{40, 50}, {49, 49}, 1, 32, kBFloat16, kNone, kShared, 0.3f, kCausal, 30},
      {{17, 0, 5}, {100, 3, 0}, 1, 32, kFloat16, kCls, kInOrder, 0.3f, kAll, 2, true},
      {{140, 64, 0}, {150, 128, 3}, 1, 32, kFloat16, kMean, kInOrder, 0.3f, kDrawn, 120, true},
      {{40, 17}, {197, 197}, 1, 32, kBFloat16, kCls, kShared, -0.2f, kAll, 64},
      {{200, 64}, {300, 128}, 1, 32, kFloat16, kMean, kInOrder, 0.3f, kCausal, 200, true},
      {{70, 3}, {280, 280}, 1, 32, kBFloat16, kNone, kShared, 0.3f, kAll, 50},
      // tables of which one fits into shared memory, or none
      {{70, 30, 5}, {81, 20, 5}, 1, 32, kFloat16, kNone, kGathered, 0.3f, kAll, 12000},
      {{70, 30, 5}, {81, 20, 5}, 1, 32, kBFloat16, kMean, kInOrder, 0.3f, kDrawn, 60000, true},
      // many groups, of which some have the same positions: the longest has one tile, or four
      {same(160, 3, 3), same(160, 3, 4), 2, 32, kFloat16, kNone, kGathered, 0.3f, kAll, 11, false,
       true},
      {same(40, 6, 90), same(40, 5, 85), 1, 32, kBFloat16, kMean, kInOrder, 0.3f, kDrawn, 60, true,
       true},
      // a group that is much longer than the others
      {{3, 2, 0, 5, 180, 4, 2, 2},
       {5, 1, 7, 0, 300, 2, 3, 1},
       1,
       32,
       kFloat16,
       kCls,
       kGathered,
       0.3f,
       kCausal,
       70},
  };
  count_seeds(2, [&] {
    for (const Case& c : cases) check(c);
    setenv("CUDA_ON_CPU_MAX_SHARED", "49152", 1);  // not enough to copy the next head early
    check({{140, 129, 20}, {17, 60, 144}, 4, 32, kBFloat16, kNone, kGathered, 0.3f});
    unsetenv("CUDA_ON_CPU_MAX_SHARED");
    check_poison({{5, 3, 4}, {5, 3, 4}, 1, 32, kBFloat16, kNone, kGathered, 0.3f});
    check_poison({{5, 7, 8}, {2, 7, 8}, 1, 32, kFloat16, kMean, kInOrder, 0.3f});
    check_poison({{5, 7, 8}, {2, 7, 8}, 1, 32, kFloat16, kMean, kInOrder, 0.3f, kCausal, 9, true});
    for (const int size : {7, 60, 140, 270}) {
      check_no_keys({{size}, {size}, 1, 32, kFloat16, kNone, kInOrder, 0.3f, kCausal});
      check_no_keys({{size}, {size}, 1, 32, kBFloat16, kNone, kInOrder, 0.3f, kDrawn, 30});
    }
    check_bits({{70, 33}, {81, 20}, 2, 32, kFloat16, kMean, kGathered, -0.2f, kAll, 90, true});
    check_bits({same(160, 3, 3), same(160, 3, 4), 1, 32, kBFloat16, kNone, kGathered, 0.3f, kAll, 9,
                false, true});
    return true;
  });
  check_plans();
#ifndef __SANITIZE_THREAD__                   // groups that overlap write a row twice
  check_bad_lists(kMean, {7, 30, 140, 270});  // every class
#endif
  return report("space_time_attention");
}
