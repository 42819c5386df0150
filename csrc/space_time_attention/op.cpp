// space_time_attention: the CPU, one head of one group at a time, and the host side of the CUDA
// kernels in space_time_attention/cuda.cu. Schema and contract: kernels/space_time_attention/op.py; the
// work itself on the CPU: space_time_attention/cpu.h.
#include "space_time_attention/interface.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "groups/host.h"

namespace vidl {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

#ifndef VIDL_EMULATED
#define VIDL_SOURCE "space_time_attention/cpu.h"
#include "cpu/levels.h"
#endif

constexpr const char* kOp = "space_time_attention";

Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& query_offsets,
                    const Tensor& key_offsets, const OptionalTensor& query_rows,
                    const OptionalTensor& key_rows, int64_t max_queries, int64_t max_keys,
                    double scale, const std::string& scores) {
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
  a.max_queries = max_queries;
  a.max_keys = max_keys;
  a.scale = static_cast<float>(scale);
  a.scores = scores.empty() ? Scores::kNone : scores == "cls" ? Scores::kCls : Scores::kMean;
  a.dtype = floating_dtype(q);
  return a;
}

// ---- The two devices ---------------------------------------------------------------------------
#ifndef VIDL_EMULATED
struct Cpu {
  static Tensor readable(const Tensor& x) { return x; }

  static void check(const Attention& a) {
    check_groups(kOp, "query", a.query_offsets, a.G, a.query_rows, a.Q, a.Q);
    check_groups(kOp, "key", a.key_offsets, a.G, a.key_rows, a.E, a.K);
  }

  // Items (group, head) for one thread: enough work to be worth a thread.
  static int64_t grain(const Attention& a) {
    const int64_t pairs = a.Q * (a.E / std::max<int64_t>(a.G, 1) + 1);
    const int64_t per_item = pairs / std::max<int64_t>(a.G, 1) * a.D + 1;
    return std::max<int64_t>(1, 65536 / per_item);
  }

  static void forward(const Attention& a, const Forward& f, const Tensor&) {
    const auto items = VIDL_FOR_THIS_CPU(forward_items);
    parallel_for(0, a.G * a.H, grain(a),
                 [&](int64_t begin, int64_t end) { items(a, f, begin, end); });
    if (f.scores == nullptr) return;
    parallel_for(0, a.E, 4096, [&](int64_t begin, int64_t end) {
      std::memset(f.mean_scores + begin, 0, (end - begin) * sizeof(float));
      for (int64_t h = 0; h < a.H; h++) {
        add_line(f.scores, Dtype::kFloat32, h * a.E + begin, f.mean_scores + begin, end - begin);
      }
      for (int64_t e = begin; e < end; e++) f.mean_scores[e] /= static_cast<float>(a.H);
    });
  }

  static void backward(const Attention& a, const Backward& b, const Tensor&) {
    if (b.entry_offsets != nullptr)
      check_groups(kOp, "entry", b.entry_offsets, a.K, b.entries, a.E, a.E);
    const auto items = VIDL_FOR_THIS_CPU(backward_items);
    parallel_for(0, a.G * a.H, grain(a),
                 [&](int64_t begin, int64_t end) { items(a, b, begin, end); });
    if (b.entry_offsets == nullptr) return;

    // A row's gradient is the sum over its entries, in ascending order.
    const int64_t line = a.H * a.D;
    parallel_for(0, a.K, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(line);
      for (int64_t row = begin; row < end; row++) {
        for (const auto& [from, to] :
             {std::pair(b.entry_grad_k, b.grad_k), std::pair(b.entry_grad_v, b.grad_v)}) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          for (int32_t i = b.entry_offsets[row]; i < b.entry_offsets[row + 1]; i++) {
            add_line(from, Dtype::kFloat32, b.entries[i] * line, sum.data(), line);
          }
          add_three(sum.data(), nullptr, Dtype::kFloat32, 0, nullptr, Dtype::kFloat32, 0, to,
                    a.dtype, row * line, line);
        }
      }
    });
  }
};
#endif

#if defined(VIDL_CUDA) || defined(VIDL_EMULATED)
struct Cuda {
  // x, or a copy of it whose rows begin at multiples of 16 bytes.
  static Tensor readable(const Tensor& x) {
    const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                         x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0;
    if (aligned || x.numel() == 0) return x;
    Tensor copy = new_empty(x, {x.size(0), x.size(1), x.size(2)});
    torch::stable::copy_(copy, x);
    return copy;
  }

  static void check(const Attention& a) {  // the kernels look at the groups
    STD_TORCH_CHECK(a.dtype != Dtype::kFloat32,
                    "space_time_attention: need float16 or bfloat16 on CUDA");
  }

  static void forward(const Attention& a, const Forward& f, const Tensor& q) {
    check_cuda(vidl_attention_cuda(&a, &f, current_stream(q)));
  }

  static void backward(const Attention& a, const Backward& b, const Tensor& q) {
    check_cuda(vidl_attention_bwd_cuda(&a, &b, current_stream(q)));
  }
};
#endif

