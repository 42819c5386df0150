// Groups of packed rows on the host: from the tensors of an op to `Groups`, with every check.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "groups/interface.h"
#include "torch/device.h"

namespace vidl {
namespace {

// The groups as a parameter of an op's function. The schema has one argument for each field.
struct GroupTensors {
  Tensor query_offsets, key_offsets;
  OptionalTensor query_rows, key_rows, entry_offsets, entries;
  int64_t max_queries, max_keys;
  OptionalTensor query_limits;
};

// The same for what is added to the logits.
struct BiasTensors {
  OptionalTensor table, query_codes, key_codes;
  int64_t shift;
  OptionalTensor key_bias;
};

template <class...>
struct Types {};
template <class R, class... A>
Types<A...> parameters_of(R (*)(A...));

template <auto f, class Before, class After>
struct Unbundled;
template <auto f, class... Before, class First, class... After>
struct Unbundled<f, Types<Before...>, Types<First, After...>>
    : Unbundled<f, Types<Before..., First>, Types<After...>> {};
template <auto f, class... Before, class... After>
struct Unbundled<f, Types<Before...>, Types<GroupTensors, After...>> {
  static auto call(Before... before, Tensor query_offsets, Tensor key_offsets,
                   OptionalTensor query_rows, OptionalTensor key_rows, OptionalTensor entry_offsets,
                   OptionalTensor entries, int64_t max_queries, int64_t max_keys,
                   OptionalTensor query_limits, After... after) {
    return f(std::move(before)...,
             GroupTensors{query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries,
                          max_queries, max_keys, query_limits},
             std::move(after)...);
  }
};

template <auto f, class... Before, class... After>
struct Unbundled<f, Types<Before...>, Types<GroupTensors, BiasTensors, After...>> {
  static auto call(Before... before, Tensor query_offsets, Tensor key_offsets,
                   OptionalTensor query_rows, OptionalTensor key_rows, OptionalTensor entry_offsets,
                   OptionalTensor entries, int64_t max_queries, int64_t max_keys,
                   OptionalTensor query_limits, OptionalTensor table, OptionalTensor query_codes,
                   OptionalTensor key_codes, int64_t shift, OptionalTensor key_bias,
                   After... after) {
    return f(std::move(before)...,
             GroupTensors{query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries,
                          max_queries, max_keys, query_limits},
             BiasTensors{table, query_codes, key_codes, shift, key_bias}, std::move(after)...);
  }
};

// The function to register for f: the schema's arguments replace its GroupTensors parameter, and
// BiasTensors behind it.
template <auto f>
constexpr auto unbundled = &Unbundled<f, Types<>, decltype(parameters_of(f))>::call;

// Checks shapes and dtypes; the values of the lists are checked by check_lists() on the CPU, and
// limited by the kernels on CUDA. `q` is absent where only the keys count.
inline Groups groups_of(const std::string& op, const GroupTensors& tensors, const OptionalTensor& q,
                        const Tensor& k) {
  const auto list = [&](const OptionalTensor& x, const char* name, int64_t size) -> const int32_t* {
    if (!x) return nullptr;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Int && x->is_contiguous() && x->dim() == 1 &&
                        x->size(0) == size,
                    op, ": need ", name, " [", size, "] in int32, contiguous");
    return x->const_data_ptr<int32_t>();
  };
  const auto& [query_offsets, key_offsets, query_rows, key_rows, entry_offsets, entries,
               max_queries, max_keys, query_limits] = tensors;
  Groups groups = {};
  groups.G = key_offsets.numel() - 1;
  STD_TORCH_CHECK(groups.G >= 0, op, ": need key_offsets [G + 1]");
  groups.num_queries = q ? q->size(0) : 0;
  groups.num_keys = k.size(0);
  groups.E = key_rows ? key_rows->numel() : groups.num_keys;
  groups.key_offsets = list(key_offsets, "key_offsets", groups.G + 1);
  groups.key_rows = list(key_rows, "key_rows", groups.E);
  if (q) {
    groups.query_offsets = list(query_offsets, "query_offsets", groups.G + 1);
    groups.query_rows = list(query_rows, "query_rows", groups.num_queries);
    groups.query_limits = list(query_limits, "query_limits", groups.num_queries);
  }
  STD_TORCH_CHECK(entry_offsets.has_value() == entries.has_value(), op,
                  ": need entry_offsets and entries, or neither");
  groups.entry_offsets = list(entry_offsets, "entry_offsets", groups.num_keys + 1);
  groups.entries = list(entries, "entries", groups.E);
  groups.max_queries = max_queries;
  groups.max_keys = max_keys;
  return groups;
}

// Checks shapes and dtypes. Any value of a code is valid.
inline Bias bias_of(const std::string& op, const BiasTensors& tensors, const Groups& groups,
                    int64_t H) {
  const auto list = [&](const OptionalTensor& x, const char* name, ScalarType dtype,
                        int64_t size) -> const void* {
    if (!x) return nullptr;
    STD_TORCH_CHECK(
        x->scalar_type() == dtype && x->is_contiguous() && x->dim() == 1 && x->size(0) == size, op,
        ": need ", name, " [", size, "] in ", dtype == ScalarType::Int ? "int32" : "float32",
        ", contiguous");
    return x->const_data_ptr();
  };
  Bias bias = {};
  bias.query_codes = static_cast<const int32_t*>(
      list(tensors.query_codes, "query_codes", ScalarType::Int, groups.num_queries));
  bias.key_codes = static_cast<const int32_t*>(
      list(tensors.key_codes, "key_codes", ScalarType::Int, groups.num_keys));
  bias.key_bias = static_cast<const float*>(
      list(tensors.key_bias, "key_bias", ScalarType::Float, groups.num_keys));
  if (!tensors.table) return bias;
  const Tensor& table = *tensors.table;
  // Pointers to no codes are null.
  STD_TORCH_CHECK(tensors.query_codes && tensors.key_codes, op,
                  ": need query_codes and key_codes with a bias");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.is_contiguous() &&
                      table.dim() == 2 && table.size(0) == H && table.size(1) > 0 &&
                      table.size(1) < (int64_t{1} << 31),
                  op, ": need bias [", H, ", rows] in float32, contiguous");
  bias.table = table.const_data_ptr<float>();
  bias.rows = table.size(1);
  STD_TORCH_CHECK(tensors.shift >= 0 && tensors.shift < bias.rows, op, ": need 0 <= shift < ",
                  bias.rows, ", got ", tensors.shift);
  bias.shift = static_cast<int32_t>(tensors.shift);
  return bias;
}

