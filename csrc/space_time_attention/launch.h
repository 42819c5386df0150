// space_time_attention on CUDA: the launches of a call, for one dtype and head size. Every size
// class has its file; `forward` and `backward` choose the class.
//
// Limits: see the files of the classes. The two kernels of this file are limited by bytes: the mean
// of the scores over the heads reads 4 H E and writes 4 E bytes, the sum over the entries reads
// 8 E H D and writes 4 num_keys H D.
#pragma once
#include <algorithm>

#include "space_time_attention/blocked.h"
#include "space_time_attention/hopper.h"
#include "space_time_attention/packed.h"
#include "space_time_attention/table.h"
#include "space_time_attention/whole.h"
#include "space_time_attention/wide.h"

namespace vidl {
namespace {

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) mean_scores_kernel(Forward f, int64_t H, int64_t E) {
  const int64_t e = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  if (e >= E) return;
  float sum = 0.0f;
  for (int64_t h = 0; h < H; h++) sum += f.scores[h * E + e];
  f.mean_scores[e] = sum / static_cast<float>(H);
}

// A thread sums two neighbouring channels of a row of keys and values.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_entries_kernel(Groups groups, Backward b, int64_t channels) {
  const int64_t i = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  const int64_t row = i / (channels / 2), channel = i % (channels / 2) * 2;
  if (row >= groups.num_keys) return;
  const int begin = within(groups.entry_offsets[row], groups.E);
  const int end = within(groups.entry_offsets[row + 1], groups.E);
  float2 k = make_float2(0.0f, 0.0f), v = k;
  for (int n = begin; n < end; n++) {
    const int64_t at = within(groups.entries[n], groups.E - 1) * channels + channel;
    const float2 more_k = *reinterpret_cast<const float2*>(b.entry_grad_k + at);
    const float2 more_v = *reinterpret_cast<const float2*>(b.entry_grad_v + at);
    k.x += more_k.x, k.y += more_k.y, v.x += more_v.x, v.y += more_v.y;
  }
  const int64_t to = row * channels + channel;
  *reinterpret_cast<uint32_t*>(static_cast<T*>(b.grad_k) + to) = pack2<T>(k.x, k.y);
  *reinterpret_cast<uint32_t*>(static_cast<T*>(b.grad_v) + to) = pack2<T>(v.x, v.y);
}

// Blocks of threads for groups that are packed into warps.
int64_t packed_blocks(const Groups& groups, int64_t H) {
  const int64_t slot = std::max(groups.max_queries, groups.max_keys);
  return slot == 0 ? 0 : div_up(div_up(groups.G, 16 / slot) * H, kPackedWarps);
}

// So many heads of a group a block of the forward computes: all, unless a multiprocessor would have
// less than about eight blocks.
int64_t heads_of_block(int64_t G, int64_t H) {
  const int64_t few = 8 * int64_t{device_attribute(cudaDevAttrMultiProcessorCount)};
  return div_up(H, std::clamp<int64_t>(few / std::max<int64_t>(G, 1), 1, H));
}

// `size`, or the class for any length if its blocks, of so many bytes, do not fit into this GPU.
Size fitting(Size size, int64_t bytes) {
  return size == Size::kPacked || bytes <= most_shared_bytes() ? size : Size::kBlocked;
}

// So many tables of the gradient a block has in shared memory: one for every warp, or one if two
// blocks would not fit into a multiprocessor else; none if that does not fit either.
[[maybe_unused]] int64_t shared_tables(int64_t bytes, int64_t rows, int64_t warps) {
  constexpr int64_t kOfSystem = 1024;  // bytes of a block
  const int64_t most = most_shared_bytes(), two = most / 2 - kOfSystem;
  const auto fit = [&](int64_t tables, int64_t limit) {
    return bytes + tables * rows * int64_t{sizeof(float)} <= limit;
  };
  if (fit(warps, two) || (fit(warps, most) && !fit(1, two))) return warps;
  return fit(1, most) ? 1 : 0;
}

}  // namespace

template <class T, int D, class Kind>
int forward(const SpaceTimeAttention& a, const Forward& f, void* stream) {
  constexpr int64_t kRow = kStride<D> * sizeof(T);
  const Groups& groups = a.groups;
  const int64_t keys = round_up_16(groups.max_keys);
  const int queries = round_up_16(std::max<int64_t>(groups.max_queries, 1));
  const int64_t heads = heads_of_block(groups.G, a.H);
  WholeForward<T, D, Kind> plan = {queries, static_cast<int>(keys), heads > 1 ? 2 : 1};
  const bool scores = f.scores != nullptr;
  if (plan.bytes(scores) > most_shared_bytes()) plan.stages = 1;
  constexpr int64_t kBlockedBytes = 5 * kBlock * kRow + (Kind::kBiased ? kTermsBytes : 0);
  // A block of more than kMostWarps warps would not fit into the registers.
  const bool many = queries > 16 * plan.kMostWarps;
  const Size size = many
                        ? Size::kBlocked
                        : fitting(size_of(groups.max_queries, groups.max_keys), plan.bytes(scores));
  int error = 0;
  if (size == Size::kPacked) {
    error = launch(packed_forward_kernel<T, D, Kind>, packed_blocks(groups, a.H), 32 * kPackedWarps,
                   kPackedWarps * 3 * 16 * kRow, stream, a, f);
  } else if (size != Size::kBlocked) {
    const auto kernel =
        scores ? whole_forward_kernel<T, D, Kind, true> : whole_forward_kernel<T, D, Kind, false>;
    error = launch(kernel, groups.G * div_up(a.H, heads), 2 * queries, plan.bytes(scores), stream,
                   a, f, plan, static_cast<int>(heads));
  } else {
    const Blocks blocks = blocks_of(groups, a.H, groups.max_queries, groups.num_queries);
    const Blocks key_blocks = blocks_of(groups, a.H, groups.max_keys, groups.E);
    error = launch(blocked_forward_kernel<T, D, Kind>, blocks.all, kBlockThreads, kBlockedBytes,
                   stream, a, f, blocks.of_group);
    if (error == 0 && f.scores != nullptr) {
      error = launch(blocked_scores_kernel<T, D, Kind>, key_blocks.all, kBlockThreads,
                     3 * kBlock * kRow, stream, a, f, key_blocks.of_group);
    }
  }
  if (error != 0 || f.scores == nullptr) return error;
  return launch(mean_scores_kernel, div_up(groups.E, kSumThreads), kSumThreads, 0, stream, f, a.H,
                groups.E);
}

