// token_scores: the CPU, one to four heads of one group at a time, and the host side of the CUDA
// kernels in cuda.cu. Schema and contract: kernels/token_scores/op.py; the loops of the CPU: cpu.h.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/lines.h"
#include "cpu/scratch.h"
#include "groups/host.h"
#include "groups/sums.h"
#include "token_scores/interface.h"
#include "torch/dtype.h"

namespace vidl {
namespace {

using torch::stable::parallel_for;

const char* const kOp = "token_scores";

#ifndef VIDL_EMULATED
struct Gradients {
  const float* grad_scores;  // [E]
  const float* weights;      // [H, E], or for "mean" the log-sum-exp [H, num_queries]
  void *grad_q, *grad_k;     // [num_queries, H, D], [num_keys, H, D]
  // Null unless there are entries:
  float* grad_logits;    // [H, E], of "cls"
  const int32_t* group;  // [E], of "cls"
  float* entry_grad_k;   // [E, H, D], of "mean"
  // Null unless the bias needs a gradient: sums over some groups, [parts, H, bias.rows].
  float* bias_parts;
  int64_t parts;
};

#define VIDL_SOURCE "token_scores/cpu.h"
#include "cpu/levels.h"

// How many of `heads` heads, over all groups, one item of "cls" takes. Two neighbouring heads are
// read in one long piece; one if a thread would get less than four items.
int64_t heads_of_item(int64_t heads) {
  const int64_t items = 4 * std::max<int64_t>(torch::stable::get_num_threads(), 1);
  return std::clamp<int64_t>((heads + items - 1) / items, 1, 2);
}

int64_t items_of_cls(const TokenScores& s, int64_t parts) {
  return parts * ((s.H + s.heads - 1) / s.heads);
}

struct Cpu {
  // x, or a copy of it if the channels of a head are not neighbours.
  static Tensor readable(const Tensor& x) {
    return x.dim() == 3 && x.stride(2) != 1 ? contiguous_of(x) : x;
  }

  static void prepare(TokenScores& s) {
    check_lists(kOp, s.groups);
    s.heads = heads_of_item(s.groups.G * s.H);
  }
};
#endif

#if defined(VIDL_CUDA) || defined(VIDL_EMULATED)
struct Cuda {
  // x, or a contiguous copy of it if a row has gaps or does not begin at a multiple of 16 bytes.
  static Tensor readable(const Tensor& x) {
    const bool aligned =
        x.dim() != 3 || (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                         x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && x.stride(2) == 1);
    if (aligned) return x;
    Tensor copy = new_tensor(x, {x.size(0), x.size(1), x.size(2)});
    torch::stable::copy_(copy, x);
    return copy;
  }

