// space_time_attention on CUDA, the gradient of the table of relative positions. One kernel for
// groups of all sizes computes the gradients of the logits once more, by the log-sum-exp and delta
// of every query.
//
// Groups with the same relative positions, as frames and windows have them, add their gradients to
// the same rows. A block therefore takes one tile of up to 80 queries and keys of many groups, one
// after another, and a warp sums the gradients of 16 queries in registers. Only when a group with
// other positions follows, as after pruning, does it add them to a table (groups/table.h). The
// order of all sums follows from the sizes of the groups.
//
// Limit: shared memory. For 16 x 16 pairs of query and key and a head size of D: D / 2 wavefronts
// for keys and values, D / 10 for queries and their gradients, D / 5 to copy all of them, and about
// 45 to add to a table if every group has other positions; beside them 4 D FLOPs a pair.
#pragma once
#include "groups/table.h"
#include "space_time_attention/warp.h"

namespace vidl {
namespace {

// Some queries and keys of a group.
struct TableTile {
  int queries, keys;           // how many; behind the last tile of a part none
  int query_place, key_place;  // of the first in the lists of all groups
  int first_query, first_key;  // in the group
  int group_queries;           // of the whole group
};

// The tiles of a part, one after another.
struct TableTiles {
  int64_t item, end;
  int g, x, y, key;  // of the next tile: its group, its place there, its first key

  __device__ __forceinline__ TableTiles(const Groups& groups, const TablePlan& plan, int64_t part)
      : item(plan.items * part / plan.parts),
        end(plan.items * (part + 1) / plan.parts),
        g(static_cast<int>(item % groups.G)),
        x(static_cast<int>(item / groups.G / max(plan.keys.tiles, 1))),
        y(static_cast<int>(item / groups.G % max(plan.keys.tiles, 1))),
        key(0) {}

  // The next tile with queries and keys. All lanes call it.
  __device__ __forceinline__ TableTile next(const Groups& groups, const TablePlan& plan) {
    while (item < end) {
      TableTile t;
      if (plan.tiled) {
        const int query = begin(x, plan.queries), first_key = begin(y, plan.keys);
        t = take(groups, g, query, begin(x + 1, plan.queries) - query, first_key,
                 begin(y + 1, plan.keys) - first_key);
        item++;
        if (++g == groups.G) g = 0, y++;
        if (y == plan.keys.tiles) y = 0, x++;
      } else {
        const Work work = find_work<kTableRows>(groups.query_offsets, groups, 0, item, 0);
        t = take(groups, work.g, work.start, kTableRows, key, kTableRows);
        key += kTableRows;
        if (t.queries == 0 || key >= keys_of(groups, work.g).count) key = 0, item++;
      }
      if (t.queries > 0 && t.keys > 0) return t;
    }
    return {};
  }

 private:
  static __device__ __forceinline__ int begin(int tile, const TableAxis& axis) {
    return 16 * (tile * axis.squares + min(tile, axis.more));
  }

  // Up to so many queries and keys of a group, from these on; of the keys those that any of the
  // queries sees.
  static __device__ __forceinline__ TableTile take(const Groups& groups, int64_t g, int query,
                                                   int most_queries, int key, int most_keys) {
    const Members queries = queries_of(groups, g), keys = keys_of(groups, g);
    TableTile t = {within(queries.count - query, most_queries),
                   within(keys.count - key, most_keys),
                   queries.first,
                   keys.first,
                   query,
                   key,
                   queries.count};
    if (t.queries == 0 || t.keys == 0) return t;
    t.query_place += query, t.key_place += key;
    if (groups.query_limits != nullptr) {
      int most = 0;
      for (int i = lane_id(); i < t.queries; i += 32) {
        most = max(most, limit_of(groups, queries, keys, t.first_query + i));
      }
      t.keys = within(max_of_warp(most) - t.first_key, t.keys);
    }
    return t;
  }
};

// What a block keeps of tiles beside their rows. The last four are tiles that it looks up, copies,
// computes, and computed before. Copies arrive in the background.
struct TableNumbers {
  int64_t part;
  bool has_bias, has_scores;
  TableTiles tiles;  // from the next to look up on
  TableTile tile[4];
  int query_codes[4][kTableRows], key_codes[4][kTableRows];
  float lse[2][kTableRows], delta[2][kTableRows];  // of queries
  int limits[2][kTableRows];
  float bias[2][kTableRows], scores[2][kTableRows];  // of keys; scores: their gradients

