// A launch of space_time_attention in bfloat16 with a head size of 64, forward or backward.
// Arguments: G groups of `rows` queries and keys, H heads; scores=1: their mean, and their
// gradient; gathered=1: the groups are windows of window_t x window_h x window_w rows of clips of T
// x Y x X, else they follow each other; height and width: of the frames of patches whose relative
// positions have a table, or 0, with `prefix` rows before them; patches: of a group, of which
// `rows` without the prefix are kept, others in each group; backward=0 or 1.
#include "profile_inputs.h"
#include "space_time_attention/interface.h"

namespace vidl {
template <class T, int D, class Kind>
int forward(const SpaceTimeAttention& a, const Forward& f, void* stream);
template <class T, int D, class Kind>
int backward(const SpaceTimeAttention& a, const Backward& b, void* stream);
}  // namespace vidl

#ifdef VIDL_PROFILE_BIASED
using Kind = vidl::Biased;
#else
using Kind = vidl::Plain;
#endif

int main(int count, char** texts) {
  const Arguments given(count, texts);
  constexpr int64_t D = 64;
  const int64_t G = given["G"], n = given["rows"], H = given["H"], rows = G * n;
  const int64_t height = given["height"], width = given["width"], prefix = given["prefix"];
  const int64_t patches = given["patches"], frames = height > 0 ? patches / (height * width) : 0;
  // The distances of two patches, and those from and to a prefix row.
  const int64_t table_rows =
      (2 * frames - 1) * (2 * height - 1) * (2 * width - 1) + (prefix > 0 ? 3 : 0);
  const bool biased = height > 0, scored = given["scores"] != 0;
  const auto tensor = [&](const char* name) { return array<uint16_t>(name, rows * H * D); };
  const auto floats = [&](const char* name, int64_t size) { return array<float>(name, size); };

  auto* const offsets = array<int32_t>("offsets", G + 1);
  for (int64_t g = 0; g <= G; g++) offsets[g] = int32_t(g * n);
  int32_t* list = nullptr;
  if (given["gathered"] != 0) {
    list = array<int32_t>("rows", rows);
    const int64_t T = given["T"], Y = given["Y"], X = given["X"];
    const int64_t t = given["window_t"], h = given["window_h"], w = given["window_w"];
    for (int64_t i = 0; i < rows; i++) {
      const int64_t g = i / n, member = i % n, clip = g / (T / t * (Y / h) * (X / w));
      const int64_t frame = g / (Y / h * (X / w)) % (T / t) * t + member / (h * w);
      const int64_t y = g / (X / w) % (Y / h) * h + member / w % h;
      const int64_t x = g % (X / w) * w + member % w;
      list[i] = int32_t(((clip * T + frame) * Y + y) * X + x);
    }
  }
  uint16_t* const qkv = array<uint16_t>("qkv", 3 * rows * H * D);
  const auto part = [&](int which) { return vidl::Strided{qkv + which * H * D, 3 * H * D, D}; };
  vidl::Bias bias = {};
  if (biased) {
    auto* const codes = array<int32_t>("codes", rows);
    const auto code = [&](int64_t frame, int64_t y, int64_t x) {
      return int32_t((frame * (2 * height - 1) + y) * (2 * width - 1) + x);
    };
    const int64_t T = given["T"], Y = given["Y"], X = given["X"], kept = n - prefix;
    for (int64_t i = 0; i < rows; i++) {
      if (list != nullptr) {
        codes[i] = code(i / (Y * X) % T, i / X % Y, i % X);
      } else if (i % n < prefix) {
        codes[i] = INT32_MAX / 2;
      } else {
        const int64_t begin = (i % n - prefix) * patches / kept;
        const int64_t end = (i % n - prefix + 1) * patches / kept;
        const int64_t patch = begin + int64_t(draw() * float(end - begin));
        const int64_t frame = height * width;
        codes[i] = code(patch / frame, patch % frame / width, patch % width);
      }
    }
    bias = {floats("table", H * table_rows), codes, codes, nullptr, table_rows,
            int32_t(table_rows / 2)};
  }
  const vidl::SpaceTimeAttention a = {
      {offsets, offsets, list, list, nullptr, nullptr, G, rows, rows, rows, n, n, nullptr},
      bias,
      part(0),
      part(1),
      part(2),
      H,
      D,
      D,
      0.125f,
      scored ? vidl::Scores::kMean : vidl::Scores::kNone,
      vidl::Dtype::kBFloat16};
  uint16_t* const out = tensor("out");
  float* const lse = floats("lse", H * rows);
  if (given["backward"] == 0) {
    const vidl::Forward f = {out, lse, scored ? floats("scores", H * rows) : nullptr,
                             scored ? floats("mean_scores", rows) : nullptr};
    return expect_success(vidl::forward<bf16, D, Kind>(a, f, nullptr));
  }
  const int64_t parts = vidl::table_plan(a.groups).parts;
  const vidl::Backward b = {tensor("grad_out"),
                            out,
                            lse,
                            scored ? floats("grad_scores", rows) : nullptr,
                            tensor("grad_q"),
                            tensor("grad_k"),
                            tensor("grad_v"),
                            nullptr,
                            nullptr,
                            floats("delta", H * rows),
                            biased ? floats("grad_bias", H * table_rows) : nullptr,
                            biased ? floats("bias_parts", parts * H * table_rows) : nullptr,
                            parts};
  return expect_success(vidl::backward<bf16, D, Kind>(a, b, nullptr));
}
