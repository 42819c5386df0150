// token_scores of the first query of each group on CUDA: "cls", and what "value" adds to it.
//
// A warp computes a group of at most 64 keys and one head, a block a longer one. Neighbouring lanes
// load the 16-byte units of a key, several keys ahead. The forward writes the logits to the memory
// of the weights and reads them back once their maximum is known.
//
// Limit: bytes. In 16 bits the forward reads 2 H D bytes per key for 2 H D FLOPs, beside 12 H bytes
// of logits and weights, which mostly stay in the cache; the backward reads and writes 4 H D bytes
// per key for 4 H D FLOPs, and the zeros of all other queries take 2 H D bytes each. "value" reads
// 2 H D bytes per value in each direction, and writes as many backward. For 64 clips, 12 heads of
// 64, on an H200 by its data sheet:
//   P1    273 tokens    27 MB,  6 us forward;   80 MB, 17 us backward
//   P1f   785 tokens    77 MB, 16 us forward;  231 MB, 48 us backward
//   P3   1568 tokens   154 MB, 32 us forward;  462 MB, 96 us backward
#pragma once
#include "cuda/floats.h"
#include "groups/logits.h"
#include "groups/table.h"
#include "token_scores/interface.h"

namespace vidl {
namespace {

constexpr int kTeamThreads = 128, kTeamWarps = kTeamThreads / 32;
constexpr int kShortGroup = 64;  // keys of a group that one warp computes
constexpr int kKeysAhead = 4;    // keys that a lane loads before it uses them
constexpr int kRowThreads = 256;

// The threads that compute one item: a warp, or a block.
struct Team {
  int thread, threads;
  float* partial;  // [kTeamWarps], shared

  __device__ __forceinline__ Team(int threads, float* partial)
      : thread(static_cast<int>(threadIdx.x) % threads), threads(threads), partial(partial) {}

  __device__ __forceinline__ int64_t item() const {
    return blockIdx.x * int64_t{kTeamThreads / threads} + threadIdx.x / threads;
  }
  // combine(a, b) of the numbers of all threads, in a fixed order.
  template <class F>
  __device__ __forceinline__ float reduce(float x, F combine) const {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, d));
    if (threads == 32) return x;
    __syncthreads();  // nobody reads the numbers of an earlier call any more
    if (lane_id() == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();  // the numbers of all warps are there
    x = partial[0];
#pragma unroll
    for (int w = 1; w < kTeamWarps; w++) x = combine(x, partial[w]);
    return x;
  }
  __device__ __forceinline__ float sum(float x) const {
    return reduce(x, [](float a, float b) { return a + b; });
  }
  __device__ __forceinline__ float max(float x) const {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }
};

int64_t team_of(const Groups& groups) { return groups.max_keys <= kShortGroup ? 32 : kTeamThreads; }
int64_t team_blocks(int64_t items, int64_t threads) {
  return div_up(items, kTeamThreads / threads);
}

template <class T>
__device__ __forceinline__ void unpack8(const uint4& bits, float (&x)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = unpack2<T>(words[i]);
    x[2 * i] = two.x, x[2 * i + 1] = two.y;
  }
}
template <class T>
__device__ __forceinline__ uint4 pack8(const float (&x)[8], float factor) {
  uint4 bits;
  bits.x = pack2<T>(x[0] * factor, x[1] * factor);
  bits.y = pack2<T>(x[2] * factor, x[3] * factor);
  bits.z = pack2<T>(x[4] * factor, x[5] * factor);
  bits.w = pack2<T>(x[6] * factor, x[7] * factor);
  return bits;
}

// Lanes that share a row: one for each 16 bytes, rounded up to a power of two.
template <int D>
constexpr int kLanesOfRow = D <= 32   ? 4
                            : D <= 64 ? 8
                                      : 16;

__device__ __forceinline__ bool is_hidden(const Bias& bias, int64_t row) {
  return bias.key_bias != nullptr && bias.key_bias[row] == -INFINITY;
}

