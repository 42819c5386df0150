// token_scores on sm_80 and later, forward and backward. cls.h has the scores of the first query
// and those weighted by values, mean.h those of all queries, similarity.h those of the keys alone;
// each begins with its limit, bytes and FLOPs. Schema: kernels/token_scores/op.py.
//
// Rows are gathered as they are loaded. A row beyond the end of its group is never read but counts
// as zeros, so that NaN in the neighbouring group has no effect. There are no atomic additions: a
// key of several groups gets one gradient per entry, and a last kernel sums them in order. The mean
// over the heads reads 4 H E bytes and writes 4 E.
#include <type_traits>

#include "token_scores/cls.h"
#include "token_scores/mean.h"
#include "token_scores/similarity.h"

#ifndef VIDL_HEAD_SIZES  // tests with sanitizers or nvcc compile fewer
#define VIDL_HEAD_SIZES 32, 64, 96, 128
#endif

namespace vidl {
namespace {

template <int... kSizes>
struct HeadSizes {
  // Calls f(null pointer to the C++ type of the dtype, head size as an integral_constant).
  template <class F>
  static int with(const TokenScores& s, F f) {
    int result = 801;  // cudaErrorNotSupported
    const auto with_size = [&](auto* type) {
      ((s.D == kSizes ? void(result = f(type, std::integral_constant<int, kSizes>())) : void()),
       ...);
    };
    if (s.dtype == Dtype::kFloat16) with_size(static_cast<fp16*>(nullptr));
    if (s.dtype == Dtype::kBFloat16) with_size(static_cast<bf16*>(nullptr));
    return result;
  }
};

// Kernels of "mean" have an instance without limits and bias, and one for all of them.
bool is_plain(const TokenScores& s) {
  return s.groups.query_limits == nullptr && s.bias.table == nullptr && s.bias.key_bias == nullptr;
}

}  // namespace
}  // namespace vidl

int vidl_token_scores_cuda(const vidl::TokenScores* scores, vidl::Score kind,
                           const vidl::ScoresForward* forward, void* stream) {
  const vidl::TokenScores& s = *scores;
  const vidl::ScoresForward& f = *forward;
  return vidl::HeadSizes<VIDL_HEAD_SIZES>::with(s, [&](auto* type, auto D) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kD = decltype(D)::value;
    if (kind == vidl::Score::kSimilarity) return vidl::similarity_forward<T, kD>(s, f, stream);
    int error = 0;
    if (kind != vidl::Score::kMean) {
      error = vidl::cls_forward<T, kD>(s, f, stream);
    } else if (vidl::is_plain(s)) {
      error = vidl::mean_forward<T, kD, vidl::Plain>(s, f, stream);
    } else {
      error = vidl::mean_forward<T, kD, vidl::Biased>(s, f, stream);
    }
    if (error != 0) return error;
    if (kind == vidl::Score::kValue) return vidl::value_forward<T>(s, f, stream);
    return vidl::head_mean(s, f, stream);
  });
}

int vidl_token_scores_bwd_cuda(const vidl::TokenScores* scores, vidl::Score kind,
                               const vidl::ScoresBackward* backward, void* stream) {
  const vidl::TokenScores& s = *scores;
  vidl::ScoresBackward b = *backward;
  return vidl::HeadSizes<VIDL_HEAD_SIZES>::with(s, [&](auto* type, auto D) -> int {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kD = decltype(D)::value;
    if (kind == vidl::Score::kMean) {
      return vidl::is_plain(s) ? vidl::mean_backward<T, kD, vidl::Plain>(s, b, stream)
                               : vidl::mean_backward<T, kD, vidl::Biased>(s, b, stream);
    }
    if (kind == vidl::Score::kValue) {
      const int error = vidl::value_backward<T>(s, b, stream);
      if (error != 0) return error;
      b.grad_scores = b.grad_attention;
    }
    return vidl::cls_backward<T, kD>(s, b, stream);
  });
}
