// token_scores on the CPU: some heads of one group at a time. Schema and contract:
// kernels/token_scores/op.py; the work itself: token_scores/cpu.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "groups/host.h"

namespace vidl {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

struct Scoring {
  Strided q, k, v;
  const int32_t *query_offsets, *key_offsets;  // [G + 1]
  const int32_t *query_rows, *key_rows;        // [Q], [E], or null
  int64_t G, H, D, Q, K, E;                    // Q rows of q, K rows of k and v
  int64_t heads;                               // of an item of "cls"
  float scale;
  Dtype dtype;
};

struct Gradients {
  const float* grad_scores;  // [E]
  const float* weights;      // [H, E], or for "mean" the log-sum-exp [H, Q]
  void *grad_q, *grad_k;     // [Q, H, D], [K, H, D]
  // Where rows are shared, else null:
  float* grad_logits;    // [H, E], of "cls"
  const int32_t* group;  // [E], of "cls"
  float* entry_grad_k;   // [E, H, D], of "mean"
};

#define VIDL_SOURCE "token_scores/cpu.h"
#include "cpu/levels.h"

const char* const kOp = "token_scores";

// x, or a copy of it, with the channels of a head side by side.
Tensor readable(const Tensor& x) {
  return x.dim() == 3 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x;
}
OptionalTensor readable(const OptionalTensor& x) { return x ? OptionalTensor(readable(*x)) : x; }

// How many heads of a group one item of "cls" takes, of so many in all: four, since rows are then
// read in long pieces, and fewer where all threads would not have four items each.
int64_t heads_of_item(int64_t all) {
  const int64_t items = 4 * std::max<int64_t>(torch::stable::get_num_threads(), 1);
  return std::clamp<int64_t>((all + items - 1) / items, 1, 4);
}

int64_t items_of_cls(const Scoring& s) { return s.G * ((s.H + s.heads - 1) / s.heads); }

Scoring scoring(const OptionalTensor& q, const Tensor& k, const OptionalTensor& v,
                const Tensor& query_offsets, const Tensor& key_offsets,
                const OptionalTensor& query_rows, const OptionalTensor& key_rows, double scale) {
  Scoring s = {};
  s.k = strided(kOp, k, "k");
  if (q) s.q = strided(kOp, *q, "q");
  if (v) s.v = strided(kOp, *v, "v");
  s.query_offsets = index(kOp, query_offsets, "query_offsets");
  s.key_offsets = index(kOp, key_offsets, "key_offsets");
  s.query_rows = query_rows ? index(kOp, *query_rows, "query_rows") : nullptr;
  s.key_rows = key_rows ? index(kOp, *key_rows, "key_rows") : nullptr;
  s.G = query_offsets.size(0) - 1;
  STD_TORCH_CHECK(s.G >= 0 && key_offsets.size(0) == s.G + 1,
                  "token_scores: need query_offsets and key_offsets of one length");
  s.K = k.size(0);
  s.H = k.size(1);
  s.D = k.size(2);
  s.E = key_rows ? key_rows->size(0) : s.K;
  check_groups(kOp, "key", s.key_offsets, s.G, s.key_rows, s.E, s.K);
  if (q) {
    s.Q = q->size(0);
    STD_TORCH_CHECK(!query_rows || query_rows->size(0) == s.Q, "token_scores: need query_rows of ",
                    s.Q, " rows");
    check_groups(kOp, "query", s.query_offsets, s.G, s.query_rows, s.Q, s.Q);
  }
  s.scale = static_cast<float>(scale);
  s.dtype = floating_dtype(k);
  s.heads = heads_of_item(s.G * s.H);
  return s;
}

// Items for one thread, of so many in all that share the work: enough to be worth a thread.
int64_t grain(int64_t items, int64_t work) {
  return std::max<int64_t>(1, items * 65536 / std::max<int64_t>(work, 1));
}

int64_t pairs(const Scoring& s) { return s.Q * (s.E / std::max<int64_t>(s.G, 1) + 1); }

// means[e] = the mean over heads of by_head[h, e]
void mean_over_heads(const Scoring& s, const float* by_head, float* means) {
  parallel_for(0, s.E, 4096, [&](int64_t begin, int64_t end) {
    std::memset(means + begin, 0, (end - begin) * sizeof(float));
    for (int64_t h = 0; h < s.H; h++) {
      add_line(by_head, Dtype::kFloat32, h * s.E + begin, means + begin, end - begin);
    }
    for (int64_t e = begin; e < end; e++) means[e] /= static_cast<float>(s.H);
  });
}

int64_t row_at(const Scoring& s, int64_t entry) {
  return s.key_rows == nullptr ? entry : s.key_rows[entry];
}

// scores[e] *= norms[row of e], and then divided by their sum over the group
void weigh_by_length(const Scoring& s, const float* norms, float* scores) {
  parallel_for(0, s.G, grain(s.G, s.E), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      double sum = 0.0;
      for (int64_t e = s.key_offsets[g]; e < s.key_offsets[g + 1]; e++) {
        scores[e] *= norms[row_at(s, e)];
        sum += scores[e];
      }
      const float total = static_cast<float>(sum);
      if (total == 0.0f) continue;
      for (int64_t e = s.key_offsets[g]; e < s.key_offsets[g + 1]; e++) scores[e] /= total;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> token_scores(OptionalTensor q, Tensor k, OptionalTensor v,
                                                OptionalTensor lse, Tensor query_offsets,
                                                Tensor key_offsets, OptionalTensor query_rows,
                                                OptionalTensor key_rows, OptionalTensor,
                                                OptionalTensor, int64_t, int64_t, double scale,
                                                std::string kind) {
  q = readable(q);
  k = readable(k);
  v = readable(v);
  Scoring s = scoring(q, k, v, query_offsets, key_offsets, query_rows, key_rows, scale);
  const auto floats = [&](std::vector<int64_t> shape) {
    return new_empty(k, shape, ScalarType::Float);
  };
  Tensor scores = floats({s.E}), none = floats({0});
  float* const to = static_cast<float*>(scores.data_ptr());
  if (kind == "similarity") {
    const auto items = VIDL_FOR_THIS_CPU(similarity_items);
    parallel_for(0, s.G, grain(s.G, s.E * (s.E / std::max<int64_t>(s.G, 1) + s.H) * s.D),
                 [&](int64_t begin, int64_t end) { items(s, to, begin, end); });
    return {scores, floats({0}), none};
  }
  Tensor by_head = floats({s.H, s.E});
  float* const head_scores = static_cast<float*>(by_head.data_ptr());
  if (kind == "mean") {
    // A log-sum-exp that is given saves no time here, where whole rows of weights are at hand, and
    // weights that are divided by their own sum are more accurate.
    Tensor found = floats(lse ? std::vector<int64_t>{0} : std::vector<int64_t>{s.H, s.Q});
    float* const to_lse = lse ? nullptr : static_cast<float*>(found.data_ptr());
    const auto items = VIDL_FOR_THIS_CPU(mean_items);
    parallel_for(0, s.G * s.H, grain(s.G, pairs(s) * s.D),
                 [&](int64_t begin, int64_t end) { items(s, head_scores, to_lse, begin, end); });
    mean_over_heads(s, head_scores, to);
    return {scores, found, none};
  }
  const int64_t count = items_of_cls(s);
  const auto items = VIDL_FOR_THIS_CPU(cls_items);
  parallel_for(0, count, grain(count, s.E * s.H * s.D),
               [&](int64_t begin, int64_t end) { items(s, head_scores, begin, end); });
  mean_over_heads(s, head_scores, to);
  if (kind == "cls") return {scores, by_head, none};

  STD_TORCH_CHECK(v && v->size(0) == s.K && v->size(1) == s.H && v->size(2) == s.D,
                  "token_scores: need v of the shape of k");
  Tensor norms = floats({s.K});
  float* const lengths = static_cast<float*>(norms.data_ptr());
  const auto rows = VIDL_FOR_THIS_CPU(lengths_of_rows);
  parallel_for(0, s.K, grain(s.K, s.K * s.H * s.D),
               [&](int64_t begin, int64_t end) { rows(s, lengths, begin, end); });
  weigh_by_length(s, lengths, to);
  return {scores, by_head, norms};
}

// ---- Backward ----------------------------------------------------------------------------------

// From the gradient of "value" scores to that of the attention, and of the lengths of the values:
// with w = attention x length and a gradient g, both come from (g - sum(g w) / sum(w)) / sum(w).
void lengths_back(const Scoring& s, const float* grad_scores, const float* norms, float* attention,
                  float* grad_lengths) {
  parallel_for(0, s.G, grain(s.G, s.E), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      double total = 0.0, reached = 0.0;
      for (int64_t e = s.key_offsets[g]; e < s.key_offsets[g + 1]; e++) {
        const float w = attention[e] * norms[row_at(s, e)];
        total += w;
        reached += grad_scores[e] * w;
      }
      for (int64_t e = s.key_offsets[g]; e < s.key_offsets[g + 1]; e++) {
        const auto grad =
            static_cast<float>(total == 0.0 ? 0.0 : (grad_scores[e] - reached / total) / total);
        grad_lengths[e] = grad * attention[e];
        attention[e] = grad * norms[row_at(s, e)];
      }
    }
  });
}

// Which entries each row of k and v is; one by one where no row is shared.
struct Entries {
  const int32_t *starts, *order;  // or null

