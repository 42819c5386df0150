// Small matmuls and exponentials in float32 on the CPU, in vectors of kWidth floats.
//
// cpu/levels.h includes this file once for each instruction set, in a namespace of its own, with
// VIDL_WIDTH floats in a register. So there is no include guard.

constexpr int kWidth = VIDL_WIDTH;
constexpr int kTileRows = 6;  // of two registers: twelve sums hide the latency of an addition

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightIntegers __attribute__((vector_size(32), unused));

VIDL_VECTOR_INLINE Vector load(const float* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}
VIDL_VECTOR_INLINE void store(float* p, Vector v) { memcpy(p, &v, sizeof v); }

template <class T>
VIDL_VECTOR_INLINE void prefetch(const T* from, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(from + d, 0, 2);
}

// 0, 1, 2, ... kWidth - 1
VIDL_VECTOR_INLINE Integers lanes() {
  Integers v;
  for (int i = 0; i < kWidth; i++) v[i] = i;
  return v;
}

// The lanes are added in halves: for short rows a chain of additions would dominate.
VIDL_VECTOR_INLINE float sum_of(Vector v) {
  float part[kWidth];
  store(part, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  }
  return part[0];
}
VIDL_VECTOR_INLINE float max_of(Vector v) {
  float part[kWidth];
  store(part, v);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) part[i] = part[i + half] > part[i] ? part[i + half] : part[i];
  }
  return part[0];
}

// The factor for power_of_two, as exponentials are to the base two. It is at least 1e-30, so that a
// scale of zero never multiplies infinity.
VIDL_VECTOR_INLINE float of_two(float scale) {
  const float factor = static_cast<float>(scale * 1.4426950408889634);
  return factor > 1e-30f ? factor : 1e-30f;
}

// The log-sum-exp of scaled logits, on the scale of the unscaled ones.
VIDL_VECTOR_INLINE float level_of(float lse, float scale) {
  return lse / (scale > 1e-30f ? scale : 1e-30f);
}

// 2^(x * factor) for x <= 0, to about one unit in the last place (0 if the exponent is below
// -126.5; NaN stays NaN): 2^n times a minimax polynomial of the remainder in [-1/2, 1/2]. With
// fused multiply-adds only the remainder is rounded, never x * factor.
VIDL_VECTOR_INLINE Vector power_of_two(Vector x, float factor) {
  const Vector least = Vector{} - 127.0f / factor;  // n is -127 there, and 2^n comes out as zero
  const Vector low = x < least ? least : x;
  const Vector shifted = low * factor + 12582912.0f;  // the integer part is in the low bits
  const Vector r = low * factor - (shifted - 12582912.0f);
  Vector p = r * 1.535336186e-4f + 1.339887449e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.0f;
  Bits bits;  // unsigned, as they overflow
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);  // the bits of the magic number are shifted out
  Vector power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

// to[c][r] = from[r][c] for 8 rows and 8 columns.
VIDL_VECTOR_INLINE void transpose_8x8(const float* from, int64_t from_stride, float* to,
                                      int64_t to_stride) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; i++) memcpy(&a[i], from + i * from_stride, sizeof(Eight));
  for (int i = 0; i < 4; i++) {
    b[2 * i] = VIDL_SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[2 * i + 1] = VIDL_SHUFFLE(a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 2; j++) {
      const Eight x = b[4 * i + j], y = b[4 * i + j + 2];
      a[4 * i + 2 * j] = VIDL_SHUFFLE(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
      a[4 * i + 2 * j + 1] = VIDL_SHUFFLE(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; i++) {
    const Eight low = VIDL_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Eight high = VIDL_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    memcpy(to + i * to_stride, &low, sizeof low);
    memcpy(to + (i + 4) * to_stride, &high, sizeof high);
  }
}

// to[c][r] = from[r][c]; `rows` and `columns` are multiples of 8.
VIDL_VECTOR_INLINE void transpose(const float* from, int64_t rows, int64_t columns,
                                  int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += 8) {
    for (int64_t c = 0; c < columns; c += 8) {
      transpose_8x8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
}

// kRows rows and kVectors vectors of the result c; see multiply().
template <int kRows, int kVectors, bool kAdd>
VIDL_VECTOR_INLINE void tile(const float* a, int64_t a_row, int64_t a_depth, const float* b,
                             int64_t b_depth, float* c, int64_t c_row, int64_t depth) {
  Vector sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    Vector line[kVectors];
    for (int i = 0; i < kVectors; i++) line[i] = load(b + k * b_depth + i * kWidth);
    for (int r = 0; r < kRows; r++) {
      const float x = a[r * a_row + k * a_depth];
      for (int i = 0; i < kVectors; i++) sum[r][i] += line[i] * x;
    }
  }
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < kVectors; i++) {
      float* const to = c + r * c_row + i * kWidth;
      store(to, kAdd ? load(to) + sum[r][i] : sum[r][i]);
    }
  }
}

template <int kRows, int kVectors, bool kAdd>
VIDL_VECTOR_INLINE void rows_of_tiles(int64_t rows, const float* a, int64_t a_row, int64_t a_depth,
                                      const float* b, int64_t b_depth, float* c, int64_t c_row,
                                      int64_t depth) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      tile<kRows, kVectors, kAdd>(a, a_row, a_depth, b, b_depth, c, c_row, depth);
    } else {
      rows_of_tiles<kRows - 1, kVectors, kAdd>(rows, a, a_row, a_depth, b, b_depth, c, c_row,
                                               depth);
    }
  }
}

// The depth is summed in steps of this length: the part of b that a step reads stays in the
// first-level cache, and rounding errors grow with the number of steps instead of the depth.
constexpr int64_t kDepthStep = 256;

// c[m][n] = (or += with kAdd) the sum over k of a[m][k] * b[k][n]. a has any strides, so it may be
// a transpose; b and c have contiguous rows of `columns` numbers, a multiple of kWidth.
template <bool kAdd>
__attribute__((noinline)) void multiply(int64_t rows, int64_t columns, int64_t depth,
                                        const float* a, int64_t a_row, int64_t a_depth,
                                        const float* b, int64_t b_depth, float* c, int64_t c_row) {
  const int64_t parts = (rows + kTileRows - 1) / kTileRows;
  for (int64_t n = 0; n < columns; n += 2 * kWidth) {
    for (int64_t k = 0; k == 0 || k < depth; k += kDepthStep) {  // a depth of 0 gives zeros
      const int64_t steps = depth - k < kDepthStep ? depth - k : kDepthStep;
      for (int64_t part = 0; part < parts; part++) {  // with nearly equal numbers of rows
        const int64_t m = rows * part / parts, count = rows * (part + 1) / parts - m;
        const float* const left = a + m * a_row + k * a_depth;
        const float* const right = b + k * b_depth + n;
        float* const sums = c + m * c_row + n;
        const bool wide = columns - n >= 2 * kWidth;
        if (kAdd || k > 0) {
          if (wide) {
            rows_of_tiles<kTileRows, 2, true>(count, left, a_row, a_depth, right, b_depth, sums,
                                              c_row, steps);
          } else {
            rows_of_tiles<kTileRows, 1, true>(count, left, a_row, a_depth, right, b_depth, sums,
                                              c_row, steps);
          }
        } else if (wide) {
          rows_of_tiles<kTileRows, 2, false>(count, left, a_row, a_depth, right, b_depth, sums,
                                             c_row, steps);
        } else {
          rows_of_tiles<kTileRows, 1, false>(count, left, a_row, a_depth, right, b_depth, sums,
                                             c_row, steps);
        }
      }
    }
  }
}
