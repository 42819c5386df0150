// A launch of masked_patch_loss in bfloat16, of uint8 clips. Arguments: those of profile_clips.h,
// where `kept` are the masked patches; statistics: 0 none, 1 of a patch, 2 of a channel; backward=0
// or 1.
#include "masked_patch_loss/interface.h"
#include "profile_clips.h"

int main(int count, char** texts) {
  const Arguments given(count, texts);
  const Clips clips(given);
  const vidl::Clip clip = clips.clip(array<uint8_t>("video", clips.pixels), vidl::Dtype::kUInt8);
  const vidl::Rows rows = clips.rows();
  const int64_t total = clips.total, numbers = clips.numbers;
  const auto statistics = static_cast<vidl::Statistics>(given["statistics"]);
  const int64_t parts = given["statistics"] == 0 ? 0 : given["statistics"] == 1 ? 1 : 3;
  const vidl::Predictions predictions = {array<uint16_t>("prediction", total * numbers),
                                         vidl::Dtype::kBFloat16, clips.K * numbers, numbers};
  vidl::Channels channels = {};
  for (float& x : channels.scale) x = 1.0f;
  for (float& x : channels.eps) x = 1e-6f;
  auto* const moments = array<float>("moments", total * parts * 2);
  auto* const losses = array<float>("losses", total);
  if (given["backward"] == 0) {
    return expect_success(vidl_masked_patch_loss_cuda(&clip, &rows, &predictions, statistics,
                                                      &channels, losses, moments, nullptr));
  }
  return expect_success(vidl_masked_patch_loss_bwd_cuda(
      losses, moments, &clip, &rows, &predictions, statistics, &channels,
      array<uint16_t>("grad_prediction", total * numbers), nullptr));
}
