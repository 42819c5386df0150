// token_scores of one group on the CPU; included once for each instruction set (cpu/levels.h).
//
// For one query ("cls", "value") the keys are read once, in place, some heads at a time. For all
// queries ("mean") the keys are converted to float32 and transposed, as in space_time_attention; a
// block of queries meets them all, and the weights are summed.
#include "groups/bias.h"

// A row in float32: the row itself, or its copy in `room`.
template <class T>
VIDL_VECTOR_INLINE const float* as_floats(const T* from, int64_t D, float* room) {
  if constexpr (std::is_same_v<T, float>) {
    return from;
  } else {
    read_row(from, D, 1.0f, room);
    return room;
  }
}

VIDL_VECTOR_INLINE float dot(const float* a, const float* b, int64_t D) {
  Vector sums = {}, more = {};
  int64_t d = 0;
  for (; d + 2 * kWidth <= D; d += 2 * kWidth) {
    sums += load(a + d) * load(b + d);
    more += load(a + d + kWidth) * load(b + d + kWidth);
  }
  float rest = 0.0f;
  for (; d < D; d++) rest += a[d] * b[d];
  return sum_of(sums + more) + rest;
}

constexpr int kDots = 8;

// to[i] = the product of row i and b, for kDots rows; the sums of the lanes of all rows are taken
// at once.
VIDL_VECTOR_INLINE void dots(const float* const* rows, const float* b, int64_t D, float* to) {
  if constexpr (kWidth < kDots) {
    for (int i = 0; i < kDots; i++) to[i] = dot(rows[i], b, D);
  } else {
    float lanes[kDots * kDots], turned[kDots * kDots], rest[kDots] = {};
    for (int i = 0; i < kDots; i++) {
      const float* const a = rows[i];
      Vector sums = {}, more = {};
      int64_t d = 0;
      for (; d + 2 * kWidth <= D; d += 2 * kWidth) {
        sums += load(a + d) * load(b + d);
        more += load(a + d + kWidth) * load(b + d + kWidth);
      }
      for (; d < D; d++) rest[i] += a[d] * b[d];
      sums += more;
      float part[kWidth];
      store(part, sums);
      for (int lane = 0; lane < kDots; lane++) {
        lanes[i * kDots + lane] =
            kWidth == kDots ? part[lane] : part[lane] + part[kWidth / 2 + lane];
      }
    }
    transpose_8x8(lanes, kDots, turned, kDots);
    for (int i = 0; i < kDots; i++) {
      float sum[4];
      for (int lane = 0; lane < 4; lane++) {
        sum[lane] = turned[lane * kDots + i] + turned[(lane + 4) * kDots + i];
      }
      to[i] = (sum[0] + sum[2]) + (sum[1] + sum[3]) + rest[i];
    }
  }
}

// Turns logits into the weights of their softmax, zeros from `keys` on; returns the log-sum-exp.
VIDL_VECTOR_INLINE float softmax(float* line, int64_t keys, int64_t columns, float scale) {
  const RowOfWeights sum = exponentiate(line, keys, columns, scale);
  for (int64_t j = 0; j < columns; j += kWidth) store(line + j, load(line + j) * sum.inverse);
  return sum.lse;
}

// How many rows of keys are prefetched: each is on a page of its own, which no hardware prefetcher
// expects.
constexpr int64_t kAhead = 16;

template <class T>
VIDL_VECTOR_INLINE void prefetch_row(const T* from, int64_t heads, int64_t head, int64_t D) {
  for (int64_t h = 0; h < heads; h++) prefetch(from + h * head, D);
}

// How many keys the first query of a group sees; 0 if all of these are hidden.
VIDL_VECTOR_INLINE int64_t first_query_sees(const TokenScores& s, int64_t query_row,
                                            int64_t first_key, int64_t keys) {
  const int32_t* const limits = s.groups.query_limits;
  const int64_t limit = limits == nullptr ? keys : limits[query_row];
  if (s.bias.key_bias == nullptr) return limit;
  for (int64_t j = 0; j < limit; j++) {
    if (s.bias.key_bias[row_of(s.groups.key_rows, first_key + j)] != -INFINITY) return limit;
  }
  return 0;
}

