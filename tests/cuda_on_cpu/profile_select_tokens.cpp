// A launch of select_tokens in bfloat16: B samples of a prefix and N tokens of C channels, of which
// K are kept, in the order of their scores. Arguments: B, N, K, C; fuse=1: with a fused token;
// backward=0 or 1.
#include <vector>

#include "profile_inputs.h"
#include "select_tokens/interface.h"

int main(int count, char** texts) {
  const Arguments given(count, texts);
  const int64_t B = given["B"], N = given["N"], K = given["K"], C = given["C"];
  const bool fuse = given["fuse"] != 0;
  const int64_t kept_rows = B * (1 + K + fuse);
  auto* const scores = array<float>("scores", B * N);
  for (int64_t i = 0; i < B * N; i++) scores[i] = draw();
  const vidl::Samples samples = {
      nullptr, nullptr, B, N, K, B * (1 + N), B * K, 1, C, vidl::Dtype::kBFloat16, fuse};
  const vidl::TokenRows x = {array<uint16_t>("x", B * (1 + N) * C), (1 + N) * C, C};
  const vidl::Numbers numbers = {scores, N, 1}, none = {nullptr, 0, 0};
  auto* const tokens = array<uint16_t>("tokens", kept_rows * C);
  auto* const inverse = array<int64_t>("inverse", B * N);
  auto* const offsets = array<int32_t>("offsets", B + 1);
  if (given["backward"] == 0) {
    const vidl::Selection out = {tokens, array<int64_t>("ids", B * K), inverse, offsets, nullptr,
                                 nullptr};
    return expect_success(vidl_select_tokens_cuda(&samples, &x, &numbers, fuse ? &numbers : &none,
                                                  true, &out, nullptr));
  }
  for (int64_t b = 0; b <= B; b++) offsets[b] = int32_t(b * (1 + K + fuse));
  // Every N / K-th token is kept.
  for (int64_t i = 0; i < B * N; i++) {
    const int64_t n = i % N, before = n * K / N;
    inverse[i] = (n + 1) * K / N > before ? before : -1;
  }
  const vidl::SelectionGrad grad = {tokens, inverse, offsets, nullptr, nullptr};
  const vidl::TokenRows no_rows = {nullptr, 0, 0};
  return expect_success(
      vidl_select_tokens_bwd_cuda(&samples, &grad, fuse ? &x : &no_rows, fuse ? &numbers : &none,
                                  array<uint16_t>("grad_x", B * (1 + N) * C),
                                  fuse ? array<float>("grad_weights", B * N) : nullptr, nullptr));
}
