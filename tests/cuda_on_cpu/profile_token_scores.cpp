// A launch of token_scores in bfloat16 with a head size of 64, of B samples of N tokens. Arguments:
// B, N, H; score: 0 "cls", 1 "mean", 2 "value"; backward=0 or 1.
#include "profile_inputs.h"
#include "token_scores/interface.h"

int main(int count, char** texts) {
  const Arguments given(count, texts);
  constexpr int64_t D = 64;
  const int64_t B = given["B"], N = given["N"], H = given["H"], E = B * N;
  const auto kind = static_cast<vidl::Score>(given["score"]);
  const auto floats = [](const char* name, int64_t n) { return array<float>(name, n); };
  const auto tensor = [&](const char* name) { return array<uint16_t>(name, E * H * D); };
  auto* const offsets = array<int32_t>("offsets", B + 1);
  for (int64_t b = 0; b <= B; b++) offsets[b] = int32_t(b * N);
  uint16_t* const qkv = array<uint16_t>("qkv", 3 * E * H * D);
  const auto part = [&](int which) { return vidl::Strided{qkv + which * H * D, 3 * H * D, D}; };
  const vidl::TokenScores s = {
      {offsets, offsets, nullptr, nullptr, nullptr, nullptr, B, E, E, E, N, N, nullptr},
      {},
      part(0),
      part(1),
      part(2),
      H,
      D,
      H,
      0.125f,
      vidl::Dtype::kBFloat16};
  auto* const by_head = floats("by_head", H * E);
  auto* const lse = floats("lse", H * E);
  auto* const norms = floats("norms", E);
  auto* const grad_norms = floats("grad_norms", E);  // of the samples whose blocks do not run
  for (int64_t e = 0; e < E; e++) norms[e] = grad_norms[e] = 1.0f;
  for (int64_t i = 0; i < H * E; i++) by_head[i] = 1.0f / float(N);
  if (given["backward"] == 0) {
    const vidl::ScoresForward f = {floats("scores", E), by_head, lse, false, norms, nullptr};
    return expect_success(vidl_token_scores_cuda(&s, kind, &f, nullptr));
  }
  vidl::ScoresBackward b = {};
  auto* const grads = floats("grad_scores", E);
  for (int64_t e = 0; e < E; e++) grads[e] = 1.0f + draw();
  b.grad_scores = grads;
  b.weights = kind == vidl::Score::kMean ? lse : by_head;
  b.norms = norms;
  b.grad_q = tensor("grad_q");
  b.grad_k = tensor("grad_k");
  b.grad_v = tensor("grad_v");
  b.grad_attention = floats("grad_attention", E);
  b.grad_norms = grad_norms;
  b.total = floats("total", H * E);
  b.delta = floats("delta", H * E);
  return expect_success(vidl_token_scores_bwd_cuda(&s, kind, &b, nullptr));
}
