// token_scores of one group on the CPU; included once for each instruction set (cpu/levels.h).
//
// One query against all keys ("cls", "value") reads the keys once, as they lie, some heads at a
// time. All queries ("mean") are space_time_attention without its values; the keys are read into
// float32 and transposed, a block of queries meets them all, and their weights are added up.

constexpr int64_t kKeyStep = kWidth < 8 ? 8 : kWidth;  // rows of keys are padded to this number

// How many queries meet the keys at once: their products stay in the second-level cache.
VIDL_VECTOR_INLINE int64_t block_of(int64_t columns) {
  const int64_t rows = 32768 / (columns + 1) / kTileRows * kTileRows;
  return rows < 2 * kTileRows ? 2 * kTileRows : rows > 60 ? 60 : rows;
}

template <class T>
VIDL_VECTOR_INLINE void read_row(const T* from, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d++) to[d] = static_cast<float>(from[d]);
}

// The same row in float32: where it is, or in `room`.
template <class T>
VIDL_VECTOR_INLINE const float* as_floats(const T* from, int64_t D, float* room) {
  if constexpr (std::is_same_v<T, float>) {
    return from;
  } else {
    read_row(from, D, room);
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

VIDL_VECTOR_INLINE int64_t row_of(const int32_t* rows, int64_t place) {
  return rows == nullptr ? place : rows[place];
}

// Products become weights of their softmax, from `keys` on zeros; returns the log-sum-exp.
// `columns` is a multiple of kWidth.
VIDL_VECTOR_INLINE float softmax(float* line, int64_t keys, int64_t columns, float scale) {
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
  const float sum = sum_of(total), inverse = 1.0f / sum;
  for (int64_t j = 0; j < columns; j += kWidth) store(line + j, load(line + j) * inverse);
  return top * scale + std::log(sum);
}

// ---- cls ---------------------------------------------------------------------------------------

// Rows of keys that are fetched beforehand: each begins on a page of its own, where no hardware
// prefetcher expects it.
constexpr int64_t kAhead = 8;

template <class T>
VIDL_VECTOR_INLINE void prefetch_row(const T* from, int64_t heads, int64_t head, int64_t D) {
  for (int64_t h = 0; h < heads; h++) prefetch(from + h * head, D);
}

template <class T>
VIDL_VECTOR_INLINE void first_query_weights(const Scoring& s, float* weights, int64_t g,
                                            int64_t first_head, Scratch& scratch) {
  const int64_t D = s.D, first_key = s.key_offsets[g], keys = s.key_offsets[g + 1] - first_key;
  const int64_t heads = s.H - first_head < s.heads ? s.H - first_head : s.heads;
  if (s.query_offsets[g] == s.query_offsets[g + 1] || keys == 0) {
    for (int64_t h = 0; h < heads; h++) {
      memset(weights + (first_head + h) * s.E + first_key, 0, keys * sizeof(float));
    }
    return;
  }
  const int64_t columns = round_up(keys, kKeyStep);
  // A negative scale turns the query round, so that the greatest product has the greatest weight.
  const float sign = s.scale < 0 ? -1.0f : 1.0f;
  float* const q = scratch.take(heads * D);
  float* const room = scratch.take(D);
  float* const lines = scratch.take(heads * columns);
  const T* const query = static_cast<const T*>(s.q.data) + first_head * s.q.head +
                         row_of(s.query_rows, s.query_offsets[g]) * s.q.row;
  for (int64_t h = 0; h < heads; h++) {
    read_row(query + h * s.q.head, D, q + h * D);
    for (int64_t d = 0; d < D; d++) q[h * D + d] *= sign;
  }
  const T* const k = static_cast<const T*>(s.k.data) + first_head * s.k.head;
  for (int64_t j = 0; j < keys; j++) {
    if (j + kAhead < keys) {
      prefetch_row(k + row_of(s.key_rows, first_key + j + kAhead) * s.k.row, heads, s.k.head, D);
    }
    const T* const key = k + row_of(s.key_rows, first_key + j) * s.k.row;
    for (int64_t h = 0; h < heads; h++) {
      lines[h * columns + j] = dot(as_floats(key + h * s.k.head, D, room), q + h * D, D);
    }
  }
  for (int64_t h = 0; h < heads; h++) {
    softmax(lines + h * columns, keys, columns, s.scale * sign);
    memcpy(weights + (first_head + h) * s.E + first_key, lines + h * columns, keys * sizeof(float));
  }
}

template <class T>
VIDL_VECTOR_INLINE void first_query_grads(const Scoring& s, const Gradients& b, int64_t g,
                                          int64_t first_head, Scratch& scratch) {
  const int64_t D = s.D, first_key = s.key_offsets[g], keys = s.key_offsets[g + 1] - first_key;
  const int64_t heads = s.H - first_head < s.heads ? s.H - first_head : s.heads;
  const bool asked = s.query_offsets[g] < s.query_offsets[g + 1];
  const float share = 1.0f / static_cast<float>(s.H);
  float* const q = scratch.take(heads * D);
  float* const grad_q = scratch.take(heads * D);
  float* const room = scratch.take(D);
  float* const grads = scratch.take(heads * keys);
  memset(grad_q, 0, heads * D * sizeof(float));
  memset(q, 0, heads * D * sizeof(float));
  const int64_t query = asked ? row_of(s.query_rows, s.query_offsets[g]) : 0;
  for (int64_t h = 0; h < heads; h++) {
    const int64_t head = first_head + h;
    if (asked) {
      read_row(static_cast<const T*>(s.q.data) + query * s.q.row + head * s.q.head, D, q + h * D);
    }
    const float* const weights = b.weights + head * s.E + first_key;
    double reached = 0.0;
    for (int64_t j = 0; j < keys; j++) reached += weights[j] * b.grad_scores[first_key + j];
    const float delta = static_cast<float>(reached);
    for (int64_t j = 0; j < keys; j++) {
      const float grad = weights[j] * (b.grad_scores[first_key + j] - delta) * share * s.scale;
      grads[h * keys + j] = asked ? grad : 0.0f;
    }
    if (b.grad_logits != nullptr) {
      memcpy(b.grad_logits + head * s.E + first_key, grads + h * keys, keys * sizeof(float));
    }
  }
  const T* const k = static_cast<const T*>(s.k.data) + first_head * s.k.head;
  for (int64_t j = 0; j < keys; j++) {
    const int64_t row = row_of(s.key_rows, first_key + j);
    if (j + kAhead < keys) {
      prefetch_row(k + row_of(s.key_rows, first_key + j + kAhead) * s.k.row, heads, s.k.head, D);
    }
    for (int64_t h = 0; h < heads; h++) {
      const int64_t head = first_head + h;
      const float grad = grads[h * keys + j];
      const T* const key = k + row * s.k.row + h * s.k.head;
      const float* const numbers = as_floats(key, D, room);
      for (int64_t d = 0; d < D; d++) grad_q[h * D + d] += grad * numbers[d];
      if (b.grad_logits != nullptr) continue;  // rows that several groups share are summed later
      T* const to = static_cast<T*>(b.grad_k) + (row * s.H + head) * D;
      for (int64_t d = 0; d < D; d++) to[d] = static_cast<T>(grad * q[h * D + d]);
    }
  }
  for (int64_t h = 0; asked && h < heads; h++) {
    T* const to = static_cast<T*>(b.grad_q) + (query * s.H + first_head + h) * D;
    for (int64_t d = 0; d < D; d++) to[d] = static_cast<T>(grad_q[h * D + d]);
  }
}

// The gradient of a row of k that several groups share: the sum over its entries, in order.
template <class T>
VIDL_VECTOR_INLINE void shared_row(const Scoring& s, const Gradients& b, const int32_t* entries,
                                   int64_t count, int64_t row, float* sums) {
  for (int64_t h = 0; h < s.H; h++) {
    memset(sums, 0, s.D * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
      const int64_t first_query = s.query_offsets[b.group[entries[i]]];
      if (first_query == s.query_offsets[b.group[entries[i]] + 1]) continue;
      const float grad = b.grad_logits[h * s.E + entries[i]];
      const T* const query = static_cast<const T*>(s.q.data) + h * s.q.head +
                             row_of(s.query_rows, first_query) * s.q.row;
      for (int64_t d = 0; d < s.D; d++) sums[d] += grad * static_cast<float>(query[d]);
    }
    T* const to = static_cast<T*>(b.grad_k) + (row * s.H + h) * s.D;
    for (int64_t d = 0; d < s.D; d++) to[d] = static_cast<T>(sums[d]);
  }
}

// ---- mean --------------------------------------------------------------------------------------

// Rows of q, k or v of one head in float32, [padded, width], zeros beyond what there is.
template <class T>
VIDL_VECTOR_INLINE void read_rows(const Strided& x, const int32_t* rows, int64_t first,
                                  int64_t count, int64_t padded, int64_t h, int64_t D,
                                  int64_t width, float* to) {
  const T* from = static_cast<const T*>(x.data) + h * x.head;
  for (int64_t j = 0; j < count; j++) {
    read_row(from + row_of(rows, first + j) * x.row, D, to + j * width);
    for (int64_t d = D; d < width; d++) to[j * width + d] = 0.0f;
  }
  memset(to + count * width, 0, (padded - count) * width * sizeof(float));
}

template <class T>
VIDL_VECTOR_INLINE void mean_weights(const Scoring& s, float* by_head, float* lse, int64_t g,
                                     int64_t h, Scratch& scratch) {
  const int64_t first_query = s.query_offsets[g], first_key = s.key_offsets[g];
  const int64_t queries = s.query_offsets[g + 1] - first_query;
  const int64_t keys = s.key_offsets[g + 1] - first_key;
  const int64_t columns = round_up(keys, kKeyStep), width = round_up(s.D, 16);
  const int64_t block = block_of(columns);
  const float sign = s.scale < 0 ? -1.0f : 1.0f, scale = s.scale * sign;
  float* const rows = scratch.take(columns * width);
  float* const keys_across = scratch.take(width * columns);
  float* const weights = scratch.take(block * columns);
  float* const q = scratch.take(block * width);
  // Of a block, then of all: rounding errors grow with the number of terms of one sum.
  float* const sums = scratch.take(columns);
  float* const all = scratch.take(columns);
  memset(all, 0, columns * sizeof(float));
  read_rows<T>(s.k, s.key_rows, first_key, keys, columns, h, s.D, width, rows);
  transpose(rows, columns, width, width, keys_across, columns);
  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    read_rows<T>(s.q, s.query_rows, first_query + start, count, count, h, s.D, width, q);
    if (sign < 0) {
      for (int64_t i = 0; i < count * width; i++) q[i] = -q[i];
    }
    multiply<false>(count, columns, s.D, q, width, 1, keys_across, columns, weights, columns);
    memset(sums, 0, columns * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
      float* const line = weights + i * columns;
      const int64_t query = row_of(s.query_rows, first_query + start + i);
      const float found = keys == 0 ? -INFINITY : softmax(line, keys, columns, scale);
      if (lse != nullptr) lse[h * s.Q + query] = found;
      for (int64_t j = 0; j < columns; j += kWidth) {
        store(sums + j, load(sums + j) + load(line + j));
      }
    }
    for (int64_t j = 0; j < columns; j += kWidth) store(all + j, load(all + j) + load(sums + j));
  }
  const float inverse = queries == 0 ? 0.0f : 1.0f / static_cast<float>(queries);
  for (int64_t j = 0; j < keys; j++) by_head[h * s.E + first_key + j] = all[j] * inverse;
}

template <class T>
VIDL_VECTOR_INLINE void mean_grads(const Scoring& s, const Gradients& b, int64_t g, int64_t h,
                                   Scratch& scratch) {
  const int64_t first_query = s.query_offsets[g], first_key = s.key_offsets[g];
  const int64_t queries = s.query_offsets[g + 1] - first_query;
  const int64_t keys = s.key_offsets[g + 1] - first_key;
  const int64_t columns = round_up(keys, kKeyStep), width = round_up(s.D, 16);
  const int64_t block = block_of(columns);
  const float sign = s.scale < 0 ? -1.0f : 1.0f;
  const float share = s.scale / static_cast<float>(s.H * (queries == 0 ? 1 : queries));
  float* const k = scratch.take(columns * width);
  float* const keys_across = scratch.take(width * columns);
  float* const grad_k = scratch.take(columns * width);
  float* const weights = scratch.take(block * columns);
  float* const q = scratch.take(block * width);
  float* const sums = scratch.take(block * width);
  float* const grad = scratch.take(columns);
  memset(grad, 0, columns * sizeof(float));
  for (int64_t j = 0; j < keys; j++) grad[j] = b.grad_scores[first_key + j];
  memset(grad_k, 0, columns * width * sizeof(float));
  read_rows<T>(s.k, s.key_rows, first_key, keys, columns, h, s.D, width, k);
  transpose(k, columns, width, width, keys_across, columns);
  for (int64_t start = 0; start < queries; start += block) {
    const int64_t count = queries - start < block ? queries - start : block;
    read_rows<T>(s.q, s.query_rows, first_query + start, count, count, h, s.D, width, q);
    if (sign < 0) {
      for (int64_t i = 0; i < count * width; i++) q[i] = -q[i];
    }
    multiply<false>(count, columns, s.D, q, width, 1, keys_across, columns, weights, columns);
    for (int64_t i = 0; i < count; i++) {
      float* const line = weights + i * columns;
      if (keys == 0) continue;
      // From the products again rather than from the log-sum-exp, which would round once more.
      softmax(line, keys, columns, s.scale * sign);
      Vector total = {};
      for (int64_t j = 0; j < columns; j += kWidth) total += load(line + j) * load(grad + j);
      const float delta = sum_of(total);
      for (int64_t j = 0; j < columns; j += kWidth) {
        store(line + j, load(line + j) * (load(grad + j) - delta));
      }
      if (keys == 1) line[0] = 0.0f * line[0];  // one key always has all the weight
    }
    multiply<true>(keys, width, count, weights, 1, columns, q, width, grad_k, width);
    multiply<false>(count, width, keys, weights, columns, 1, k, width, sums, width);
    for (int64_t i = 0; i < count; i++) {
      const int64_t query = row_of(s.query_rows, first_query + start + i);
      T* const to = static_cast<T*>(b.grad_q) + (query * s.H + h) * s.D;
      for (int64_t d = 0; d < s.D; d++) to[d] = static_cast<T>(sums[i * width + d] * share);
    }
  }
  for (int64_t j = 0; j < keys; j++) {
    const int64_t entry = first_key + j;
    if (b.entry_grad_k != nullptr) {  // rows that several groups share are summed afterwards
      float* const to = b.entry_grad_k + (entry * s.H + h) * s.D;
      for (int64_t d = 0; d < s.D; d++) to[d] = grad_k[j * width + d] * share * sign;
    } else {
      T* const to = static_cast<T*>(b.grad_k) + (row_of(s.key_rows, entry) * s.H + h) * s.D;
      for (int64_t d = 0; d < s.D; d++)
        to[d] = static_cast<T>(grad_k[j * width + d] * share * sign);
    }
  }
}

// ---- value -------------------------------------------------------------------------------------

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

// ---- similarity --------------------------------------------------------------------------------

// The mean of a key over its heads, divided by its length: [D].
template <class T>
VIDL_VECTOR_INLINE void direction(const Scoring& s, int64_t row, float* to) {
  const T* const from = static_cast<const T*>(s.k.data) + row * s.k.row;
  memset(to, 0, s.D * sizeof(float));
  for (int64_t h = 0; h < s.H; h++) {
    for (int64_t d = 0; d < s.D; d++) to[d] += static_cast<float>(from[h * s.k.head + d]);
  }
  for (int64_t d = 0; d < s.D; d++) to[d] /= static_cast<float>(s.H);
  const float length = std::sqrt(dot(to, to, s.D));
  for (int64_t d = 0; d < s.D; d++) to[d] /= length < 1e-12f ? 1e-12f : length;
}

template <class T>
VIDL_VECTOR_INLINE void unlike(const Scoring& s, float* scores, int64_t g, Scratch& scratch) {
  const int64_t first = s.key_offsets[g], keys = s.key_offsets[g + 1] - first;
  const int64_t even = (keys + 1) / 2, odd = keys / 2, width = round_up(s.D, 16);
  const int64_t columns = round_up(odd, kKeyStep), block = block_of(columns);
  scores += first;
  float* const evens = scratch.take(even * width);
  float* const odds = scratch.take(columns * width);
  float* const odds_across = scratch.take(width * columns);
  float* const cosines = scratch.take(block * columns);
  memset(odds, 0, columns * width * sizeof(float));
  for (int64_t j = 0; j < keys; j++) {
    direction<T>(s, row_of(s.key_rows, first + j), (j % 2 ? odds : evens) + j / 2 * width);
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
        wrong += cosine - cosine;  // NaN, if a cosine is
      }
      scores[2 * (start + i)] = -(most + wrong);
    }
  }
}

