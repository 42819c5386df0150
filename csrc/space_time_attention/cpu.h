// space_time_attention of one head of one group on the CPU; included once for each instruction set,
// after cpu/vectors.h (see there).
//
// All rows are converted to float32 first. Keys are also transposed, so that both matmuls of the
// forward and all five of the backward read contiguous rows. A block of queries meets all keys at
// once: one softmax without rescaling. The scale is applied inside the softmax: scaled queries
// would be rounded once more. A negative scale negates the queries, so that the greatest logit
// still has the greatest weight. With a bias the logits are scaled before it is added.
#include "groups/cpu.h"

// What is added to the logits of a query, for the keys of a group in their order. The row of a key
// is key_codes[j] - query code + shift, limited to [0, last].
//
// Neighbours in a row of patches have neighbouring rows of the table. Such a run of keys is copied
// or added in vectors; the lookups of single keys cost several times as much.
struct GroupBias {
  const float* table;  // of a head, or null
  const int32_t* query_codes;
  int32_t *key_codes, *runs;  // run r begins at key runs[r]; `runs` ends with the number of keys
  int64_t num_runs;           // 0: runs are too short to be worth it
  float *key_bias, *line;     // key_bias or null; the bias of a query
  int32_t shift, last;
  bool unseen;  // key_bias hides every key
};

