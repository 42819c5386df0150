// space_time_attention of one head of one group on the CPU; included once for each instruction set,
// after cpu/vectors.h (which says how).
//
// Everything is read into float32 first: keys also transposed, so that both products of the forward
// and all five of the backward run over contiguous rows. A block of queries meets all keys at once:
// one softmax, no rescaling. The products are scaled as the softmax reads them, not before: a
// scaled query would be rounded once more. A negative scale turns the query round, so that the
// greatest product still has the greatest weight.

constexpr int64_t kKeyStep = kWidth < 8 ? 8 : kWidth;  // rows of keys are padded to this number

// How many queries meet the keys at once: their products stay in the second-level cache.
VIDL_VECTOR_INLINE int64_t block_of(int64_t columns) {
  const int64_t rows = 32768 / columns / kTileRows * kTileRows;
  return rows < 2 * kTileRows ? 2 * kTileRows : rows > 60 ? 60 : rows;
}

template <class T>
VIDL_VECTOR_INLINE void read_row(const T* from, int64_t D, float scale, float* to) {
  for (int64_t d = 0; d < D; d++) to[d] = static_cast<float>(from[d]) * scale;
}

template <class T>
VIDL_VECTOR_INLINE void write_row(const float* from, int64_t D, float scale, T* to) {
  for (int64_t d = 0; d < D; d++) to[d] = static_cast<T>(from[d] * scale);
}

// Rows of keys or values [count, D] as they are, zero up to `padded` rows. The next head is the
// next task: its part of the row, on a page of its own, would come too late.
template <class T>
VIDL_VECTOR_INLINE void read_rows(const Strided& x, const int32_t* rows, int64_t first,
                                  int64_t count, int64_t padded, int64_t h, int64_t D, float* to) {
  const T* from = static_cast<const T*>(x.data) + h * x.head;
  for (int64_t j = 0; j < count; j++) {
    const int64_t row = rows == nullptr ? first + j : rows[first + j];
    read_row(from + row * x.row, D, 1.0f, to + j * D);
    prefetch(from + row * x.row + x.head, D);
  }
  memset(to + count * D, 0, (padded - count) * D * sizeof(float));
}

template <class T>
VIDL_VECTOR_INLINE void forward(const Attention& a, const Forward& f, int64_t g, int64_t h,
                                Scratch& scratch) {
  const int64_t D = a.D, first_query = a.query_offsets[g], first_key = a.key_offsets[g];
  const int64_t queries = a.query_offsets[g + 1] - first_query;
  const int64_t keys = a.key_offsets[g + 1] - first_key;
  const float sign = a.scale < 0 ? -1.0f : 1.0f, scale = a.scale * sign;
  const float factor = of_two(scale);
  T* const out = static_cast<T*>(f.out) + h * D;
  float* const scores = f.scores == nullptr ? nullptr : f.scores + h * a.E + first_key;
  if (keys == 0) {
    for (int64_t i = 0; i < queries; i++) {
      const int64_t row = a.query_rows == nullptr ? first_query + i : a.query_rows[first_query + i];
      for (int64_t d = 0; d < D; d++) out[row * a.H * D + d] = static_cast<T>(0.0f);
      f.lse[h * a.Q + row] = -INFINITY;
    }
    return;
  }
  const int64_t columns = round_up(keys, kKeyStep), block = block_of(columns);
  float* const values = scratch.take(columns * D);
  float* const keys_across = scratch.take(D * columns);
  float* const weights = scratch.take(block * columns);
  float* const q = scratch.take(block * D);
  float* const sums = scratch.take(block * D);
  read_rows<T>(a.k, a.key_rows, first_key, keys, columns, h, D, values);
  transpose(values, columns, D, D, keys_across, columns);
  read_rows<T>(a.v, a.key_rows, first_key, keys, keys, h, D, values);
  if (scores != nullptr) memset(scores, 0, keys * sizeof(float));

  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = first_query + start + i;
      const int64_t row = a.query_rows == nullptr ? at : a.query_rows[at];
      const T* const from = static_cast<const T*>(a.q.data) + row * a.q.row + h * a.q.head;
      read_row(from, D, sign, q + i * D);
      prefetch(from + a.q.head, D);
    }
    multiply<false>(count, columns, D, q, D, 1, keys_across, columns, weights, columns);
    float inverse[60];
    for (int64_t i = 0; i < count; i++) {
      float* const line = weights + i * columns;
      for (int64_t j = keys; j < columns; j++) line[j] = -INFINITY;
      Vector most = load(line);
      for (int64_t j = kWidth; j < columns; j += kWidth) {
        const Vector next = load(line + j);
        most = next > most ? next : most;
      }
      const float top = max_of(most);
      Vector total = {};
      for (int64_t j = 0; j < columns; j += kWidth) {
        const Vector weight = power_of_two(load(line + j) - top, factor);
        store(line + j, weight);
        total += weight;
      }
      const float sum = sum_of(total);
      inverse[i] = 1.0f / sum;
      const int64_t at = first_query + start + i;
      const int64_t row = a.query_rows == nullptr ? at : a.query_rows[at];
      f.lse[h * a.Q + row] = top * scale + std::log(sum);
    }
    multiply<false>(count, D, keys, weights, columns, 1, values, D, sums, D);
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = first_query + start + i;
      const int64_t row = a.query_rows == nullptr ? at : a.query_rows[at];
      write_row(sums + i * D, D, inverse[i], out + row * a.H * D);
    }
    if (scores == nullptr) continue;
    const int64_t scored = a.scores == Scores::kMean ? count : start == 0 ? 1 : 0;
    for (int64_t i = 0; i < scored; i++) {
      for (int64_t j = 0; j < keys; j++) scores[j] += weights[i * columns + j] * inverse[i];
    }
  }
  if (scores == nullptr || a.scores != Scores::kMean || queries == 0) return;
  for (int64_t j = 0; j < keys; j++) scores[j] /= static_cast<float>(queries);
}

