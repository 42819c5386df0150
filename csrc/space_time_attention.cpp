// space_time_attention on the CPU: one head of one group at a time. Schema and contract:
// kernels/space_time_attention/op.py; the work itself: space_time_attention_cpu.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_groups.h"

namespace vidl {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

enum class Scores { kNone, kCls, kMean };

struct Attention {
  Strided q, k, v;
  const int32_t *query_offsets, *key_offsets;  // [G + 1]
  const int32_t *query_rows, *key_rows;        // [Q], [E], or null
  int64_t G, H, D, Q, K, E;                    // Q rows of q, K rows of k and v
  float scale;
  Scores scores;
  Dtype dtype;
};

struct Forward {
  void* out;      // [Q, H, D]
  float* lse;     // [H, Q]
  float* scores;  // [H, E] or null
};

struct Backward {
  const void* grad_out;                // [Q, H, D]
  const float *lse, *grad_scores;      // [H, Q]; [E] or null
  void *grad_q, *grad_k, *grad_v;      // [Q, H, D], [K, H, D]
  float *entry_grad_k, *entry_grad_v;  // [E, H, D] where rows are shared, else null
};

#define VIDL_SOURCE "space_time_attention_cpu.h"
#include "cpu_levels.h"

const char* const kOp = "space_time_attention";

Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& query_offsets,
                    const Tensor& key_offsets, const OptionalTensor& query_rows,
                    const OptionalTensor& key_rows, double scale, const std::string& scores) {
  Attention a;
  a.q = strided(kOp, q, "q");
  a.k = strided(kOp, k, "k");
  a.v = strided(kOp, v, "v");
  a.query_offsets = index(kOp, query_offsets, "query_offsets");
  a.key_offsets = index(kOp, key_offsets, "key_offsets");
  a.query_rows = query_rows ? index(kOp, *query_rows, "query_rows") : nullptr;
  a.key_rows = key_rows ? index(kOp, *key_rows, "key_rows") : nullptr;
  a.G = query_offsets.size(0) - 1;
  STD_TORCH_CHECK(a.G >= 0 && key_offsets.size(0) == a.G + 1,
                  "space_time_attention: need query_offsets and key_offsets of one length");
  a.Q = q.size(0);
  a.H = q.size(1);
  a.D = q.size(2);
  a.K = k.size(0);
  STD_TORCH_CHECK(a.D % 16 == 0, "space_time_attention: need D a multiple of 16, got ", a.D);
  a.E = key_rows ? key_rows->size(0) : a.K;
  STD_TORCH_CHECK(!query_rows || query_rows->size(0) == a.Q,
                  "space_time_attention: need query_rows of ", a.Q, " rows");
  check_groups(kOp, "query", a.query_offsets, a.G, a.query_rows, a.Q, a.Q);
  check_groups(kOp, "key", a.key_offsets, a.G, a.key_rows, a.E, a.K);
  a.scale = static_cast<float>(scale);
  a.scores = scores.empty() ? Scores::kNone : scores == "cls" ? Scores::kCls : Scores::kMean;
  a.dtype = floating_dtype(q);
  return a;
}

// Items (group, head) for one thread: enough work to be worth a thread.
int64_t grain(const Attention& a) {
  const int64_t pairs = a.Q * (a.E / std::max<int64_t>(a.G, 1) + 1);
  const int64_t per_item = pairs / std::max<int64_t>(a.G, 1) * a.D + 1;
  return std::max<int64_t>(1, 65536 / per_item);
}

std::tuple<Tensor, Tensor, Tensor> space_time_attention(Tensor q, Tensor k, Tensor v,
                                                        Tensor query_offsets, Tensor key_offsets,
                                                        OptionalTensor query_rows,
                                                        OptionalTensor key_rows, OptionalTensor,
                                                        OptionalTensor, int64_t, int64_t,
                                                        double scale, std::string scores) {
  const Attention a =
      attention(q, k, v, query_offsets, key_offsets, query_rows, key_rows, scale, scores);
  Tensor out = new_empty(q, {a.Q, a.H, a.D});
  Tensor lse = new_empty(q, {a.H, a.Q}, ScalarType::Float);
  const int64_t scored = a.scores == Scores::kNone ? 0 : a.E;
  Tensor by_head = new_empty(q, {a.H, scored}, ScalarType::Float);
  Tensor mean = new_empty(q, {scored}, ScalarType::Float);
  Forward f = {out.data_ptr(), static_cast<float*>(lse.data_ptr()),
               scored ? static_cast<float*>(by_head.data_ptr()) : nullptr};
  const auto items = VIDL_FOR_THIS_CPU(forward_items);
  parallel_for(0, a.G * a.H, grain(a),
               [&](int64_t begin, int64_t end) { items(a, f, begin, end); });
  float* const means = static_cast<float*>(mean.data_ptr());
  parallel_for(0, scored, 4096, [&](int64_t begin, int64_t end) {
    std::memset(means + begin, 0, (end - begin) * sizeof(float));
    for (int64_t h = 0; h < a.H; h++) {
      add_line(f.scores, Dtype::kFloat32, h * a.E + begin, means + begin, end - begin);
    }
    for (int64_t e = begin; e < end; e++) means[e] /= static_cast<float>(a.H);
  });
  return {out, lse, mean};
}

