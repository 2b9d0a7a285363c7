// Depthwise convolution of a grid of tokens, channels last, with or without SiLU; forward and backward.
//
// A tile is kTile neighbouring outputs of a row. It holds a pointer to each token under its window, to zeros where the
// window leaves the grid, and walks along the channels: there every value is loaded once for all taps of its row.

#include "arguments.h"
#include "channels.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

constexpr int kTile = 7;  // grids are mostly 7, 14, 28 or 56 columns wide
constexpr int kMaxKernel = 15;
constexpr int kMaxWindow = kTile + kMaxKernel - 1;

// What a kernel turned by 180 degrees sees.
ConvShape turned(ConvShape shape) {
  shape.top = shape.kernel_rows - 1 - shape.top;
  shape.left = shape.kernel_columns - 1 - shape.left;
  return shape;
}

// The kernel, tap by tap: rows of channels, zeros up to whole vectors. The last row is the bias.
class Taps {
 public:
  const int64_t count, stride;

  Taps(const float* weight, const float* bias, const ConvShape& shape, bool turn)
      : count(shape.kernel_rows * shape.kernel_columns),
        stride(round_up(shape.channels, kLanes)),
        memory_((count + 1) * stride) {
    float* rows = memory_.get();
    if (rows == nullptr) return;
    memset(rows, 0, (count + 1) * stride * sizeof(float));
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t tap = 0; tap < count; ++tap) {
        rows[tap * stride + c] = weight[c * count + (turn ? count - 1 - tap : tap)];
      }
    }
    if (bias != nullptr) memcpy(rows + count * stride, bias, shape.channels * sizeof(float));
  }
  bool missing() const { return memory_.get() == nullptr; }
  const float* row(int64_t tap) const { return memory_.get() + tap * stride; }
  const float* bias() const { return row(count); }

 private:
  const Scratch memory_;
};

// The grid in blocks of whole rows, or a single row in blocks of columns: several for each thread.
struct Blocks {
  int64_t height, width, down, across, count;

  Blocks(const ConvShape& shape, int threads) {
    const int64_t shares = 8 * larger(1, threads);
    height = larger(1, smaller(shape.rows, shape.batch * shape.rows / shares));
    width = shape.rows > 1 ? larger(1, shape.columns)
                           : round_up(larger(1, shape.batch * shape.columns / shares), kTile);
    down = (shape.rows + height - 1) / height;
    across = (shape.columns + width - 1) / width;
    count = shape.batch * down * across;
  }
};

// Calls body(image, row, column, number of columns) for the tiles of a block.
template <typename Body>
LINVISION_INLINE void each_tile(const Blocks& blocks, const ConvShape& shape, int64_t index, const Body& body) {
  const int64_t image = index / (blocks.down * blocks.across), place = index % (blocks.down * blocks.across);
  const int64_t first_row = place / blocks.across * blocks.height, first = place % blocks.across * blocks.width;
  const int64_t last_row = smaller(first_row + blocks.height, shape.rows);
  const int64_t last = smaller(first + blocks.width, shape.columns);
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t column = first; column < last; column += kTile) {
      body(image, row, column, smaller(kTile, last - column));
    }
  }
}

template <typename T>
LINVISION_INLINE T* token_of(const Grid& grid, int64_t image, int64_t row, int64_t column) {
  return static_cast<T*>(grid.data) + image * grid.batch + row * grid.row + column * grid.column;
}

// The last token of the lowest row under the window of an output: to the caches, that row is new, and the next tile's
// part of it is worth fetching ahead.
template <typename T>
LINVISION_INLINE const T* newest_token(const Grid& grid, const ConvShape& shape, int64_t image, int64_t row,
                                       int64_t column) {
  const int64_t lowest = smaller(row + shape.kernel_rows - 1 - shape.top, shape.rows - 1);
  return token_of<const T>(grid, image, lowest, column + shape.kernel_columns - 1 - shape.left);
}

// The tokens of a tile, as many as there are, and something else to point at in place of the others.
template <typename T>
struct TileTokens {
  T* tokens[kTile];

  TileTokens(const Grid& grid, int64_t image, int64_t row, int64_t column, int64_t count, T* other) {
    for (int64_t t = 0; t < kTile; ++t) tokens[t] = t < count ? token_of<T>(grid, image, row, column + t) : other;
  }
};

template <typename T>
struct Window {
  const T* tokens[kMaxKernel][kMaxWindow];
  int64_t first, last;  // the kernel's rows that lie within the grid

  Window(const Grid& grid, const ConvShape& shape, int64_t image, int64_t row, int64_t column, const T* zeros) {
    first = larger(0, shape.top - row);
    last = smaller(shape.kernel_rows, shape.rows - row + shape.top);
    for (int64_t i = first; i < last; ++i) {
      const T* start = token_of<const T>(grid, image, row + i - shape.top, 0);
      for (int64_t j = 0; j < kTile + shape.kernel_columns - 1; ++j) {
        const int64_t at = column + j - shape.left;
        tokens[i][j] = at < 0 || at >= shape.columns ? zeros : start + at * grid.column;
      }
    }
  }
};

