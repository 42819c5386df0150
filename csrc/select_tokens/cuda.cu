// select_tokens: selection, packing and fusing in one launch; the backward in one. Schema:
// kernels/select_tokens/op.py.
//
// The forward has two kinds of blocks. Every block computes for itself which tokens of its sample
// are kept, from scores that fit into the cache, so that no block waits for another:
//   pack  32 to 128 tokens of a sample: copies the kept ones, and never reads the others
//   fuse  a slice of columns of a sample: sums the dropped rows, in a fixed order
// A score becomes an integer key in the order of the contract. For the order of indices, and to
// fuse, a search for the K-th largest key, eight bits at a time, gives the kept tokens: it counts
// the digits that the keys have there, with one barrier for each of the four. In the order of
// scores the place of a token is the number of better ones: a block compares its tokens with all
// tokens of a short sample, or with the kept ones of a long sample, which the search gives.
//
// Limits, with rows of R bytes: the forward reads K + 1 rows, or all of them if it fuses, and
// writes K + 1 or K + 2; the backward reads what the forward wrote, and the fused rows for the
// gradient of their scores, and writes all rows. Scores, ids and inverse take 20 bytes per token.
// For bf16 and C = 768, in MB (fused):
//   P1   64 x 273, keep 0.7     38 (46)     P2  256 x 197, keep 0.7    110 (134)
//   P1f  64 x 785, keep 0.5     78 (117)    P3   64 x 1568, keep 0.5   156 (233)
// The selection is integer arithmetic, two or three instructions per comparison at half rate. By an
// estimate that is not yet measured it takes a tenth of the time that the bytes of P2 need, and a
// third for P1f and P3, while other blocks copy. Up to kCached scores are kept in shared memory;
// the others are read from L2 every time.
#include "cuda/floats.h"
#include "select_tokens/interface.h"

namespace vidl {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kResident = 4;                     // blocks per multiprocessor: half its threads
constexpr int kMostRows = 128, kLeastRows = 32;  // tokens of a packing block
constexpr int kQuad = 4;                         // tokens that a thread compares with others
constexpr int kAhead = 4;                        // units that a thread loads before it uses them
constexpr int kCompareAll = 1024;                // tokens of a short sample
constexpr int kCached = 16384, kCachedPacked = 4096;
constexpr int64_t kManyBlocks = 768;  // about six per multiprocessor of an H200
constexpr int kChunk = 1024;          // units of a row that a block packs, at most
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kDigits = 4, kBins = 256;  // of a key, eight bits each, the highest first
static_assert(kBins == kThreads);

// A thread loads one unit at a time: 16 bytes, or one element if rows are not aligned.
template <class T, int kVec>
struct Unit {
  uint4 bits;
  __device__ __forceinline__ void load(const T* from) { bits = load_16(from); }
  __device__ __forceinline__ void store(T* to) const { store_16(to, bits); }
  __device__ __forceinline__ void get(float (&x)[kVec]) const {
    T in[kVec];
    memcpy(in, &bits, 16);
#pragma unroll
    for (int i = 0; i < kVec; i++) x[i] = to_float(in[i]);
  }
  __device__ __forceinline__ void set(const float (&x)[kVec]) {
    T out[kVec];
#pragma unroll
    for (int i = 0; i < kVec; i++) out[i] = from_float<T>(x[i]);
    memcpy(&bits, out, 16);
  }
};
template <class T>
struct Unit<T, 1> {
  T element;
  __device__ __forceinline__ void load(const T* from) { element = *from; }
  __device__ __forceinline__ void store(T* to) const { *to = element; }
  __device__ __forceinline__ void get(float (&x)[1]) const { x[0] = to_float(element); }
  __device__ __forceinline__ void set(const float (&x)[1]) { element = from_float<T>(x[0]); }
};

template <int kVec>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kVec]) {
  if constexpr (kVec == 1) {
    to[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const uint4 bits = load_16(from + i);
      memcpy(to + i, &bits, 16);
    }
  }
}

__device__ __forceinline__ bool is_finite(float x) {
  return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u;
}

struct Sample {
  int64_t begin;       // its first row in packed x, else 0
  int64_t scored;      // its first token in arrays of the shape of the scores
  int64_t first_kept;  // in ids
  int64_t b;
  int N, K;
  bool fits;  // else its offsets are out of range, it has no tokens, and its rows become NaN

