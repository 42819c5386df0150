// Groups of packed rows of several heads, for host code and CUDA kernels alike. No torch, no CUDA.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace vidl {

// [rows, H, D], the last dimension contiguous; strides count elements.
struct Strided {
  const void* data;
  int64_t row, head;
};

// G groups of queries and keys (vidl.ops.Groups). Group g has the queries and keys from offset g to
// offset g + 1 of two lists. E is the length of the list of keys; its elements are the entries.
struct Groups {
  const int32_t *query_offsets, *key_offsets;  // [G + 1]; no queries: query_offsets is null
  const int32_t *query_rows, *key_rows;        // [num_queries], [E], or null: rows in order
  const int32_t *entry_offsets, *entries;      // [num_keys + 1], [E], or null: no shared keys
  int64_t G, E;
  int64_t num_queries, num_keys;  // rows of q, rows of k and v
  int64_t max_queries, max_keys;  // upper bounds for any group
  // [num_queries]: query row i sees so many keys of its group, the first. Null: all.
  const int32_t* query_limits;
};

// What is added to the logit of query row i and key row j for head h: table[h * rows + row] +
// key_bias[j], where row = key_codes[j] - query_codes[i] + shift, limited to [0, rows - 1]. Without
// a table `table` is null, without numbers for the keys `key_bias`.
struct Bias {
  const float* table;                      // [H, rows]
  const int32_t *query_codes, *key_codes;  // [num_queries], [num_keys]
  const float* key_bias;                   // [num_keys]
  int64_t rows;
  int32_t shift;
};

// What the logits of a call depend on beside the products of queries and keys. Each CUDA kernel has
// an instance of its own for every kind: those without a bias spend nothing on it.
struct Plain {
  static constexpr bool kLimited = false, kBiased = false;
};
struct Limited {  // queries see the first keys of their group
  static constexpr bool kLimited = true, kBiased = false;
};
struct Biased {  // a table, numbers for the keys or both; limits or none
  static constexpr bool kLimited = true, kBiased = true;
};

}  // namespace vidl
