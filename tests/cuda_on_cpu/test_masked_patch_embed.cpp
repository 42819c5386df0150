// The kernels of masked_patch_embed on small shapes, against loops; every output is watched. All
// numbers are small integers or eighths of a power of two, so that results are equal to the bit.
#include "clips.h"
#include "masked_patch_embed/interface.h"

namespace {

using vidl::Affine;
using vidl::Inverse;
using vidl::Position;

constexpr int kC = 3;

// The inverse of rows with ids, of which rows without ids have none.
struct Lists {
  explicit Lists(const Rows& rows) : first(rows.ids ? rows.B * rows.N : 0, 7), next(rows.total, 7) {
    if (rows.ids == nullptr) return;
    CHECK(vidl_masked_patch_embed_invert_cuda(&rows, first.data(), next.data(), nullptr) == 0);
    inverse = {first.data(), next.data()};
  }

  std::vector<int32_t> first, next;
  Inverse inverse{};
};

// Whether the lists hold rows [begin, end) of sample b, each in the list of its patch, in order.
bool lists_rows(const Lists& lists, const Rows& rows, int64_t b, int64_t begin, int64_t end) {
  std::vector<int32_t> expected(rows.N, -1);
  bool good = true;
  for (int64_t m = end - 1; m >= begin; m--) {
    const int64_t id = rows.ids[m];
    if (id < 0 || id >= rows.N) continue;
    good = good && lists.next[m] == expected[id];
    expected[id] = static_cast<int32_t>(m);
  }
  return good && std::equal(expected.begin(), expected.end(), lists.first.begin() + b * rows.N);
}

// More rows of a sample than a warp has lanes, and more patches than fit into shared memory.
void check_lists() {
  for (const int64_t N : {5, 12300}) {
    constexpr int64_t kM = 75;
    std::vector<int64_t> ids(2 * kM);
    for (int64_t m = 0; m < 2 * kM; m++) ids[m] = m * m % 13 * (N / 5) - (m % 17 == 0);
    const Rows rows{ids.data(), nullptr, 2, kM, 2 * kM, N};
    const Lists lists(rows);
    CHECK(lists_rows(lists, rows, 0, 0, kM) && lists_rows(lists, rows, 1, kM, 2 * kM));
  }
}

struct Case {
  Layout layout;
  Which which;
  Dtype video, dtype;
  int t, h, w;
  int64_t C;
};

void check(const Case& c) {
  const int numbers = kC * c.t * c.h * c.w;
  const Patches p(c.layout, c.which, c.video, kC, c.t, c.h, c.w);
  const Clip& clip = p.clip;
  const Rows& rows = p.rows;
  const auto place = [&](const Clip& of, int64_t b, int64_t n, int i) {
    const int y = i / c.w % c.h, t = i / c.w / c.h % c.t;
    return p.place(of, b, n, i / c.w / c.h / c.t, t, y, i % c.w);
  };

  Affine affine{};
  for (int i = 0; i < kC; i++) {
    affine.scale[i] = c.video == Dtype::kUInt8 ? 1.0f / 128 : 1.0f;
    affine.centre[i] = c.video == Dtype::kUInt8 ? static_cast<float>(100 + i) : 0.0f;
    affine.shift[i] = static_cast<float>(i) * affine.scale[i];
  }
  Tensor bias(Dtype::kFloat32, c.C), space(c.dtype, kN / 2 * c.C), time(Dtype::kFloat32, 2 * c.C);
  bias.fill(11), space.fill(13), time.fill(7);
  const Position position{static_cast<const float*>(bias.data()),
                          space.data(),
                          time.data(),
                          space.dtype,
                          time.dtype,
                          kN / 2,
                          c.C};
  Tensor patches(c.dtype, rows.total * numbers), out(c.dtype, rows.total * c.C);
  {
    cuda_on_cpu::Watch watch(out.data(), out.bytes(), size_of(c.dtype), "out");
    watched(patches, "patches", [&] {
      return vidl_masked_patch_embed_pack_cuda(&clip, &rows, &affine, &position, patches.data(),
                                               out.data(), c.dtype, nullptr);
    });
    watch.expect_all_written();
  }
  for (int64_t m = 0; m < rows.total; m++) {
    for (int i = 0; i < numbers; i++) {
      const int channel = i / (numbers / kC);
      const float pixel = p.video[place(clip, p.sample(m), p.patch(m), i)];
      const float scaled = (pixel - affine.centre[channel]) * affine.scale[channel];
      CHECK(patches[m * numbers + i] == scaled + affine.shift[channel]);
    }
    for (int64_t d = 0; d < c.C; d++) {
      const float sum =
          bias[d] + space[p.patch(m) % (kN / 2) * c.C + d] + time[p.patch(m) / (kN / 2) * c.C + d];
      CHECK(out[m * c.C + d] == sum);
    }
  }

  const Lists lists(rows);
  Tensor grad_out(c.dtype, rows.total * c.C), grad_position(Dtype::kFloat32, kN * c.C);
  grad_out.fill(17);
  watched(grad_position, "grad_position", [&] {
    return vidl_masked_patch_embed_position_grad_cuda(
        grad_out.data(), c.dtype, &rows, &lists.inverse, static_cast<float*>(grad_position.data()),
        c.C, nullptr);
  });
  for (int64_t n = 0; n < kN; n++) {
    for (int64_t d = 0; d < c.C; d++) {
      float sum = 0;
      for (int64_t m = 0; m < rows.total; m++) sum += p.patch(m) == n ? grad_out[m * c.C + d] : 0;
      CHECK(grad_position[n * c.C + d] == sum);
    }
  }

  if (c.video == Dtype::kUInt8) return;
  Clip dense = clip;
  dense.stride_w = 1, dense.stride_h = p.W, dense.stride_t = p.W * p.H;
  dense.stride_c = dense.stride_t * p.T;
  dense.stride_b = dense.stride_c * kC;
  Tensor grad_video(c.video, kB * dense.stride_b);
  patches.fill(19);
  watched(grad_video, "grad_video", [&] {
    return vidl_masked_patch_embed_unpack_cuda(patches.data(), c.dtype, &dense, &rows,
                                               &lists.inverse, grad_video.data(), nullptr);
  });
  for (int64_t b = 0; b < kB; b++) {
    for (int64_t n = 0; n < kN; n++) {
      for (int i = 0; i < numbers; i++) {
        float sum = 0;
        for (int64_t m = 0; m < rows.total; m++) {
          if (p.sample(m) == b && p.patch(m) == n) sum += patches[m * numbers + i];
        }
        CHECK(grad_video[place(dense, b, n, i)] == sum);
      }
    }
  }
}

// More samples than a warp has lanes. With `repeat` a patch has several rows in a sample; without,
// 32 samples have more rows of it than a warp loads together.
void check_many_samples(bool repeat) {
  constexpr int64_t kSamples = 70, kRows = 9, kM = kSamples * kRows, kD = 3;
  std::vector<int64_t> ids(kM);
  for (int64_t m = 0; m < kM; m++) {
    ids[m] = repeat ? m * m % kN : (m % kRows + m / kRows) % kN;
    if (!repeat && m % kRows >= kN) ids[m] = -1;
  }
  const Rows rows{ids.data(), nullptr, kSamples, kRows, kM, kN};
  const Lists lists(rows);
  Tensor grad_out(Dtype::kFloat32, kM * kD), grad_position(Dtype::kFloat32, kN * kD);
  grad_out.fill(17);
  watched(grad_position, "grad_position", [&] {
    return vidl_masked_patch_embed_position_grad_cuda(
        grad_out.data(), Dtype::kFloat32, &rows, &lists.inverse,
        static_cast<float*>(grad_position.data()), kD, nullptr);
  });
  std::vector<float> sums(kN * kD);
  for (int64_t i = 0; i < kM * kD; i++) {
    if (ids[i / kD] >= 0) sums[ids[i / kD] * kD + i % kD] += grad_out[i];
  }
  for (int64_t i = 0; i < kN * kD; i++) CHECK(grad_position[i] == sums[i]);
}

void check_fold(Dtype dtype) {
  constexpr int kRows = 5, kColumns = kC * 100;
  Tensor weight(dtype, kRows * kColumns), bias(Dtype::kFloat32, kRows);
  Tensor folded(dtype, weight.n), folded_bias(Dtype::kFloat32, kRows);
  weight.fill(31), bias.fill(5);
  Affine affine{};
  for (int i = 0; i < kC; i++) affine.scale[i] = 0.5f, affine.shift[i] = static_cast<float>(i - 1);
  for (const bool has_bias : {true, false}) {
    cuda_on_cpu::Watch watch(folded.data(), folded.bytes(), size_of(dtype), "weight");
    watched(folded_bias, "bias", [&] {
      return vidl_masked_patch_embed_fold_cuda(
          weight.data(), dtype, has_bias ? static_cast<const float*>(bias.data()) : nullptr,
          folded.data(), static_cast<float*>(folded_bias.data()), kRows, kColumns, kC, &affine,
          nullptr);
    });
    watch.expect_all_written();
    for (int d = 0; d < kRows; d++) {
      float sum = has_bias ? bias[d] : 0;
      for (int k = 0; k < kColumns; k++) {
        CHECK(folded[d * kColumns + k] == weight[d * kColumns + k] * 0.5f);
        sum += folded[d * kColumns + k] * affine.shift[k / 100];
      }
      CHECK(folded_bias[d] == sum);
    }
  }
}

// Ids and offsets out of range give NaN, and nothing out of range is read: AddressSanitizer sees
// it.
void check_bad_indices(int side) {
  const int numbers = kC * side * side;
  const Affine affine{};
  constexpr int64_t kWidth = 5;
  Tensor table(Dtype::kFloat32, kN * kWidth);
  const Position position{nullptr, table.data(), nullptr, table.dtype, table.dtype, kN, kWidth};
  const auto pack = [&](const Patches& p, Tensor& patches, Tensor& out) {
    CHECK(vidl_masked_patch_embed_pack_cuda(&p.clip, &p.rows, &affine, &position, patches.data(),
                                            out.data(), out.dtype, nullptr) == 0);
  };
  Patches p(kPlanar, kUniform, Dtype::kFloat32, kC, 1, side, side);
  const int64_t total = p.rows.total;
  const std::vector<int64_t> ids = p.ids;
  Tensor patches(Dtype::kFloat32, total * numbers), out(Dtype::kFloat32, total * kWidth);
  Tensor grad_position(Dtype::kFloat32, kN * kWidth), grad_video(Dtype::kFloat32, p.video.n);
  const auto sum = [&](const Patches& of, Tensor& grad_patches, Tensor& grad_out) {
    const Lists lists(of.rows);
    CHECK(vidl_masked_patch_embed_position_grad_cuda(
              grad_out.data(), grad_out.dtype, &of.rows, &lists.inverse,
              static_cast<float*>(grad_position.data()), kWidth, nullptr) == 0);
    CHECK(vidl_masked_patch_embed_unpack_cuda(grad_patches.data(), grad_patches.dtype, &of.clip,
                                              &of.rows, &lists.inverse, grad_video.data(),
                                              nullptr) == 0);
  };
  for (const int64_t x : kBadIds) {
    p.ids = ids, p.ids[2] = p.ids[11] = x;
    pack(p, patches, out);
    for (int64_t m = 0; m < total; m++) {
      const bool bad = m == 2 || m == 11;
      CHECK(is_nan(patches, m * numbers, (m + 1) * numbers) == bad);
      CHECK(is_nan(out, m * kWidth, (m + 1) * kWidth) == bad);
    }
    sum(p, patches, out);
    for (size_t i = 0; i < grad_position.n; i++) CHECK(grad_position[i] == 0);
    for (size_t i = 0; i < grad_video.n; i++) CHECK(grad_video[i] == 0);
  }
  Patches ragged(kPlanar, kRagged, Dtype::kFloat32, kC, 1, side, side);
  for (const auto& offsets : kBadOffsets) {
    ragged.offsets.assign(offsets, offsets + kB + 1);
    pack(ragged, patches, out);
    CHECK(is_nan(patches, 0, numbers) && is_nan(out, 0, kWidth));
    sum(ragged, patches, out);
    for (size_t i = 0; i < grad_position.n; i++) CHECK(grad_position[i] == 0);
    for (size_t i = 0; i < grad_video.n; i++) CHECK(grad_video[i] == 0);
  }
  // No rows: torch gives empty ids a null pointer.
  const Rows none{nullptr, nullptr, kB, 0, 0, kN};
  const Inverse empty{};
  CHECK(vidl_masked_patch_embed_position_grad_cuda(nullptr, Dtype::kFloat32, &none, &empty,
                                                   static_cast<float*>(grad_position.data()),
                                                   kWidth, nullptr) == 0);
  for (size_t i = 0; i < grad_position.n; i++) CHECK(grad_position[i] == 0);
  // Rows of a clip without patches.
  p.rows.N = 0;
  pack(p, patches, out);
  CHECK(is_nan(patches, 0, patches.n) && is_nan(out, 0, out.n));
}

}  // namespace