  __device__ const float* numbers(const Numbers& x, bool packed) const {
    return x.data + (packed ? scored * x.token : b * x.sample);
  }
};

// Whether b of B + 1 offsets may be followed by the next: they ascend from 0 to `total`.
__device__ __forceinline__ bool ascends(const int32_t* offsets, int64_t b, int64_t B,
                                        int64_t total) {
  const int32_t begin = offsets[b], end = offsets[b + 1];
  return begin <= end && (b > 0 ? begin >= 0 : begin == 0) &&
         (b + 1 < B ? end <= total : end == total);
}

__device__ Sample sample_at(const Samples& s, int64_t b) {
  Sample sample = {0, b * s.N, b * s.K, b, static_cast<int>(s.N), static_cast<int>(s.K), true};
  if (s.cu_seqlens == nullptr) return sample;
  sample.fits = ascends(s.cu_seqlens, b, s.B, s.total);
  sample.begin = s.cu_seqlens[b];
  sample.scored = sample.begin + s.prefix;
  sample.N = static_cast<int>(s.cu_seqlens[b + 1] - sample.scored);
  if (s.cu_kept != nullptr) {
    const int first = within(s.cu_kept[b], s.num_kept), last = within(s.cu_kept[b + 1], s.num_kept);
    sample.first_kept = first;
    sample.K = max(last - first, 0);
    sample.fits = sample.fits && ascends(s.cu_kept, b, s.B, s.num_kept) && sample.K <= sample.N;
  }
  sample.fits = sample.fits && sample.N >= 0;
  if (!sample.fits) sample.begin = 0, sample.scored = s.prefix, sample.N = 0;
  return sample;
}

// Whether all offsets fit. Only the first block knows: then what it writes is NaN. Called by all
// threads of every block.
__device__ bool offsets_fit(const Samples& s) {
  if (s.cu_seqlens == nullptr || blockIdx.x != 0) return true;
  bool fit = true;
  for (int64_t b = threadIdx.x; b < s.B; b += kThreads) fit = fit && sample_at(s, b).fits;
  return __syncthreads_and(fit);
}

// The last b in [0, B) with at(b) <= x; at(0) <= x must hold.
template <class F>
__device__ __forceinline__ int64_t last_below(int64_t B, int64_t x, F at) {
  int64_t low = 0, high = B;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (at(middle) <= x ? low : high) = middle;
  }
  return low;
}

// Larger for a better score; 0 for NaN, and never all ones.
__device__ __forceinline__ uint32_t key_of(float score) {
  if (score != score) return 0;
  const uint32_t bits = score == 0.0f ? 0u : __float_as_uint(score);  // not -0.0f
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The keys of a sample, the first `cached` of them in shared memory.
struct Keys {
  const float* scores;
  int64_t stride;
  uint32_t* cache;
  int* bins;  // [kDigits][kBins], for find_cut
  int cached, N;

  __device__ __forceinline__ uint32_t at(int n) const {
    return n < cached ? cache[n] : key_of(scores[n * stride]);
  }
  __device__ void fill() {
    cached = min(cached, N);
    for (int n = threadIdx.x; n < cached; n += kThreads) cache[n] = key_of(scores[n * stride]);
    __syncthreads();  // the keys are there
  }
};

// Tokens with a larger key are kept, and those with this key and an index below the bound.
struct Cut {
  uint32_t key;
  int bound;
  __device__ __forceinline__ bool stays(uint32_t other, int n) const {
    return other > key || (other == key && n < bound);
  }
};

// The number of tokens n < end for which f(n) is true; called by all threads of the block.
template <class F>
__device__ __forceinline__ int count_tokens(int end, F f) {
  int mine = 0, sum = 0;
  for (int n = threadIdx.x; n < end; n += kThreads) mine += f(n);
  const int most = (end + kThreads - 1) / kThreads;
  for (int bit = 0; most >> bit != 0; bit++) {
    sum += __syncthreads_count(mine >> bit & 1) << bit;
  }
  return sum;
}

// The largest digit that `rank` counted digits reach: so many are above it, and so many equal it.
struct Digit {
  int value, above, count;
};

// Every warp searches for itself, so that the block needs no barrier. `rank` is at least 1.
__device__ Digit find_digit(const int* bins, int rank) {
  const int lane = static_cast<int>(lane_id());
  int above = 0;
  for (int first = kBins / 2;; first = 0) {  // the upper half, then the lower one
    int counts[4];
    const uint4 bits = load_16(bins + first + 4 * lane);
    memcpy(counts, &bits, 16);
    const int mine = counts[0] + counts[1] + counts[2] + counts[3];
    int sum = mine;  // of this lane and those after it
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_down_sync(kAllLanes, sum, d);
      sum += lane + d < 32 ? other : 0;
    }
    const uint32_t reach = __ballot_sync(kAllLanes, above + sum >= rank);
    if (reach == 0 && first != 0) {
      above += __shfl_sync(kAllLanes, sum, 0);
      continue;
    }
    Digit digit = {first + 4 * lane + 3, above + sum - mine, counts[3]};
#pragma unroll
    for (int i = 2; i >= 0; i--) {
      if (digit.above + digit.count >= rank) continue;
      digit = {first + 4 * lane + i, digit.above + digit.count, counts[i]};
    }
    const int owner = 31 - __clz(static_cast<int>(reach));
    return {__shfl_sync(kAllLanes, digit.value, owner), __shfl_sync(kAllLanes, digit.above, owner),
            __shfl_sync(kAllLanes, digit.count, owner)};
  }
}