// ---- The op ------------------------------------------------------------------------------------
template <class Device>
std::tuple<Tensor, Tensor, Tensor> space_time_attention(
    Tensor q, Tensor k, Tensor v, Tensor query_offsets, Tensor key_offsets,
    OptionalTensor query_rows, OptionalTensor key_rows, OptionalTensor, OptionalTensor,
    int64_t max_queries, int64_t max_keys, double scale, std::string scores) {
  const DeviceScope scope(q);
  q = Device::readable(q);
  k = Device::readable(k);
  v = Device::readable(v);
  const Attention a = attention(q, k, v, query_offsets, key_offsets, query_rows, key_rows,
                                max_queries, max_keys, scale, scores);
  Device::check(a);
  Tensor out = new_empty(q, {a.Q, a.H, a.D});
  Tensor lse = new_empty(q, {a.H, a.Q}, ScalarType::Float);
  const int64_t scored = a.scores == Scores::kNone ? 0 : a.E;
  Tensor by_head = new_empty(q, {a.H, scored}, ScalarType::Float);
  Tensor mean = new_empty(q, {scored}, ScalarType::Float);
  const Forward f = {out.data_ptr(), static_cast<float*>(lse.data_ptr()),
                     scored ? static_cast<float*>(by_head.data_ptr()) : nullptr,
                     scored ? static_cast<float*>(mean.data_ptr()) : nullptr};
  Device::forward(a, f, q);
  return {out, lse, mean};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> space_time_attention_bwd(
    Tensor grad_out, OptionalTensor grad_scores, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, Tensor query_offsets, Tensor key_offsets, OptionalTensor query_rows,
    OptionalTensor key_rows, OptionalTensor entry_offsets, OptionalTensor entries,
    int64_t max_queries, int64_t max_keys, double scale, std::string scores) {
  const DeviceScope scope(q);
  q = Device::readable(q);
  k = Device::readable(k);
  v = Device::readable(v);
  const Attention a = attention(q, k, v, query_offsets, key_offsets, query_rows, key_rows,
                                max_queries, max_keys, scale, scores);
  Device::check(a);
  grad_out = Device::readable(torch::stable::contiguous(grad_out));
  out = Device::readable(torch::stable::contiguous(out));
  lse = torch::stable::contiguous(lse);
  if (a.scores == Scores::kNone) grad_scores.reset();
  if (grad_scores) grad_scores = torch::stable::contiguous(*grad_scores);
  STD_TORCH_CHECK(!grad_scores || grad_scores->numel() == a.E,
                  "space_time_attention_bwd: need grad_scores of ", a.E, " entries");
  const bool shared = entries.has_value();
  STD_TORCH_CHECK(
      !shared || (entry_offsets && entry_offsets->size(0) == a.K + 1 && entries->size(0) == a.E),
      "space_time_attention_bwd: need entry_offsets [keys + 1] and entries [E]");
  Tensor grad_q = new_empty(q, {a.Q, a.H, a.D});
  Tensor grad_k = new_empty(k, {a.K, a.H, a.D});
  Tensor grad_v = new_empty(v, {a.K, a.H, a.D});
  const int64_t kept = shared ? a.E : 0;
  Tensor entry_grad_k = new_empty(k, {kept, a.H, a.D}, ScalarType::Float);
  Tensor entry_grad_v = new_empty(k, {kept, a.H, a.D}, ScalarType::Float);
  const int64_t long_rows = backward_size(max_queries, max_keys, a.D) == Size::kBlocked ? a.Q : 0;
  Tensor delta = new_empty(q, {a.H, long_rows}, ScalarType::Float);
  const Backward b = {grad_out.data_ptr(),
                      out.data_ptr(),
                      static_cast<const float*>(lse.data_ptr()),
                      static_cast<const float*>(pointer(grad_scores)),
                      grad_q.data_ptr(),
                      grad_k.data_ptr(),
                      grad_v.data_ptr(),
                      shared ? static_cast<float*>(entry_grad_k.data_ptr()) : nullptr,
                      shared ? static_cast<float*>(entry_grad_v.data_ptr()) : nullptr,
                      shared ? index(kOp, *entry_offsets, "entry_offsets") : nullptr,
                      shared ? index(kOp, *entries, "entries") : nullptr,
                      static_cast<float*>(delta.data_ptr())};
  Device::backward(a, b, q);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace vidl

#ifdef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(vidl, CPU, m) {
  m.impl("space_time_attention_emulated", TORCH_BOX(&vidl::space_time_attention<vidl::Cuda>));
  m.impl("space_time_attention_bwd_emulated",
         TORCH_BOX(&vidl::space_time_attention_bwd<vidl::Cuda>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(vidl, CPU, m) {
  m.impl("space_time_attention", TORCH_BOX(&vidl::space_time_attention<vidl::Cpu>));
  m.impl("space_time_attention_bwd", TORCH_BOX(&vidl::space_time_attention_bwd<vidl::Cpu>));
}
#ifdef VIDL_CUDA
STABLE_TORCH_LIBRARY_IMPL(vidl, CUDA, m) {
  m.impl("space_time_attention", TORCH_BOX(&vidl::space_time_attention<vidl::Cuda>));
  m.impl("space_time_attention_bwd", TORCH_BOX(&vidl::space_time_attention_bwd<vidl::Cuda>));
}
#endif
#endif