  // Called by one thread.
  __device__ __forceinline__ void start(const SpaceTimeAttention& a, const Backward& b,
                                        const TablePlan& plan) {
    // Blocks that run at once take the tiles of the same groups, so that these stay in L2.
    const int64_t block = blockIdx.x / a.H;
    const int64_t of_group = plan.tiled ? int64_t{plan.queries.tiles} * plan.keys.tiles : 1;
    const int64_t of_tile = plan.parts / of_group;
    part = of_tile > 0 ? block % of_group * of_tile + block / of_group : block;
    tiles = TableTiles(a.groups, plan, part);
    for (TableTile& t : tile) t = {};
    has_bias = a.bias.key_bias != nullptr, has_scores = b.grad_scores != nullptr;
  }

  // Looks up the next tile. Called by one warp.
  __device__ __forceinline__ void find(const Groups& groups, const TablePlan& plan, unsigned slot) {
    TableTiles from = tiles;
    __syncwarp();  // all lanes have them
    const TableTile next = from.next(groups, plan);
    if (lane_id() == 0) tiles = from, tile[slot] = next;
  }

  // Whether two tiles have the same rows of the table: their codes differ by one number. All lanes
  // call it.
  __device__ __forceinline__ bool same_rows(unsigned x, unsigned y) const {
    const int queries = tile[x].queries, keys = tile[x].keys;
    bool same = queries == tile[y].queries && keys == tile[y].keys;
    const unsigned more = static_cast<unsigned>(key_codes[x][0]) - key_codes[y][0];
#pragma unroll
    for (int i = lane_id(); i < (kTableRows + 31) / 32 * 32; i += 32) {
      if (i < queries)
        same = same && static_cast<unsigned>(query_codes[x][i]) - query_codes[y][i] == more;
      if (i < keys) same = same && static_cast<unsigned>(key_codes[x][i]) - key_codes[y][i] == more;
    }
    return __all_sync(kAllLanes, same);
  }
};

// The shared memory of a block: two stages of rows, numbers, and tables. A warp's 16 queries and
// the gradients of their outputs follow each other. Their place holds gradients that it adds to a
// table, before the next rows are copied there.
template <class T, int D>
struct TableMemory {
  static_assert(32 * kStride<D> * sizeof(T) >= kChunkBytes);
  T* memory;
  int queries, keys;  // rows of a stage

  __device__ __forceinline__ TableMemory(T* memory, const TablePlan& plan)
      : memory(memory), queries(plan.queries.most), keys(plan.keys.most) {}

  static int64_t bytes(const TablePlan& plan) {
    const int64_t rows = 2 * (int64_t{plan.queries.most} + plan.keys.most);
    return 2 * rows * kStride<D> * int64_t{sizeof(T)} + int64_t{sizeof(TableNumbers)};
  }
  __device__ __forceinline__ T* stage(unsigned n) const {
    return memory + n * 2 * (queries + keys) * kStride<D>;
  }
  __device__ __forceinline__ T* q(unsigned slot, int warp) const {
    return stage(slot % 2) + warp * 32 * kStride<D>;
  }
  __device__ __forceinline__ T* k(unsigned slot) const {
    return stage(slot % 2) + 2 * queries * kStride<D>;
  }
  __device__ __forceinline__ TableNumbers& numbers() const {
    return *reinterpret_cast<TableNumbers*>(stage(2));
  }
  __device__ __forceinline__ float* tables() const {
    return reinterpret_cast<float*>(&numbers() + 1);
  }