// The cut after which exactly K tokens stay. Called at most once, by all threads of the block.
__device__ Cut find_cut(const Keys& keys, int K) {
  const int N = keys.N;
  if (K == N) return {0, N};
  if (K == 0) return {~0u, 0};
#pragma unroll
  for (int i = 0; i < kDigits; i++) keys.bins[i * kBins + threadIdx.x] = 0;
  __syncthreads();  // nothing is counted
  Cut cut = {0, N};
  int rank = K;  // of the K-th largest key, among those that begin with the digits so far
  for (int i = 0; i < kDigits; i++) {
    const int shift = 8 * (kDigits - 1 - i);
    const uint32_t known = i == 0 ? 0u : ~0u << (shift + 8);
    int* const bins = keys.bins + i * kBins;
    for (int n = threadIdx.x; n < N; n += kThreads) {
      const uint32_t key = keys.at(n);
      if (((key ^ cut.key) & known) == 0) atomicAdd(&bins[key >> shift & (kBins - 1)], 1);
    }
    __syncthreads();  // the digits of all keys are counted
    const Digit digit = find_digit(bins, rank);
    cut.key |= static_cast<uint32_t>(digit.value) << shift;
    rank -= digit.above;
    if (digit.count == rank) return cut;
  }
  // Too many tokens have the K-th largest key: the last ones are dropped.
  cut.bound = 0;
  for (int bit = 31 - __clz(N); bit >= 0; bit--) {
    const Cut wider = {cut.key, cut.bound | 1 << bit};
    const int kept = count_tokens(N, [&](int n) { return wider.stays(keys.at(n), n); });
    if (kept <= K) cut = wider;
  }
  return cut;
}

// places[r] of token start + r among the kept ones, in the order of indices, or -1.
__device__ void places_by_index(const Keys& keys, Cut cut, int start, int rows, int* places) {
  int before = count_tokens(start, [&](int n) { return cut.stays(keys.at(n), n); });
  if (threadIdx.x < 32) {
    for (int r = threadIdx.x; r < rows; r += 32) {
      const int n = start + r;
      const bool stays = n < keys.N && cut.stays(keys.at(n), n);
      const uint32_t mask = __ballot_sync(kAllLanes, stays);
      places[r] = stays ? before + __popc(mask & ((1u << threadIdx.x) - 1)) : -1;
      before += __popc(mask);
    }
  }
  __syncthreads();  // the places are there
}

