// Small groups of queries and keys with their lists, limits and biases, and tensors of their rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "check.h"
#include "groups/interface.h"

namespace {

using vidl::Dtype;
using Numbers = std::vector<double>;

// [rows, H, D] of a dtype. Rows are padded with NaN.
class Tensor : public Buffer {
 public:
  Tensor(Dtype dtype, size_t n) : Buffer(n * (dtype == Dtype::kFloat32 ? 4 : 2)), dtype(dtype) {
    std::memset(data(), 0xFF, bytes());
  }
  double operator[](size_t i) const {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(data())[i];
    if (dtype == Dtype::kFloat16) return float(static_cast<const fp16*>(data())[i]);
    return float(static_cast<const bf16*>(data())[i]);
  }
  void set(size_t i, float x) {
    if (dtype == Dtype::kFloat32) static_cast<float*>(data())[i] = x;
    if (dtype == Dtype::kFloat16) static_cast<fp16*>(data())[i] = x;
    if (dtype == Dtype::kBFloat16) static_cast<bf16*>(data())[i] = x;
  }
  float* floats() const { return static_cast<float*>(data()); }
  const Dtype dtype;
};

enum Rows { kInOrder, kGathered, kShared };
enum Limits { kAll, kCausal, kPadded, kDrawn };

std::vector<int32_t> offsets_of(const std::vector<int>& sizes) {
  std::vector<int32_t> offsets = {0};
  for (const int size : sizes) offsets.push_back(offsets.back() + size);
  return offsets;
}
int64_t longest(const std::vector<int>& sizes) {
  return *std::max_element(sizes.begin(), sizes.end());
}

// The lists of the groups: their rows are in order, gathered, or shared by several groups.
struct Lists {
  Lists(const std::vector<int>& queries, const std::vector<int>& keys, Rows rows, Limits kind,
        int table_rows)
      : query_sizes(queries),
        key_sizes(keys),
        rows(rows),
        kind(kind),
        table_rows(table_rows),
        query_offsets(offsets_of(queries)),
        key_offsets(offsets_of(keys)),
        num_queries(query_offsets.back()),
        E(key_offsets.back()),
        num_keys(rows == kShared ? (E + 1) / 2 : E) {
    for (int i = 0; i < num_queries; i++) query_rows.push_back(num_queries - 1 - i);
    for (int e = 0; e < E; e++) key_rows.push_back(rows == kShared ? e * 5 % num_keys : E - 1 - e);
    if (rows == kInOrder) {
      for (int i = 0; i < num_queries; i++) query_rows[i] = i;
      for (int e = 0; e < E; e++) key_rows[e] = e;
    }
    entry_offsets = {0};
    for (int row = 0; row < num_keys; row++) {
      for (int e = 0; e < E; e++) {
        if (key_rows[e] == row) entries.push_back(e);
      }
      entry_offsets.push_back(int(entries.size()));
    }
    limit_queries();
    place_rows();
    for (auto* list :
         {&query_rows, &key_rows, &entry_offsets, &entries, &limits, &query_codes, &key_codes})
      list->shrink_to_fit();
  }

  // Some queries see no key or one; the last see all keys of their group.
  void limit_queries() {
    limits.resize(num_queries);
    for (size_t g = 0; g < query_sizes.size(); g++) {
      for (int i = 0; i < query_sizes[g]; i++) {
        const int drawn = i % 5 == 0 ? i / 5 % 2 : i * 13 % (key_sizes[g] + 1);
        const int limit = kind == kAll      ? key_sizes[g]
                          : kind == kCausal ? i + 1
                          : kind == kPadded ? key_sizes[g] * 2 / 3
                                            : drawn;
        limits[query_rows[query_offsets[g] + i]] = std::min(limit, key_sizes[g]);
      }
    }
  }