// The sums of a tile at channels c, ... with kernels of kColumns columns, or of any number where that is 0.
template <int kColumns, bool kWhole, typename T>
LINVISION_INLINE void convolve_channels(const Window<T>& window, const Taps& taps, int64_t columns, int64_t c, int n,
                                        Vec (&sums)[kTile]) {
  const Vec bias = load(taps.bias() + c);
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) sums[t] = bias;
  for (int64_t i = window.first; i < window.last; ++i) {
    const T* const* tokens = window.tokens[i];
    if constexpr (kColumns > 0) {
      Vec weights[kColumns];
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) weights[k] = load(taps.row(i * kColumns + k) + c);
#pragma GCC unroll 16
      for (int j = 0; j < kTile + kColumns - 1; ++j) {
        const Vec x = load_channels<kWhole>(tokens[j] + c, n);
#pragma GCC unroll 8
        for (int k = 0; k < kColumns; ++k) {
          if (j - k >= 0 && j - k < kTile) sums[j - k] += weights[k] * x;
        }
      }
    } else {
      for (int64_t k = 0; k < columns; ++k) {
        const Vec weight = load(taps.row(i * columns + k) + c);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) sums[t] += weight * load_channels<kWhole>(tokens[t + k] + c, n);
      }
    }
  }
}

template <int kColumns, typename In, typename Out>
int32_t convolve(const Grid& x, const Grid& y, const ConvShape& shape, const Taps& taps, bool with_silu, int threads) {
  const Blocks blocks(shape, threads);
  int32_t status = kDone;
  parallel_for(threads, blocks.count, [&](int64_t index) {
    const Scratch spare(2 * taps.stride);
    if (spare.get() == nullptr) {
      status = kOutOfMemory;
      return;
    }
    memset(spare.get(), 0, taps.stride * sizeof(float));
    const In* zeros = reinterpret_cast<const In*>(spare.get());
    Out* nowhere = reinterpret_cast<Out*>(spare.get() + taps.stride);
    each_tile(blocks, shape, index, [&](int64_t image, int64_t row, int64_t column, int64_t count) {
      const Window<In> window(x, shape, image, row, column, zeros);
      const TileTokens<Out> out(y, image, row, column, count, nowhere);
      const In* next = newest_token<In>(x, shape, image, row, column + kTile);
      each_vector(shape.channels, [&](auto whole, int64_t c, int n) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        Vec sums[kTile];
        convolve_channels<kColumns, kWhole>(window, taps, shape.kernel_columns, c, n, sums);
        for (int t = 0; t < kTile; ++t) __builtin_prefetch(next + t * x.column + c);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) {
          store_channels<kWhole>(out.tokens[t] + c, with_silu ? silu(sums[t]) : sums[t], n);
        }
      });
    });
  });
  return status;
}

// Adds what a tile gives to the gradients of the taps at channels c, ..., from the gradients d of its sums.
template <int kColumns, bool kWhole, typename T>
LINVISION_INLINE void add_tap_gradients(const Window<T>& window, int64_t columns, int64_t c, int n,
                                        const Vec (&d)[kTile], float* gradients, int64_t stride) {
  for (int64_t i = window.first; i < window.last; ++i) {
    const T* const* tokens = window.tokens[i];
    float* rows = gradients + i * columns * stride + c;
    if constexpr (kColumns > 0) {
      Vec sums[kColumns];
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) sums[k] = load(rows + k * stride);
#pragma GCC unroll 16
      for (int j = 0; j < kTile + kColumns - 1; ++j) {
        const Vec x = load_channels<kWhole>(tokens[j] + c, n);
#pragma GCC unroll 8
        for (int k = 0; k < kColumns; ++k) {
          if (j - k >= 0 && j - k < kTile) sums[k] += d[j - k] * x;
        }
      }
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) store(rows + k * stride, sums[k]);
    } else {
      for (int64_t k = 0; k < columns; ++k) {
        Vec sum = load(rows + k * stride);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) sum += d[t] * load_channels<kWhole>(tokens[t + k] + c, n);
        store(rows + k * stride, sum);
      }
    }
  }
}

