// What the kernels that walk along the channels of tokens share.

#pragma once

#include "arguments.h"
#include "simd.h"

namespace linvision {
namespace LINVISION_ISA {

LINVISION_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct WholeVector {
  static constexpr bool value = true;
};

struct PartOfVector {
  static constexpr bool value = false;
};

// Calls body(WholeVector or PartOfVector, c, number of channels left) for every vector of channels.
template <typename Body>
LINVISION_INLINE void each_vector(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(WholeVector{}, c, kLanes);
  if (c < channels) body(PartOfVector{}, c, static_cast<int>(channels - c));
}

template <bool kWhole, typename T>
LINVISION_INLINE Vec load_channels(const T* p, int n) {
  if constexpr (kWhole) {
    return load(p);
  } else {
    return load_some(p, n);
  }
}

template <bool kWhole, typename T>
LINVISION_INLINE void store_channels(T* p, Vec x, int n) {
  if constexpr (kWhole) {
    store(p, x);
  } else {
    store_some(p, x, n);
  }
}

// Lanes beyond the first n as zeros.
template <bool kWhole>
LINVISION_INLINE Vec within(Vec x, int n) {
  if constexpr (kWhole) {
    return x;
  } else {
    float lanes[kLanes];
    store(lanes, x);
    return load_some(lanes, n);
  }
}

// Mean and scale of the values that a norm takes together.
struct Moments {
  float mean, scale;  // scale = 1 / sqrt(variance + eps)
};

template <typename T>
LINVISION_INLINE Moments moments_of(const T* x, int64_t channels, float eps) {
  Vec sum = {}, squares = {};
  each_vector(channels, [&](auto whole, int64_t d, int n) __attribute__((always_inline)) {
    sum += load_channels<decltype(whole)::value>(x + d, n);
  });
  const float mean = total(sum) / static_cast<float>(channels);
  each_vector(channels, [&](auto whole, int64_t d, int n) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const Vec deviation = within<kWhole>(load_channels<kWhole>(x + d, n) - mean, n);
    squares += deviation * deviation;
  });
  return {mean, 1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(channels) + eps)};
}

// The derivative of x sigmoid(x), given sigmoid(x) or not.
LINVISION_INLINE Vec silu_slope(Vec x, Vec sigmoid_of_x) { return sigmoid_of_x * (1.0f + x * (1.0f - sigmoid_of_x)); }

LINVISION_INLINE Vec silu_slope(Vec x) { return silu_slope(x, sigmoid(x)); }

// Adds all parts, one after the other in memory, to the first; their size is a multiple of kLanes.
LINVISION_INLINE void add_parts(float* parts, int64_t num_parts, int64_t size) {
  for (int64_t part = 1; part < num_parts; ++part) {
    for (int64_t j = 0; j < size; j += kLanes) store(parts + j, load(parts + j) + load(parts + part * size + j));
  }
}

// Tokens of (B, S, ...) by their place among all, as many as a block has; `other` stands for those beyond the end.
template <typename T, int kCount>
struct TokenRows {
  T* rows[kCount];

  TokenRows(const Strided& tensor, int64_t tokens, int64_t first, int64_t last, T* other) {
    for (int64_t t = 0; t < kCount; ++t) {
      const int64_t at = first + t;
      rows[t] = at >= last ? other
                           : static_cast<T*>(tensor.data) + at / tokens * tensor.batch + at % tokens * tensor.token;
    }
  }
};

// All tokens in blocks for threads to share, of a whole number of tiles.
struct TokenBlocks {
  int64_t total, size, count;

  TokenBlocks(int64_t total, int64_t tile, int64_t shares)
      : total(total),
        size(round_up(larger(1, (total + shares - 1) / shares), tile)),
        count((total + size - 1) / size) {}
  int64_t first(int64_t block) const { return block * size; }
  int64_t last(int64_t block) const { return smaller(total, (block + 1) * size); }
};

}  // namespace LINVISION_ISA
}  // namespace linvision