// Moves the keys of the kept tokens to the front of the cache, in order.
__device__ void compact(const Keys& keys, Cut cut, int* counts) {
  const int warp = threadIdx.x / 32;
  int begin = 0;
  for (int start = 0; start < keys.N; start += kThreads) {
    const int n = start + static_cast<int>(threadIdx.x);
    const uint32_t key = n < keys.N ? keys.cache[n] : 0;
    const bool stays = n < keys.N && cut.stays(key, n);
    const uint32_t mask = __ballot_sync(kAllLanes, stays);
    if (lane_id() == 0) counts[warp] = __popc(mask);
    __syncthreads();  // every key of this round is read, and counted
    int to = begin + __popc(mask & ((1u << lane_id()) - 1));
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      if (w < warp) to += counts[w];
      begin += counts[w];
    }
    if (stays) keys.cache[to] = key;
    __syncthreads();  // nobody reads the counts any more
  }
}

// Adds to better[u], for four tokens, the number of rivals that precede it. `first` is the place of
// the first of the four among the rivals; those of the four that are rivals are neighbours there.
__device__ void count_better(const Keys& keys, int rivals, int first, const uint32_t (&own)[kQuad],
                             int part, int parts, int (&better)[kQuad]) {
  for (int j = part; j < rivals; j += parts) {
    const uint32_t rival = keys.at(j) + (j < first);  // the first of equal keys is better
#pragma unroll
    for (int u = 0; u < kQuad; u++) better[u] += rival > own[u];
  }
  for (int d = parts / 2; d > 0; d /= 2) {
#pragma unroll
    for (int u = 0; u < kQuad; u++) better[u] += __shfl_xor_sync(kAllLanes, better[u], d);
  }
#pragma unroll
  for (int u = 1; u < kQuad; u++) {
#pragma unroll
    for (int v = 0; v < u; v++) better[u] += own[v] == own[u];
  }
}

// places[] in the order of scores: `parts` neighbouring threads compare four tokens with all
// rivals.
__device__ void places_by_score(const Keys& keys, int K, int start, int rows, int* places,
                                int* counts) {
  const int parts = kThreads * kQuad / rows, part = threadIdx.x % parts;
  const int r = threadIdx.x / parts * kQuad;
  const bool all = keys.N <= kCompareAll || keys.N > keys.cached;
  Cut cut = {0, keys.N};
  if (!all) {
    cut = find_cut(keys, K);
    places_by_index(keys, cut, start, rows, places);
  }
  uint32_t own[kQuad];
  bool stays[kQuad];
  int better[kQuad] = {}, first = all ? start + r : 0;
#pragma unroll
  for (int u = kQuad - 1; u >= 0; u--) {
    const int n = start + r + u;
    own[u] = n < keys.N ? keys.at(n) : 0;
    stays[u] = n < keys.N && (all || places[r + u] >= 0);
    if (!all && stays[u]) first = places[r + u];
  }
  if (!all) compact(keys, cut, counts);  // it has a barrier before its first write
  count_better(keys, all ? keys.N : K, first, own, part, parts, better);
  if (part == 0) {
#pragma unroll
    for (int u = 0; u < kQuad; u++) places[r + u] = stays[u] && better[u] < K ? better[u] : -1;
  }
  __syncthreads();  // the new places are there
}

// to[c] = from[c] for `count` elements. Called by `threads` threads; this one is number `thread`.
template <class T, int kVec>
__device__ __forceinline__ void copy_row(const T* from, T* to, int count, int thread, int threads) {
  const int step = threads * kVec;
  for (int c = thread * kVec; c < count; c += kAhead * step) {
    Unit<T, kVec> units[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (c + i * step < count) units[i].load(from + c + i * step);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (c + i * step < count) units[i].store(to + c + i * step);
    }
  }
}

// Writes the kept tokens of a sample whose offsets are out of range, without its fused token: NaN.
template <class T>
__device__ void write_nan_rows(const Samples& s, const Sample& sample, const Selection& out) {
  const int64_t to = sample.first_kept + sample.b * (s.prefix + s.fuses),
                rows = s.prefix + sample.K;
  write_nan(static_cast<T*>(out.tokens) + to * s.C, rows * s.C, threadIdx.x, kThreads);
  if (threadIdx.x != 0) return;
  out.offsets[sample.b + 1] = static_cast<int32_t>(to + rows + s.fuses);
  if (sample.b == 0) out.offsets[0] = 0;
}