template <class T>
VIDL_VECTOR_INLINE void first_query_weights(const TokenScores& s, float* weights, int64_t g,
                                            int64_t first_head, Scratch& scratch) {
  const Groups& groups = s.groups;
  const auto [first_query, queries, first_key, keys] = group_of(groups, g);
  const int64_t D = s.D;
  const int64_t heads = s.H - first_head < s.heads ? s.H - first_head : s.heads;
  if (keys == 0) return;
  const int64_t query_row = queries == 0 ? 0 : row_of(groups.query_rows, first_query);
  const int64_t seen = queries == 0 ? 0 : first_query_sees(s, query_row, first_key, keys);
  if (seen == 0) {
    for (int64_t h = 0; h < heads; h++) {
      memset(weights + (first_head + h) * groups.E + first_key, 0, keys * sizeof(float));
    }
    return;
  }
  const int64_t columns = round_up(keys, kKeyStep);
  // A negative scale negates the query, so that the greatest logit has the greatest weight.
  const float sign = s.scale < 0 ? -1.0f : 1.0f;
  float* const q = scratch.take(heads * D);
  float* const room = scratch.take(kDots * D);
  float* const lines = scratch.take(heads * columns);
  const T* const query =
      static_cast<const T*>(s.q.data) + first_head * s.q.head + query_row * s.q.row;
  for (int64_t h = 0; h < heads; h++) read_row(query + h * s.q.head, D, sign, q + h * D);
  const T* const k = static_cast<const T*>(s.k.data) + first_head * s.k.head;
  for (int64_t first = 0; first < seen; first += kDots) {
    const T* rows[kDots];
    for (int64_t i = 0; i < kDots; i++) {
      const int64_t j = first + i, ahead = j + kAhead;
      if (ahead < seen) {
        prefetch_row(k + row_of(groups.key_rows, first_key + ahead) * s.k.row, heads, s.k.head, D);
      }
      rows[i] = k + row_of(groups.key_rows, first_key + (j < seen ? j : seen - 1)) * s.k.row;
    }
    for (int64_t h = 0; h < heads; h++) {
      const float* numbers[kDots];
      for (int i = 0; i < kDots; i++) {
        numbers[i] = as_floats(rows[i] + h * s.k.head, D, room + i * D);
      }
      dots(numbers, q + h * D, D, lines + h * columns + first);
    }
  }
  for (int64_t h = 0; h < heads; h++) {
    float* const line = lines + h * columns;
    if (is_given(s.bias)) {
      const GroupBias bias = bias_of(s.bias, groups, first_head + h, first_key, keys, scratch);
      add_bias(line, seen, s.scale * sign, bias, query_row);
    }
    softmax(line, seen, columns, is_given(s.bias) ? 1.0f : s.scale * sign);
    memcpy(weights + (first_head + h) * groups.E + first_key, lines + h * columns,
           keys * sizeof(float));
  }
}