  // Starts to copy a tile.
  __device__ __forceinline__ void fetch(const SpaceTimeAttention& a, const Backward& b, int h,
                                        unsigned slot) const {
    TableNumbers& to = numbers();
    const TableTile& t = to.tile[slot];
    const Groups& groups = a.groups;
    const Members queries = {groups.query_rows, groups.num_queries, t.query_place, t.queries};
    const Members rows = {groups.key_rows, groups.num_keys, t.key_place, t.keys};
    // Computed again for every tile: kept through the loop, these would not fit into registers.
    const int thread = thread_id(), lane = thread % 32, first = thread / 32 * 16;
    const int i = first + lane % 16;
    T *const q_tile = q(slot, thread / 32), *const k_tile = k(slot);
    if (first < queries.count) {
      copy_rows<T, D>({q_tile, q_tile + 16 * kStride<D>}, 16, {a.q, {b.grad_out, a.H * D, D}}, h,
                      queries, first, lane, 32);
    }
    copy_rows<T, D>({k_tile, k_tile + keys * kStride<D>}, round_up_16(rows.count), {a.k, a.v}, h,
                    rows, 0, thread, blockDim.x);
    if (lane < 16 && i < queries.count) {
      const int64_t row = queries.row(i), at = h * groups.num_queries + row;
      cp_async_4(&to.lse[slot % 2][i], b.lse + at);
      cp_async_4(&to.delta[slot % 2][i], b.delta + at);
      cp_async_4(&to.query_codes[slot][i], a.bias.query_codes + row);
      if (groups.query_limits != nullptr) {
        cp_async_4(&to.limits[slot % 2][i], groups.query_limits + row);
      }
    }
    if (lane >= 16 && i < round_up_16(rows.count)) {
      const bool real = i < rows.count;
      const int64_t row = real ? rows.row(i) : 0, entry = real ? t.key_place + i : 0;
      cp_async_4(&to.key_codes[slot][i], a.bias.key_codes + row, real);
      if (a.bias.key_bias != nullptr) {
        cp_async_4(&to.bias[slot % 2][i], a.bias.key_bias + row, real);
      }
      if (b.grad_scores != nullptr) {
        cp_async_4(&to.scores[slot % 2][i], b.grad_scores + entry, real);
      }
    }
    cp_async_commit();
  }
};

// The lane's two queries of a tile.
struct TableQueries {
  const TableNumbers& numbers;
  unsigned slot;
  bool has_bias, has_scores;  // read for every tile: a copy of the loop for each would be larger
  Table table;
  float scale;
  float lse[2], delta[2], share[2];  // share: of the gradient of a score
  int limit[2], offset[2];           // limit: keys of the tile that a query sees

  __device__ __forceinline__ TableQueries(const SpaceTimeAttention& a, int h,
                                          const TableNumbers& numbers, unsigned slot, int first)
      : numbers(numbers),
        slot(slot),
        has_bias(numbers.has_bias),
        has_scores(numbers.has_scores),
        table(a.bias, h),
        scale(a.scale * kLog2E) {
    const TableTile& t = numbers.tile[slot];
    const int keys = t.keys, count = t.queries;
    const float rows = a.scores == Scores::kMean ? static_cast<float>(t.group_queries) : 1.0f;
    const float part = reciprocal_approx(rows * static_cast<float>(a.H));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = first + row_of_lane(i);
      const bool real = query < count;
      lse[i] = real ? numbers.lse[slot % 2][query] * kLog2E : -INFINITY;
      delta[i] = real ? numbers.delta[slot % 2][query] : 0.0f;
      offset[i] = real ? offset_of_code(a.bias, numbers.query_codes[slot][query]) : 0;
      limit[i] = keys;
      if (a.groups.query_limits != nullptr && real) {
        limit[i] = within(max(numbers.limits[slot % 2][query], 0) - t.first_key, keys);
      }
      if (lse[i] == -INFINITY) limit[i] = 0;  // key_bias hides all keys
      share[i] = a.scores == Scores::kMean || t.first_query + query == 0 ? part : 0.0f;
    }
  }

  // Adds the gradients of the logits with 16 keys from `start` on, of which `products` are those of
  // queries and keys, and `grads` those of gradients of the outputs and values.
  __device__ __forceinline__ void add(Square& sums, const Square& products, const Square& grads,
                                      int start) const {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column = start + column_of_lane(j);
      const int2 codes = *reinterpret_cast<const int2*>(&numbers.key_codes[slot][column]);
      float2 bias = make_float2(0.0f, 0.0f), score = bias;
      if (has_bias) bias = *reinterpret_cast<const float2*>(&numbers.bias[slot % 2][column]);
      if (has_scores) score = *reinterpret_cast<const float2*>(&numbers.scores[slot % 2][column]);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = e / 2, l = e % 2;
        const int row = wrapping_sum(l == 0 ? codes.x : codes.y, offset[i]);
        const float added =
            __ldg(table.rows + within(row, table.last)) + (l == 0 ? bias.x : bias.y);
        const float logit = products[j][e] * scale + (added * kLog2E - lse[i]);
        const float grad = grads[j][e] + ((l == 0 ? score.x : score.y) * share[i] - delta[i]);
        sums[j][e] += column + l < limit[i] ? exp2_approx(logit) * grad : 0.0f;
      }
    }
  }
};

