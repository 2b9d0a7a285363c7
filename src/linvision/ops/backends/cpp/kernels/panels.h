// Products of tokens with the weights (N, K) of a linear layer. The weights are laid out once for all tokens in panels of
// columns, so that a product reads them in order; sums are float32 and go, tile by tile, to whatever finishes them.

#pragma once

#include "channels.h"

namespace linvision {
namespace LINVISION_ISA {

// A tile of sums stays in registers: 28 of 32 with AVX-512, else 12 of 16. A panel is so many vectors wide.
constexpr int kTileSums = kLanes == 16 ? 28 : 12;
constexpr int kWeightVecs = 3;

// What one multiply-add takes from a row: kDepth entries.
template <typename T>
struct Operand;

template <>
struct Operand<float> {
  static constexpr int kDepth = 1;
  typedef Vec Type;
  LINVISION_INLINE Vec repeat(const float* p) { return splat(*p); }
  LINVISION_INLINE Vec read(const float* p) { return load(p); }
  LINVISION_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16Products = true;

template <>
struct Operand<BFloat16> {
  static constexpr int kDepth = 2;
  typedef IntVec Type;
  LINVISION_INLINE IntVec repeat(const BFloat16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return IntVec{} + pair;
  }
  LINVISION_INLINE IntVec read(const BFloat16* p) { return bits_of(load(reinterpret_cast<const float*>(p))); }
  LINVISION_INLINE Vec multiply_add(Vec sum, IntVec a, IntVec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
constexpr bool kHasBFloat16Products = false;
#endif

// Columns in panels: entry (k, column) of a panel lies at (k / kDepth, column, k % kDepth).
template <typename T, int kVecs>
struct Panels {
  static constexpr int kWidth = kVecs * kLanes;  // columns
  static constexpr int kRows = kTileSums / kVecs;  // of a tile

  T* data;
  int64_t depth, columns;
  const float* bias;  // what all rows of sums start from, as many as the panels have columns; or null for zeros

  int64_t count() const { return (columns + kWidth - 1) / kWidth; }
  int64_t size() const { return count() * kWidth * depth; }
  T* panel(int64_t index) const { return data + index * kWidth * depth; }

  // Lays out one panel of weights (columns, depth); zeros stand for columns beyond the last.
  void lay_out(int64_t index, const T* weight, int64_t stride) const {
    constexpr int64_t kDepth = Operand<T>::kDepth, kBlock = 16;
    T* to = panel(index);
    const int64_t first = index * kWidth, given = smaller(kWidth, columns - first);
    for (int64_t block = 0; block < depth; block += kBlock) {
      const int64_t end = smaller(depth, block + kBlock);
      for (int64_t j = 0; j < kWidth; ++j) {
        const T* row = weight + (first + j) * stride;
        for (int64_t k = block; k < end; ++k) {
          to[(k / kDepth * kWidth + j) * kDepth + k % kDepth] = j < given ? row[k] : T{};
        }
      }
    }
  }

  // As lay_out(), of what is given as rows (depth, columns).
  void copy(int64_t index, const T* rows, int64_t stride) const {
    static_assert(Operand<T>::kDepth == 1, "entries of a row lie side by side");
    const int64_t first = index * kWidth, given = smaller(kWidth, columns - first);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = 0; j < kWidth; ++j) panel(index)[k * kWidth + j] = j < given ? rows[k * stride + first + j] : T{};
    }
  }
};

// kRows rows of A times a panel.
template <int kRows, int kVecs, typename T>
[[gnu::noinline]] void multiply_panel_tile(const T* a, int64_t a_stride, const T* panel, int64_t depth, const float* bias,
                                      float* product) {
  constexpr int kDepth = Operand<T>::kDepth, kWidth = kVecs * kLanes;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 3
  for (int j = 0; j < kVecs; ++j) {
    const Vec first = bias == nullptr ? Vec{} : load(bias + j * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) sums[r][j] = first;
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    typename Operand<T>::Type b[kVecs];
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) b[j] = Operand<T>::read(panel + (k * kWidth + j * kLanes * kDepth));
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      const auto factor = Operand<T>::repeat(a + r * a_stride + k);
#pragma GCC unroll 3
      for (int j = 0; j < kVecs; ++j) sums[r][j] = Operand<T>::multiply_add(sums[r][j], factor, b[j]);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) store(product + r * kWidth + j * kLanes, sums[r][j]);
  }
}

template <int kRows, typename T, int kVecs, typename Finish>
LINVISION_INLINE void multiply_panel_rows(int64_t row, const T* a, int64_t a_stride, const Panels<T, kVecs>& b,
                                          int64_t index, int64_t start, int64_t depth, const Finish& finish) {
  constexpr int kWidth = kVecs * kLanes;
  alignas(64) float product[kRows * kWidth];
  const float* bias = b.bias == nullptr || start > 0 ? nullptr : b.bias + index * kWidth;
  multiply_panel_tile<kRows, kVecs>(a + row * a_stride, a_stride, b.panel(index) + start * kWidth, depth, bias, product);
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < kWidth; j += kLanes) finish(row + r, index * kWidth + j, load(product + r * kWidth + j));
  }
}

// Multiplies rows of A by the panels [first, last), of which `depth` entries from `start` on are used, and calls
// finish(row, column, sums) for all of the product, columns beyond the last of a panel included. The bias counts once:
// where entries are used from the first on.
template <typename T, int kVecs, typename Finish>
LINVISION_INLINE void multiply_panels(int64_t rows, const T* a, int64_t a_stride, const Panels<T, kVecs>& b,
                                      int64_t first, int64_t last, int64_t start, int64_t depth, const Finish& finish) {
  constexpr int kRows = Panels<T, kVecs>::kRows;
  for (int64_t index = first; index < last; ++index) {
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      multiply_panel_rows<kRows>(row, a, a_stride, b, index, start, depth, finish);
    }
    for (; row + kRows / 2 <= rows; row += kRows / 2) {
      multiply_panel_rows<kRows / 2>(row, a, a_stride, b, index, start, depth, finish);
    }
    for (; row < rows; ++row) multiply_panel_rows<1>(row, a, a_stride, b, index, start, depth, finish);
  }
}

template <typename T, int kVecs, typename Finish>
LINVISION_INLINE void multiply_panels(int64_t rows, const T* a, int64_t a_stride, const Panels<T, kVecs>& b,
                                      const Finish& finish) {
  multiply_panels(rows, a, a_stride, b, 0, b.count(), 0, b.depth, finish);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
