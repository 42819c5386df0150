// space_time_attention on the tensor cores of sm_80 and later, forward and backward. Every size
// class has its file (packed.h, whole.h, wide.h, blocked.h), and hopper.h a kernel for sm_90a;
// launch.h chooses the class of a call. logits.h has limits and biases, table.h the gradient of a
// table. Schema: kernels/space_time_attention/op.py.
//
// Rows are gathered as they are loaded. A row beyond the end of its group is never read but counts
// as zeros, so that NaN in the neighbouring group has no effect. There are no atomic additions: a
// key of several groups gets one gradient per entry, and a last kernel sums them in order.
#include <type_traits>

#include "cuda/primitives.h"
#include "space_time_attention/interface.h"

#ifndef VIDL_HEAD_SIZES  // tests with sanitizers or nvcc compile fewer
#define VIDL_HEAD_SIZES 32, 64, 80, 96, 128
#endif

namespace vidl {

template <class T, int D, class Kind>
int forward(const SpaceTimeAttention& a, const Forward& f, void* stream);
template <class T, int D, class Kind>
int backward(const SpaceTimeAttention& a, const Backward& b, void* stream);

}  // namespace vidl

// CMakeLists.txt compiles every dtype, head size and kind in a translation unit of its own, in
// parallel.
#ifndef VIDL_SPLIT
#include "space_time_attention/launch.h"
#endif

namespace vidl {
namespace {

template <int... kSizes>
struct HeadSizes {
  // Calls f(null pointer to the C++ type of the dtype, head size as an integral_constant, kind).
  template <class F>
  static int with(const SpaceTimeAttention& a, F f) {
    constexpr int kNotSupported = 801;  // cudaErrorNotSupported
    const auto with_kind = [&](auto* type, auto D) -> int {
      if (a.bias.table != nullptr || a.bias.key_bias != nullptr) {
        if constexpr (D.value <= kMostBiased) {
          return f(type, D, Biased());
        } else {
          return kNotSupported;
        }
      }
      return a.groups.query_limits != nullptr ? f(type, D, Limited()) : f(type, D, Plain());
    };
    int result = kNotSupported;
    const auto with_size = [&](auto* type) {
      ((a.D == kSizes ? void(result = with_kind(type, std::integral_constant<int, kSizes>()))
                      : void()),
       ...);
    };
    if (a.dtype == Dtype::kFloat16) with_size(static_cast<fp16*>(nullptr));
    if (a.dtype == Dtype::kBFloat16) with_size(static_cast<bf16*>(nullptr));
    return result;
  }
};

}  // namespace
}  // namespace vidl

int vidl_space_time_attention_cuda(const vidl::SpaceTimeAttention* a, const vidl::Forward* f,
                                   void* stream) {
  return vidl::HeadSizes<VIDL_HEAD_SIZES>::with(*a, [&](auto* type, auto D, auto kind) {
    using T = std::remove_pointer_t<decltype(type)>;
    return vidl::forward<T, D.value, decltype(kind)>(*a, *f, stream);
  });
}

int vidl_space_time_attention_bwd_cuda(const vidl::SpaceTimeAttention* a, const vidl::Backward* b,
                                       void* stream) {
  return vidl::HeadSizes<VIDL_HEAD_SIZES>::with(*a, [&](auto* type, auto D, auto kind) {
    using T = std::remove_pointer_t<decltype(type)>;
    return vidl::backward<T, D.value, decltype(kind)>(*a, *b, stream);
  });
}
