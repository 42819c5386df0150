// Products of warpgroups: results, and bugs that the emulator must report or that must give wrong
// numbers. A trace build finds more of them.
#include <random>

#include "check.h"
#include "cuda/wgmma.h"

namespace {

constexpr int kRows = 64, kColumns = 64, kFew = 32;
constexpr int kBytes = (kRows + 2 * kFew) * kSwizzledRow;

// The bugs, of which kernels have one at a time.
enum Bug {
  kNone,
  kNoFence,
  kFragmentAfterFence,
  kFragmentInFlight,
  kReadInFlight,
  kWrittenInFlight,
  kNotNamed,
  kOnePending,
  kNoCommit,
  kSkipped,
  kNoWait,
  kOtherLane,
  kNoProxyFence,
  kLateProxyFence,
  kNoBarrier,
  kOverwritten,
  kStride,
  kUnaligned,
  kWrongMajor,
  kShortColumns,
  kShortRows,
  kAccumulated,
  kEnd
};

template <class T, int rows>
__device__ void load(unsigned char* tile, const T* x) {
  for (int i = threadIdx.x; i < rows * kColumns; i += 128)
    *reinterpret_cast<T*>(tile + swizzled(i / kColumns * kSwizzledRow + i % kColumns * 2)) = x[i];
}

// out = round(x y^T) z and square = x^T x; x [64, 64], y and z [32, 64].
template <class T, int kBug>
__global__ void products(const T* x, const T* y, const T* z, float* out, float* square) {
  DYNAMIC_SHARED_1024(unsigned char, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* const x_tile = memory + (kBug == kUnaligned ? 128 : 0);
  unsigned char *const y_tile = x_tile + kRows * kSwizzledRow, *const z_tile =
                                                                   y_tile + kFew * kSwizzledRow;
  load<T, kRows>(x_tile, x), load<T, kFew>(y_tile, y), load<T, kFew>(z_tile, z);
  if (kBug != kNoProxyFence && kBug != kLateProxyFence) fence_proxy_async();
  if (kBug != kNoBarrier) __syncthreads();
  if (kBug == kLateProxyFence) fence_proxy_async();
  uint64_t x_operand = describe_tile(x_tile);
  if (kBug == kStride) x_operand -= uint64_t{32} << 32;
  const uint64_t y_operand = describe_tile(y_tile), z_operand = describe_tile(z_tile);

  float s[kFew / 2], early = 0.0f;
  for (float& value : s) value = 1.0f;
  if (kBug != kNoFence) wgmma_fence(s);
  for (int k = 0; k < kColumns / 16; k++) {
    const int step = kBug == kShortColumns ? 16 : 32;
    const uint64_t moved = kBug == kOtherLane && lane == 3 ? 1 : 0;
    wgmma<T, Major::kK, Major::kK>(s, advance(x_operand, step * k) + moved,
                                   advance(y_operand, step * k), kBug == kAccumulated || k > 0);
  }
  if (kBug != kNoCommit) wgmma_commit();
  if (kBug == kReadInFlight) early = s[0];
  if (kBug == kWrittenInFlight) s[0] *= 0.5f;
  if (kBug == kNotNamed)
    wgmma_wait<0>();
  else if (kBug == kOnePending)
    wgmma_wait<1>(s);
  else
    wgmma_wait<0>(s);
  uint32_t fragments[kFew / 16][4];
  for (int i = 0; i < kFew / 4; i++) fragments[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);

  float sums[kColumns / 2], squares[kColumns / 2];
  wgmma_fence(sums, fragments);
  if (kBug == kFragmentAfterFence) fragments[0][0] ^= 0x80008000u;
  for (int k = 0; k < kFew / 16; k++) {
    constexpr Major kMajor = kBug == kWrongMajor ? Major::kK : Major::kMN;
    const int rows = kBug == kShortRows ? 8 : 16;
    wgmma<T, kMajor>(sums, fragments[k], advance(z_operand, k * rows * kSwizzledRow), k > 0);
  }
  wgmma_commit();
  if (kBug == kFragmentInFlight) fragments[1][3] = 0;
  if (kBug == kOverwritten && warp == 1) z_tile[16 * lane] ^= 1;
  wgmma_wait<0>(sums, fragments);
  wgmma_fence(squares);
  for (int k = 0; k < kRows / 16; k++) {
    if (kBug == kSkipped && warp == 2 && k == 1) continue;
    const uint64_t part = advance(describe_tile(x_tile), k * 16 * kSwizzledRow);
    wgmma<T, Major::kMN, Major::kMN>(squares, part, part, k > 0);
  }
  wgmma_commit();
  if (kBug == kNoWait) return;
  wgmma_wait<0>(squares);
  for (int i = 0; i < kColumns / 2; i++) {
    const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    out[row * kColumns + column] = sums[i] + early;
    square[row * kColumns + column] = squares[i];
  }
}

template <class T>
struct Data {
  std::vector<T> x, y, z;
  std::vector<float> out, square, true_out, true_square;

  Data() {
    std::mt19937 rng(3);
    const auto fill = [&](std::vector<T>& v, int rows) {
      for (int i = 0; i < rows * kColumns; i++) v.push_back(T(float(int(rng() % 17) - 8) / 8));
    };
    fill(x, kRows), fill(y, kFew), fill(z, kFew);
    true_out.resize(kRows * kColumns), true_square.resize(kRows * kColumns);
    for (int i = 0; i < kRows; i++) {
      for (int j = 0; j < kFew; j++) {
        float s = 0.0f;
        for (int c = 0; c < kColumns; c++) s += at(x, i, c) * at(y, j, c);
        for (int c = 0; c < kColumns; c++)
          true_out[size_t(i * kColumns + c)] += float(T(s)) * at(z, j, c);
      }
      for (int a = 0; a < kColumns; a++)
        for (int b = 0; b < kColumns; b++)
          true_square[size_t(a * kColumns + b)] += at(x, i, a) * at(x, i, b);
    }
  }
  static float at(const std::vector<T>& v, int row, int column) {
    return float(v[size_t(row * kColumns + column)]);
  }

  // "" if all is right, otherwise what is wrong.
  template <int kBug>
  std::string run() {
    out.assign(true_out.size(), NAN), square.assign(true_square.size(), NAN);
    try {
      launch(products<T, kBug>, 1, 128, kBytes + 128, nullptr, x.data(), y.data(), z.data(),
             out.data(), square.data());
    } catch (const cuda_on_cpu::Error& e) {
      return e.what();
    }
    for (size_t i = 0; i < out.size(); i++)
      if (!(std::fabs(out[i] - true_out[i]) < 1e-3f && square[i] == true_square[i]))
        return "wrong numbers";
    return "";
  }
};

// What every report of a bug contains. A bug that gives wrong numbers, or only sometimes an error,
// has none; one with a star needs a trace build.
constexpr const char* kReports[] = {
    /* kNone */ "",
    /* kNoFence */ "without wgmma.fence",
    /* kFragmentAfterFence */ "was written after the wgmma.fence",
    /* kFragmentInFlight */ "written before the wait",
    /* kReadInFlight */ "",
    /* kWrittenInFlight */ "",
    /* kNotNamed */ "",
    /* kOnePending */ "a group in flight still writes",
    /* kNoCommit */ "a group in flight still writes",
    /* kSkipped */ "of the warps differ",
    /* kNoWait */ "never waited for",
    /* kOtherLane */ "of the lanes differ",
    /* kNoProxyFence */ "no fence.proxy.async",
    /* kLateProxyFence */ "*no fence.proxy.async",
    /* kNoBarrier */ "",
    /* kOverwritten */ "",
    /* kStride */ "",
    /* kUnaligned */ "does not start where the swizzle's pattern does",
    /* kWrongMajor */ "",
    /* kShortColumns */ "",
    /* kShortRows */ "",
    /* kAccumulated */ "",
};
static_assert(sizeof kReports / sizeof *kReports == kEnd);
#if defined(CUDA_ON_CPU_TRACE)
constexpr bool kTrace = true;
#else
constexpr bool kTrace = false;
#endif

template <int kBug>
void check(Data<bf16>& data) {
  const char* text = kReports[kBug];
  if (*text == '*' && !kTrace) return;
  text += *text == '*';
  constexpr int kSeeds = 6;
  const int hits = count_seeds(kSeeds, [&] {
    const std::string report = data.run<kBug>();
    if (std::getenv("VERBOSE")) std::printf("%d: %s\n", kBug, report.c_str());
    return !report.empty() && report.find(text) != std::string::npos;
  });
  if (hits == (kBug == kNone ? 0 : kSeeds)) return;
  std::printf("bug %d: %d of %d orders\n", kBug, hits, kSeeds);
  fail();
}
template <int... kBugs>
void check_all(Data<bf16>& data, std::integer_sequence<int, kBugs...>) {
  (check<kBugs>(data), ...);
}

}  // namespace

int main() {
  Data<bf16> data;
  check_all(data, std::make_integer_sequence<int, kEnd>());
  Data<fp16> half;
  CHECK(half.run<kNone>().empty());
  return report("warpgroups");
}
