// space_time_attention of one head of one group on the CPU; included once for each instruction set,
// after cpu/vectors.h (see there).
//
// All rows are converted to float32 first. Keys are also transposed, so that both matmuls of the
// forward and all five of the backward read contiguous rows. Values narrower than keys are padded
// to whole vectors there, and multiplied in their own width. A block of queries meets all keys at
// once: one softmax without rescaling. The scale is applied inside the softmax: scaled queries
// would be rounded once more. A negative scale negates the queries, so that the greatest logit
// still has the greatest weight. With a bias the logits are scaled before it is added.
#include "groups/bias.h"

template <class T>
VIDL_VECTOR_INLINE void forward(const SpaceTimeAttention& a, const Forward& f, int64_t g, int64_t h,
                                Scratch& scratch) {
  const Groups& groups = a.groups;
  const auto [first_query, queries, first_key, keys] = group_of(groups, g);
  const int64_t D = a.D, Dv = a.Dv, width = round_up(Dv, kKeyStep);
  const float sign = a.scale < 0 ? -1.0f : 1.0f, scale = a.scale * sign;
  T* const out = static_cast<T*>(f.out) + h * Dv;
  float* const scores = f.scores == nullptr ? nullptr : f.scores + h * groups.E + first_key;
  const bool biased = is_given(a.bias);
  const GroupBias bias = bias_of(a.bias, groups, h, first_key, keys, scratch);
  if (bias.first == keys) {
    if (scores != nullptr) memset(scores, 0, keys * sizeof(float));
    for (int64_t i = 0; i < queries; i++) {
      const int64_t row = row_of(groups.query_rows, first_query + i);
      for (int64_t d = 0; d < Dv; d++) out[row * a.H * Dv + d] = static_cast<T>(0.0f);
      f.lse[h * groups.num_queries + row] = -INFINITY;
    }
    return;
  }
  const int64_t columns = round_up(keys, kKeyStep), block = queries_at_once(columns);
  float* const values = scratch.take(columns * D);
  float* const keys_across = scratch.take(D * columns);
  float* const weights = scratch.take(block * columns);
  float* const q = scratch.take(block * D);
  float* const sums = scratch.take(block * width);
  float* const block_scores = scratch.take(columns);
  float* const lost = scratch.take(columns);
  memset(lost, 0, columns * sizeof(float));
  read_rows<T>(a.k, groups.key_rows, first_key, keys, columns, h, D, D, 1.0f, values);
  transpose(values, columns, D, D, keys_across, columns);
  read_rows<T>(a.v, groups.key_rows, first_key, keys, keys, h, Dv, width, 1.0f, values);
  if (scores != nullptr) memset(scores, 0, keys * sizeof(float));

  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    const int64_t first = first_query + start;
    read_rows<T>(a.q, groups.query_rows, first, count, count, h, D, D, sign, q);
    const Seen seen = seen_by_block(groups, first, count, keys, bias.first);
    multiply<false>(count, seen.columns, D, q, D, 1, keys_across, columns, weights, columns);
    float inverse[kMostQueries];
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      float* const line = weights + i * columns;
      const int64_t own = seen.keys(i), used = round_up(own, kWidth);
      clear(line, used, seen.columns);
      if (own == 0) {
        inverse[i] = 0.0f;
        f.lse[h * groups.num_queries + row] = -INFINITY;
        continue;
      }
      if (biased) add_bias(line, own, scale, bias, row);
      const RowOfWeights sum = exponentiate(line, own, used, biased ? 1.0f : scale);
      inverse[i] = sum.inverse;
      f.lse[h * groups.num_queries + row] = sum.lse;
    }
    multiply<false>(count, width, seen.most, weights, columns, 1, values, width, sums, width);
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      if (seen.keys(i) == 0) memset(sums + i * width, 0, width * sizeof(float));
      write_row(sums + i * width, Dv, inverse[i], out + row * a.H * Dv);
    }
    if (scores == nullptr) continue;
    const int64_t scored = a.scores == Scores::kMean ? count : start == 0 ? 1 : 0;
    memset(block_scores, 0, columns * sizeof(float));
    for (int64_t i = 0; i < scored; i++) {
      for (int64_t j = 0; j < seen.keys(i); j++) {
        block_scores[j] += weights[i * columns + j] * inverse[i];
      }
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
  const int64_t D = a.D, Dv = a.Dv, width = round_up(Dv, kKeyStep);
  const float sign = a.scale < 0 ? -1.0f : 1.0f, scale = a.scale * sign;
  const bool biased = is_given(a.bias);
  const GroupBias bias = bias_of(a.bias, groups, h, first_key, keys, scratch);
  const float logit_scale = biased ? 1.0f : scale, factor = of_two(logit_scale);
  T* const grad_q = static_cast<T*>(b.grad_q) + h * D;
  const int64_t columns = round_up(keys, kKeyStep), block = queries_at_once(columns + 1);
  float* const k = scratch.take(columns * D);
  float* const keys_across = scratch.take(D * columns);
  float* const values_across = scratch.take(width * columns);
  const QuerySum grad_k = query_sum(keys * D, queries, block, scratch);
  const QuerySum grad_v = query_sum(keys * width, queries, block, scratch);
  float* const weights = scratch.take(block * columns);
  float* const grads = scratch.take(block * columns);
  float* const q = scratch.take(block * D);
  float* const grad_out = scratch.take(block * width);
  float* const sums = scratch.take(block * D);
  read_rows<T>(a.v, groups.key_rows, first_key, keys, columns, h, Dv, width, 1.0f, k);
  transpose(k, columns, width, width, values_across, columns);
  read_rows<T>(a.k, groups.key_rows, first_key, keys, columns, h, D, D, 1.0f, k);
  transpose(k, columns, D, D, keys_across, columns);

  const TableSums table = table_sums(grad_table, bias, queries, keys, scratch);
  const Strided grads_of_out = {b.grad_out, a.H * Dv, Dv};
  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    const int64_t first = first_query + start;
    read_rows<T>(a.q, groups.query_rows, first, count, count, h, D, D, sign, q);
    read_rows<T>(grads_of_out, groups.query_rows, first, count, count, h, Dv, width, 1.0f,
                 grad_out);
    const Seen seen = seen_by_block(groups, first, count, keys, bias.first);
    multiply<false>(count, seen.columns, D, q, D, 1, keys_across, columns, weights, columns);
    multiply<false>(count, seen.columns, Dv, grad_out, width, 1, values_across, columns, grads,
                    columns);
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      const float level = level_of(b.lse[h * groups.num_queries + row], logit_scale);
      float* const weight = weights + i * columns;
      float* const grad = grads + i * columns;
      const int64_t own = seen.keys(i), used = round_up(own, kWidth);
      clear(weight, used, seen.columns);
      clear(grad, used, seen.columns);
      if (own == 0) continue;
      if (biased) add_bias(weight, own, scale, bias, row);
      if (b.grad_scores != nullptr && (a.scores == Scores::kMean || start + i == 0)) {
        const float share =
            1.0f / static_cast<float>(a.H * (a.scores == Scores::kMean ? queries : 1));
        for (int64_t j = 0; j < own; j++) grad[j] += b.grad_scores[first_key + j] * share;
      }
      for (int64_t j = 0; j < used; j += kWidth) {
        store(weight + j, power_of_two(load(weight + j) - level, factor));
      }
      for (int64_t j = own; j < used; j++) weight[j] = 0.0f;
      // The weights of a row are divided by their sum again, which differs from one by the rounding
      // error of the log-sum-exp: their gradient is a difference, in which that error would show.
      Vector sum = {}, total = {};
      for (int64_t j = 0; j < used; j += kWidth) {
        sum += load(weight + j);
        total += load(weight + j) * load(grad + j);
      }
      const float inverse = 1.0f / sum_of(sum), delta = sum_of(total) * inverse;
      for (int64_t j = 0; j < used; j += kWidth) {
        const Vector normal = load(weight + j) * inverse;
        store(weight + j, normal);
        store(grad + j, normal * (load(grad + j) - delta));
      }
      if (own == 1) grad[0] = 0.0f * grad[0];  // one key always has all the weight
      if (grad_table != nullptr) add_to_table(grad, own, bias, row, table);
    }
    // Both gradients are scaled when they are written.
    multiply<true>(seen.most, width, count, weights, 1, columns, grad_out, width, grad_v.part,
                   width);
    multiply<true>(seen.most, D, count, grads, 1, columns, q, D, grad_k.part, D);
    end_block(grad_v, start, block, queries);
    end_block(grad_k, start, block, queries);
    multiply<false>(count, D, seen.most, grads, columns, 1, k, D, sums, D);
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_of(groups.query_rows, first + i);
      if (seen.keys(i) == 0) memset(sums + i * D, 0, D * sizeof(float));
      write_row(sums + i * D, D, a.scale, grad_q + row * a.H * D);
    }
  }
  end_sums(table, bias);
  for (int64_t j = 0; j < keys; j++) {
    const int64_t entry = first_key + j;
    if (b.entry_grad_k != nullptr) {  // rows that several groups share are summed afterwards
      write_row(grad_k.total + j * D, D, scale, b.entry_grad_k + (entry * a.H + h) * D);
      write_row(grad_v.total + j * width, Dv, 1.0f, b.entry_grad_v + (entry * a.H + h) * Dv);
    } else {
      const int64_t row = row_of(groups.key_rows, entry);
      write_row(grad_k.total + j * D, D, scale, static_cast<T*>(b.grad_k) + (row * a.H + h) * D);
      write_row(grad_v.total + j * width, Dv, 1.0f,
                static_cast<T*>(b.grad_v) + (row * a.H + h) * Dv);
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
    const int64_t h = item % a.H;
    float* const grad_table = b.bias_parts + item * a.bias.rows;
    memset(grad_table, 0, a.bias.rows * sizeof(float));
    for_part(a.groups.G, item / a.H, b.parts, scratch, [&](int64_t g) {
      VIDL_FLOATING(a.dtype, T, backward<T>(a, b, g, h, grad_table, scratch))
    });
  });
}