// The backward of a wide class: by wgmma if the GPU has it and the kernel supports the call.
template <class T, int D, class Kind>
int wide_backward(const SpaceTimeAttention& a, const Backward& b, int64_t threads, int64_t bytes,
                  void* stream) {
  const int64_t tasks = a.groups.G * a.H;
#ifdef VIDL_WGMMA
  if constexpr (D == kHopperD && !Kind::kLimited) {
    if (b.grad_scores == nullptr && tasks <= INT32_MAX && runs_hopper<T>()) {
      const int64_t most = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
      const int64_t blocks = std::min(tasks, most);
      return launch(hopper_backward_kernel<T>, blocks, kHopperThreads, HopperMemory<T>::kBytes,
                    stream, a, b, static_cast<unsigned>(tasks));
    }
  }
#endif
  return launch(wide_backward_kernel<T, D, Kind>, tasks, threads, bytes, stream, a, b);
}

// The gradient of the table, after the other gradients.
template <class T, int D>
int table_backward(const SpaceTimeAttention& a, const Backward& b, void* stream) {
  const TablePlan plan = table_plan(a.groups);
  const int64_t threads = int64_t{2} * std::max(plan.queries.most, plan.keys.most);
  const int64_t bytes = TableMemory<T, D>::bytes(plan);
  const int64_t tables = shared_tables(bytes, a.bias.rows, threads / 32);
  const int error = launch(table_backward_kernel<T, D>, b.parts * a.H, threads,
                           bytes + tables * a.bias.rows * int64_t{sizeof(float)}, stream, a, b,
                           plan, static_cast<int>(tables));
  if (error != 0) return error;
  const int64_t numbers = a.H * a.bias.rows;
  return launch(sum_parts_kernel, div_up(numbers, kPartThreads), kPartThreads, 0, stream,
                b.bias_parts, b.parts, numbers, b.grad_bias);
}

template <class T, int D, class Kind>
int backward(const SpaceTimeAttention& a, const Backward& b, void* stream) {
  constexpr int64_t kRow = kStride<D> * sizeof(T);
  const Groups& groups = a.groups;
  const int64_t queries = round_up_16(groups.max_queries), keys = round_up_16(groups.max_keys);
  const int64_t most = queries > keys ? queries : keys;
  const Size by_length = size_of(groups.max_queries, groups.max_keys);
  const int64_t bytes = by_length == Size::kWide ? WideGroup<T, D, Kind>::bytes(queries, keys)
                                                 : whole_backward_bytes<T, D, Kind>(queries, keys);
  constexpr int64_t kBlockedBytes = 6 * kBlock * kRow + (Kind::kLimited ? kTermsBytes : 0);
  // Wide kernels exist up to D = 64, with which four tensors of 256 rows fit into sm_80.
  const bool wide = by_length == Size::kWide && D > 64;
  const Size size = wide ? Size::kBlocked : fitting(by_length, bytes);
  int error = 0;
  if (size == Size::kPacked) {
    error = launch(packed_backward_kernel<T, D, Kind>, packed_blocks(groups, a.H),
                   32 * kPackedWarps, kPackedWarps * 4 * 16 * kRow, stream, a, b);
  } else if (size == Size::kWhole) {
    const auto kernel = most <= 64   ? whole_backward_kernel<T, D, 4, Kind>
                        : most <= 80 ? whole_backward_kernel<T, D, 5, Kind>
                                     : whole_backward_kernel<T, D, 8, Kind>;
    error = launch(kernel, groups.G * a.H, 2 * most, bytes, stream, a, b);
  } else if (size == Size::kWide) {
    if constexpr (D <= 64) {
      error = wide_backward<T, D, Kind>(a, b, 2 * most, bytes, stream);
    }
  } else {
    const Blocks query_blocks = blocks_of(groups, a.H, groups.max_queries, groups.num_queries);
    const Blocks key_blocks = blocks_of(groups, a.H, groups.max_keys, groups.E);
    error = launch(query_backward_kernel<T, D, Kind>, query_blocks.all, kBlockThreads,
                   kBlockedBytes, stream, a, b, query_blocks.of_group);
    if (error == 0) {
      error = launch(key_backward_kernel<T, D, Kind>, key_blocks.all, kBlockThreads, kBlockedBytes,
                     stream, a, b, key_blocks.of_group);
    }
  }
  if constexpr (Kind::kBiased) {
    if (error == 0 && b.grad_bias != nullptr) error = table_backward<T, D>(a, b, stream);
  }
  if (error != 0 || groups.entry_offsets == nullptr) return error;
  const int64_t pairs = groups.num_keys * a.H * D / 2;
  return launch(sum_entries_kernel<T>, div_up(pairs, kSumThreads), kSumThreads, 0, stream, groups,
                b, a.H * int64_t{D});
}

}  // namespace vidl