// The sizes of a forward launch.
struct Plan {
  int rows;        // tokens of a packing block
  int64_t parts;   // blocks of rows per sample, without offsets
  int64_t chunks;  // blocks of columns per block of rows
  int64_t slices;  // fusing blocks per sample
  int cached;      // keys in shared memory
};

template <class T, int kVec>
__device__ void pack_block(const Samples& s, const Plan& plan, const TokenRows& x,
                           const Numbers& ranks, bool by_score, const Selection& out, int64_t block,
                           bool fits, uint32_t* cache, int* bins, int* places, int* counts) {
  const bool packed = s.cu_seqlens != nullptr;
  const int64_t item = block / plan.chunks, chunk = block % plan.chunks;
  int64_t b, part;
  if (packed) {
    // Sample b has the blocks from cu_seqlens[b] / rows + b on, at least one.
    const auto first = [&](int64_t i) { return s.cu_seqlens[i] / plan.rows + i; };
    b = last_below(s.B, item, first);
    part = item - first(b);
  } else {
    b = item / plan.parts;
    part = item % plan.parts;
  }
  if (!fits) b = part = 0;  // as in the first block of offsets that fit
  const Sample sample = sample_at(s, b);
  if (!fits || !sample.fits) {
    if (part == 0 && chunk == 0) write_nan_rows<T>(s, sample, out);
    return;
  }
  if (part != 0 && (part < 0 || part * plan.rows >= sample.N)) return;  // the whole block
  const int start = static_cast<int>(part) * plan.rows;
  Keys keys = {sample.numbers(ranks, packed), ranks.token, cache, bins, plan.cached, sample.N};
  keys.fill();
  if (by_score) {
    places_by_score(keys, sample.K, start, plan.rows, places, counts);
  } else {
    places_by_index(keys, find_cut(keys, sample.K), start, plan.rows, places);
  }

  const int count = min(plan.rows, sample.N - start);
  const int64_t to = sample.first_kept + b * (s.prefix + s.fuses);  // its first row of tokens
  if (chunk == 0) {
    for (int r = threadIdx.x; r < count; r += kThreads) {
      out.inverse[sample.scored + start + r] = places[r];
      if (places[r] >= 0) out.ids[sample.first_kept + places[r]] = start + r;
    }
    if (part == 0) {
      for (int64_t i = threadIdx.x; packed && i < s.prefix; i += kThreads) {
        out.inverse[sample.begin + i] = -1;
      }
      if (threadIdx.x == 0) {
        out.offsets[b + 1] = static_cast<int32_t>(to + s.prefix + sample.K + s.fuses);
        if (b == 0) out.offsets[0] = 0;
      }
    }
  }

  const int64_t first = chunk * kChunk * kVec;
  const int columns = static_cast<int>(s.C - first < kChunk * kVec ? s.C - first : kChunk * kVec);
  const int64_t extra = part == 0 ? s.prefix : 0;  // prefix rows, always kept
  const T* const from = static_cast<const T*>(x.data) + b * x.sample + sample.begin * x.row + first;
  T* const tokens = static_cast<T*>(out.tokens) + to * s.C + first;
  for (int64_t i = threadIdx.x / 32; i < extra + count; i += kWarps) {
    int64_t row = i, place = i;
    if (i >= extra) {
      const int r = static_cast<int>(i - extra);
      if (places[r] < 0) continue;
      row = s.prefix + start + r;
      place = s.prefix + places[r];
    }
    copy_row<T, kVec>(from + row * x.row, tokens + place * s.C, columns, lane_id(), 32);
  }
}

// Threads per row of a slice: 128 bytes of it, or 32 elements.
template <int kVec>
constexpr int kSharing = kVec == 1 ? 32 : 8;

