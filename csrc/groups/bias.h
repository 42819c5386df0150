// What is added to the logits of one group on the CPU. The VIDL_SOURCE of an op includes this file
// once for each instruction set (cpu/levels.h). So there is no include guard.
#include "groups/cpu.h"

// Keys meet the table in vectors of this length: a row of a window rarely fills more.
constexpr int64_t kPiece = kWidth < 8 ? kWidth : 8;
typedef float Some __attribute__((vector_size(4 * kPiece)));
typedef int32_t SomeIntegers __attribute__((vector_size(4 * kPiece)));

VIDL_VECTOR_INLINE Some load_some(const float* p) {
  Some v;
  memcpy(&v, p, sizeof v);
  return v;
}
VIDL_VECTOR_INLINE void store_some(float* p, Some v) { memcpy(p, &v, sizeof v); }

// Lanes below `count`, at most kPiece, are true.
VIDL_VECTOR_INLINE SomeIntegers lanes_below(int64_t count) {
  static constexpr int32_t kTrue[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  SomeIntegers v;
  memcpy(&v, kTrue + 8 - count, sizeof v);
  return v;
}

// The codes of kPiece keys. Neighbours in a row of patches have neighbouring rows of the table, so
// most pieces are two runs: the keys before `split` have the codes low, low + 1, ..., key j from
// `split` on has high + j. In other pieces `split` is negative, and low and high are the least and
// the greatest code.
struct Codes {
  int64_t low, high, split;
};
constexpr int64_t kSingle = -1, kLimited = -2;  // values of `split`; rows of kLimited are limited

// What is added to the logits of a query, for the keys of a group in their order. The row of a key
// is key_codes[j] - query code + shift, limited to [0, last].
struct GroupBias {
  const float* table;  // of a head, or null
  const int32_t* query_codes;
  int32_t* key_codes;
  Codes* pieces;
  float* key_bias;  // or null
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

VIDL_VECTOR_INLINE Codes two_runs(const int32_t* codes) {
  int64_t split = 1;
  while (split < kPiece && codes[split] == codes[0] + split) split++;
  const int64_t high = static_cast<int64_t>(codes[kPiece - 1]) - (kPiece - 1);
  bool two = true;
  for (int64_t j = split; j < kPiece; j++) two &= codes[j] - j == high;
  return {codes[0], split == kPiece ? codes[0] : high, two ? split : kSingle};
}

VIDL_VECTOR_INLINE Codes range_of(const int32_t* codes) {
  Codes any = {codes[0], codes[0], kSingle};
  for (int64_t j = 1; j < kPiece; j++) {
    if (codes[j] < any.low) any.low = codes[j];
    if (codes[j] > any.high) any.high = codes[j];
  }
  return any;
}

VIDL_VECTOR_INLINE GroupBias bias_of(const Bias& all, const Groups& groups, int64_t h,
                                     int64_t first_key, int64_t keys, Scratch& scratch) {
  GroupBias bias = {};
  if (!is_given(all)) return bias;
  if (all.table != nullptr) {
    const int64_t padded = round_up(keys, kPiece);
    bias.table = all.table + h * all.rows;
    bias.query_codes = all.query_codes;
    bias.shift = all.shift;
    bias.last = static_cast<int32_t>(all.rows - 1);
    bias.key_codes = reinterpret_cast<int32_t*>(scratch.take(padded));
    for (int64_t j = 0; j < keys; j++) {
      bias.key_codes[j] = all.key_codes[row_of(groups.key_rows, first_key + j)];
    }
    for (int64_t j = keys; j < padded; j++) {  // the last run goes on
      bias.key_codes[j] = wrapping_sum(bias.key_codes[j - 1], 1);
    }
    constexpr int64_t kSize = sizeof(Codes) / sizeof(float);
    bias.pieces = reinterpret_cast<Codes*>(scratch.take(padded / kPiece * kSize));
    int64_t others = 0;
    for (int64_t j = 0; j < padded; j += kPiece) {
      bias.pieces[j / kPiece] = two_runs(bias.key_codes + j);
      others += bias.pieces[j / kPiece].split < 0 ? 1 : 0;
    }
    // Where many pieces are not two runs, none is treated as such: sums of vectors would wait for
    // those of single keys before them.
    const bool single = others * 4 * kPiece > padded;
    for (int64_t j = 0; others > 0 && j < padded; j += kPiece) {
      Codes& piece = bias.pieces[j / kPiece];
      if (single || piece.split < 0) piece = range_of(bias.key_codes + j);
    }
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

// The rows of the table for the keys of a query. It holds copies, which stores of floats cannot
// change.
struct Rows {
  const Codes* pieces;
  const int32_t* codes;
  int64_t shift, last;
  uint64_t starts;  // a vector of the table begins at a row below

  VIDL_VECTOR_INLINE Rows(const GroupBias& bias, int64_t query)
      : pieces(bias.pieces),
        codes(bias.key_codes),
        shift(static_cast<int64_t>(bias.shift) - bias.query_codes[query]),
        last(bias.last),
        starts(last + 2 > kPiece ? last + 2 - kPiece : 0) {}

  // Of kPiece keys from `key` on: the runs from both rows, or a negative `split`.
  VIDL_VECTOR_INLINE Codes runs(int64_t key) const {
    const Codes piece = pieces[key / kPiece];
    const int64_t low = piece.low + shift, high = piece.high + shift;
    const bool inside =
        (static_cast<uint64_t>(low) < starts) & (static_cast<uint64_t>(high) < starts);
    return {low, high, inside ? piece.split : kLimited};
  }
  // Calls f(i, row of key + i) for `count` keys in a piece with a negative `split`.
  template <class F>
  VIDL_VECTOR_INLINE void for_each(int64_t key, int64_t count, int64_t split, F f) const {
    if (split == kSingle) {
      for (int64_t i = 0; i < count; i++) f(i, codes[key + i] + shift);
      return;
    }
    const int32_t wrapped = static_cast<int32_t>(static_cast<uint32_t>(shift));
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = wrapping_sum(codes[key + i], wrapped);
      f(i, row < 0 ? 0 : row > last ? last : row);
    }
  }
};

// Scales the logits of a query row and adds the bias.
VIDL_VECTOR_INLINE void add_bias(float* line, int64_t keys, float scale, const GroupBias& bias,
                                 int64_t query) {
  if (const float* const table = bias.table; table != nullptr) {
    const Rows rows(bias, query);
    for (int64_t j = 0; j < keys; j += kPiece) {
      const Codes piece = rows.runs(j);
      Some terms;
      if (piece.split >= 0) [[likely]] {
        const Some low = load_some(table + piece.low), high = load_some(table + piece.high);
        terms = lanes_below(piece.split) ? low : high;
      } else {
        rows.for_each(j, kPiece, piece.split,
                      [&](int64_t i, int64_t row) { terms[i] = table[row]; });
      }
      store_some(line + j, load_some(line + j) * scale + terms);
    }
  } else {
    for (int64_t j = 0; j < keys; j += kWidth) store(line + j, load(line + j) * scale);
  }
  if (bias.key_bias == nullptr) return;
  for (int64_t j = 0; j < keys; j += kWidth) {
    store(line + j, load(line + j) + load(bias.key_bias + j));
  }
}

// Where gradients of a table are summed. The two runs of a piece have overlapping vectors in the
// table: a load would wait for the store before it. So each has sums of its own, where groups are
// large enough to add them up afterwards.
struct TableSums {
  float *low, *high;
};

VIDL_VECTOR_INLINE TableSums table_sums(float* grad_table, const GroupBias& bias, int64_t queries,
                                        int64_t keys, Scratch& scratch) {
  const int64_t rows = bias.last + 1;
  if (grad_table == nullptr || rows * 4 > queries * keys) return {grad_table, grad_table};
  float* const high = scratch.take(rows);
  memset(high, 0, rows * sizeof(float));
  return {grad_table, high};
}

VIDL_VECTOR_INLINE void end_sums(const TableSums& sums, const GroupBias& bias) {
  if (sums.high == sums.low) return;
  for (int64_t row = 0; row <= bias.last; row++) sums.low[row] += sums.high[row];
}

// Adds the gradients of the logits of a query row to those of the table.
VIDL_VECTOR_INLINE void add_to_table(const float* grads, int64_t keys, const GroupBias& bias,
                                     int64_t query, const TableSums& sums) {
  float *const low = sums.low, *const high = sums.high;
  const Rows rows(bias, query);
  for (int64_t j = 0; j < keys; j += kPiece) {
    const Codes piece = rows.runs(j);
    const int64_t count = keys - j < kPiece ? keys - j : kPiece;
    if (piece.split >= 0) [[likely]] {
      const Some grad = lanes_below(count) ? load_some(grads + j) : Some{};
      const SomeIntegers first = lanes_below(piece.split);
      store_some(low + piece.low, load_some(low + piece.low) + (first ? grad : Some{}));
      if (piece.split >= count) continue;
      store_some(high + piece.high, load_some(high + piece.high) + (first ? Some{} : grad));
    } else {
      const auto add = [&](int64_t i, int64_t row) { low[row] += grads[j + i]; };
      if (count == kPiece) {  // loops of constant length are faster
        rows.for_each(j, kPiece, piece.split, add);
      } else {
        rows.for_each(j, count, piece.split, add);
      }
    }
  }
}