std::tuple<Tensor, Tensor, Tensor> space_time_attention_bwd(
    Tensor grad_out, OptionalTensor grad_scores, Tensor q, Tensor k, Tensor v, Tensor, Tensor lse,
    Tensor query_offsets, Tensor key_offsets, OptionalTensor query_rows, OptionalTensor key_rows,
    OptionalTensor entry_offsets, OptionalTensor entries, int64_t, int64_t, double scale,
    std::string scores) {
  const Attention a =
      attention(q, k, v, query_offsets, key_offsets, query_rows, key_rows, scale, scores);
  grad_out = torch::stable::contiguous(grad_out);
  lse = torch::stable::contiguous(lse);
  if (a.scores == Scores::kNone) grad_scores.reset();
  if (grad_scores) grad_scores = torch::stable::contiguous(*grad_scores);
  STD_TORCH_CHECK(!grad_scores || grad_scores->numel() == a.E,
                  "space_time_attention_bwd: need grad_scores of ", a.E, " entries");
  Tensor grad_q = new_empty(q, {a.Q, a.H, a.D});
  Tensor grad_k = new_empty(k, {a.K, a.H, a.D});
  Tensor grad_v = new_empty(v, {a.K, a.H, a.D});
  const bool shared = entries.has_value();
  const int64_t kept = shared ? a.E : 0;
  Tensor entry_grad_k = new_empty(k, {kept, a.H, a.D}, ScalarType::Float);
  Tensor entry_grad_v = new_empty(k, {kept, a.H, a.D}, ScalarType::Float);
  Backward b = {grad_out.data_ptr(),
                static_cast<const float*>(lse.data_ptr()),
                static_cast<const float*>(pointer(grad_scores)),
                grad_q.data_ptr(),
                grad_k.data_ptr(),
                grad_v.data_ptr(),
                shared ? static_cast<float*>(entry_grad_k.data_ptr()) : nullptr,
                shared ? static_cast<float*>(entry_grad_v.data_ptr()) : nullptr};
  const auto items = VIDL_FOR_THIS_CPU(backward_items);
  parallel_for(0, a.G * a.H, grain(a),
               [&](int64_t begin, int64_t end) { items(a, b, begin, end); });
  if (!shared) return {grad_q, grad_k, grad_v};

  // A row's gradient is the sum over its entries, in ascending order.
  const int32_t* const starts = index(kOp, *entry_offsets, "entry_offsets");
  const int32_t* const order = index(kOp, *entries, "entries");
  STD_TORCH_CHECK(entry_offsets->size(0) == a.K + 1 && entries->size(0) == a.E,
                  "space_time_attention: need entry_offsets [keys + 1] and entries [E]");
  check_groups(kOp, "entry", starts, a.K, order, a.E, a.E);
  const int64_t line = a.H * a.D;
  parallel_for(0, a.K, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(line);
    for (int64_t row = begin; row < end; row++) {
      for (const auto& [from, to] :
           {std::pair(b.entry_grad_k, b.grad_k), std::pair(b.entry_grad_v, b.grad_v)}) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int32_t i = starts[row]; i < starts[row + 1]; i++) {
          add_line(from, Dtype::kFloat32, order[i] * line, sum.data(), line);
        }
        add_three(sum.data(), nullptr, Dtype::kFloat32, 0, nullptr, Dtype::kFloat32, 0, to, a.dtype,
                  row * line, line);
      }
    }
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace vidl

#ifndef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(vidl, CPU, m) {
  m.impl("space_time_attention", TORCH_BOX(&vidl::space_time_attention));
  m.impl("space_time_attention_bwd", TORCH_BOX(&vidl::space_time_attention_bwd));
}
#endif