  // Some keys of a group have equal codes. Some queries are so far from the keys that all have the
  // first or the last row of the table; some codes are the least and the greatest.
  void place_rows() {
    const int32_t far[] = {0, -100000, 100000, INT32_MIN, INT32_MAX};
    for (int i = 0; i < num_queries; i++) {
      query_codes.push_back(i % 9 == 4 ? far[i / 9 % 5] : i * 3 % 64 - 20);
    }
    for (int i = 0; i < num_keys; i++) {
      const int near = i * 5 % (num_keys * 2 / 3 + 1);
      key_codes.push_back(i % 16 == 11 ? 50000 + i : i % 16 == 3 ? INT32_MIN + i : near);
    }
  }
  // Every three groups have the same positions at other places, but the queries of some third
  // groups are one place further.
  void place_windows() {
    for (size_t g = 0; g < query_sizes.size(); g++) {
      const uint32_t place = uint32_t(g) * 1000000007u, step = g / 3 % 2 + 1;
      for (int i = 0; i < query_sizes[g]; i++) {
        query_codes[query_rows[query_offsets[g] + i]] =
            int32_t(place + 2 * uint32_t(i) + (g % 6 == 2));
      }
      for (int i = 0; i < key_sizes[g]; i++) {
        key_codes[key_rows[key_offsets[g] + i]] = int32_t(place + step * uint32_t(i));
      }
    }
  }
  int row_of(int query, int key) const {
    const int64_t row = int32_t(uint32_t(key_codes[key]) - uint32_t(query_codes[query]) + shift());
    return int(std::clamp<int64_t>(row, 0, table_rows - 1));
  }
  int shift() const { return table_rows / 2; }

  static float number(size_t i, int which) {  // an eighth of an integer, in [-1, 1]
    return float(int((i * 7919 * which + i / 13 + which) % 17) - 8) / 8;
  }
  // The only key of some queries is hidden.
  float bias_of_key(int i) const {
    return i % 7 == 2 || i == 0 || i == num_keys - 1 ? -INFINITY : number(i, 7);
  }

  vidl::Groups groups() const {
    const bool gathered = rows != kInOrder, shared = rows == kShared;
    return {query_offsets.data(),
            key_offsets.data(),
            gathered ? query_rows.data() : nullptr,
            gathered ? key_rows.data() : nullptr,
            shared ? entry_offsets.data() : nullptr,
            shared ? entries.data() : nullptr,
            int64_t(query_sizes.size()),
            E,
            num_queries,
            num_keys,
            longest(query_sizes),
            longest(key_sizes),
            kind == kAll ? nullptr : limits.data()};
  }
  vidl::Bias bias(const float* table, const float* key_bias) const {
    return {table_rows > 0 ? table : nullptr,
            query_codes.data(),
            key_codes.data(),
            key_bias,
            table_rows,
            shift()};
  }

  const std::vector<int> query_sizes, key_sizes;
  const Rows rows;
  const Limits kind;
  const int table_rows;
  std::vector<int32_t> query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries;
  std::vector<int32_t> limits, query_codes, key_codes;
  const int num_queries, E, num_keys;
};

// Runs `kernel`, which must write every element of the outputs exactly once.
template <class F>
void watched(const std::vector<Tensor*>& outputs, F kernel) {
  std::vector<std::unique_ptr<cuda_on_cpu::Watch>> watches;
  for (Tensor* x : outputs) {
    const size_t element = x->dtype == Dtype::kFloat32 ? 4 : 2;
    if (x->bytes() == 0) continue;
    watches.emplace_back(new cuda_on_cpu::Watch(x->data(), x->bytes(), element, "output"));
  }
  CHECK(kernel() == 0);
  for (const auto& watch : watches) watch->expect_all_written();
}

// Equal up to rounding of the inputs of products to 16 bits; infinite alike.
void expect_close(const char* name, const Tensor& x, const Numbers& truth, Dtype dtype) {
  double most = 0.1;
  for (const double t : truth) most = std::isfinite(t) ? std::max(most, std::abs(t)) : most;
  const double allowed = most * (dtype == Dtype::kFloat16 ? 0.004 : 0.03);
  for (size_t i = 0; i < truth.size(); i++) {
    if (x[i] == truth[i] || std::abs(x[i] - truth[i]) <= allowed) continue;
    std::printf("%s[%zu] is %g, not %g\n", name, i, x[i], truth[i]);
    return fail();
  }
}

}  // namespace