// Computes the gradients of kernel and bias, and through the activation those of the sums.
template <int kColumns, typename T>
int32_t differentiate_kernel(const DepthwiseConvBackward& args, const ConvShape& shape, const Taps& taps) {
  const Blocks blocks(shape, args.threads);
  const int64_t size = (taps.count + 1) * taps.stride;
  const int64_t num_parts = smaller(blocks.count, 4 * larger(1, args.threads));
  const Scratch parts(larger(1, num_parts) * size);
  if (parts.get() == nullptr) return kOutOfMemory;
  memset(parts.get(), 0, larger(1, num_parts) * size * sizeof(float));
  int32_t status = kDone;
  parallel_for(args.threads, num_parts, [&](int64_t part) {
    const Scratch spare(2 * taps.stride);
    if (spare.get() == nullptr) {
      status = kOutOfMemory;
      return;
    }
    memset(spare.get(), 0, taps.stride * sizeof(float));
    const T* zeros = reinterpret_cast<const T*>(spare.get());
    float *nowhere = spare.get() + taps.stride, *gradients = parts.get() + part * size;
    const auto add_tile = [&](int64_t image, int64_t row, int64_t column, int64_t count) {
      const Window<T> window(args.x, shape, image, row, column, zeros);
      const T* next_x = newest_token<T>(args.x, shape, image, row, column + kTile);
      const T* next_dy = token_of<const T>(args.dy, image, row, column + kTile);
      const TileTokens<const T> dy(args.dy, image, row, column, count, zeros);
      const TileTokens<float> d_sum(args.d_sum, image, row, column, args.silu ? count : 0, nowhere);
      each_vector(shape.channels, [&](auto whole, int64_t c, int n) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        for (int t = 0; t < kTile; ++t) {
          __builtin_prefetch(next_x + t * args.x.column + c);
          __builtin_prefetch(next_dy + t * args.dy.column + c);
        }
        Vec d[kTile];
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) d[t] = load_channels<kWhole>(dy.tokens[t] + c, n);
        if (args.silu) {
          Vec sums[kTile];
          convolve_channels<kColumns, kWhole>(window, taps, shape.kernel_columns, c, n, sums);
#pragma GCC unroll 8
          for (int t = 0; t < kTile; ++t) {
            d[t] *= silu_slope(sums[t]);
            store_channels<kWhole>(d_sum.tokens[t] + c, d[t], n);
          }
        }
        add_tap_gradients<kColumns, kWhole>(window, shape.kernel_columns, c, n, d, gradients, taps.stride);
        float* d_bias = gradients + taps.count * taps.stride + c;
        Vec sum = load(d_bias);
#pragma GCC unroll 8
        for (int t = 0; t < kTile; ++t) sum += d[t];
        store(d_bias, sum);
      });
    };
    const int64_t last = (part + 1) * blocks.count / num_parts;
    for (int64_t index = part * blocks.count / num_parts; index < last; ++index) {
      each_tile(blocks, shape, index, add_tile);
    }
  });
  if (status != kDone) return status;
  add_parts(parts.get(), num_parts, size);
  for (int64_t c = 0; c < shape.channels; ++c) {
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      const int64_t at = args.reverse ? taps.count - 1 - tap : tap;
      args.dweight[c * taps.count + at] = parts.get()[tap * taps.stride + c];
    }
  }
  if (args.dbias != nullptr) {
    memcpy(args.dbias, parts.get() + taps.count * taps.stride, shape.channels * sizeof(float));
  }
  return kDone;
}

template <int kColumns, typename T>
int32_t forward(const DepthwiseConvForward& args) {
  const ConvShape shape = args.reverse ? turned(args.shape) : args.shape;
  const Taps taps(args.weight, args.bias, shape, args.reverse != 0);
  if (taps.missing()) return kOutOfMemory;
  return convolve<kColumns, T, T>(args.x, args.y, shape, taps, args.silu != 0, args.threads);
}

template <int kColumns, typename T>
int32_t backward(const DepthwiseConvBackward& args) {
  const ConvShape shape = args.reverse ? turned(args.shape) : args.shape;
  {
    const Taps taps(args.weight, args.bias, shape, args.reverse != 0);
    if (taps.missing()) return kOutOfMemory;
    const int32_t status = differentiate_kernel<kColumns, T>(args, shape, taps);
    if (status != kDone) return status;
  }
  const Taps taps(args.weight, nullptr, shape, args.reverse == 0);
  if (taps.missing()) return kOutOfMemory;
  if (args.silu) return convolve<kColumns, float, T>(args.d_sum, args.dx, turned(shape), taps, false, args.threads);
  return convolve<kColumns, T, T>(args.dy, args.dx, turned(shape), taps, false, args.threads);
}

}  // namespace

int32_t depthwise_conv_forward(const DepthwiseConvForward& args) {
  const bool half = args.dtype == kBFloat16;
  switch (args.shape.kernel_columns) {
    case 3: return half ? forward<3, BFloat16>(args) : forward<3, float>(args);
    case 4: return half ? forward<4, BFloat16>(args) : forward<4, float>(args);
    case 7: return half ? forward<7, BFloat16>(args) : forward<7, float>(args);
    default: return half ? forward<0, BFloat16>(args) : forward<0, float>(args);
  }
}

int32_t depthwise_conv_backward(const DepthwiseConvBackward& args) {
  const bool half = args.dtype == kBFloat16;
  switch (args.shape.kernel_columns) {
    case 3: return half ? backward<3, BFloat16>(args) : backward<3, float>(args);
    case 4: return half ? backward<4, BFloat16>(args) : backward<4, float>(args);
    case 7: return half ? backward<7, BFloat16>(args) : backward<7, float>(args);
    default: return half ? backward<0, BFloat16>(args) : backward<0, float>(args);
  }
}

}  // namespace LINVISION_ISA
}  // namespace linvision
