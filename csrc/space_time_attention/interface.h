// space_time_attention: what its host code and its CUDA kernels share. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "groups/interface.h"

namespace vidl {

enum class Scores : int32_t { kNone, kCls, kMean };

struct SpaceTimeAttention {
  Groups groups;
  Bias bias;
  Strided q, k, v;
  int64_t H, D, Dv;  // Dv: channels of v and out, at most D; on CUDA equal to D
  float scale;
  Scores scores;
  Dtype dtype;
};

struct Forward {
  void* out;           // [num_queries, H, Dv]
  float* lse;          // [H, num_queries]
  float* scores;       // [H, E] or null
  float* mean_scores;  // [E] or null: the mean of `scores` over the heads
};

struct Backward {
  const void *grad_out, *out;          // [num_queries, H, Dv]
  const float *lse, *grad_scores;      // [H, num_queries]; [E] or null
  void *grad_q, *grad_k, *grad_v;      // as q, k, v, contiguous
  float *entry_grad_k, *entry_grad_v;  // [E, H, D] and [E, H, Dv], or null without entries
  float* delta;                        // [H, num_queries], for the kernels of long groups
  // The gradient of the table, [H, bias.rows], or null: the sum of `parts` of [H, bias.rows], in
  // their order.
  float *grad_bias, *bias_parts;
  int64_t parts;
};

// How the CUDA kernel of the table's gradient divides its work. A tile is up to kTableRows queries
// and keys of a group. If the groups are about as long as the longest, a block takes one tile of
// many groups; else it takes blocks of kTableRows queries, as groups/blocks.h does for 64.
constexpr int32_t kTableSquares = 5, kTableRows = 16 * kTableSquares;

// The tiles of a group: so many, each of `squares` of 16 rows or, the first `more` of them, of one
// square more.
struct TableAxis {
  int32_t tiles, squares, more, most;  // most: rows of the largest
};

struct TablePlan {
  bool tiled;
  TableAxis queries, keys;  // of the longest group; without `tiled` one tile, the longest
  int64_t items;            // pairs of tile and group, or blocks of queries
  int64_t parts;            // of the items, a block for each head
};

constexpr TableAxis table_axis(int64_t rows) {
  const auto squares = static_cast<int32_t>((rows + 15) / 16);
  const int32_t tiles = (squares + kTableSquares - 1) / kTableSquares;
  if (tiles == 0) return {0, 0, 0, 0};
  const int32_t more = squares % tiles;
  return {tiles, squares / tiles, more, 16 * (squares / tiles + (more > 0 ? 1 : 0))};
}

constexpr TablePlan table_plan(const Groups& groups) {
  constexpr int64_t kMost = 64;  // parts
  const int64_t G = groups.G, queries = groups.num_queries / kTableRows + G;
  TablePlan plan = {};
  plan.queries = table_axis(groups.max_queries), plan.keys = table_axis(groups.max_keys);
  plan.tiled = G * plan.queries.tiles <= 2 * queries &&
               G * plan.keys.tiles <= 2 * (groups.E / kTableRows + G);
  if (!plan.tiled) {
    plan.queries = table_axis(groups.max_queries < kTableRows ? groups.max_queries : kTableRows);
    plan.keys = table_axis(groups.max_keys < kTableRows ? groups.max_keys : kTableRows);
    plan.items = queries;
    plan.parts = queries < kMost ? queries : kMost;
    return plan;
  }
  const int64_t all = int64_t{plan.queries.tiles} * plan.keys.tiles;
  plan.items = all * G;
  // A part has one tile if there are not more tiles than parts.
  plan.parts = plan.items == 0 ? 0
               : all > kMost   ? kMost
                               : all * (kMost / all < G ? kMost / all : G);
  return plan;
}

constexpr int64_t kMostBiased = 64;  // the largest head size with kernels for Biased

// Which CUDA kernels a call launches, by its longest group and the shared memory of a block.
enum class Size {
  kPacked,   // at most 16 queries and keys: a warp computes the groups that fit into 16 rows
  kWhole,    // at most 128: a block computes a group, and every warp whole rows of weights
  kWide,     // at most 256: the same, but the backward takes a few queries at a time
  kBlocked,  // any length: blocks of queries meet blocks of keys
};

constexpr Size size_of(int64_t max_queries, int64_t max_keys) {
  const int64_t longest = max_queries > max_keys ? max_queries : max_keys;
  return longest <= 16    ? Size::kPacked
         : longest <= 128 ? Size::kWhole
         : longest <= 256 ? Size::kWide
                          : Size::kBlocked;
}

}  // namespace vidl

// CUDA entry points, for float16 and bfloat16, with rows that begin at multiples of 16 bytes.
// Pointers are device pointers, `stream` is a cudaStream_t, the result is a cudaError_t. Under the
// emulator of tests/cuda_on_cpu they are host pointers.
extern "C" {
int vidl_space_time_attention_cuda(const vidl::SpaceTimeAttention* attention,
                                   const vidl::Forward* forward, void* stream);
int vidl_space_time_attention_bwd_cuda(const vidl::SpaceTimeAttention* attention,
                                       const vidl::Backward* backward, void* stream);
}
