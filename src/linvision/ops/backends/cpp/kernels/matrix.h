// Small matrix products out of caches: C = scale C + A B, all row-major, B and C in whole vectors of columns.

#pragma once

#include "simd.h"

namespace linvision {
namespace LINVISION_ISA {

// Rows and vectors of columns of the tile that stays in registers: 24 of 32 with AVX-512, else 12 of 16.
constexpr int kTileRows = 4;
constexpr int kTileVecs = kLanes == 16 ? 6 : 3;

struct Matrix {
  float* data;
  int64_t stride;  // between rows
  float* row(int64_t r) const { return data + r * stride; }
};

template <int kVecs>
LINVISION_INLINE void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                    float* c, int64_t c_stride, float scale) {
  Vec sums[kTileRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 6
    for (int j = 0; j < kVecs; ++j) {
      sums[r][j] = scale == 0.0f ? Vec{} : load(c + r * c_stride + j * kLanes) * scale;
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[kVecs];
#pragma GCC unroll 6
    for (int j = 0; j < kVecs; ++j) column[j] = load(b + d * b_stride + j * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const Vec factor = splat(a[r * a_stride + d]);
#pragma GCC unroll 6
      for (int j = 0; j < kVecs; ++j) sums[r][j] += factor * column[j];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 6
    for (int j = 0; j < kVecs; ++j) store(c + r * c_stride + j * kLanes, sums[r][j]);
  }
}

// kTileRows rows of the product, for so many columns (a multiple of kLanes).
[[maybe_unused]] static void multiply_rows(int64_t columns, int64_t depth, const float* a, int64_t a_stride, Matrix b,
                                           float* c, int64_t c_stride, float scale) {
  int64_t j = 0;
  for (; j + kTileVecs * kLanes <= columns; j += kTileVecs * kLanes) {
    multiply_tile<kTileVecs>(depth, a, a_stride, b.data + j, b.stride, c + j, c_stride, scale);
  }
  for (; kTileVecs > 3 && j + 3 * kLanes <= columns; j += 3 * kLanes) {
    multiply_tile<3>(depth, a, a_stride, b.data + j, b.stride, c + j, c_stride, scale);
  }
  for (; j < columns; j += kLanes) {
    multiply_tile<1>(depth, a, a_stride, b.data + j, b.stride, c + j, c_stride, scale);
  }
}

// C = scale C + A B with `rows` (a multiple of kTileRows) rows; a scale of 0 leaves C unread.
[[maybe_unused]] static void multiply(int64_t rows, int64_t columns, int64_t depth, Matrix a, Matrix b, Matrix c,
                                      float scale) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    multiply_rows(columns, depth, a.row(r), a.stride, b, c.row(r), c.stride, scale);
  }
}

// As multiply(), for a square A that is zero above its diagonal.
[[maybe_unused]] static void multiply_lower(int64_t rows, int64_t columns, Matrix a, Matrix b, Matrix c, float scale) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    multiply_rows(columns, r + kTileRows, a.row(r), a.stride, b, c.row(r), c.stride, scale);
  }
}

// As multiply(), for a square A that is zero below its diagonal.
[[maybe_unused]] static void multiply_upper(int64_t rows, int64_t columns, Matrix a, Matrix b, Matrix c, float scale) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const Matrix below = {b.row(r), b.stride};
    multiply_rows(columns, rows - r, a.row(r) + r, a.stride, below, c.row(r), c.stride, scale);
  }
}

// A square C = A B of which only the entries up to the diagonal are wanted; some above it are written as well.
[[maybe_unused]] static void multiply_to_diagonal(int64_t rows, int64_t depth, Matrix a, Matrix b, Matrix c) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    multiply_rows(round_up(r + kTileRows, kLanes), depth, a.row(r), a.stride, b, c.row(r), c.stride, 0.0f);
  }
}

[[maybe_unused]] static void transpose(int64_t rows, int64_t columns, Matrix from, Matrix to) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float *a = from.row(r), *b = from.row(r + 1), *c = from.row(r + 2), *d = from.row(r + 3);
    for (int64_t j = 0; j < columns; ++j) {
      float* p = to.row(j) + r;
      p[0] = a[j];
      p[1] = b[j];
      p[2] = c[j];
      p[3] = d[j];
    }
  }
}

LINVISION_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec products = {};
  for (int64_t j = 0; j < n; j += kLanes) products += load(a + j) * load(b + j);
  return total(products);
}

LINVISION_INLINE void scale_row(float* row, int64_t n, float factor) {
  for (int64_t j = 0; j < n; j += kLanes) store(row + j, load(row + j) * factor);
}

// y += factor x
LINVISION_INLINE void add_scaled(float* y, const float* x, int64_t n, float factor) {
  for (int64_t j = 0; j < n; j += kLanes) store(y + j, load(y + j) + load(x + j) * factor);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