// ---- Items of a thread -------------------------------------------------------------------------

void cls_items(const Scoring& s, float* weights, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const int64_t parts = (s.H + s.heads - 1) / s.heads;
  for (int64_t item = begin; item < end; item++) {
    scratch.reset();
    VIDL_FLOATING(s.dtype, T,
                  first_query_weights<T>(s, weights, item / parts, item % parts * s.heads, scratch))
  }
}

void cls_backward_items(const Scoring& s, const Gradients& b, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const int64_t parts = (s.H + s.heads - 1) / s.heads;
  for (int64_t item = begin; item < end; item++) {
    scratch.reset();
    VIDL_FLOATING(s.dtype, T,
                  first_query_grads<T>(s, b, item / parts, item % parts * s.heads, scratch))
  }
}

void shared_rows(const Scoring& s, const Gradients& b, const int32_t* starts,
                 const int32_t* entries, int64_t begin, int64_t end) {
  std::vector<float> sums(s.D);
  for (int64_t row = begin; row < end; row++) {
    VIDL_FLOATING(
        s.dtype, T,
        shared_row<T>(s, b, entries + starts[row], starts[row + 1] - starts[row], row, sums.data()))
  }
}

void mean_items(const Scoring& s, float* by_head, float* lse, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  for (int64_t item = begin; item < end; item++) {
    scratch.reset();
    VIDL_FLOATING(s.dtype, T, mean_weights<T>(s, by_head, lse, item / s.H, item % s.H, scratch))
  }
}

void mean_backward_items(const Scoring& s, const Gradients& b, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  for (int64_t item = begin; item < end; item++) {
    scratch.reset();
    VIDL_FLOATING(s.dtype, T, mean_grads<T>(s, b, item / s.H, item % s.H, scratch))
  }
}

void lengths_of_rows(const Scoring& s, float* norms, int64_t begin, int64_t end) {
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

void similarity_items(const Scoring& s, float* scores, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  for (int64_t g = begin; g < end; g++) {
    scratch.reset();
    VIDL_FLOATING(s.dtype, T, unlike<T>(s, scores, g, scratch))
  }
}