  // Calls f(row, its entries, their number) for every row.
  template <class F>
  void of_rows(const Scoring& s, F f) const {
    parallel_for(0, s.K, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        f(row, order + starts[row], starts[row + 1] - starts[row]);
      }
    });
  }
};

// grad_v[row] = v[row] / |v[row]| times the sum of its entries' grad_lengths
template <class T>
void values_back(const Scoring& s, const Entries& shared, const float* norms,
                 const float* grad_lengths, T* grad_v) {
  const auto write = [&](int64_t row, float grad) {
    const float factor = norms[row] == 0.0f ? 0.0f : grad / norms[row];
    for (int64_t h = 0; h < s.H; h++) {
      const T* const from = static_cast<const T*>(s.v.data) + row * s.v.row + h * s.v.head;
      T* const to = grad_v + (row * s.H + h) * s.D;
      for (int64_t d = 0; d < s.D; d++) {
        to[d] = static_cast<T>(static_cast<float>(from[d]) * factor);
      }
    }
  };
  if (shared.order == nullptr) {
    parallel_for(0, s.E, 16, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; e++) write(row_at(s, e), grad_lengths[e]);
    });
    return;
  }
  shared.of_rows(s, [&](int64_t row, const int32_t* entries, int64_t count) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; i++) sum += grad_lengths[entries[i]];
    write(row, sum);
  });
}