template <class T>
VIDL_VECTOR_INLINE void first_query_grads(const TokenScores& s, const Gradients& b, int64_t g,
                                          int64_t first_head, float* grad_tables,
                                          Scratch& scratch) {
  const Groups& groups = s.groups;
  const auto [first_query, queries, first_key, keys] = group_of(groups, g);
  const int64_t D = s.D;
  const int64_t heads = s.H - first_head < s.heads ? s.H - first_head : s.heads;
  const float share = 1.0f / static_cast<float>(s.H);
  float* const q = scratch.take(heads * D);
  float* const grad_q = scratch.take(heads * D);
  float* const room = scratch.take(D);
  float* const grads = scratch.take(heads * keys + kWidth);  // vectors are read from any key on
  memset(grad_q, 0, heads * D * sizeof(float));
  memset(q, 0, heads * D * sizeof(float));
  const int64_t query = queries > 0 ? row_of(groups.query_rows, first_query) : 0;
  for (int64_t h = 0; h < heads; h++) {
    const int64_t head = first_head + h;
    if (queries > 0) {
      const T* const from = static_cast<const T*>(s.q.data) + query * s.q.row;
      read_row(from + head * s.q.head, D, 1.0f, q + h * D);
    }
    const float* const weights = b.weights + head * groups.E + first_key;
    double weighted = 0.0;
    for (int64_t j = 0; j < keys; j++) weighted += weights[j] * b.grad_scores[first_key + j];
    const float delta = static_cast<float>(weighted);
    for (int64_t j = 0; j < keys; j++) {
      const float grad = weights[j] * (b.grad_scores[first_key + j] - delta) * share;
      grads[h * keys + j] = queries > 0 ? grad : 0.0f;
    }
    if (grad_tables != nullptr && queries > 0) {
      const GroupBias bias = bias_of(s.bias, groups, head, first_key, keys, scratch);
      const int64_t seen = first_query_sees(s, query, first_key, keys);
      float* const table = grad_tables + h * s.bias.rows;
      add_to_table(grads + h * keys, seen, bias, query, {table, table});
    }
    for (int64_t j = 0; j < keys; j++) grads[h * keys + j] *= s.scale;
    if (b.grad_logits != nullptr) {
      memcpy(b.grad_logits + head * groups.E + first_key, grads + h * keys, keys * sizeof(float));
    }
  }
  const T* const k = static_cast<const T*>(s.k.data) + first_head * s.k.head;
  for (int64_t j = 0; j < keys; j++) {
    const int64_t row = row_of(groups.key_rows, first_key + j);
    if (j + kAhead < keys) {
      prefetch_row(k + row_of(groups.key_rows, first_key + j + kAhead) * s.k.row, heads, s.k.head,
                   D);
    }
    for (int64_t h = 0; h < heads; h++) {
      const int64_t head = first_head + h;
      const float grad = grads[h * keys + j];
      const T* const key = k + row * s.k.row + h * s.k.head;
      const float* const numbers = as_floats(key, D, room);
      for (int64_t d = 0; d < D; d++) grad_q[h * D + d] += grad * numbers[d];
      if (b.grad_logits != nullptr) continue;  // rows that several groups share are summed later
      T* const to = static_cast<T*>(b.grad_k) + (row * s.H + head) * D;
      write_row(q + h * D, D, grad, to);
    }
  }
  for (int64_t h = 0; queries > 0 && h < heads; h++) {
    write_row(grad_q + h * D, D, 1.0f,
              static_cast<T*>(b.grad_q) + (query * s.H + first_head + h) * D);
  }
}

// The gradient of a row of k that several groups share: the sum over its entries, in order.
template <class T>
VIDL_VECTOR_INLINE void shared_row(const TokenScores& s, const Gradients& b, int64_t row,
                                   float* sums) {
  const Groups& groups = s.groups;
  for (int64_t h = 0; h < s.H; h++) {
    memset(sums, 0, s.D * sizeof(float));
    for (int32_t i = groups.entry_offsets[row]; i < groups.entry_offsets[row + 1]; i++) {
      const int64_t entry = groups.entries[i], g = b.group[entry];
      const int64_t first_query = groups.query_offsets[g];
      if (first_query == groups.query_offsets[g + 1]) continue;
      const float grad = b.grad_logits[h * groups.E + entry];
      const T* const query = static_cast<const T*>(s.q.data) + h * s.q.head +
                             row_of(groups.query_rows, first_query) * s.q.row;
      for (int64_t d = 0; d < s.D; d++) sums[d] += grad * static_cast<float>(query[d]);
    }
    write_row(sums, s.D, 1.0f, static_cast<T*>(b.grad_k) + (row * s.H + h) * s.D);
  }
}