template <class T, int kVec>
__device__ void fuse_block(const Samples& s, const Plan& plan, const TokenRows& x,
                           const Numbers& ranks, const Numbers& weights, const Selection& out,
                           int64_t block, bool fits, uint32_t* cache, int* bins, float* partial) {
  constexpr int kColumns = kSharing<kVec> * kVec, kGroups = kThreads / kSharing<kVec>;
  const bool packed = s.cu_seqlens != nullptr;
  const int64_t b = block / plan.slices, slice = block % plan.slices;
  Sample sample = sample_at(s, b);
  sample.fits = sample.fits && fits;
  Keys keys = {sample.numbers(ranks, packed), ranks.token, cache, bins, plan.cached, sample.N};
  keys.fill();
  const Cut cut = find_cut(keys, sample.K);

  const int thread = threadIdx.x % kSharing<kVec>, group = threadIdx.x / kSharing<kVec>;
  const int64_t column = slice * kColumns + thread * kVec;
  const float* const weight = sample.numbers(weights, packed);
  const T* const row =
      static_cast<const T*>(x.data) + b * x.sample + (sample.begin + s.prefix) * x.row + column;
  float sum[kVec] = {}, mass = 0.0f;
  for (int start = group; start < sample.N; start += kAhead * kGroups) {
    float scale[kAhead];
    bool used[kAhead];
    Unit<T, kVec> units[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      const int n = start + i * kGroups;
      used[i] = n < sample.N && !cut.stays(keys.at(n), n);
      scale[i] = used[i] ? weight[n * weights.token] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      used[i] = used[i] && is_finite(scale[i]);
      if (used[i] && column < s.C) units[i].load(row + (start + i * kGroups) * x.row);
    }
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (!used[i]) continue;
      mass += scale[i];
      if (column >= s.C) continue;
      float elements[kVec];
      units[i].get(elements);
#pragma unroll
      for (int e = 0; e < kVec; e++) sum[e] = fmaf(scale[i], elements[e], sum[e]);
    }
  }

  // Sums over the groups of a warp, then over the warps.
  for (int d = kSharing<kVec>; d < 32; d *= 2) {
    mass += __shfl_xor_sync(kAllLanes, mass, d);
#pragma unroll
    for (int e = 0; e < kVec; e++) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], d);
  }
  float* const masses = partial + kWarps * kColumns;
  if (static_cast<int>(lane_id()) < kSharing<kVec>) {
    float* const mine = partial + threadIdx.x / 32 * kColumns + thread * kVec;
#pragma unroll
    for (int e = 0; e < kVec; e++) mine[e] = sum[e];
    if (thread == 0) masses[threadIdx.x / 32] = mass;
  }
  __syncthreads();  // the sums of all warps are there
  const int64_t c = slice * kColumns + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= kColumns) return;
  float value = 0.0f, total = 0.0f;
  for (int w = 0; w < kWarps; w++) {
    value += partial[w * kColumns + threadIdx.x];
    total += masses[w];
  }
  if (out.mean != nullptr) value = total == 0.0f ? 0.0f : value / total;
  if (!sample.fits) value = NAN;
  if (out.mean != nullptr) {
    if (c < s.C) out.mean[b * s.C + c] = value;
    if (c == 0) out.mass[b] = total;
  }
  if (c >= s.C) return;
  const int64_t last = sample.first_kept + sample.K + (b + 1) * s.prefix + b;
  static_cast<T*>(out.tokens)[last * s.C + c] = from_float<T>(value);
}

// Fusing blocks come first: they take longest.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, kResident)
    select_kernel(Samples samples, Plan plan, TokenRows x, Numbers ranks, Numbers weights,
                  bool by_score, Selection out) {
  SHARED(int, places, [kMostRows]);
  SHARED(int, counts, [kWarps]);
  SHARED(int, bins, [kDigits * kBins]);
  SHARED(float, partial, [kWarps * (kSharing<kVec> * kVec + 1)]);
  DYNAMIC_SHARED(uint32_t, cache);
  const bool fits = offsets_fit(samples);
  const int64_t fused = samples.B * plan.slices;
  if (blockIdx.x < fused) {
    fuse_block<T, kVec>(samples, plan, x, ranks, weights, out, blockIdx.x, fits, cache, bins,
                        partial);
  } else {
    pack_block<T, kVec>(samples, plan, x, ranks, by_score, out, blockIdx.x - fused, fits, cache,
                        bins, places, counts);
  }
}