// Calls f(j, row, x) for this lane's keys below `count` and its eight channels of each; all lanes
// of a warp call it together, and row is -1 beyond the end. The channels of keys that the first
// query does not see, from `seen` on or hidden, count as zeros and are not read.
template <class T, int D, class F>
__device__ __forceinline__ void for_keys(const TokenScores& s, int h, const Members& keys,
                                         int count, int seen, const Team& team, F f) {
  constexpr int kLanes = kLanesOfRow<D>;
  const int unit = team.thread % kLanes, step = team.threads / kLanes;
  const T* const head = static_cast<const T*>(s.k.data) + h * s.k.head + unit * 8;
  for (int start = 0; start < count; start += kKeysAhead * step) {
    int64_t row[kKeysAhead];
    uint4 bits[kKeysAhead];
#pragma unroll
    for (int n = 0; n < kKeysAhead; n++) {
      const int j = start + n * step + team.thread / kLanes;
      row[n] = j < count ? keys.row(j) : -1;
      bits[n] = {0, 0, 0, 0};
      if (j >= seen || unit >= D / 8 || is_hidden(s.bias, row[n])) continue;
      bits[n] = load_16(head + row[n] * s.k.row);
    }
#pragma unroll
    for (int n = 0; n < kKeysAhead; n++) {
      float x[8];
      unpack8<T>(bits[n], x);
      f(start + n * step + team.thread / kLanes, row[n], x);
    }
  }
}

// This lane's eight channels of the first query of a group, zeros without one.
template <class T, int D>
__device__ __forceinline__ void load_first(const TokenScores& s, int h, const Members& queries,
                                           int unit, float (&q)[8]) {
  uint4 bits = {0, 0, 0, 0};
  if (queries.count > 0 && unit < D / 8) {
    bits = load_16(static_cast<const T*>(s.q.data) + queries.row(0) * s.q.row + h * s.q.head +
                   unit * 8);
  }
  unpack8<T>(bits, q);
}

// The weights of the first query of one group and head.
template <class T, int D>
__global__ void __launch_bounds__(kTeamThreads, 6)
    cls_weights_kernel(TokenScores s, float* weights, int threads) {
  constexpr int kLanes = kLanesOfRow<D>;
  SHARED(float, partial, [kTeamWarps]);
  const Team team(threads, partial);
  if (team.item() >= s.groups.G * s.H) return;  // whole warps
  const int64_t g = team.item() / s.H;
  const int h = static_cast<int>(team.item() % s.H), unit = team.thread % kLanes;
  const Members queries = queries_of(s.groups, g), keys = keys_of(s.groups, g);
  const int seen = limit_of(s.groups, queries, keys, 0);
  float* const to = weights + h * s.groups.E + keys.first;
  const Table table(s.bias, h);
  const int offset = queries.count > 0 ? offset_of(s.bias, queries.row(0)) : 0;
  const bool biased = s.bias.table != nullptr || s.bias.key_bias != nullptr;
  const float scale = s.scale * kLog2E;
  float q[8], most = -INFINITY, sum = 0.0f;
  load_first<T, D>(s, h, queries, unit, q);
  for_keys<T, D>(s, h, keys, seen, seen, team, [&](int j, int64_t row, const float (&k)[8]) {
    float x = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) x = fmaf(q[i], k[i], x);
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) x += __shfl_xor_sync(kAllLanes, x, d);
    if (unit != 0 || row < 0) return;
    x *= scale;
    if (biased) {
      float added = table.rows == nullptr ? 0.0f : table.at(s.bias.key_codes[row], offset);
      if (s.bias.key_bias != nullptr) added += s.bias.key_bias[row];
      x = is_hidden(s.bias, row) ? -INFINITY : x + added * kLog2E;
    }
    to[j] = x;
    most = fmaxf(most, x);
  });
  // Without a key that is seen the weights are zero. Elsewhere -inf and NaN give NaN.
  const bool may_hide = s.groups.query_limits != nullptr || s.bias.key_bias != nullptr;
  __syncwarp();  // the logits of all lanes are there; those of other warps after max()
  most = team.max(most);
  if (may_hide && most == -INFINITY) most = 0.0f;
  for (int j = team.thread; j < seen; j += threads) {
    const float x = exp2_approx(to[j] - most);
    to[j] = x;
    sum += x;
  }
  sum = team.sum(sum);
  if (may_hide && sum == 0.0f) sum = 1.0f;
  for (int j = team.thread; j < keys.count; j += threads) to[j] = j < seen ? to[j] / sum : 0.0f;
}