int main() {
  using enum Dtype;
  const Case cases[] = {
      {kPlanar, kUniform, kUInt8, kBFloat16, 1, 16, 16, 40},  // 16 bytes at a time
      {kPlanar, kRagged, kUInt8, kFloat32, 2, 2, 16, 300},
      {kPadded, kDense, kUInt8, kFloat16, 2, 3, 5, 8},
      {kChannelsLast, kRagged, kUInt8, kBFloat16, 1, 4, 4, 33},
      {kPlanar, kUniform, kFloat32, kFloat32, 2, 4, 4, 16},
      {kPlanar, kRagged, kBFloat16, kBFloat16, 1, 8, 8, 16},
      {kPlanar, kDense, kFloat16, kFloat16, 1, 8, 8, 1},
      {kPadded, kUniform, kFloat32, kBFloat16, 1, 3, 7, 9},
      {kChannelsLast, kRagged, kFloat16, kFloat32, 2, 2, 3, 5},
      {kChannelsLast, kUniform, kUInt8, kFloat16, 1, 3, 3, 5},  // a number at a time
      {kPlanar, kUniform, kUInt8, kBFloat16, 1, 14, 14, 4},     // 2 bytes, and 4 pixels
      {kChannelsLast, kRagged, kUInt8, kFloat16, 1, 14, 14, 4},
      {kPlanar, kRagged, kUInt8, kBFloat16, 1, 4, 8, 4},     // 8 bytes
      {kPlanar, kUniform, kFloat32, kBFloat16, 1, 2, 6, 4},  // 2 numbers
      {kPlanar, kRagged, kBFloat16, kBFloat16, 1, 2, 6, 4},
      {kPlanar, kUniform, kFloat16, kFloat16, 1, 4, 12, 4},  // 4 numbers
  };
  count_seeds(3, [&] {
    check_lists();  // first: wrong lists may have no end
    for (const Case& c : cases) check(c);
    for (const bool repeat : {false, true}) check_many_samples(repeat);
    for (const Dtype dtype : {kFloat32, kFloat16, kBFloat16}) check_fold(dtype);
    return true;
  });
  for (const int side : {4, 80}) check_bad_indices(side);  // in shared memory, and too large for it
  return report("masked_patch_embed");
}
