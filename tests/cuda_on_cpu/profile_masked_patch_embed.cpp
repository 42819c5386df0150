// Launches of masked_patch_embed in bfloat16, of uint8 clips. Arguments: those of profile_clips.h,
// C, and kernel: 0 folds the normalisation into the weight, 1 packs the patches and writes their
// positions, 2 packs the patches alone, 3 computes the gradient of the positions, 4 that of
// bfloat16 clips, 5 lists the rows of each patch for both.
#include "masked_patch_embed/interface.h"
#include "profile_clips.h"

using vidl::Dtype;

int main(int count, char** texts) {
  const Arguments given(count, texts);
  const Clips clips(given);
  const int64_t C = given["C"], which = given["kernel"];
  const int64_t total = clips.total, numbers = clips.numbers, N = clips.N;
  const bool is_float = which == 4;
  const void* const video = is_float ? static_cast<void*>(array<uint16_t>("video", clips.pixels))
                                     : array<uint8_t>("video", clips.pixels);
  const vidl::Clip clip = clips.clip(video, is_float ? Dtype::kBFloat16 : Dtype::kUInt8);
  const vidl::Rows rows = clips.rows();
  vidl::Affine affine = {};
  for (float& x : affine.scale) x = 1.0f;
  const auto tensor = [](const char* name, int64_t n) { return array<uint16_t>(name, n); };
  constexpr Dtype dtype = Dtype::kBFloat16;
  if (which == 0) {
    return expect_success(vidl_masked_patch_embed_fold_cuda(
        tensor("weight", C * numbers), dtype, array<float>("bias", C),
        tensor("weight_out", C * numbers), array<float>("bias_out", C), C, numbers,
        Clips::kChannels, &affine, nullptr));
  }
  if (which == 1 || which == 2) {
    const vidl::Position position = {
        array<float>("bias", C), tensor("position", N * C), nullptr, dtype, dtype, N, C};
    return expect_success(vidl_masked_patch_embed_pack_cuda(
        &clip, &rows, &affine, &position, tensor("patches", total * numbers),
        which == 1 ? tensor("out", total * C) : nullptr, dtype, nullptr));
  }
  auto* const first = array<int32_t>("first", clips.B * N);
  auto* const next = array<int32_t>("next", total);
  if (which == 5) {
    return expect_success(vidl_masked_patch_embed_invert_cuda(&rows, first, next, nullptr));
  }
  // Listed by the host: only some blocks of a launch run here.
  std::fill_n(first, clips.B * N, -1);
  std::fill_n(next, total, -1);
  for (int64_t m = 0; m < total && rows.ids != nullptr; m++) {
    first[m / rows.K * N + rows.ids[m]] = static_cast<int32_t>(m);
  }
  const vidl::Inverse inverse = {first, next};
  if (which == 3) {
    return expect_success(vidl_masked_patch_embed_position_grad_cuda(
        tensor("grad_out", total * C), dtype, &rows, &inverse, array<float>("grad_position", N * C),
        C, nullptr));
  }
  return expect_success(vidl_masked_patch_embed_unpack_cuda(
      tensor("grad_patches", total * numbers), dtype, &clip, &rows, &inverse,
      tensor("grad_video", clips.pixels), nullptr));
}