void cls_back(const Scoring& s, Gradients b, const Entries& shared) {
  const int64_t row_bytes = s.H * s.D * itemsize(s.dtype);
  char* const grad_q = static_cast<char*>(b.grad_q);
  parallel_for(0, s.Q, grain(s.Q, s.Q * s.H * s.D), [&](int64_t begin, int64_t end) {
    std::memset(grad_q + begin * row_bytes, 0, (end - begin) * row_bytes);
  });
  std::vector<float> grad_logits(shared.order == nullptr ? 0 : s.H * s.E);
  std::vector<int32_t> group(shared.order == nullptr ? 0 : s.E);
  if (shared.order != nullptr) {
    for (int64_t g = 0; g < s.G; g++) {
      std::fill(group.begin() + s.key_offsets[g], group.begin() + s.key_offsets[g + 1], g);
    }
    b.grad_logits = grad_logits.data();
    b.group = group.data();
  }
  const int64_t count = items_of_cls(s);
  const auto items = VIDL_FOR_THIS_CPU(cls_backward_items);
  parallel_for(0, count, grain(count, s.E * s.H * s.D),
               [&](int64_t begin, int64_t end) { items(s, b, begin, end); });
  if (shared.order == nullptr) return;
  const auto rows = VIDL_FOR_THIS_CPU(shared_rows);
  parallel_for(0, s.K, 16, [&](int64_t begin, int64_t end) {
    rows(s, b, shared.starts, shared.order, begin, end);
  });
}