  static void prepare(TokenScores& s) {  // the kernels check the lists of the groups
    STD_TORCH_CHECK(s.dtype != Dtype::kFloat32, kOp, ": need float16 or bfloat16 on CUDA");
    STD_TORCH_CHECK(s.D % 32 == 0 && s.D > 0 && s.D <= 128, kOp,
                    ": the CUDA kernels need head sizes 32, 64, 96 or 128, got ", s.D);
  }
};
#endif

// The checked inputs of forward and backward. q, k and v become readable.
template <class Device>
TokenScores scores_of(OptionalTensor& q, Tensor& k, OptionalTensor& v, const GroupTensors& groups,
                      const BiasTensors& bias, double scale) {
  k = Device::readable(k);
  if (q) q = Device::readable(*q);
  if (v) v = Device::readable(*v);
  TokenScores s = {};
  s.groups = groups_of(kOp, groups, q, k);
  if (q) s.q = strided(kOp, *q, "q");
  s.k = strided(kOp, k, "k");
  if (v) s.v = strided(kOp, *v, "v");
  s.H = k.size(1);
  s.D = k.size(2);
  s.bias = bias_of(kOp, bias, s.groups, s.H);
  s.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(std::isfinite(s.scale), kOp, ": need a finite scale, got ", scale);
  s.dtype = dtype_of(k);
  Device::prepare(s);
  return s;
}

#ifndef VIDL_EMULATED
// How many of `items` items, which share the work equally, are worth a thread.
int64_t grain(int64_t items, int64_t work) {
  return std::max<int64_t>(1, items * 65536 / std::max<int64_t>(work, 1));
}

// Keys of a group, on average.
int64_t keys_of_group(const Groups& groups) { return groups.E / std::max<int64_t>(groups.G, 1); }

// Pairs of a query and a key of its group, approximately.
int64_t pairs(const Groups& groups) { return groups.num_queries * (keys_of_group(groups) + 1); }

int64_t row_at(const TokenScores& s, int64_t entry) {
  return s.groups.key_rows == nullptr ? entry : s.groups.key_rows[entry];
}

// scores[e] *= norms[row of e]; then the scores of every group are divided by their sum.
void weigh_by_length(const TokenScores& s, const float* norms, float* scores) {
  const Groups& groups = s.groups;
  parallel_for(0, groups.G, grain(groups.G, groups.E), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      double sum = 0.0;
      for (int64_t e = groups.key_offsets[g]; e < groups.key_offsets[g + 1]; e++) {
        scores[e] *= norms[row_at(s, e)];
        sum += scores[e];
      }
      const float total = static_cast<float>(sum);
      if (total == 0.0f) continue;
      for (int64_t e = groups.key_offsets[g]; e < groups.key_offsets[g + 1]; e++)
        scores[e] /= total;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> token_scores(OptionalTensor q, Tensor k, OptionalTensor v,
                                                OptionalTensor lse, GroupTensors groups,
                                                BiasTensors bias, double scale, std::string kind) {
  const TokenScores s = scores_of<Cpu>(q, k, v, groups, bias, scale);
  const auto floats = [&](std::vector<int64_t> shape) {
    return new_tensor(k, shape, ScalarType::Float);
  };
  Tensor scores = floats({s.groups.E}), none = floats({0});
  float* const to = static_cast<float*>(scores.data_ptr());
  if (kind == "similarity") {
    const auto items = VIDL_FOR_THIS_CPU(similarity_items);
    parallel_for(0, s.groups.G,
                 grain(s.groups.G, s.groups.E * (keys_of_group(s.groups) + s.H) * s.D),
                 [&](int64_t begin, int64_t end) { items(s, to, begin, end); });
    return {scores, floats({0}), none};
  }
  Tensor by_head = floats({s.H, s.groups.E});
  float* const head_scores = static_cast<float*>(by_head.data_ptr());
  if (kind == "mean") {
    // The caller's log-sum-exp is not used: a whole row of weights is in the cache, and dividing
    // it by its own sum is as fast and more accurate.
    Tensor own_lse =
        floats(lse ? std::vector<int64_t>{0} : std::vector<int64_t>{s.H, s.groups.num_queries});
    float* const to_lse = lse ? nullptr : static_cast<float*>(own_lse.data_ptr());
    const auto items = VIDL_FOR_THIS_CPU(mean_items);
    parallel_for(0, s.groups.G * s.H, grain(s.groups.G, pairs(s.groups) * s.D),
                 [&](int64_t begin, int64_t end) { items(s, head_scores, to_lse, begin, end); });
    mean_over_heads(head_scores, s.H, s.groups.E, to);
    return {scores, own_lse, none};
  }
  const int64_t count = items_of_cls(s, s.groups.G);
  const auto items = VIDL_FOR_THIS_CPU(cls_items);
  parallel_for(0, count, grain(count, s.groups.E * s.H * s.D),
               [&](int64_t begin, int64_t end) { items(s, head_scores, begin, end); });
  mean_over_heads(head_scores, s.H, s.groups.E, to);
  if (kind == "cls") return {scores, by_head, none};

  STD_TORCH_CHECK(v && v->size(0) == s.groups.num_keys && v->size(1) == s.H && v->size(2) == s.D,
                  "token_scores: need v of the shape of k");
  Tensor norms = floats({s.groups.num_keys});
  float* const lengths = static_cast<float*>(norms.data_ptr());
  const auto rows = VIDL_FOR_THIS_CPU(lengths_of_rows);
  parallel_for(0, s.groups.num_keys, grain(s.groups.num_keys, s.groups.num_keys * s.H * s.D),
               [&](int64_t begin, int64_t end) { rows(s, lengths, begin, end); });
  weigh_by_length(s, lengths, to);
  return {scores, by_head, norms};
}

// The backward of "value" scores w / sum(w), w = attention * length: from their gradient g follow
// the gradients of attention (written over it) and length, both by way of that of w, which is
// (g - sum(g w) / sum(w)) / sum(w).
void lengths_back(const TokenScores& s, const float* grad_scores, const float* norms,
                  float* attention, float* grad_lengths) {
  const Groups& groups = s.groups;
  parallel_for(0, groups.G, grain(groups.G, groups.E), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      double total = 0.0, weighted = 0.0;
      for (int64_t e = groups.key_offsets[g]; e < groups.key_offsets[g + 1]; e++) {
        const float w = attention[e] * norms[row_at(s, e)];
        total += w;
        weighted += grad_scores[e] * w;
      }
      for (int64_t e = groups.key_offsets[g]; e < groups.key_offsets[g + 1]; e++) {
        const auto grad =
            static_cast<float>(total == 0.0 ? 0.0 : (grad_scores[e] - weighted / total) / total);
        grad_lengths[e] = grad * attention[e];
        attention[e] = grad * norms[row_at(s, e)];
      }
    }
  });
}

// grad_v[row] = v[row] / |v[row]| times the sum of its entries' grad_lengths
template <class T>
void values_back(const TokenScores& s, const float* norms, const float* grad_lengths, T* grad_v) {
  const Groups& groups = s.groups;
  const auto write = [&](int64_t row, float grad) {
    // A row of no group may be NaN, and its gradient is zero.
    const bool zero = norms[row] == 0.0f || grad == 0.0f;
    const float factor = zero ? 0.0f : grad / norms[row];
    for (int64_t h = 0; h < s.H; h++) {
      const T* const from = static_cast<const T*>(s.v.data) + row * s.v.row + h * s.v.head;
      T* const to = grad_v + (row * s.H + h) * s.D;
      for (int64_t d = 0; d < s.D; d++) {
        to[d] = static_cast<T>(zero ? 0.0f : static_cast<float>(from[d]) * factor);
      }
    }
  };
  if (groups.entry_offsets == nullptr) {
    parallel_for(0, groups.E, 16, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; e++) write(row_at(s, e), grad_lengths[e]);
    });
    return;
  }
  parallel_for(0, groups.num_keys, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float sum = 0.0f;
      for (int32_t i = groups.entry_offsets[row]; i < groups.entry_offsets[row + 1]; i++) {
        sum += grad_lengths[groups.entries[i]];
      }
      write(row, sum);
    }
  });
}