template <class T>
VIDL_VECTOR_INLINE void mean_weights(const TokenScores& s, float* by_head, float* lse, int64_t g,
                                     int64_t h, Scratch& scratch) {
  const Groups& groups = s.groups;
  const auto [first_query, queries, first_key, keys] = group_of(groups, g);
  const int64_t columns = round_up(keys, kKeyStep), width = round_up(s.D, 16);
  const int64_t block = queries_at_once(columns + 1);
  const float sign = s.scale < 0 ? -1.0f : 1.0f, scale = s.scale * sign;
  const GroupBias bias = bias_of(s.bias, groups, h, first_key, keys, scratch);
  const bool biased = is_given(s.bias);
  float* const rows = scratch.take(columns * width);
  float* const keys_across = scratch.take(width * columns);
  float* const weights = scratch.take(block * columns);
  float* const q = scratch.take(block * width);
  float* const sums = scratch.take(columns);  // over a block of queries
  float* const all = scratch.take(columns);
  float* const lost = scratch.take(columns);
  memset(all, 0, columns * sizeof(float));
  memset(lost, 0, columns * sizeof(float));
  read_rows<T>(s.k, groups.key_rows, first_key, keys, columns, h, s.D, width, 1.0f, rows);
  transpose(rows, columns, width, width, keys_across, columns);
  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    read_rows<T>(s.q, groups.query_rows, first_query + start, count, count, h, s.D, width, sign, q);
    const Seen seen = seen_by_block(groups, first_query + start, count, keys, bias.first);
    multiply<false>(count, seen.columns, s.D, q, width, 1, keys_across, columns, weights, columns);
    memset(sums, 0, columns * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
      float* const line = weights + i * columns;
      const int64_t query = row_of(groups.query_rows, first_query + start + i);
      float own_lse = -INFINITY;
      const int64_t own = seen.keys(i), used = round_up(own, kWidth);
      if (own > 0) {
        if (biased) add_bias(line, own, scale, bias, query);
        own_lse = softmax(line, own, used, biased ? 1.0f : scale);
      }
      if (lse != nullptr) lse[h * groups.num_queries + query] = own_lse;
      for (int64_t j = 0; j < used; j += kWidth) {
        store(sums + j, load(sums + j) + load(line + j));
      }
    }
    add_compensated(sums, columns, all, lost);
  }
  const float number = static_cast<float>(queries == 0 ? 1 : queries);
  for (int64_t j = 0; j < keys; j++) by_head[h * groups.E + first_key + j] = all[j] / number;
}

template <class T>
VIDL_VECTOR_INLINE void mean_grads(const TokenScores& s, const Gradients& b, int64_t g, int64_t h,
                                   float* grad_table, Scratch& scratch) {
  const Groups& groups = s.groups;
  const auto [first_query, queries, first_key, keys] = group_of(groups, g);
  const int64_t columns = round_up(keys, kKeyStep), width = round_up(s.D, 16);
  const int64_t block = queries_at_once(columns + 1);
  const float sign = s.scale < 0 ? -1.0f : 1.0f;
  const float number = static_cast<float>(s.H * (queries == 0 ? 1 : queries));
  const float share = s.scale / number;
  const GroupBias bias = bias_of(s.bias, groups, h, first_key, keys, scratch);
  const bool biased = is_given(s.bias);
  float* const k = scratch.take(columns * width);
  float* const keys_across = scratch.take(width * columns);
  const QuerySum grad_k = query_sum(columns * width, queries, block, scratch);
  float* const weights = scratch.take(block * columns);
  float* const q = scratch.take(block * width);
  float* const sums = scratch.take(block * width);
  float* const grad = scratch.take(columns);
  float* const table_grads = scratch.take(columns + kWidth);
  const TableSums table = table_sums(grad_table, bias, queries, keys, scratch);
  memset(grad, 0, columns * sizeof(float));
  for (int64_t j = 0; j < keys; j++) grad[j] = b.grad_scores[first_key + j];
  read_rows<T>(s.k, groups.key_rows, first_key, keys, columns, h, s.D, width, 1.0f, k);
  transpose(k, columns, width, width, keys_across, columns);
  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    read_rows<T>(s.q, groups.query_rows, first_query + start, count, count, h, s.D, width, sign, q);
    const Seen seen = seen_by_block(groups, first_query + start, count, keys, bias.first);
    multiply<false>(count, seen.columns, s.D, q, width, 1, keys_across, columns, weights, columns);
    for (int64_t i = 0; i < count; i++) {
      float* const line = weights + i * columns;
      const int64_t own = seen.keys(i), used = round_up(own, kWidth);
      clear(line, used, seen.columns);
      if (own == 0) continue;
      const int64_t query = row_of(groups.query_rows, first_query + start + i);
      if (biased) add_bias(line, own, s.scale * sign, bias, query);
      // Not from the log-sum-exp of the forward, which is rounded once more.
      softmax(line, own, used, biased ? 1.0f : s.scale * sign);
      Vector total = {};
      for (int64_t j = 0; j < used; j += kWidth) total += load(line + j) * load(grad + j);
      const float delta = sum_of(total);
      for (int64_t j = 0; j < used; j += kWidth) {
        store(line + j, load(line + j) * (load(grad + j) - delta));
      }
      if (own == 1) line[0] = 0.0f * line[0];  // one key always has all the weight
      if (grad_table == nullptr) continue;
      for (int64_t j = 0; j < used; j += kWidth) store(table_grads + j, load(line + j) / number);
      add_to_table(table_grads, own, bias, query, table);
    }
    multiply<true>(seen.most, width, count, weights, 1, columns, q, width, grad_k.part, width);
    end_block(grad_k, start, block, queries);
    multiply<false>(count, width, seen.most, weights, columns, 1, k, width, sums, width);
    for (int64_t i = 0; i < count; i++) {
      const int64_t query = row_of(groups.query_rows, first_query + start + i);
      if (seen.keys(i) == 0) memset(sums + i * width, 0, width * sizeof(float));
      write_row(sums + i * width, s.D, share, static_cast<T*>(b.grad_q) + (query * s.H + h) * s.D);
    }
  }
  end_sums(table, bias);
  for (int64_t j = 0; j < keys; j++) {
    const int64_t entry = first_key + j;
    if (b.entry_grad_k != nullptr) {  // rows that several groups share are summed afterwards
      float* const to = b.entry_grad_k + (entry * s.H + h) * s.D;
      write_row(grad_k.total + j * width, s.D, share * sign, to);
    } else {
      T* const to = static_cast<T*>(b.grad_k) + (row_of(groups.key_rows, entry) * s.H + h) * s.D;
      write_row(grad_k.total + j * width, s.D, share * sign, to);
    }
  }
}