// Codes may be any numbers: sums of them wrap around.
VIDL_VECTOR_INLINE int32_t wrapping_sum(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

VIDL_VECTOR_INLINE GroupBias bias_of(const SpaceTimeAttention& a, int64_t h, int64_t first_key,
                                     int64_t keys, Scratch& scratch) {
  const Bias& all = a.bias;
  GroupBias bias = {};
  bias.line = scratch.take(round_up(keys, kWidth) + kWidth);
  if (all.table != nullptr) {
    bias.table = all.table + h * all.rows;
    bias.query_codes = all.query_codes;
    bias.shift = all.shift;
    bias.last = static_cast<int32_t>(all.rows - 1);
    bias.key_codes = reinterpret_cast<int32_t*>(scratch.take(keys));
    bias.runs = reinterpret_cast<int32_t*>(scratch.take(keys + 1));
    for (int64_t j = 0; j < keys; j++) {
      bias.key_codes[j] = all.key_codes[row_of(a.groups.key_rows, first_key + j)];
      if (j == 0 || bias.key_codes[j] != wrapping_sum(bias.key_codes[j - 1], 1)) {
        bias.runs[bias.num_runs++] = static_cast<int32_t>(j);
      }
    }
    bias.runs[bias.num_runs] = static_cast<int32_t>(keys);
    if (bias.num_runs * 3 > keys) bias.num_runs = 0;
  }
  if (all.key_bias != nullptr) {
    bias.key_bias = scratch.take(round_up(keys, kWidth));
    bias.unseen = true;
    for (int64_t j = 0; j < keys; j++) {
      bias.key_bias[j] = all.key_bias[row_of(a.groups.key_rows, first_key + j)];
      bias.unseen = bias.unseen && bias.key_bias[j] == -INFINITY;
    }
  }
  return bias;
}

VIDL_VECTOR_INLINE int32_t limited(int32_t row, int32_t last) {
  return row < 0 ? 0 : row > last ? last : row;
}

// Calls vectors(key, row, lanes) for `lanes` keys with the rows from `row` on, where a vector from
// `row` on is in the table, and single(key, row) for other keys.
template <class V, class S>
VIDL_VECTOR_INLINE void for_rows(const GroupBias& bias, int64_t keys, int64_t query, V vectors,
                                 S single) {
  const int32_t shift = static_cast<int32_t>(static_cast<uint32_t>(bias.shift) -
                                             static_cast<uint32_t>(bias.query_codes[query]));
  for (int64_t r = 0; r < bias.num_runs; r++) {
    const int64_t begin = bias.runs[r], count = bias.runs[r + 1] - begin;
    const int64_t row = wrapping_sum(bias.key_codes[begin], shift);
    if (row >= 0 && row + round_up(count, kWidth) <= bias.last + 1) {
      for (int64_t j = 0; j < count; j += kWidth) {
        vectors(begin + j, row + j, count - j < kWidth ? count - j : kWidth);
      }
    } else {
      for (int64_t j = begin; j < begin + count; j++) {
        single(j, limited(wrapping_sum(bias.key_codes[j], shift), bias.last));
      }
    }
  }
  if (bias.num_runs > 0) return;
  for (int64_t j = 0; j < keys; j++) {
    single(j, limited(wrapping_sum(bias.key_codes[j], shift), bias.last));
  }
}

// Scales the logits of a query row and adds the bias.
VIDL_VECTOR_INLINE void add_bias(float* line, int64_t keys, float scale, const GroupBias& bias,
                                 int64_t query) {
  if (bias.table != nullptr) {
    // Lanes beyond a run are written by the next one.
    for_rows(
        bias, keys, query,
        [&](int64_t j, int64_t row, int64_t) { store(bias.line + j, load(bias.table + row)); },
        [&](int64_t j, int64_t row) { bias.line[j] = bias.table[row]; });
    for (int64_t j = 0; j < keys; j += kWidth) {
      store(line + j, load(line + j) * scale + load(bias.line + j));
    }
  } else {
    for (int64_t j = 0; j < keys; j += kWidth) store(line + j, load(line + j) * scale);
  }
  if (bias.key_bias == nullptr) return;
  for (int64_t j = 0; j < keys; j += kWidth) {
    store(line + j, load(line + j) + load(bias.key_bias + j));
  }
}

// Adds the gradients of the logits of a query row to those of the table.
VIDL_VECTOR_INLINE void add_to_table(const float* grads, int64_t keys, const GroupBias& bias,
                                     int64_t query, float* grad_table) {
  for_rows(
      bias, keys, query,
      [&](int64_t j, int64_t row, int64_t count) {
        const Vector grad = load(grads + j);
        float* const to = grad_table + row;
        const Integers used = lanes() < static_cast<int32_t>(count);
        store(to, load(to) + (used ? grad : Vector{}));
      },
      [&](int64_t j, int64_t row) { grad_table[row] += grads[j]; });
}

template <class T>
VIDL_VECTOR_INLINE void forward(const SpaceTimeAttention& a, const Forward& f, int64_t g, int64_t h,
                                Scratch& scratch) {
  const Groups& groups = a.groups;
  const auto [first_query, queries, first_key, keys] = group_of(groups, g);
  const int64_t D = a.D;
  const float sign = a.scale < 0 ? -1.0f : 1.0f, scale = a.scale * sign;
  T* const out = static_cast<T*>(f.out) + h * D;
  float* const scores = f.scores == nullptr ? nullptr : f.scores + h * groups.E + first_key;
  const bool biased = a.bias.table != nullptr || a.bias.key_bias != nullptr;
  const GroupBias bias = biased ? bias_of(a, h, first_key, keys, scratch) : GroupBias{};
  if (keys == 0 || bias.unseen) {
    if (scores != nullptr) memset(scores, 0, keys * sizeof(float));
    for (int64_t i = 0; i < queries; i++) {
      const int64_t row = row_of(groups.query_rows, first_query + i);
      for (int64_t d = 0; d < D; d++) out[row * a.H * D + d] = static_cast<T>(0.0f);
      f.lse[h * groups.num_queries + row] = -INFINITY;
    }
    return;
  }
  const int64_t columns = round_up(keys, kKeyStep), block = queries_at_once(columns);
  float* const values = scratch.take(columns * D);
  float* const keys_across = scratch.take(D * columns);
  float* const weights = scratch.take(block * columns);
  float* const q = scratch.take(block * D);
  float* const sums = scratch.take(block * D);
  float* const block_scores = scratch.take(columns);
  float* const lost = scratch.take(columns);
  memset(lost, 0, columns * sizeof(float));
  read_rows<T>(a.k, groups.key_rows, first_key, keys, columns, h, D, D, 1.0f, values);
  transpose(values, columns, D, D, keys_across, columns);
  read_rows<T>(a.v, groups.key_rows, first_key, keys, keys, h, D, D, 1.0f, values);
  if (scores != nullptr) memset(scores, 0, keys * sizeof(float));

  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    const int64_t first = first_query + start;
    read_rows<T>(a.q, groups.query_rows, first, count, count, h, D, D, sign, q);
    multiply<false>(count, columns, D, q, D, 1, keys_across, columns, weights, columns);
    float inverse[kMostQueries];
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      if (biased) add_bias(weights + i * columns, keys, scale, bias, row);
      const RowOfWeights sum =
          exponentiate(weights + i * columns, keys, columns, biased ? 1.0f : scale);
      inverse[i] = sum.inverse;
      f.lse[h * groups.num_queries + row] = sum.lse;
    }
    multiply<false>(count, D, keys, weights, columns, 1, values, D, sums, D);
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      write_row(sums + i * D, D, inverse[i], out + row * a.H * D);
    }
    if (scores == nullptr) continue;
    const int64_t scored = a.scores == Scores::kMean ? count : start == 0 ? 1 : 0;
    memset(block_scores, 0, columns * sizeof(float));
    for (int64_t i = 0; i < scored; i++) {
      for (int64_t j = 0; j < keys; j++) block_scores[j] += weights[i * columns + j] * inverse[i];
    }
    add_compensated(block_scores, keys, scores, lost);
  }
  if (scores == nullptr || a.scores != Scores::kMean || queries == 0) return;
  for (int64_t j = 0; j < keys; j++) scores[j] /= static_cast<float>(queries);
}