void mean_back(const Scoring& s, Gradients b, const Entries& shared) {
  const int64_t line = s.H * s.D;
  std::vector<float> entry_grad_k(shared.order == nullptr ? 0 : s.E * line);
  if (shared.order != nullptr) b.entry_grad_k = entry_grad_k.data();
  const auto items = VIDL_FOR_THIS_CPU(mean_backward_items);
  parallel_for(0, s.G * s.H, grain(s.G, pairs(s) * s.D),
               [&](int64_t begin, int64_t end) { items(s, b, begin, end); });
  if (shared.order == nullptr) return;
  shared.of_rows(s, [&](int64_t row, const int32_t* entries, int64_t count) {
    std::vector<float> sum(line, 0.0f);
    for (int64_t i = 0; i < count; i++) {
      add_line(b.entry_grad_k, Dtype::kFloat32, entries[i] * line, sum.data(), line);
    }
    add_three(sum.data(), nullptr, Dtype::kFloat32, 0, nullptr, Dtype::kFloat32, 0, b.grad_k,
              s.dtype, row * line, line);
  });
}

std::tuple<Tensor, Tensor, Tensor> token_scores_bwd(
    Tensor grad_scores, Tensor weights, Tensor norms, Tensor q, Tensor k, OptionalTensor v,
    Tensor query_offsets, Tensor key_offsets, OptionalTensor query_rows, OptionalTensor key_rows,
    OptionalTensor entry_offsets, OptionalTensor entries, int64_t, int64_t, double scale,
    std::string kind) {
  q = readable(q);
  k = readable(k);
  v = readable(v);
  const Scoring s = scoring(q, k, v, query_offsets, key_offsets, query_rows, key_rows, scale);
  grad_scores = torch::stable::contiguous(grad_scores);
  weights = torch::stable::contiguous(weights);
  norms = torch::stable::contiguous(norms);
  STD_TORCH_CHECK(
      grad_scores.numel() == s.E && weights.numel() == s.H * (kind == "mean" ? s.Q : s.E),
      "token_scores_bwd: need grad_scores of ", s.E, " entries and what forward kept");
  Tensor grad_q = new_empty(q, {s.Q, s.H, s.D});
  Tensor grad_k = new_empty(k, {s.K, s.H, s.D});
  Tensor grad_v = new_empty(k, v ? std::vector<int64_t>{s.K, s.H, s.D} : std::vector<int64_t>{0});
  Entries shared = {nullptr, nullptr};
  if (entries) {
    shared = {index(kOp, *entry_offsets, "entry_offsets"), index(kOp, *entries, "entries")};
    STD_TORCH_CHECK(entry_offsets->size(0) == s.K + 1 && entries->size(0) == s.E,
                    "token_scores: need entry_offsets [keys + 1] and entries [E]");
    check_groups(kOp, "entry", shared.starts, s.K, shared.order, s.E, s.E);
  }
  Gradients b = {};
  b.grad_scores = grad_scores.const_data_ptr<float>();
  b.weights = weights.const_data_ptr<float>();
  b.grad_q = grad_q.data_ptr();
  b.grad_k = grad_k.data_ptr();
  if (kind == "mean") {
    mean_back(s, b, shared);
    return {grad_q, grad_k, grad_v};
  }
  std::vector<float> attention, grad_lengths;
  if (kind == "value") {
    STD_TORCH_CHECK(v && norms.numel() == s.K, "token_scores_bwd: need v and its lengths");
    attention.resize(s.E);
    grad_lengths.resize(s.E);
    mean_over_heads(s, b.weights, attention.data());
    const float* const lengths = norms.const_data_ptr<float>();
    lengths_back(s, b.grad_scores, lengths, attention.data(), grad_lengths.data());
    VIDL_FLOATING(
        s.dtype, T,
        values_back(s, shared, lengths, grad_lengths.data(), static_cast<T*>(grad_v.data_ptr())))
    b.grad_scores = attention.data();
  }
  cls_back(s, b, shared);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace vidl

#ifndef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(vidl, CPU, m) {
  m.impl("token_scores", TORCH_BOX(&vidl::token_scores));
  m.impl("token_scores_bwd", TORCH_BOX(&vidl::token_scores_bwd));
}
#endif