template <class T>
VIDL_VECTOR_INLINE float length_of(const Strided& v, int64_t row, int64_t H, int64_t D,
                                   float* room) {
  const T* const from = static_cast<const T*>(v.data) + row * v.row;
  float sum = 0.0f;
  for (int64_t h = 0; h < H; h++) {
    const float* const numbers = as_floats(from + h * v.head, D, room);
    sum += dot(numbers, numbers, D);
  }
  return std::sqrt(sum);
}

// The mean of a key over its heads, divided by its length: [D].
template <class T>
VIDL_VECTOR_INLINE void direction(const TokenScores& s, int64_t row, float* to) {
  const T* const from = static_cast<const T*>(s.k.data) + row * s.k.row;
  memset(to, 0, s.D * sizeof(float));
  for (int64_t h = 0; h < s.H; h++) {
    for (int64_t d = 0; d < s.D; d++) to[d] += static_cast<float>(from[h * s.k.head + d]);
  }
  for (int64_t d = 0; d < s.D; d++) to[d] /= static_cast<float>(s.H);
  const float length = std::sqrt(dot(to, to, s.D));
  for (int64_t d = 0; d < s.D; d++) to[d] /= length < 1e-12f ? 1e-12f : length;
}

// Scores of "similarity": minus the greatest cosine of an even key with any odd key, infinity for
// odd keys.
template <class T>
VIDL_VECTOR_INLINE void dissimilarity(const TokenScores& s, float* scores, int64_t g,
                                      Scratch& scratch) {
  const Groups& groups = s.groups;
  const int64_t first = groups.key_offsets[g], keys = groups.key_offsets[g + 1] - first;
  const int64_t even = (keys + 1) / 2, odd = keys / 2, width = round_up(s.D, 16);
  const int64_t columns = round_up(odd, kKeyStep), block = queries_at_once(columns + 1);
  scores += first;
  float* const evens = scratch.take(even * width);
  float* const odds = scratch.take(columns * width);
  float* const odds_across = scratch.take(width * columns);
  float* const cosines = scratch.take(block * columns);
  memset(odds, 0, columns * width * sizeof(float));
  for (int64_t j = 0; j < keys; j++) {
    direction<T>(s, row_of(groups.key_rows, first + j), (j % 2 ? odds : evens) + j / 2 * width);
    if (j % 2) scores[j] = INFINITY;
  }
  transpose(odds, columns, width, width, odds_across, columns);
  for (int64_t start = 0; start < even; start += block) {
    const int64_t count = even - start < block ? even - start : block;
    multiply<false>(count, columns, s.D, evens + start * width, width, 1, odds_across, columns,
                    cosines, columns);
    for (int64_t i = 0; i < count; i++) {
      float most = -INFINITY, wrong = 0.0f;
      for (int64_t j = 0; j < odd; j++) {
        const float cosine = cosines[i * columns + j];
        most = cosine > most ? cosine : most;
        wrong += cosine - cosine;  // NaN if a cosine is NaN
      }
      scores[2 * (start + i)] = -(most + wrong);
    }
  }
}