// The gradients of the first query and of the keys of one group and head. Of keys that several
// groups share, the gradients of the logits are stored instead.
template <class T, int D>
__global__ void __launch_bounds__(kTeamThreads, 6)
    cls_backward_kernel(TokenScores s, ScoresBackward b, int threads) {
  constexpr int kLanes = kLanesOfRow<D>;
  SHARED(float, partial, [kTeamWarps]);
  SHARED(float, sums, [kTeamWarps][D]);
  const Team team(threads, partial);
  if (team.item() >= s.groups.G * s.H) return;  // whole warps
  const int64_t g = team.item() / s.H;
  const int h = static_cast<int>(team.item() % s.H), unit = team.thread % kLanes;
  const Members queries = queries_of(s.groups, g), keys = keys_of(s.groups, g);
  const int seen = limit_of(s.groups, queries, keys, 0);
  const float* const weights = b.weights + h * s.groups.E + keys.first;
  const float* const grads = b.grad_scores + keys.first;
  const float share = s.scale / static_cast<float>(s.H);
  float delta = 0.0f;  // the sum of the weights times their gradients
  for (int j = team.thread; j < seen; j += threads) delta = fmaf(weights[j], grads[j], delta);
  delta = team.sum(delta);
  float q[8], grad_q[8] = {};
  load_first<T, D>(s, h, queries, unit, q);
  for_keys<T, D>(s, h, keys, keys.count, seen, team, [&](int j, int64_t row, const float (&k)[8]) {
    if (row < 0) return;
    const float grad = j < seen ? weights[j] * (grads[j] - delta) * share : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) grad_q[i] = fmaf(grad, k[i], grad_q[i]);
    if (b.grad_logits != nullptr) {
      if (unit == 0) b.grad_logits[h * s.groups.E + keys.first + j] = grad;
    } else if (unit < D / 8) {
      store_16(static_cast<T*>(b.grad_k) + (row * s.H + h) * D + unit * 8, pack8<T>(q, grad));
    }
  });
  if (queries.count == 0) return;  // the whole team
#pragma unroll
  for (int d = kLanes; d < 32; d *= 2) {
#pragma unroll
    for (int i = 0; i < 8; i++) grad_q[i] += __shfl_xor_sync(kAllLanes, grad_q[i], d);
  }
  if (threads > 32) {
    if (static_cast<int>(lane_id()) < D / 8) {
#pragma unroll
      for (int i = 0; i < 8; i++) sums[threadIdx.x / 32][unit * 8 + i] = grad_q[i];
    }
    __syncthreads();  // the sums of all warps are there
    if (team.thread >= D / 8) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      grad_q[i] = 0.0f;
      for (int w = 0; w < kTeamWarps; w++) grad_q[i] += sums[w][unit * 8 + i];
    }
  }
  if (team.thread >= D / 8) return;
  store_16(static_cast<T*>(b.grad_q) + (queries.row(0) * s.H + h) * D + unit * 8,
           pack8<T>(grad_q, 1.0f));
}

// The gradient of keys that several groups share: a thread sums eight channels over the entries of
// a row, in their order.
template <class T>
__global__ void __launch_bounds__(kRowThreads) cls_entries_kernel(TokenScores s, ScoresBackward b) {
  const Groups& groups = s.groups;
  const int64_t i = blockIdx.x * int64_t{kRowThreads} + threadIdx.x, units = s.D / 8;
  const int64_t row = i / units / s.H, h = i / units % s.H, channel = i % units * 8;
  if (row >= groups.num_keys) return;
  const int begin = within(groups.entry_offsets[row], groups.E);
  const int end = within(groups.entry_offsets[row + 1], groups.E);
  float grad_k[8] = {};
  for (int n = begin; n < end; n++) {
    const int entry = within(groups.entries[n], groups.E - 1);
    const Members queries = queries_of(groups, group_of(groups, entry));
    if (queries.count == 0) continue;
    float q[8];
    unpack8<T>(load_16(static_cast<const T*>(s.q.data) + queries.row(0) * s.q.row + h * s.q.head +
                       channel),
               q);
    const float grad = b.grad_logits[h * groups.E + entry];
#pragma unroll
    for (int c = 0; c < 8; c++) grad_k[c] = fmaf(grad, q[c], grad_k[c]);
  }
  store_16(static_cast<T*>(b.grad_k) + (row * s.H + h) * s.D + channel, pack8<T>(grad_k, 1.0f));
}