// The backward of a fused row: writes its share of the fused token's gradient, and returns this
// thread's part of the dot product of that gradient with the row, or with the row minus the mean.
template <class T, int kVec>
__device__ __forceinline__ float spread_row(const T* grad, const T* x, const float* mean, T* to,
                                            float scale, int count, int thread, int threads) {
  constexpr int kTwo = 2;
  const int step = threads * kVec;
  float product = 0.0f;
  for (int c = thread * kVec; c < count; c += kTwo * step) {
    Unit<T, kVec> units[kTwo], rows[kTwo];
#pragma unroll
    for (int i = 0; i < kTwo; i++) {
      if (c + i * step >= count) continue;
      units[i].load(grad + c + i * step);
      if (x != nullptr) rows[i].load(x + c + i * step);
    }
#pragma unroll
    for (int i = 0; i < kTwo; i++) {
      if (c + i * step >= count) continue;
      float g[kVec], row[kVec];
      units[i].get(g);
      if (x != nullptr) {
        rows[i].get(row);
        float centre[kVec] = {};
        if (mean != nullptr) load_floats(mean + c + i * step, centre);
#pragma unroll
        for (int e = 0; e < kVec; e++) product = fmaf(g[e], row[e] - centre[e], product);
      }
      if (to != nullptr) {
#pragma unroll
        for (int e = 0; e < kVec; e++) g[e] *= scale;
        units[i].set(g);
        units[i].store(to + c + i * step);
      }
    }
  }
  return product;
}

// A group of `threads` threads computes a row of x: a warp, or the block if rows are long.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, kResident)
    select_backward_kernel(Samples s, SelectionGrad grad, TokenRows x, Numbers weights,
                           T* __restrict__ grad_x, float* __restrict__ grad_weights, int threads) {
  SHARED(float, partial, [kWarps]);
  const int thread = threadIdx.x % threads;
  const int64_t row = blockIdx.x * int64_t{kThreads / threads} + threadIdx.x / threads;
  if (row >= s.total) return;  // whole warps
  const bool packed = s.cu_seqlens != nullptr;
  const int64_t b = packed ? last_below(s.B, row, [&](int64_t i) { return s.cu_seqlens[i]; })
                           : row / (s.prefix + s.N);
  const Sample sample = sample_at(s, b);
  const int64_t inside = packed ? row - sample.begin : row % (s.prefix + s.N);
  const int64_t n = inside - s.prefix;  // negative in the prefix
  const int64_t number = sample.scored + n;
  const int64_t begin = grad.offsets[b], fused = grad.offsets[b + 1] - 1;
  // the place of a token among the kept ones, or -1
  const int64_t place = n < 0 || !sample.fits ? n : grad.inverse[number];
  const bool stays = n < 0 || place >= 0;
  const int64_t source = stays ? begin + s.prefix + place : fused;

  const T* const grad_tokens = static_cast<const T*>(grad.tokens);
  T* const to = grad_x == nullptr ? nullptr : grad_x + row * s.C;
  const int C = static_cast<int>(s.C);
  float product = 0.0f, share = 1.0f;
  if (!sample.fits || source >= s.num_kept + s.B * (s.prefix + s.fuses) ||
      (source < 0 && (stays || s.fuses))) {
    if (to != nullptr) write_nan(to, C, thread, threads);
    if (grad_weights != nullptr && (n >= 0 || packed) && thread == 0) grad_weights[number] = NAN;
    return;
  }
  if (stays) {
    const T* const from = grad_tokens + source * s.C;
    if (to != nullptr) copy_row<T, kVec>(from, to, C, thread, threads);
  } else {
    const bool weighed = weights.data != nullptr;
    const float weight = weighed ? sample.numbers(weights, packed)[n * weights.token] : 0.0f;
    if (grad.mass != nullptr) share = grad.mass[b] == 0.0f ? 0.0f : 1.0f / grad.mass[b];
    if (weighed && is_finite(weight)) {
      const T* x_row = nullptr;
      if (grad_weights != nullptr) {
        x_row = static_cast<const T*>(x.data) + b * x.sample + (sample.begin + inside) * x.row;
      }
      const float* const mean = grad.mean == nullptr ? nullptr : grad.mean + b * s.C;
      product = spread_row<T, kVec>(grad_tokens + source * s.C, x_row, mean, to, weight * share, C,
                                    thread, threads);
    } else if (to != nullptr) {
      Unit<T, kVec> zeros;
      zeros.set({});
      for (int c = thread * kVec; c < C; c += threads * kVec) {
        zeros.store(to + c);
      }
    }
  }
  if (grad_weights == nullptr || (n < 0 && !packed)) return;  // all threads of a row
  product = warp_sum(product);
  if (threads > 32) {
    if (lane_id() == 0) partial[threadIdx.x / 32] = product;
    __syncthreads();  // the products of all warps are there
    product = 0.0f;
    for (int w = 0; w < kWarps; w++) product += partial[w];
  }
  if (thread == 0) grad_weights[number] = product * share;
}

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Whether rows can be read and written 16 bytes at a time.
bool aligned(const void* data, int64_t vec, int64_t C, int64_t sample = 0, int64_t row = 0) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && C % vec == 0 && sample % vec == 0 &&
         row % vec == 0;
}