template <class T>
VIDL_VECTOR_INLINE void backward(const Attention& a, const Backward& b, int64_t g, int64_t h,
                                 Scratch& scratch) {
  const int64_t D = a.D, first_query = a.query_offsets[g], first_key = a.key_offsets[g];
  const int64_t queries = a.query_offsets[g + 1] - first_query;
  const int64_t keys = a.key_offsets[g + 1] - first_key;
  const float sign = a.scale < 0 ? -1.0f : 1.0f, scale = a.scale * sign;
  const float factor = of_two(scale);
  T* const grad_q = static_cast<T*>(b.grad_q) + h * D;
  const int64_t columns = round_up(keys, kKeyStep), block = block_of(columns + 1);
  float* const k = scratch.take(columns * D);
  float* const keys_across = scratch.take(D * columns);
  float* const values_across = scratch.take(D * columns);
  float* const grad_k = scratch.take(columns * D);
  float* const grad_v = scratch.take(columns * D);
  float* const weights = scratch.take(block * columns);
  float* const grads = scratch.take(block * columns);
  float* const q = scratch.take(block * D);
  float* const grad_out = scratch.take(block * D);
  float* const sums = scratch.take(block * D);
  read_rows<T>(a.v, a.key_rows, first_key, keys, columns, h, D, k);
  transpose(k, columns, D, D, values_across, columns);
  read_rows<T>(a.k, a.key_rows, first_key, keys, columns, h, D, k);
  transpose(k, columns, D, D, keys_across, columns);
  memset(grad_k, 0, keys * D * sizeof(float));
  memset(grad_v, 0, keys * D * sizeof(float));

  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = first_query + start + i;
      const int64_t row = a.query_rows == nullptr ? at : a.query_rows[at];
      const T* const from = static_cast<const T*>(a.q.data) + row * a.q.row + h * a.q.head;
      const T* const grad_from = static_cast<const T*>(b.grad_out) + (row * a.H + h) * D;
      read_row(from, D, sign, q + i * D);
      read_row(grad_from, D, 1.0f, grad_out + i * D);
      prefetch(from + a.q.head, D);
      prefetch(grad_from + D, D);
    }
    multiply<false>(count, columns, D, q, D, 1, keys_across, columns, weights, columns);
    multiply<false>(count, columns, D, grad_out, D, 1, values_across, columns, grads, columns);
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = first_query + start + i;
      const int64_t row = a.query_rows == nullptr ? at : a.query_rows[at];
      const float level = level_of(b.lse[h * a.Q + row], scale);
      float* const weight = weights + i * columns;
      float* const grad = grads + i * columns;
      if (b.grad_scores != nullptr && (a.scores == Scores::kMean || start + i == 0)) {
        const float share =
            1.0f / static_cast<float>(a.H * (a.scores == Scores::kMean ? queries : 1));
        for (int64_t j = 0; j < keys; j++) grad[j] += b.grad_scores[first_key + j] * share;
      }
      for (int64_t j = 0; j < columns; j += kWidth) {
        store(weight + j, power_of_two(load(weight + j) - level, factor));
      }
      for (int64_t j = keys; j < columns; j++) weight[j] = 0.0f;
      // The weights of a row are made to sum to one again, as far as rounding in the log-sum-exp
      // let them stray: their gradient is a difference that would show it.
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
    }
    // Both gradients are scaled when they are written.
    multiply<true>(keys, D, count, weights, 1, columns, grad_out, D, grad_v, D);
    multiply<true>(keys, D, count, grads, 1, columns, q, D, grad_k, D);
    multiply<false>(count, D, keys, grads, columns, 1, k, D, sums, D);
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = first_query + start + i;
      const int64_t row = a.query_rows == nullptr ? at : a.query_rows[at];
      write_row(sums + i * D, D, a.scale, grad_q + row * a.H * D);
    }
  }
  for (int64_t j = 0; j < keys; j++) {
    const int64_t entry = first_key + j;
    if (b.entry_grad_k != nullptr) {  // rows that several groups share are summed afterwards
      write_row(grad_k + j * D, D, scale, b.entry_grad_k + (entry * a.H + h) * D);
      memcpy(b.entry_grad_v + (entry * a.H + h) * D, grad_v + j * D, D * sizeof(float));
    } else {
      const int64_t row = a.key_rows == nullptr ? entry : a.key_rows[entry];
      write_row(grad_k + j * D, D, scale, static_cast<T*>(b.grad_k) + (row * a.H + h) * D);
      write_row(grad_v + j * D, D, 1.0f, static_cast<T*>(b.grad_v) + (row * a.H + h) * D);
    }
  }
}

void forward_items(const Attention& a, const Forward& f, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  for (int64_t item = begin; item < end; item++) {
    scratch.reset();
    VIDL_FLOATING(a.dtype, T, forward<T>(a, f, item / a.H, item % a.H, scratch))
  }
}

void backward_items(const Attention& a, const Backward& b, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  for (int64_t item = begin; item < end; item++) {
    scratch.reset();
    VIDL_FLOATING(a.dtype, T, backward<T>(a, b, item / a.H, item % a.H, scratch))
  }
}