void cls_back(const TokenScores& s, Gradients b) {
  const Groups& groups = s.groups;
  const int64_t row_bytes = s.H * s.D * itemsize(s.dtype);
  char* const grad_q = static_cast<char*>(b.grad_q);
  parallel_for(0, groups.num_queries, grain(groups.num_queries, groups.num_queries * s.H * s.D),
               [&](int64_t begin, int64_t end) {
                 std::memset(grad_q + begin * row_bytes, 0, (end - begin) * row_bytes);
               });
  std::vector<float> grad_logits(groups.entry_offsets == nullptr ? 0 : s.H * groups.E);
  std::vector<int32_t> group(groups.entry_offsets == nullptr ? 0 : groups.E);
  if (groups.entry_offsets != nullptr) {
    for (int64_t g = 0; g < groups.G; g++) {
      std::fill(group.begin() + groups.key_offsets[g], group.begin() + groups.key_offsets[g + 1],
                g);
    }
    b.grad_logits = grad_logits.data();
    b.group = group.data();
  }
  // Items (group, heads), or (part of the groups, heads) with a gradient of the bias each.
  const int64_t count = items_of_cls(s, b.bias_parts == nullptr ? groups.G : b.parts);
  const auto items = VIDL_FOR_THIS_CPU(cls_backward_items);
  parallel_for(0, count, grain(count, groups.E * s.H * s.D),
               [&](int64_t begin, int64_t end) { items(s, b, begin, end); });
  if (groups.entry_offsets == nullptr) return;
  const auto rows = VIDL_FOR_THIS_CPU(shared_rows);
  parallel_for(0, groups.num_keys, 16, [&](int64_t begin, int64_t end) { rows(s, b, begin, end); });
}

