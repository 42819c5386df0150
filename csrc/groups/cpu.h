// Rows and softmax of one group on the CPU. The VIDL_SOURCE of an op includes this file, once for
// each instruction set (cpu/levels.h). So there is no include guard.

constexpr int64_t kKeyStep = kWidth < 8 ? 8 : kWidth;  // rows of keys are padded to this number
constexpr int64_t kMostQueries = 60;                   // that meet the keys at once

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many queries meet `columns` keys at once: their logits stay in the second-level cache.
VIDL_VECTOR_INLINE int64_t queries_at_once(int64_t columns) {
  const int64_t rows = 32768 / columns / kTileRows * kTileRows;
  return rows < 2 * kTileRows ? 2 * kTileRows : rows > kMostQueries ? kMostQueries : rows;
}

// One group: where its queries and keys begin in their lists, and how many there are.
struct Group {
  int64_t first_query, queries, first_key, keys;
};

VIDL_VECTOR_INLINE Group group_of(const Groups& groups, int64_t g) {
  const int64_t first_query = groups.query_offsets[g], first_key = groups.key_offsets[g];
  return {first_query, groups.query_offsets[g + 1] - first_query, first_key,
          groups.key_offsets[g + 1] - first_key};
}

VIDL_VECTOR_INLINE int64_t row_of(const int32_t* rows, int64_t place) {
  return rows == nullptr ? place : rows[place];
}

// Zeros from one multiple of kWidth to another.
VIDL_VECTOR_INLINE void clear(float* line, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j += kWidth) store(line + j, Vector{});
}

// How many keys the queries of a block see, the first of their group.
struct Seen {
  const int32_t *limits, *rows;  // of the groups, by row; of the queries of the block, or null
  int64_t first, hidden, all;    // see seen_by_block(); what a query sees without limits
  int64_t most, columns;         // of one query; and rounded up to kKeyStep

  // Of query i of the block.
  VIDL_VECTOR_INLINE int64_t keys(int64_t i) const {
    if (limits == nullptr) return all;
    const int64_t limit = limits[row_of(rows, first + i)];
    return limit <= hidden ? 0 : limit;
  }
};

// Args: where the block begins in the list of queries, its size, and the keys of the group, of
// which the first `hidden` are hidden. A query that sees no others sees none.
VIDL_VECTOR_INLINE Seen seen_by_block(const Groups& groups, int64_t first, int64_t count,
                                      int64_t keys, int64_t hidden) {
  const int64_t all = keys <= hidden ? 0 : keys;
  Seen seen = {groups.query_limits, groups.query_rows, first, hidden, all, 0, 0};
  if (groups.query_limits == nullptr) seen.most = all;
  for (int64_t i = 0; groups.query_limits != nullptr && i < count; i++) {
    if (seen.keys(i) > seen.most) seen.most = seen.keys(i);
  }
  seen.columns = round_up(seen.most, kKeyStep);
  return seen;
}

template <class T>
VIDL_VECTOR_INLINE void read_row(const T* from, int64_t D, float scale, float* to) {
  for (int64_t d = 0; d < D; d++) to[d] = static_cast<float>(from[d]) * scale;
}

template <class T>
VIDL_VECTOR_INLINE void write_row(const float* from, int64_t D, float scale, T* to) {
  for (int64_t d = 0; d < D; d++) to[d] = static_cast<T>(from[d] * scale);
}

// Rows [count, D] of one head times `scale`, in float32 [padded, width] with zeros beyond them. The
// next task is the next head: its part of a row is on the same page now, and fetched ahead.
template <class T>
VIDL_VECTOR_INLINE void read_rows(const Strided& x, const int32_t* rows, int64_t first,
                                  int64_t count, int64_t padded, int64_t h, int64_t D,
                                  int64_t width, float scale, float* to) {
  const T* const from = static_cast<const T*>(x.data) + h * x.head;
  for (int64_t j = 0; j < count; j++) {
    const T* const row = from + row_of(rows, first + j) * x.row;
    read_row(row, D, scale, to + j * width);
    for (int64_t d = D; d < width; d++) to[j * width + d] = 0.0f;
    prefetch(row + x.head, D);
  }
  memset(to + count * width, 0, (padded - count) * width * sizeof(float));
}

