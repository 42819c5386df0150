// space_time_attention: the CPU, one head of one group at a time, and the host side of the CUDA
// kernels in cuda.cu. Schema and contract: kernels/space_time_attention/op.py; the loops of the
// CPU: cpu.h.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/lines.h"
#include "cpu/scratch.h"
#include "groups/host.h"
#include "groups/sums.h"
#include "space_time_attention/interface.h"
#include "torch/dtype.h"

namespace vidl {
namespace {

using torch::stable::parallel_for;

constexpr const char* kOp = "space_time_attention";

#ifndef VIDL_EMULATED
#define VIDL_SOURCE "space_time_attention/cpu.h"
#include "cpu/levels.h"

struct Cpu {
  // x, or a copy of it if the channels of a head are not neighbours.
  static Tensor readable(const Tensor& x) {
    return x.dim() == 3 && x.stride(2) != 1 ? contiguous_of(x) : x;
  }

  static void check(const SpaceTimeAttention& a) { check_lists(kOp, a.groups); }

  // Items (group, head) for one thread: enough work to be worth a thread.
  static int64_t grain(const SpaceTimeAttention& a) {
    const int64_t G = std::max<int64_t>(a.groups.G, 1);
    const int64_t pairs = a.groups.num_queries * (a.groups.E / G + 1);
    return std::max<int64_t>(1, 65536 / (pairs / G * a.D + 1));
  }

  static void forward(const SpaceTimeAttention& a, const Forward& f, const Tensor&) {
    const auto items = VIDL_FOR_THIS_CPU(forward_items);
    parallel_for(0, a.groups.G * a.H, grain(a),
                 [&](int64_t begin, int64_t end) { items(a, f, begin, end); });
    if (f.scores != nullptr) mean_over_heads(f.scores, a.H, a.groups.E, f.mean_scores);
  }

  static void backward(const SpaceTimeAttention& a, const Backward& b, const Tensor&) {
    check_entries(kOp, a.groups);
    if (b.grad_bias == nullptr) {
      const auto items = VIDL_FOR_THIS_CPU(backward_items);
      parallel_for(0, a.groups.G * a.H, grain(a),
                   [&](int64_t begin, int64_t end) { items(a, b, begin, end); });
    } else {
      const auto parts = VIDL_FOR_THIS_CPU(backward_parts);
      parallel_for(0, b.parts * a.H, 1,
                   [&](int64_t begin, int64_t end) { parts(a, b, begin, end); });
      sum_parts(b.bias_parts, b.parts, a.H * a.bias.rows, b.grad_bias);
    }
    if (a.groups.entry_offsets == nullptr) return;
    sum_entries(a.groups, b.entry_grad_k, a.H * a.D, b.grad_k, a.dtype);
    sum_entries(a.groups, b.entry_grad_v, a.H * a.Dv, b.grad_v, a.dtype);
  }

  // The groups are divided alike for any number of threads, so that the sums have the same bits.
  static int64_t parts(const SpaceTimeAttention& a) {
    return std::min<int64_t>(a.groups.G, kMostParts);
  }
};
#endif

#if defined(VIDL_CUDA) || defined(VIDL_EMULATED)
struct Cuda {
  // x, or a contiguous copy of it if a row has gaps or does not begin at a multiple of 16 bytes.
  static Tensor readable(const Tensor& x) {
    const bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                         x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && x.stride(2) == 1;
    if (aligned) return x;
    Tensor copy = new_tensor(x, {x.size(0), x.size(1), x.size(2)});
    torch::stable::copy_(copy, x);
    return copy;
  }