void mean_back(const TokenScores& s, Gradients b) {
  const Groups& groups = s.groups;
  const int64_t line = s.H * s.D;
  std::vector<float> entry_grad_k(groups.entry_offsets == nullptr ? 0 : groups.E * line);
  if (groups.entry_offsets != nullptr) b.entry_grad_k = entry_grad_k.data();
  const auto items = VIDL_FOR_THIS_CPU(mean_backward_items);
  const int64_t count = b.bias_parts == nullptr ? groups.G : b.parts;
  parallel_for(0, count * s.H, grain(count, pairs(groups) * s.D),
               [&](int64_t begin, int64_t end) { items(s, b, begin, end); });
  if (groups.entry_offsets == nullptr) return;
  sum_entries(groups, b.entry_grad_k, line, b.grad_k, s.dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_scores_bwd(Tensor grad_scores, Tensor weights,
                                                            Tensor norms, Tensor q, Tensor k,
                                                            OptionalTensor v, GroupTensors groups,
                                                            BiasTensors bias, bool need_bias,
                                                            double scale, std::string kind) {
  OptionalTensor query = q;
  const TokenScores s = scores_of<Cpu>(query, k, v, groups, bias, scale);
  STD_TORCH_CHECK(!need_bias || s.bias.table != nullptr, kOp, "_bwd: need a bias for its gradient");
  check_entries(kOp, s.groups);
  grad_scores = contiguous_of(grad_scores);
  weights = contiguous_of(weights);
  norms = contiguous_of(norms);
  STD_TORCH_CHECK(grad_scores.numel() == s.groups.E &&
                      weights.numel() == s.H * (kind == "mean" ? s.groups.num_queries : s.groups.E),
                  "token_scores_bwd: need grad_scores [E] for ", s.groups.E,
                  " entries and the forward's weights");
  Tensor grad_q = new_tensor(q, {s.groups.num_queries, s.H, s.D});
  Tensor grad_k = grad_of_keys(s.groups, k);
  Tensor grad_v = v ? grad_of_keys(s.groups, *v) : new_tensor(k, {0});
  Gradients b = {};
  b.grad_scores = grad_scores.const_data_ptr<float>();
  b.weights = weights.const_data_ptr<float>();
  b.grad_q = grad_q.data_ptr();
  b.grad_k = grad_k.data_ptr();
  // The groups are divided alike for any number of threads, so that the sums have the same bits.
  b.parts = need_bias ? std::min<int64_t>(s.groups.G, kMostParts) : 0;
  Tensor bias_parts = new_tensor(k, {b.parts, s.H, s.bias.rows}, ScalarType::Float);
  Tensor grad_bias = need_bias ? new_tensor(k, {s.H, s.bias.rows}, ScalarType::Float)
                               : new_tensor(k, {0}, ScalarType::Float);
  if (need_bias) b.bias_parts = static_cast<float*>(bias_parts.data_ptr());
  const auto results = [&] {
    if (need_bias) {
      sum_parts(b.bias_parts, b.parts, s.H * s.bias.rows,
                static_cast<float*>(grad_bias.data_ptr()));
    }
    return std::make_tuple(grad_q, grad_k, grad_v, grad_bias);
  };
  if (kind == "mean") {
    mean_back(s, b);
    return results();
  }
  std::vector<float> attention, grad_lengths;
  if (kind == "value") {
    STD_TORCH_CHECK(v && norms.numel() == s.groups.num_keys,
                    "token_scores_bwd: need v and the norms of its rows");
    attention.resize(s.groups.E);
    grad_lengths.resize(s.groups.E);
    mean_over_heads(b.weights, s.H, s.groups.E, attention.data());
    const float* const lengths = norms.const_data_ptr<float>();
    lengths_back(s, b.grad_scores, lengths, attention.data(), grad_lengths.data());
    VIDL_FLOATING(s.dtype, T,
                  values_back(s, lengths, grad_lengths.data(), static_cast<T*>(grad_v.data_ptr())))
    b.grad_scores = attention.data();
  }
  cls_back(s, b);
  return results();
}

#endif

#if defined(VIDL_CUDA) || defined(VIDL_EMULATED)
Score score_of(const std::string& kind) {
  return kind == "cls"     ? Score::kCls
         : kind == "mean"  ? Score::kMean
         : kind == "value" ? Score::kValue
                           : Score::kSimilarity;
}

void check_values(const TokenScores& s, const OptionalTensor& v) {
  STD_TORCH_CHECK(v && v->dim() == 3 && v->size(0) == s.groups.num_keys && v->size(1) == s.H &&
                      v->size(2) == s.D,
                  kOp, ": need v of the shape of k");
}

std::tuple<Tensor, Tensor, Tensor> token_scores_cuda(OptionalTensor q, Tensor k, OptionalTensor v,
                                                     OptionalTensor lse, GroupTensors groups,
                                                     BiasTensors bias, double scale,
                                                     std::string name) {
  const DeviceScope scope(k);
  const Score kind = score_of(name);
  const TokenScores s = scores_of<Cuda>(q, k, v, groups, bias, scale);
  STD_TORCH_CHECK(q || kind == Score::kSimilarity, kOp, ": need q");
  if (kind == Score::kValue) check_values(s, v);
  if (kind != Score::kMean) lse.reset();
  if (lse) lse = contiguous_of(*lse);
  STD_TORCH_CHECK(!lse || (lse->scalar_type() == ScalarType::Float &&
                           lse->numel() == s.H * s.groups.num_queries),
                  kOp, ": need lse [H, num_queries] in float32");
  const auto floats = [&](bool used, const std::vector<int64_t>& shape) {
    return new_tensor(k, used ? shape : std::vector<int64_t>{0}, ScalarType::Float);
  };
  Tensor scores = floats(true, {s.groups.E});
  Tensor by_head = floats(kind != Score::kSimilarity, {s.H, s.groups.E});
  Tensor own_lse = floats(kind == Score::kMean && !lse, {s.H, s.groups.num_queries});
  Tensor norms = floats(kind == Score::kValue, {s.groups.num_keys});
  const int64_t directions = kind == Score::kSimilarity ? s.groups.E : 0;
  Tensor of_keys = new_tensor(k, {directions, 2, s.D}, ScalarType::Half);
  const ScoresForward f = {static_cast<float*>(scores.data_ptr()),
                           static_cast<float*>(by_head.data_ptr()),
                           static_cast<float*>(lse ? lse->data_ptr() : own_lse.data_ptr()),
                           lse.has_value(),
                           static_cast<float*>(norms.data_ptr()),
                           of_keys.data_ptr()};
  check_cuda(vidl_token_scores_cuda(&s, kind, &f, current_stream(k)));
  return {scores, kind == Score::kMean ? own_lse : by_head, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_scores_bwd_cuda(
    Tensor grad_scores, Tensor weights, Tensor norms, Tensor q, Tensor k, OptionalTensor v,
    GroupTensors groups, BiasTensors bias, bool need_bias, double scale, std::string name) {
  const DeviceScope scope(k);
  const Score kind = score_of(name);
  OptionalTensor query = q;
  const TokenScores s = scores_of<Cuda>(query, k, v, groups, bias, scale);
  const int64_t E = s.groups.E, num_queries = s.groups.num_queries;
  const bool mean = kind == Score::kMean, value = kind == Score::kValue;
  STD_TORCH_CHECK(!need_bias || s.bias.table != nullptr, kOp, "_bwd: need a bias for its gradient");
  grad_scores = contiguous_of(grad_scores);
  weights = contiguous_of(weights);
  norms = contiguous_of(norms);
  STD_TORCH_CHECK(grad_scores.numel() == E && weights.numel() == s.H * (mean ? num_queries : E),
                  kOp, "_bwd: need grad_scores [E] for ", E, " entries and the forward's weights");
  if (value) check_values(s, v);
  STD_TORCH_CHECK(!value || norms.numel() == s.groups.num_keys, kOp,
                  "_bwd: need the norms of the rows of v");
  const bool shared = s.groups.entry_offsets != nullptr;
  const auto floats = [&](bool used, const std::vector<int64_t>& shape) {
    return new_tensor(k, used ? shape : std::vector<int64_t>{0}, ScalarType::Float);
  };
  const std::vector<int64_t> queries = {num_queries, s.H, s.D};
  // The first query of each group alone has a gradient of "cls".
  Tensor grad_q = mean ? new_tensor(q, queries) : torch::stable::new_zeros(q, queries);
  Tensor grad_k = grad_of_keys(s.groups, k);
  Tensor grad_v = value ? grad_of_keys(s.groups, *v) : new_tensor(k, {0});
  Tensor grad_attention = floats(value, {E}), grad_norms = floats(value, {E});
  Tensor grad_logits = floats(shared && !mean, {s.H, E});
  Tensor entry_grad_k = floats(shared && mean, {E, s.H, s.D});
  Tensor total = floats(mean, {s.H, num_queries}), delta = floats(mean, {s.H, num_queries});
  // For "mean" a block of threads takes a part; or each of its four warps, if their tables do not
  // fit into it.
  const int64_t blocks = s.groups.G * (mean ? (s.groups.max_queries + 63) / 64 : 1);
  const int64_t parts =
      need_bias ? std::min<int64_t>(mean ? (blocks + 3) / 4 * 4 : blocks, kMostParts) : 0;
  Tensor bias_parts = floats(need_bias, {parts, s.H, s.bias.rows});
  Tensor grad_bias = floats(need_bias, {s.H, s.bias.rows});
  const auto given = [](bool used, Tensor& x) {
    return used ? static_cast<float*>(x.data_ptr()) : nullptr;
  };
  const ScoresBackward b = {static_cast<const float*>(grad_scores.data_ptr()),
                            static_cast<const float*>(weights.data_ptr()),
                            static_cast<const float*>(norms.data_ptr()),
                            grad_q.data_ptr(),
                            grad_k.data_ptr(),
                            grad_v.data_ptr(),
                            given(value, grad_attention),
                            given(value, grad_norms),
                            given(shared && !mean, grad_logits),
                            given(shared && mean, entry_grad_k),
                            given(mean, total),
                            given(mean, delta),
                            given(need_bias, grad_bias),
                            given(need_bias, bias_parts),
                            parts};
  check_cuda(vidl_token_scores_bwd_cuda(&s, kind, &b, current_stream(k)));
  return {grad_q, grad_k, grad_v, grad_bias};
}
#endif

}  // namespace
}  // namespace vidl

#ifdef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("token_scores_emulated", TORCH_BOX(vidl::unbundled<&vidl::token_scores_cuda>));
  m.impl("token_scores_bwd_emulated", TORCH_BOX(vidl::unbundled<&vidl::token_scores_bwd_cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("token_scores", TORCH_BOX(vidl::unbundled<&vidl::token_scores>));
  m.impl("token_scores_bwd", TORCH_BOX(vidl::unbundled<&vidl::token_scores_bwd>));
}
#ifdef VIDL_CUDA
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  m.impl("token_scores", TORCH_BOX(vidl::unbundled<&vidl::token_scores_cuda>));
  m.impl("token_scores_bwd", TORCH_BOX(vidl::unbundled<&vidl::token_scores_bwd_cuda>));
}
#endif
#endif