// A part of the gradient of the table: a warp adds the keys of some groups, for one head. Row r
// belongs to lane r % 32, so that no addition needs to be atomic.
__global__ void __launch_bounds__(32) cls_table_kernel(TokenScores s, ScoresBackward b) {
  const Groups& groups = s.groups;
  const int lane = lane_id(), h = static_cast<int>(blockIdx.x % s.H);
  const int last = static_cast<int>(s.bias.rows) - 1;
  const int64_t part = blockIdx.x / s.H;
  float* const table = b.bias_parts + blockIdx.x * s.bias.rows;
  for (int64_t r = lane; r <= last; r += 32) table[r] = 0.0f;
  for (int64_t g = groups.G * part / b.parts; g < groups.G * (part + 1) / b.parts; g++) {
    const Members queries = queries_of(groups, g), keys = keys_of(groups, g);
    const int seen = limit_of(groups, queries, keys, 0);
    if (seen == 0) continue;
    const float* const weights = b.weights + h * groups.E + keys.first;
    const float* const grads = b.grad_scores + keys.first;
    const int offset = offset_of(s.bias, queries.row(0));
    float delta = 0.0f;
    for (int j = lane; j < seen; j += 32) delta = fmaf(weights[j], grads[j], delta);
    delta = warp_sum(delta);
    for (int start = 0; start < seen; start += 32) {
      const int j = start + lane;
      int row = 0;
      float grad = 0.0f;
      if (j < seen) {
        row = within(wrapping_sum(s.bias.key_codes[keys.row(j)], offset), last);
        grad = weights[j] * (grads[j] - delta) / static_cast<float>(s.H);
      }
      for (int i = 0; i < min(seen - start, 32); i++) {
        const int to = __shfl_sync(kAllLanes, row, i);
        const float more = __shfl_sync(kAllLanes, grad, i);
        if (to % 32 == lane) table[to] += more;
      }
    }
  }
}

// means[e] = the mean over the heads of by_head[h, e]
__global__ void __launch_bounds__(kRowThreads)
    head_mean_kernel(const float* by_head, int64_t H, int64_t E, float* means) {
  const int64_t e = blockIdx.x * int64_t{kRowThreads} + threadIdx.x;
  if (e >= E) return;
  float sum = 0.0f;
  for (int64_t h = 0; h < H; h++) sum += by_head[h * E + e];
  means[e] = sum / static_cast<float>(H);
}

// The norm of a row of values over all heads, by a warp.
template <class T>
__global__ void __launch_bounds__(kRowThreads) norms_kernel(TokenScores s, float* norms) {
  const int64_t row = blockIdx.x * int64_t{kRowThreads / 32} + threadIdx.x / 32;
  if (row >= s.groups.num_keys) return;
  const T* const from = static_cast<const T*>(s.v.data) + row * s.v.row;
  const int units = static_cast<int>(s.D) / 8, count = static_cast<int>(s.H) * units;
  float sum = 0.0f;
  for (int i = lane_id(); i < count; i += 32) {
    float x[8];
    unpack8<T>(load_16(from + i / units * s.v.head + i % units * 8), x);
#pragma unroll
    for (int c = 0; c < 8; c++) sum = fmaf(x[c], x[c], sum);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) norms[row] = sqrtf(sum);
}

// scores = attention times norm, divided by the sum over the group.
__global__ void __launch_bounds__(kTeamThreads)
    value_scores_kernel(TokenScores s, ScoresForward f, int threads) {
  SHARED(float, partial, [kTeamWarps]);
  const Team team(threads, partial);
  if (team.item() >= s.groups.G) return;  // whole warps
  const Members keys = keys_of(s.groups, team.item());
  float* const to = f.scores + keys.first;
  float sum = 0.0f;
  for (int j = team.thread; j < keys.count; j += threads) {
    float attention = 0.0f;
    for (int64_t h = 0; h < s.H; h++) attention += f.by_head[h * s.groups.E + keys.first + j];
    const float x = attention / static_cast<float>(s.H) * f.norms[keys.row(j)];
    to[j] = x;
    sum += x;
  }
  sum = team.sum(sum);
  if (sum == 0.0f) return;
  for (int j = team.thread; j < keys.count; j += threads) to[j] /= sum;
}

// With w = attention * norm and gradients g: the gradient of w is (g - sum(g w) / sum(w)) / sum(w).
__global__ void __launch_bounds__(kTeamThreads)
    value_backward_kernel(TokenScores s, ScoresBackward b, int threads) {
  SHARED(float, partial, [kTeamWarps]);
  const Team team(threads, partial);
  if (team.item() >= s.groups.G) return;  // whole warps
  const Members keys = keys_of(s.groups, team.item());
  const float* const grads = b.grad_scores + keys.first;
  float* const attention = b.grad_attention + keys.first;  // first the attention, then its gradient
  float sum = 0.0f, weighted = 0.0f;
  for (int j = team.thread; j < keys.count; j += threads) {
    float x = 0.0f;
    for (int64_t h = 0; h < s.H; h++) x += b.weights[h * s.groups.E + keys.first + j];
    attention[j] = x / static_cast<float>(s.H);
    const float w = attention[j] * b.norms[keys.row(j)];
    sum += w;
    weighted = fmaf(grads[j], w, weighted);
  }
  sum = team.sum(sum);
  const float mean = team.sum(weighted) / sum;
  for (int j = team.thread; j < keys.count; j += threads) {
    const float grad = sum == 0.0f ? 0.0f : (grads[j] - mean) / sum;
    b.grad_norms[keys.first + j] = grad * attention[j];
    attention[j] = grad * b.norms[keys.row(j)];
  }
}

