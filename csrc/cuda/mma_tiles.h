// Tiles of 16-bit numbers in shared memory, rows of D numbers, and matmuls of 16 x 16 squares of
// them on the tensor cores, by a warp. For CUDA sources and for the emulator of tests/cuda_on_cpu.
#pragma once
#include "cuda/primitives.h"

namespace vidl {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Eight more numbers per row make it an odd number of 16-byte units. The same unit of eight
// neighbouring rows, which ldmatrix reads and put() writes, then lies in different banks.
template <int D>
constexpr int kStride = D + 8;

// 16 x 16 sums as mma leaves them: s[j][2 * i + l] is row lane / 4 + 8 * i, column
// 8 * j + lane % 4 * 2 + l.
typedef float Square[2][4];

__device__ __forceinline__ int row_of_lane(int i) { return int(lane_id()) / 4 + 8 * i; }
__device__ __forceinline__ int column_of_lane(int j) { return 8 * j + int(lane_id()) % 4 * 2; }

// Loads the 16 x 16 numbers of a tile from (row, column) on as an operand of mma. Left operand:
// rows by columns with <true, false>, transposed with <false, true>. Right operand, two of 16 x 8:
// rows by columns with <true, true>, transposed with <false, false>.
template <bool kDown, bool kTransposed, class T>
__device__ __forceinline__ void load_square(uint32_t (&r)[4], const T* tile, int stride, int row,
                                            int column) {
  const int lane = lane_id(), matrix = lane / 8;
  const int down = kDown ? matrix % 2 : matrix / 2, across = kDown ? matrix / 2 : matrix % 2;
  ldmatrix<4, kTransposed>(r, tile + (row + lane % 8 + 8 * down) * stride + column + 8 * across);
}

template <class T>
__device__ __forceinline__ void multiply(Square& sums, const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
  mma_m16n8k16<T>(sums[0], a, left);
  mma_m16n8k16<T>(sums[1], a, right);
}

// 16 whole rows of a tile as left operands.
template <int D>
struct Rows16 {
  uint32_t x[D / 16][4];

  template <class T>
  __device__ __forceinline__ void load(const T* tile) {
#pragma unroll
    for (int n = 0; n < D / 16; n++) load_square<true, false>(x[n], tile, kStride<D>, 0, 16 * n);
  }
};

// sums = rows times the transpose of 16 rows of a tile
template <class T, int D>
__device__ __forceinline__ void multiply_transposed(Square& sums, const Rows16<D>& rows,
                                                    const T* tile, int row) {
#pragma unroll
  for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    uint32_t b[4];
    load_square<false, false>(b, tile, kStride<D>, row, 16 * n);
    multiply<T>(sums, rows.x[n], b);
  }
}

// The same for 16 rows of two tiles: slower, but with fewer registers.
template <class T, int D>
__device__ __forceinline__ void multiply_tiles(Square& sums, const T* x, int x_row, const T* y,
                                               int y_row) {
#pragma unroll
  for (int i = 0; i < 8; i++) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    uint32_t a[4], b[4];
    load_square<true, false>(a, x, kStride<D>, x_row, 16 * n);
    load_square<false, false>(b, y, kStride<D>, y_row, 16 * n);
    multiply<T>(sums, a, b);
  }
}

// sums += a 16 x 16 matrix times 16 rows of a tile
template <class T, int D>
__device__ __forceinline__ void accumulate(Square (&sums)[D / 16], const uint32_t (&a)[4],
                                           const T* tile, int row) {
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    uint32_t b[4];
    load_square<true, true>(b, tile, kStride<D>, row, 16 * n);
    multiply<T>(sums[n], a, b);
  }
}

// Rounds sums to 16 bits, as a left operand, after the lane's two rows are multiplied by `top` and
// `bottom`.
template <class T>
__device__ __forceinline__ void pack(uint32_t (&a)[4], const Square& s, float top = 1.0f,
                                     float bottom = 1.0f) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    a[2 * j] = pack2<T>(s[j][0] * top, s[j][1] * top);
    a[2 * j + 1] = pack2<T>(s[j][2] * bottom, s[j][3] * bottom);
  }
}

__device__ __forceinline__ void transpose(uint32_t (&a)[4]) {
  const uint32_t upper = movmatrix_trans(a[1]), lower = movmatrix_trans(a[2]);
  a[0] = movmatrix_trans(a[0]);
  a[1] = lower;
  a[2] = upper;
  a[3] = movmatrix_trans(a[3]);
}

// Writes the result of pack() to a tile.
template <class T>
__device__ __forceinline__ void put(T* tile, int stride, int row, int column,
                                    const uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    T* const to = tile + (row + row_of_lane(i % 2)) * stride + column + column_of_lane(i / 2);
    *reinterpret_cast<uint32_t*>(to) = a[i];
  }
}

template <int D>
__device__ __forceinline__ void clear(Square (&sums)[D / 16]) {
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
#pragma unroll
    for (int i = 0; i < 8; i++) sums[n][i / 4][i % 4] = 0.0f;
  }
}

// Stores 16 rows of sums, the lane's two multiplied by `top` and `bottom`, as rows of one head of x
// [rows, H, D]: row r as row_of(r), or not at all if that is negative. They pass through `tile`,
// which only this warp uses.
template <class T, int D, class RowOf>
__device__ __forceinline__ void store_rows(T* x, int64_t H, int h, T* tile,
                                           const Square (&sums)[D / 16], float top, float bottom,
                                           RowOf row_of) {
  T* const head = x + int64_t{h} * D;
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    uint32_t a[4];
    pack<T>(a, sums[n], top, bottom);
    put(tile, kStride<D>, 0, 16 * n, a);
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    const int i = 32 * n + int(lane_id()), r = i / (D / 8), unit = i % (D / 8);
    const int row = static_cast<int>(row_of(r));
    const uint4 words = *reinterpret_cast<const uint4*>(tile + r * kStride<D> + unit * 8);
    // Not negative: a product of 32 and 64 bits is half of one of 64.
    if (row >= 0) store_16(head + static_cast<uint32_t>(row) * (H * D) + unit * 8, words);
  }
  __syncwarp();
}
// The same in float32, directly.
template <int D, class RowOf>
__device__ __forceinline__ void store_floats(float* x, int64_t H, int h,
                                             const Square (&sums)[D / 16], float scale,
                                             RowOf row_of) {
  const int64_t rows[2] = {row_of(row_of_lane(0)), row_of(row_of_lane(1))};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (rows[i] < 0) continue;
    float* const to = x + (rows[i] * H + h) * D;
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        *reinterpret_cast<float2*>(to + 16 * n + column_of_lane(j)) =
            make_float2(sums[n][j][2 * i] * scale, sums[n][j][2 * i + 1] * scale);
      }
    }
  }
}

}  // namespace
}  // namespace vidl