// The sums of a warp: the gradients of the logits of 16 queries with the keys of a tile.
template <class T, int D>
struct TableSums {
  Square sums[kTableSquares];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < 8 * kTableSquares; e++) sums[e / 8][e / 4 % 2][e % 4] = 0.0f;
  }

  // Adds those of a tile, for the queries from `first` on.
  __device__ __forceinline__ void add(const SpaceTimeAttention& a, int h,
                                      const TableMemory<T, D>& memory, unsigned slot, int first) {
    const TableNumbers& numbers = memory.numbers();
    const int count = numbers.tile[slot].keys;
    const T *const q = memory.q(slot, first / 16), *const k = memory.k(slot);
    Rows16<D> query_rows, grad_rows;
    query_rows.load(q);
    grad_rows.load(q + 16 * kStride<D>);
    const TableQueries queries(a, h, numbers, slot, first);
#pragma unroll
    for (int s = 0; s < kTableSquares; s++) {
      if (16 * s < count) {
        Square products, grads;
        multiply_transposed<T, D>(products, query_rows, k, 16 * s);
        multiply_transposed<T, D>(grads, grad_rows, k + memory.keys * kStride<D>, 16 * s);
        queries.add(sums[s], products, grads, 16 * s);
      }
    }
  }

  // Adds them to a table, where a tile tells their rows.
  __device__ __forceinline__ void add_to(float* to, const Bias& bias,
                                         const TableMemory<T, D>& memory, unsigned slot,
                                         int first) const {
    const TableNumbers& numbers = memory.numbers();
    const int queries = numbers.tile[slot].queries, keys = numbers.tile[slot].keys;
    const int own = first + static_cast<int>(lane_id()) % 16;
    const int offset = own < queries ? offset_of_code(bias, numbers.query_codes[slot][own]) : 0;
    float* const grads = reinterpret_cast<float*>(memory.q(slot, first / 16));
    WarpTable table(to, bias.rows);
#pragma unroll 1
    for (int chunk = 0; chunk < keys; chunk += kChunk) {
#pragma unroll
      for (int s = 0; s < kTableSquares; s++) {
        if (16 * s / kChunk * kChunk == chunk) put_chunk(grads, 16 * s % kChunk, sums[s]);
      }
      const int key = chunk + static_cast<int>(lane_id());
      table.add(grads, key < keys ? numbers.key_codes[slot][key] : 0, key < keys,
                min(queries - first, 16), offset);
    }
    table.finish();
  }
};

// There is a warp for every 16 queries and 16 keys of a tile. Of `tables` in shared memory every
// warp has its own, or there is one, to which warps add in turn; or none, and they add to the part.
template <class T, int D>
__global__ void __launch_bounds__(32 * kTableSquares, 2)
    table_backward_kernel(SpaceTimeAttention a, Backward b, TablePlan plan, int tables) {
  DYNAMIC_SHARED(T, shared);
  const TableMemory<T, D> memory(shared, plan);
  TableNumbers& numbers = memory.numbers();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, first = 16 * warp;
  const int h = static_cast<int>(blockIdx.x % a.H);
  if (threadIdx.x == 0) numbers.start(a, b, plan);
  __syncthreads();  // the number of the part is there
  // Computed when it is needed: the loop over tiles leaves no registers for it.
  const auto part = [&] { return b.bias_parts + (numbers.part * a.H + h) * a.bias.rows; };
  const auto all = [&] { return tables > 0 ? memory.tables() : part(); };
  for (int64_t i = threadIdx.x; i < max(tables, 1) * a.bias.rows; i += blockDim.x) all()[i] = 0.0f;

  // Tile n is looked up, the one before copied, the one before that computed.
  TableSums<T, D> sums;
  unsigned n = 0, now = 0;
  do {
    sums.clear();
    do {
      n = opaque(n);
      now = (n + 2) % 4;
      if (numbers.tile[(n + 3) % 4].keys > 0) memory.fetch(a, b, h, (n + 3) % 4);
      if (warp == 0) numbers.find(a.groups, plan, n % 4);
      if (first < numbers.tile[now].queries) sums.add(a, h, memory, now, first);
      n++;
      cp_async_wait();
      __syncthreads();  // the tile is there, and nobody reads the one before any more
    } while (n < 3 ? n == 1 || numbers.tile[0].keys > 0 : numbers.same_rows((n + 2) % 4, now));
    for (int turn = 0; n > 2 && turn < warps; turn++) {
      if (tables != warps) __syncthreads();  // the sums of the warps before are there
      if (turn == warp && first < numbers.tile[now].queries) {
        sums.add_to(all() + (tables == warps ? warp * a.bias.rows : 0), a.bias, memory, now, first);
      }
    }
  } while (numbers.tile[(n + 2) % 4].keys > 0);
  if (tables > 0) sum_tables(memory.tables(), tables, a.bias.rows, part());
}

}  // namespace
}  // namespace vidl