template <class T, int kVec>
int select_with(const Samples& s, const TokenRows& x, const Numbers& ranks, const Numbers& weights,
                bool by_score, const Selection& out, void* stream) {
  const bool packed = s.cu_seqlens != nullptr;
  const int64_t units = divide_up(s.C, kVec), longest = packed ? s.total : s.N;
  Plan plan = {};
  plan.chunks = units > kChunk ? divide_up(units, kChunk) : 1;
  plan.slices = s.fuses ? divide_up(units > 0 ? units : 1, kSharing<kVec>) : 0;
  const int most = packed ? kCachedPacked : kCached;
  plan.cached = longest < most ? static_cast<int>(longest) : most;
  int64_t items = 0;
  for (plan.rows = kMostRows; plan.rows >= kLeastRows; plan.rows /= 2) {
    plan.parts = s.N > 0 ? divide_up(s.N, plan.rows) : 1;
    items = packed ? s.total / plan.rows + s.B : s.B * plan.parts;
    if (items * plan.chunks >= kManyBlocks || plan.rows == kLeastRows) break;
  }
  const int64_t blocks = s.B * plan.slices + items * plan.chunks;
  return launch(select_kernel<T, kVec>, blocks, kThreads, plan.cached * sizeof(uint32_t), stream, s,
                plan, x, ranks, weights, by_score, out);
}

template <class T, int kVec>
int select_backward_with(const Samples& s, const SelectionGrad& grad, const TokenRows& x,
                         const Numbers& weights, void* grad_x, float* grad_weights, void* stream) {
  const int threads = s.C > int64_t{kChunk} * kVec ? kThreads : 32;
  const int64_t blocks = divide_up(s.total, kThreads / threads);
  return launch(select_backward_kernel<T, kVec>, blocks, kThreads, 0, stream, s, grad, x, weights,
                static_cast<T*>(grad_x), grad_weights, threads);
}

}  // namespace
}  // namespace vidl

using vidl::Numbers;
using vidl::Samples;
using vidl::Selection;
using vidl::SelectionGrad;
using vidl::TokenRows;

int vidl_select_tokens_cuda(const Samples* samples, const TokenRows* x, const Numbers* ranks,
                            const Numbers* weights, bool by_score, const Selection* out,
                            void* stream) {
  if (samples->B == 0) return 0;
  return vidl::with_type(samples->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVec = 16 / sizeof(T);
    const bool vectors = vidl::aligned(x->data, kVec, samples->C, x->sample, x->row) &&
                         vidl::aligned(out->tokens, kVec, samples->C);
    const auto run = vectors ? vidl::select_with<T, kVec> : vidl::select_with<T, 1>;
    return run(*samples, *x, *ranks, *weights, by_score, *out, stream);
  });
}

int vidl_select_tokens_bwd_cuda(const Samples* samples, const SelectionGrad* grad,
                                const TokenRows* x, const Numbers* weights, void* grad_x,
                                float* grad_weights, void* stream) {
  if (samples->total == 0) return 0;
  return vidl::with_type(samples->dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kVec = 16 / sizeof(T);
    const bool vectors = vidl::aligned(x->data, kVec, samples->C, x->sample, x->row) &&
                         vidl::aligned(grad->tokens, kVec, samples->C) &&
                         vidl::aligned(grad->mean, kVec, samples->C) &&
                         vidl::aligned(grad_x, kVec, samples->C);
    const auto run =
        vectors ? vidl::select_backward_with<T, kVec> : vidl::select_backward_with<T, 1>;
    return run(*samples, *grad, *x, *weights, grad_x, grad_weights, stream);
  });
}