  static void check(const SpaceTimeAttention& a) {  // the kernels check the lists of the groups
    STD_TORCH_CHECK(a.dtype != Dtype::kFloat32, kOp, ": need float16 or bfloat16 on CUDA");
    STD_TORCH_CHECK(a.Dv == a.D, kOp, ": the CUDA kernels need v as wide as q, got ", a.Dv,
                    " channels for ", a.D);
    const bool biased = a.bias.table != nullptr || a.bias.key_bias != nullptr;
    STD_TORCH_CHECK(!biased || a.D <= kMostBiased, kOp,
                    ": the CUDA kernels take a bias and a key_bias for head sizes up to ",
                    kMostBiased, ", got ", a.D);
  }

  static void forward(const SpaceTimeAttention& a, const Forward& f, const Tensor& q) {
    check_cuda(vidl_space_time_attention_cuda(&a, &f, current_stream(q)));
  }

  static void backward(const SpaceTimeAttention& a, const Backward& b, const Tensor& q) {
    check_cuda(vidl_space_time_attention_bwd_cuda(&a, &b, current_stream(q)));
  }

  static int64_t parts(const SpaceTimeAttention& a) { return table_plan(a.groups).parts; }
};
#endif

// The checked inputs of forward and backward. q, k and v become what the device can read.
template <class Device>
SpaceTimeAttention attention_of(Tensor& q, Tensor& k, Tensor& v, const GroupTensors& groups,
                                const BiasTensors& bias, double scale, const std::string& scores) {
  for (Tensor* x : {&q, &k, &v}) *x = Device::readable(*x);
  SpaceTimeAttention a = {};
  a.groups = groups_of(kOp, groups, q, k);
  a.q = strided(kOp, q, "q");
  a.k = strided(kOp, k, "k");
  a.v = strided(kOp, v, "v");
  a.H = q.size(1);
  a.D = q.size(2);
  a.Dv = v.size(2);
  const bool fits = k.size(1) == a.H && k.size(2) == a.D && v.size(0) == k.size(0) &&
                    v.size(1) == a.H && a.Dv <= a.D;
  STD_TORCH_CHECK(fits, kOp, ": need k as q, and v as k with at most ", a.D, " channels");
  a.bias = bias_of(kOp, bias, a.groups, a.H);
  STD_TORCH_CHECK(a.D % 16 == 0, kOp, ": need D a multiple of 16, got ", a.D);
  a.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(std::isfinite(a.scale), kOp, ": need a finite scale, got ", scale);
  a.scores = scores.empty() ? Scores::kNone : scores == "cls" ? Scores::kCls : Scores::kMean;
  a.dtype = dtype_of(q);
  Device::check(a);
  return a;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> space_time_attention(Tensor q, Tensor k, Tensor v,
                                                        GroupTensors groups, BiasTensors bias,
                                                        double scale, std::string scores) {
  const DeviceScope scope(q);
  const SpaceTimeAttention a = attention_of<Device>(q, k, v, groups, bias, scale, scores);
  const int64_t num_queries = a.groups.num_queries;
  const int64_t scored = a.scores == Scores::kNone ? 0 : a.groups.E;
  Tensor out = new_tensor(q, {num_queries, a.H, a.Dv});
  Tensor lse = new_tensor(q, {a.H, num_queries}, ScalarType::Float);
  Tensor by_head = new_tensor(q, {a.H, scored}, ScalarType::Float);
  Tensor mean = new_tensor(q, {scored}, ScalarType::Float);
  const Forward f = {out.data_ptr(), static_cast<float*>(lse.data_ptr()),
                     scored ? static_cast<float*>(by_head.data_ptr()) : nullptr,
                     scored ? static_cast<float*>(mean.data_ptr()) : nullptr};
  Device::forward(a, f, q);
  return {out, lse, mean};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> space_time_attention_bwd(
    Tensor grad_out, OptionalTensor grad_scores, Tensor q, Tensor k, Tensor v, Tensor out,
    Tensor lse, GroupTensors groups, BiasTensors bias, bool need_bias, double scale,
    std::string scores) {
  const DeviceScope scope(q);
  const SpaceTimeAttention a = attention_of<Device>(q, k, v, groups, bias, scale, scores);
  STD_TORCH_CHECK(!need_bias || a.bias.table != nullptr, kOp, "_bwd: need a bias for its gradient");
  const int64_t num_queries = a.groups.num_queries;
  grad_out = Device::readable(contiguous_of(grad_out));
  out = Device::readable(contiguous_of(out));
  STD_TORCH_CHECK(grad_out.dim() == 3 && grad_out.size(0) == num_queries &&
                      grad_out.size(1) == a.H && grad_out.size(2) == a.Dv,
                  kOp, "_bwd: need grad_out [num_queries, H, Dv], as out");
  lse = contiguous_of(lse);
  if (a.scores == Scores::kNone) grad_scores.reset();
  if (grad_scores) grad_scores = contiguous_of(*grad_scores);
  STD_TORCH_CHECK(!grad_scores || grad_scores->numel() == a.groups.E, kOp,
                  "_bwd: need grad_scores [E] for ", a.groups.E, " entries");
  const bool shared = a.groups.entry_offsets != nullptr;
  const int64_t entries = shared ? a.groups.E : 0;
  Tensor grad_q = new_tensor(q, {num_queries, a.H, a.D});
  Tensor grad_k = grad_of_keys(a.groups, k);
  Tensor grad_v = grad_of_keys(a.groups, v);
  Tensor entry_grad_k = new_tensor(k, {entries, a.H, a.D}, ScalarType::Float);
  Tensor entry_grad_v = new_tensor(k, {entries, a.H, a.Dv}, ScalarType::Float);
  Tensor delta = new_tensor(q, {a.H, num_queries}, ScalarType::Float);
  const int64_t parts = need_bias ? Device::parts(a) : 0;
  Tensor bias_parts = new_tensor(q, {parts, a.H, a.bias.rows}, ScalarType::Float);
  Tensor grad_bias = need_bias ? new_tensor(q, {a.H, a.bias.rows}, ScalarType::Float)
                               : new_tensor(q, {0}, ScalarType::Float);
  const Backward b = {grad_out.data_ptr(),
                      out.data_ptr(),
                      static_cast<const float*>(lse.data_ptr()),
                      static_cast<const float*>(pointer(grad_scores)),
                      grad_q.data_ptr(),
                      grad_k.data_ptr(),
                      grad_v.data_ptr(),
                      shared ? static_cast<float*>(entry_grad_k.data_ptr()) : nullptr,
                      shared ? static_cast<float*>(entry_grad_v.data_ptr()) : nullptr,
                      static_cast<float*>(delta.data_ptr()),
                      need_bias ? static_cast<float*>(grad_bias.data_ptr()) : nullptr,
                      need_bias ? static_cast<float*>(bias_parts.data_ptr()) : nullptr,
                      parts};
  Device::backward(a, b, q);
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace vidl

#ifdef VIDL_EMULATED
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("space_time_attention_emulated",
         TORCH_BOX(vidl::unbundled<&vidl::space_time_attention<vidl::Cuda>>));
  m.impl("space_time_attention_bwd_emulated",
         TORCH_BOX(vidl::unbundled<&vidl::space_time_attention_bwd<vidl::Cuda>>));
}
#else
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("space_time_attention",
         TORCH_BOX(vidl::unbundled<&vidl::space_time_attention<vidl::Cpu>>));
  m.impl("space_time_attention_bwd",
         TORCH_BOX(vidl::unbundled<&vidl::space_time_attention_bwd<vidl::Cpu>>));
}
#ifdef VIDL_CUDA
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  m.impl("space_time_attention",
         TORCH_BOX(vidl::unbundled<&vidl::space_time_attention<vidl::Cuda>>));
  m.impl("space_time_attention_bwd",
         TORCH_BOX(vidl::unbundled<&vidl::space_time_attention_bwd<vidl::Cuda>>));
}
#endif
#endif