template <class T>
VIDL_VECTOR_INLINE void backward(const SpaceTimeAttention& a, const Backward& b, int64_t g,
                                 int64_t h, float* grad_table, Scratch& scratch) {
  const Groups& groups = a.groups;
  const auto [first_query, queries, first_key, keys] = group_of(groups, g);
  const int64_t D = a.D;
  const float sign = a.scale < 0 ? -1.0f : 1.0f, scale = a.scale * sign;
  const bool biased = a.bias.table != nullptr || a.bias.key_bias != nullptr;
  const GroupBias bias = biased ? bias_of(a, h, first_key, keys, scratch) : GroupBias{};
  const float logit_scale = biased ? 1.0f : scale, factor = of_two(logit_scale);
  T* const grad_q = static_cast<T*>(b.grad_q) + h * D;
  const int64_t columns = round_up(keys, kKeyStep), block = queries_at_once(columns + 1);
  float* const k = scratch.take(columns * D);
  float* const keys_across = scratch.take(D * columns);
  float* const values_across = scratch.take(D * columns);
  const QuerySum grad_k = query_sum(keys * D, queries, block, scratch);
  const QuerySum grad_v = query_sum(keys * D, queries, block, scratch);
  float* const weights = scratch.take(block * columns);
  float* const grads = scratch.take(block * columns);
  float* const q = scratch.take(block * D);
  float* const grad_out = scratch.take(block * D);
  float* const sums = scratch.take(block * D);
  read_rows<T>(a.v, groups.key_rows, first_key, keys, columns, h, D, D, 1.0f, k);
  transpose(k, columns, D, D, values_across, columns);
  read_rows<T>(a.k, groups.key_rows, first_key, keys, columns, h, D, D, 1.0f, k);
  transpose(k, columns, D, D, keys_across, columns);

  const Strided grads_of_out = {b.grad_out, a.H * D, D};
  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    const int64_t first = first_query + start;
    read_rows<T>(a.q, groups.query_rows, first, count, count, h, D, D, sign, q);
    read_rows<T>(grads_of_out, groups.query_rows, first, count, count, h, D, D, 1.0f, grad_out);
    multiply<false>(count, columns, D, q, D, 1, keys_across, columns, weights, columns);
    multiply<false>(count, columns, D, grad_out, D, 1, values_across, columns, grads, columns);
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      const float level = level_of(b.lse[h * groups.num_queries + row], logit_scale);
      float* const weight = weights + i * columns;
      float* const grad = grads + i * columns;
      if (bias.unseen) {
        memset(weight, 0, columns * sizeof(float));
        memset(grad, 0, columns * sizeof(float));
        continue;
      }
      if (biased) add_bias(weight, keys, scale, bias, row);
      if (b.grad_scores != nullptr && (a.scores == Scores::kMean || start + i == 0)) {
        const float share =
            1.0f / static_cast<float>(a.H * (a.scores == Scores::kMean ? queries : 1));
        for (int64_t j = 0; j < keys; j++) grad[j] += b.grad_scores[first_key + j] * share;
      }
      for (int64_t j = 0; j < columns; j += kWidth) {
        store(weight + j, power_of_two(load(weight + j) - level, factor));
      }
      for (int64_t j = keys; j < columns; j++) weight[j] = 0.0f;
      // The weights of a row are divided by their sum again, which differs from one by the rounding
      // error of the log-sum-exp: their gradient is a difference, in which that error would show.
      Vector sum = {}, total = {};
      for (int64_t j = 0; j < columns; j += kWidth) {
        sum += load(weight + j);
        total += load(weight + j) * load(grad + j);
      }
      const float inverse = 1.0f / sum_of(sum), delta = sum_of(total) * inverse;
      for (int64_t j = 0; j < columns; j += kWidth) {
        const Vector normal = load(weight + j) * inverse;
        store(weight + j, normal);
        store(grad + j, normal * (load(grad + j) - delta));
      }
      if (keys == 1) grad[0] = 0.0f * grad[0];  // one key always has all the weight
      if (grad_table != nullptr) add_to_table(grad, keys, bias, row, grad_table);
    }
    // Both gradients are scaled when they are written.
    multiply<true>(keys, D, count, weights, 1, columns, grad_out, D, grad_v.part, D);
    multiply<true>(keys, D, count, grads, 1, columns, q, D, grad_k.part, D);
    end_block(grad_v, start, block, queries);
    end_block(grad_k, start, block, queries);
    multiply<false>(count, D, keys, grads, columns, 1, k, D, sums, D);
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      write_row(sums + i * D, D, a.scale, grad_q + row * a.H * D);
    }
  }
  for (int64_t j = 0; j < keys; j++) {
    const int64_t entry = first_key + j;
    if (b.entry_grad_k != nullptr) {  // rows that several groups share are summed afterwards
      write_row(grad_k.total + j * D, D, scale, b.entry_grad_k + (entry * a.H + h) * D);
      memcpy(b.entry_grad_v + (entry * a.H + h) * D, grad_v.total + j * D, D * sizeof(float));
    } else {
      const int64_t row = row_of(groups.key_rows, entry);
      write_row(grad_k.total + j * D, D, scale, static_cast<T*>(b.grad_k) + (row * a.H + h) * D);
      write_row(grad_v.total + j * D, D, 1.0f, static_cast<T*>(b.grad_v) + (row * a.H + h) * D);
    }
  }
}