// The gradient of eight channels of a value: the value divided by its norm, times the sum of the
// gradients of its entries' norms. Without shared rows a thread takes an entry.
template <class T>
__global__ void __launch_bounds__(kRowThreads) values_kernel(TokenScores s, ScoresBackward b) {
  const Groups& groups = s.groups;
  const bool shared = groups.entry_offsets != nullptr;
  const int64_t i = blockIdx.x * int64_t{kRowThreads} + threadIdx.x, units = s.D / 8;
  const int64_t item = i / units / s.H, h = i / units % s.H, channel = i % units * 8;
  if (item >= (shared ? groups.num_keys : groups.E) || groups.num_keys == 0) return;
  int64_t row = item;
  float grad = 0.0f;
  if (shared) {
    const int begin = within(groups.entry_offsets[row], groups.E);
    const int end = within(groups.entry_offsets[row + 1], groups.E);
    for (int n = begin; n < end; n++) grad += b.grad_norms[within(groups.entries[n], groups.E - 1)];
  } else {
    grad = b.grad_norms[item];
    if (groups.key_rows != nullptr) row = groups.key_rows[item];
    row = within(static_cast<int>(row), groups.num_keys - 1);
  }
  // A row of no group may be NaN, and its gradient is zero.
  uint4 bits = {0, 0, 0, 0};
  if (b.norms[row] != 0.0f && grad != 0.0f) {
    float x[8];
    unpack8<T>(load_16(static_cast<const T*>(s.v.data) + row * s.v.row + h * s.v.head + channel),
               x);
    bits = pack8<T>(x, grad / b.norms[row]);
  }
  store_16(static_cast<T*>(b.grad_v) + (row * s.H + h) * s.D + channel, bits);
}

template <class T, int D>
int cls_forward(const TokenScores& s, const ScoresForward& f, void* stream) {
  const int64_t threads = team_of(s.groups);
  return launch(cls_weights_kernel<T, D>, team_blocks(s.groups.G * s.H, threads), kTeamThreads, 0,
                stream, s, f.by_head, threads);
}

[[maybe_unused]] int head_mean(const TokenScores& s, const ScoresForward& f, void* stream) {
  return launch(head_mean_kernel, div_up(s.groups.E, kRowThreads), kRowThreads, 0, stream,
                f.by_head, s.H, s.groups.E, f.scores);
}

template <class T>
int value_forward(const TokenScores& s, const ScoresForward& f, void* stream) {
  const int64_t threads = team_of(s.groups);
  const int error = launch(norms_kernel<T>, div_up(s.groups.num_keys, kRowThreads / 32),
                           kRowThreads, 0, stream, s, f.norms);
  if (error != 0) return error;
  return launch(value_scores_kernel, team_blocks(s.groups.G, threads), kTeamThreads, 0, stream, s,
                f, threads);
}

// Writes the gradients of the values and of the attention.
template <class T>
int value_backward(const TokenScores& s, const ScoresBackward& b, void* stream) {
  const Groups& groups = s.groups;
  const int64_t threads = team_of(groups);
  const int error = launch(value_backward_kernel, team_blocks(groups.G, threads), kTeamThreads, 0,
                           stream, s, b, threads);
  if (error != 0) return error;
  const int64_t rows = groups.entry_offsets == nullptr ? groups.E : groups.num_keys;
  return launch(values_kernel<T>, div_up(rows * s.H * s.D / 8, kRowThreads), kRowThreads, 0, stream,
                s, b);
}

template <class T, int D>
int cls_backward(const TokenScores& s, const ScoresBackward& b, void* stream) {
  const Groups& groups = s.groups;
  const int64_t threads = team_of(groups);
  int error = launch(cls_backward_kernel<T, D>, team_blocks(groups.G * s.H, threads), kTeamThreads,
                     0, stream, s, b, threads);
  if (error == 0 && groups.entry_offsets != nullptr) {
    error = launch(cls_entries_kernel<T>, div_up(groups.num_keys * s.H * D / 8, kRowThreads),
                   kRowThreads, 0, stream, s, b);
  }
  if (error != 0 || b.grad_bias == nullptr) return error;
  error = launch(cls_table_kernel, b.parts * s.H, 32, 0, stream, s, b);
  if (error != 0) return error;
  const int64_t numbers = s.H * s.bias.rows;
  return launch(sum_parts_kernel, div_up(numbers, kPartThreads), kPartThreads, 0, stream,
                b.bias_parts, b.parts, numbers, b.grad_bias);
}

}  // namespace
}  // namespace vidl