void cls_items(const TokenScores& s, float* weights, int64_t begin, int64_t end) {
  const int64_t parts = (s.H + s.heads - 1) / s.heads;
  for_items(begin, end, [&](int64_t item, Scratch& scratch) {
    VIDL_FLOATING(s.dtype, T,
                  first_query_weights<T>(s, weights, item / parts, item % parts * s.heads, scratch))
  });
}

void cls_backward_items(const TokenScores& s, const Gradients& b, int64_t begin, int64_t end) {
  const int64_t parts = (s.H + s.heads - 1) / s.heads;
  for_items(begin, end, [&](int64_t item, Scratch& scratch) {
    const int64_t first = item / parts, head = item % parts * s.heads;
    if (b.bias_parts == nullptr) {
      VIDL_FLOATING(s.dtype, T, first_query_grads<T>(s, b, first, head, nullptr, scratch))
      return;
    }
    const int64_t heads = s.H - head < s.heads ? s.H - head : s.heads;
    float* const grad_tables = b.bias_parts + (first * s.H + head) * s.bias.rows;
    memset(grad_tables, 0, heads * s.bias.rows * sizeof(float));
    for_part(s.groups.G, first, b.parts, scratch, [&](int64_t g) {
      VIDL_FLOATING(s.dtype, T, first_query_grads<T>(s, b, g, head, grad_tables, scratch))
    });
  });
}

void shared_rows(const TokenScores& s, const Gradients& b, int64_t begin, int64_t end) {
  std::vector<float> sums(s.D);
  for (int64_t row = begin; row < end; row++) {
    VIDL_FLOATING(s.dtype, T, shared_row<T>(s, b, row, sums.data()))
  }
}

void mean_items(const TokenScores& s, float* by_head, float* lse, int64_t begin, int64_t end) {
  for_items(begin, end, [&](int64_t item, Scratch& scratch) {
    VIDL_FLOATING(s.dtype, T, mean_weights<T>(s, by_head, lse, item / s.H, item % s.H, scratch))
  });
}

void mean_backward_items(const TokenScores& s, const Gradients& b, int64_t begin, int64_t end) {
  for_items(begin, end, [&](int64_t item, Scratch& scratch) {
    const int64_t first = item / s.H, h = item % s.H;
    if (b.bias_parts == nullptr) {
      VIDL_FLOATING(s.dtype, T, mean_grads<T>(s, b, first, h, nullptr, scratch))
      return;
    }
    float* const grad_table = b.bias_parts + item * s.bias.rows;
    memset(grad_table, 0, s.bias.rows * sizeof(float));
    for_part(s.groups.G, first, b.parts, scratch, [&](int64_t g) {
      VIDL_FLOATING(s.dtype, T, mean_grads<T>(s, b, g, h, grad_table, scratch))
    });
  });
}

void lengths_of_rows(const TokenScores& s, float* norms, int64_t begin, int64_t end) {
  std::vector<float> room(s.D);
  for (int64_t row = begin; row < end; row++) {
    VIDL_FLOATING(s.dtype, T, {
      if (row + kAhead < end) {
        const T* const next = static_cast<const T*>(s.v.data) + (row + kAhead) * s.v.row;
        prefetch_row(next, s.H, s.v.head, s.D);
      }
      norms[row] = length_of<T>(s.v, row, s.H, s.D, room.data());
    })
  }
}

void similarity_items(const TokenScores& s, float* scores, int64_t begin, int64_t end) {
  for_items(begin, end, [&](int64_t g, Scratch& scratch) {
    VIDL_FLOATING(s.dtype, T, dissimilarity<T>(s, scores, g, scratch))
  });
}