struct RowOfWeights {
  float inverse, lse;  // 1 / the sum of the weights; the log-sum-exp of the scaled logits
};

// Turns the unscaled logits of a query into weights before the division by their sum: exponentials
// relative to the greatest logit, zeros from `keys` on. `columns` is a multiple of kWidth,
// `scale` is not negative.
VIDL_VECTOR_INLINE RowOfWeights exponentiate(float* line, int64_t keys, int64_t columns,
                                             float scale) {
  for (int64_t j = keys; j < columns; j++) line[j] = -INFINITY;
  Vector most = load(line);
  for (int64_t j = kWidth; j < columns; j += kWidth) {
    const Vector next = load(line + j);
    most = next > most ? next : most;
  }
  const float top = max_of(most), factor = of_two(scale);
  Vector total = {};
  for (int64_t j = 0; j < columns; j += kWidth) {
    const Vector weight = power_of_two(load(line + j) - top, factor);
    store(line + j, weight);
    total += weight;
  }
  const float sum = sum_of(total);
  return {1.0f / sum, top * scale + std::log(sum)};
}

// Adds terms to sums with Kahan's compensation: rounding errors would grow with the terms of one
// sum. `lost` holds what rounding cut off, zeros at first; an infinite sum stays infinite.
VIDL_VECTOR_INLINE void add_compensated(const float* terms, int64_t count, float* sums,
                                        float* lost) {
  for (int64_t j = 0; j < count; j++) {
    const float term = terms[j] - lost[j], sum = sums[j] + term;
    const float rest = (sum - sums[j]) - term;
    lost[j] = std::abs(rest) <= FLT_MAX ? rest : 0.0f;
    sums[j] = sum;
  }
}

// A sum over all queries of a group, [numbers], a multiple of kWidth. Blocks of queries are added
// to `part`, and `part` to `total` at the end of each span of kSpan blocks: rounding errors grow
// with the terms of one sum. A group of one span needs one sum alone.
struct QuerySum {
  float *total, *part;
  int64_t numbers;
};
constexpr int64_t kSpan = 16;

VIDL_VECTOR_INLINE QuerySum query_sum(int64_t numbers, int64_t queries, int64_t block,
                                      Scratch& scratch) {
  float* const total = scratch.take(numbers);
  float* const part = queries > kSpan * block ? scratch.take(numbers) : total;
  memset(total, 0, numbers * sizeof(float));
  memset(part, 0, numbers * sizeof(float));
  return {total, part, numbers};
}

// To be called after the block of queries that begins at `start`.
VIDL_VECTOR_INLINE void end_block(const QuerySum& sum, int64_t start, int64_t block,
                                  int64_t queries) {
  const bool ends = start / block % kSpan == kSpan - 1 || start + block >= queries;
  if (sum.part == sum.total || !ends) return;
  for (int64_t i = 0; i < sum.numbers; i += kWidth) {
    store(sum.total + i, load(sum.total + i) + load(sum.part + i));
    store(sum.part + i, Vector{});
  }
}

// Calls f(item, scratch) for the items [begin, end), with memory that the thread reuses.
template <class F>
VIDL_VECTOR_INLINE void for_items(int64_t begin, int64_t end, F f) {
  thread_local Scratch scratch;
  for (int64_t item = begin; item < end; item++) {
    scratch.reset();
    f(item, scratch);
  }
}

// Calls f(group) for the groups of one of `parts` parts; the memory is free again after each.
template <class F>
VIDL_VECTOR_INLINE void for_part(int64_t G, int64_t part, int64_t parts, Scratch& scratch, F f) {
  for (int64_t g = G * part / parts; g < G * (part + 1) / parts; g++) {
    f(g);
    scratch.reset();
  }
}