// Checks the offsets of `count` parts of a list, and the list: `size` numbers below `end`.
inline void check_list(const std::string& op, const char* offsets_name, const int32_t* offsets,
                       int64_t count, const char* name, const int32_t* list, int64_t size,
                       int64_t end) {
  bool ascending = offsets[0] == 0 && offsets[count] == size;
  for (int64_t i = 0; i < count; i++) ascending = ascending && offsets[i] <= offsets[i + 1];
  STD_TORCH_CHECK(ascending, op, ": ", offsets_name, " must ascend from 0 to ", size);
  for (int64_t i = 0; list != nullptr && i < size; i++) {
    STD_TORCH_CHECK(list[i] >= 0 && list[i] < end, op, ": ", name, " must lie in [0, ", end,
                    "), got ", list[i]);
  }
}

// Checks the values of the lists of queries and keys, which must be on the CPU.
inline void check_lists(const std::string& op, const Groups& groups) {
  const int64_t G = groups.G, num_queries = groups.num_queries;
  check_list(op, "key_offsets", groups.key_offsets, G, "key_rows", groups.key_rows, groups.E,
             groups.num_keys);
  if (groups.query_offsets == nullptr) return;
  check_list(op, "query_offsets", groups.query_offsets, G, "query_rows", groups.query_rows,
             num_queries, num_queries);
  if (groups.query_limits == nullptr) return;
  for (int64_t g = 0; g < G; g++) {
    const int32_t keys = groups.key_offsets[g + 1] - groups.key_offsets[g];
    for (int32_t i = groups.query_offsets[g]; i < groups.query_offsets[g + 1]; i++) {
      const int32_t row = groups.query_rows == nullptr ? i : groups.query_rows[i];
      const int32_t limit = groups.query_limits[row];
      STD_TORCH_CHECK(limit >= 0 && limit <= keys, op, ": query_limits must lie in [0, ", keys,
                      "], the keys of the group, got ", limit);
    }
  }
}

// The same for the entries of every key, which only the backward reads.
inline void check_entries(const std::string& op, const Groups& groups) {
  if (groups.entry_offsets == nullptr) return;
  check_list(op, "entry_offsets", groups.entry_offsets, groups.num_keys, "entries", groups.entries,
             groups.E, groups.E);
}

// The memory for the gradient of k or v, [num_keys, H, D]. Without entries, kernels write the rows
// of the list of keys alone: where some rows may be missing in it, they have zeros.
inline Tensor grad_of_keys(const Groups& groups, const Tensor& x) {
  const std::vector<int64_t> shape = {groups.num_keys, x.size(1), x.size(2)};
  const bool all = groups.entry_offsets != nullptr || groups.E == groups.num_keys;
  return all ? new_tensor(x, shape) : torch::stable::new_zeros(x, shape);
}

inline Strided strided(const std::string& op, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1 || x.numel() == 0), op,
                  ": need ", name, " [rows, H, D] with a contiguous D");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

}  // namespace
}  // namespace vidl