void forward_items(const SpaceTimeAttention& a, const Forward& f, int64_t begin, int64_t end) {
  for_items(begin, end, [&](int64_t item, Scratch& scratch) {
    VIDL_FLOATING(a.dtype, T, forward<T>(a, f, item / a.H, item % a.H, scratch))
  });
}

void backward_items(const SpaceTimeAttention& a, const Backward& b, int64_t begin, int64_t end) {
  for_items(begin, end, [&](int64_t item, Scratch& scratch) {
    VIDL_FLOATING(a.dtype, T, backward<T>(a, b, item / a.H, item % a.H, nullptr, scratch))
  });
}

// The same for items (part of the groups, head), with the gradient of the bias of each.
void backward_parts(const SpaceTimeAttention& a, const Backward& b, int64_t begin, int64_t end) {
  for_items(begin, end, [&](int64_t item, Scratch& scratch) {
    const int64_t part = item / a.H, h = item % a.H, G = a.groups.G;
    float* const grad_table = b.bias_parts + item * a.bias.rows;
    memset(grad_table, 0, a.bias.rows * sizeof(float));
    for (int64_t g = G * part / b.parts; g < G * (part + 1) / b.parts; g++) {
      VIDL_FLOATING(a.dtype, T, backward<T>(a, b, g, h, grad_table, scratch))
      scratch.reset();
    }
  });
}
