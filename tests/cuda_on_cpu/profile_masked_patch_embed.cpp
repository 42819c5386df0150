// Launches of masked_patch_embed in bfloat16: of uint8 clips [B, 3, T, 224, 224] by frames, in
// patches of `tubelet` x `side` x `side` pixels, of which `kept` of every slice are rows.
// Arguments: B, T, tubelet, side, kept, C, and kernel: 0 folds the normalisation into the weight, 1
// packs the patches and writes their positions, 2 packs the patches alone, 3 computes the gradient
// of the positions, 4 that of bfloat16 clips.
#include <algorithm>
#include <numeric>
#include <vector>

#include "masked_patch_embed/interface.h"
#include "profile_inputs.h"

using vidl::Dtype;

int main(int count, char** texts) {
  const Arguments given(count, texts);
  constexpr int64_t kSide = 224, kChannels = 3;
  const int64_t B = given["B"], T = given["T"], t = given["tubelet"], side = given["side"];
  const int64_t kept = given["kept"], C = given["C"], which = given["kernel"];
  const int64_t slices = T / t, grid = kSide / side, P = grid * grid, N = slices * P;
  const int64_t K = slices * kept, total = B * K, numbers = kChannels * t * side * side;

  auto* const ids = array<int64_t>("ids", total);
  std::vector<int64_t> order(P);
  for (int64_t s = 0; s < B * slices; s++) {
    std::iota(order.begin(), order.end(), 0);
    for (int64_t k = 0; k < kept; k++) {
      std::swap(order[k], order[k + int64_t(draw() * float(P - k))]);
      ids[s * kept + k] = s % slices * P + order[k];
    }
    std::sort(ids + s * kept, ids + (s + 1) * kept);
  }
  const bool is_float = which == 4;
  const int64_t plane = kSide * kSide, pixels = B * T * kChannels * plane;
  const void* const video = is_float ? static_cast<void*>(array<uint16_t>("video", pixels))
                                     : array<uint8_t>("video", pixels);
  // Clips of one tubelet per frame are stored [B, T, C, H, W], others [B, C, T, H, W].
  const bool by_frame = t == 1;
  const vidl::Clip clip = {video,
                           is_float ? Dtype::kBFloat16 : Dtype::kUInt8,
                           kChannels * T * plane,
                           by_frame ? plane : T * plane,
                           by_frame ? kChannels * plane : plane,
                           kSide,
                           1,
                           int32_t(kChannels),
                           int32_t(t),
                           int32_t(side),
                           int32_t(side),
                           int32_t(slices),
                           int32_t(grid),
                           int32_t(grid)};
  const vidl::Rows rows = {kept == P ? nullptr : ids, nullptr, B, K, total, N};
  vidl::Affine affine = {};
  for (float& x : affine.scale) x = 1.0f;
  const auto tensor = [](const char* name, int64_t n) { return array<uint16_t>(name, n); };
  constexpr Dtype dtype = Dtype::kBFloat16;
  if (which == 0) {
    return expect_success(vidl_masked_patch_embed_fold_cuda(
        tensor("weight", C * numbers), dtype, array<float>("bias", C),
        tensor("weight_out", C * numbers), array<float>("bias_out", C), C, numbers, kChannels,
        &affine, nullptr));
  }
  if (which == 1 || which == 2) {
    const vidl::Position position = {
        array<float>("bias", C), tensor("position", N * C), nullptr, dtype, dtype, N, C};
    return expect_success(vidl_masked_patch_embed_pack_cuda(
        &clip, &rows, &affine, &position, tensor("patches", total * numbers),
        which == 1 ? tensor("out", total * C) : nullptr, dtype, nullptr));
  }
  if (which == 3) {
    return expect_success(vidl_masked_patch_embed_position_grad_cuda(
        tensor("grad_out", total * C), dtype, &rows, array<float>("grad_position", N * C), C,
        nullptr));
  }
  return expect_success(vidl_masked_patch_embed_unpack_cuda(tensor("grad_patches", total * numbers),
                                                            dtype, &clip, &rows,
                                                            tensor("grad_video", pixels), nullptr));
}
