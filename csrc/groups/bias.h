// What is added to the logits of one group on the CPU. The VIDL_SOURCE of an op includes this file
// once for each instruction set (cpu/levels.h). So there is no include guard.
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
  int64_t first;  // key_bias hides all keys before it
};

// Codes may be any numbers: sums of them wrap around.
VIDL_VECTOR_INLINE int32_t wrapping_sum(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

VIDL_VECTOR_INLINE bool is_given(const Bias& bias) {
  return bias.table != nullptr || bias.key_bias != nullptr;
}

VIDL_VECTOR_INLINE GroupBias bias_of(const Bias& all, const Groups& groups, int64_t h,
                                     int64_t first_key, int64_t keys, Scratch& scratch) {
  GroupBias bias = {};
  if (!is_given(all)) return bias;
  bias.line = scratch.take(round_up(keys, kWidth) + kWidth);
  if (all.table != nullptr) {
    bias.table = all.table + h * all.rows;
    bias.query_codes = all.query_codes;
    bias.shift = all.shift;
    bias.last = static_cast<int32_t>(all.rows - 1);
    bias.key_codes = reinterpret_cast<int32_t*>(scratch.take(keys));
    bias.runs = reinterpret_cast<int32_t*>(scratch.take(keys + 1));
    for (int64_t j = 0; j < keys; j++) {
      bias.key_codes[j] = all.key_codes[row_of(groups.key_rows, first_key + j)];
      if (j == 0 || bias.key_codes[j] != wrapping_sum(bias.key_codes[j - 1], 1)) {
        bias.runs[bias.num_runs++] = static_cast<int32_t>(j);
      }
    }
    bias.runs[bias.num_runs] = static_cast<int32_t>(keys);
    if (bias.num_runs * 3 > keys) bias.num_runs = 0;
  }
  if (all.key_bias != nullptr) {
    bias.key_bias = scratch.take(round_up(keys, kWidth));
    for (int64_t j = 0; j < keys; j++) {
      bias.key_bias[j] = all.key_bias[row_of(groups.key_rows, first_key + j)];
      if (bias.first == j && bias.key_bias[j] == -INFINITY) bias.first = j + 1;
    }
  }
  return bias;
}

VIDL_VECTOR_INLINE int32_t limited(int32_t row, int32_t last) {
  return row < 0 ? 0 : row > last ? last : row;
}

// Calls vectors(key, row, lanes) for `lanes` of the first `keys` keys with the rows from `row` on,
// where a vector from `row` on is in the table, and single(key, row) for the others of them.
template <class V, class S>
VIDL_VECTOR_INLINE void for_rows(const GroupBias& bias, int64_t keys, int64_t query, V vectors,
                                 S single) {
  const int32_t shift = static_cast<int32_t>(static_cast<uint32_t>(bias.shift) -
                                             static_cast<uint32_t>(bias.query_codes[query]));
  for (int64_t r = 0; r < bias.num_runs && bias.runs[r] < keys; r++) {
    const int64_t begin = bias.runs[r], end = bias.runs[r + 1];
    const int64_t count = (end < keys ? end : keys) - begin;
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
