// What the passes of the selective scan share: its decays and step sizes, the order of its tokens, its pieces of work.
//
// Lanes of a vector are channels. Tokens are taken in tiles as long as the interval between kept states; what a tile
// needs of u, delta, z, B and C is laid out in scratch memory in the order of the scan, so that `reverse` is nothing
// more than another order of these copies.

#pragma once

#include "arguments.h"
#include "simd.h"

namespace linvision {
namespace LINVISION_ISA {

constexpr float kLn2 = 0.693147181f;

// 2^x to 2e-7 of its value for |x| <= 126, and exactly 1 for 0: as `exp2`, with a polynomial of degree 5 fitted to the
// relative error. kClamp takes any x.
template <bool kClamp>
LINVISION_INLINE Vec decay_of(Vec x) {
  if (kClamp) x = minimum(maximum(x, splat(-126.0f)), splat(127.49f));
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = splat(1.32647272e-3f);
  p = p * f + 9.67151281e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  return from_bits(bits_of(p) + (bits_of(shifted) << 23));
}

// log(1 + exp(x)) to 3e-7 of its value where that is a normal number, with a polynomial for log(1 + t) on [0, 1]; a NaN
// stays one.
LINVISION_INLINE Vec step_size(Vec x) {
  const Vec t = decay_of<true>(absolute(x) * -kLog2E);
  Vec p = splat(5.23267621e-3f);
  p = p * t - 2.95051657e-2f;
  p = p * t + 7.82258305e-2f;
  p = p * t - 1.36632351e-1f;
  p = p * t + 1.91060015e-1f;
  p = p * t - 2.48429807e-1f;
  p = p * t + 3.33190966e-1f;
  p = p * t - 4.99994931e-1f;
  p = p * t + 0.99999997f;
  return p * t + (x < 0.0f ? Vec{} : x);
}

LINVISION_INLINE Vec gate_of(Vec x) { return 1.0f / (1.0f + decay_of<true>(x * -kLog2E)); }

// Some consecutive tokens of a sequence, in the order of the scan.
struct Tile {
  int64_t batch, index, first, count, step;

  static Tile at(const SelectiveScan& in, int64_t batch, int64_t index) {
    const int64_t start = index * in.interval, count = smaller(in.interval, in.tokens - start);
    return in.reverse ? Tile{batch, index, start + count - 1, count, -1} : Tile{batch, index, start, count, 1};
  }

  int64_t token(int64_t t) const { return first + t * step; }
};

template <typename T>
LINVISION_INLINE T* row_of(const Strided& x, const Tile& tile, int64_t t) {
  return static_cast<T*>(x.data) + tile.batch * x.batch + tile.token(t) * x.token;
}

// Copies B or C of a tile to (tokens, N).
template <typename T>
void gather_states(const Strided& x, const Tile& tile, int64_t states, float* to) {
  for (int64_t t = 0; t < tile.count; ++t) {
    const T* from = row_of<const T>(x, tile, t);
    int64_t n = 0;
    for (; n + kLanes <= states; n += kLanes) store(to + t * states + n, load(from + n));
    for (; n < states; ++n) to[t * states + n] = to_float(from[n]);
  }
}

// The channels of a piece of work: some vectors, the last of which may have fewer channels than lanes.
struct Channels {
  int64_t batch, first, width, vectors;

  static int64_t groups(const SelectiveScan& in) { return (in.width + in.group - 1) / in.group; }

  static Channels of(const SelectiveScan& in, int64_t piece) {
    const int64_t count = groups(in), first = piece % count * in.group, width = smaller(in.group, in.width - first);
    return {piece / count, first, width, (width + kLanes - 1) / kLanes};
  }

  int64_t channel(int64_t vector) const { return first + vector * kLanes; }

  int lanes(int64_t vector) const { return static_cast<int>(smaller(kLanes, width - vector * kLanes)); }
};

// Memory of a piece of work, handed out in arrays of whole vectors.
class Arrays {
 public:
  explicit Arrays(float* memory) : next_(memory) {}
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  float* next_;
};

// Rates A log2(e) of the channels, (vectors, N, lanes), and the greatest of each channel's.
LINVISION_INLINE void gather_rates(const SelectiveScan& in, const Channels& channels, float* rates, float* greatest) {
  for (int64_t v = 0; v < channels.vectors; ++v) {
    Vec most = {};
    for (int64_t n = 0; n < in.states; ++n) {
      const Vec rate = load_some(in.A + n * in.width + channels.channel(v), channels.lanes(v)) * kLog2E;
      store(rates + (v * in.states + n) * kLanes, rate);
      const Vec size = absolute(rate);
      most = size <= most ? most : size;
    }
    store(greatest + v * kLanes, most);
  }
}

// States of one sequence (E, N) to and from (vectors, N, lanes).
LINVISION_INLINE void gather_state(const SelectiveScan& in, const Channels& channels, const float* from, float* to) {
  memset(to, 0, channels.vectors * in.states * kLanes * sizeof(float));
  if (from == nullptr) return;
  from += (channels.batch * in.width + channels.first) * in.states;
  for (int64_t e = 0; e < channels.width; ++e) {
    float* column = to + e / kLanes * in.states * kLanes + e % kLanes;
    for (int64_t n = 0; n < in.states; ++n) column[n * kLanes] = from[e * in.states + n];
  }
}

LINVISION_INLINE void scatter_state(const SelectiveScan& in, const Channels& channels, const float* from, float* to) {
  to += (channels.batch * in.width + channels.first) * in.states;
  for (int64_t e = 0; e < channels.width; ++e) {
    const float* column = from + e / kLanes * in.states * kLanes + e % kLanes;
    for (int64_t n = 0; n < in.states; ++n) to[e * in.states + n] = column[n * kLanes];
  }
}

// Whether every exponent step * rate lies where 2^x needs no clamp; false for NaN.
LINVISION_INLINE bool in_range(Vec greatest_step, Vec greatest_rate) {
  float lanes[kLanes];
  store(lanes, greatest_step * greatest_rate);
  bool within = true;
  for (int i = 0; i < kLanes; ++i) within &= lanes[i] <= 126.0f;
  return within;
}

// Runs all pieces of work of a pass.
template <typename Piece, typename Arguments>
int32_t run_pieces(const Arguments& args) {
  int32_t status = kDone;
  parallel_for(args.inputs.threads, args.inputs.batch * Channels::groups(args.inputs), [&](int64_t index) {
    Piece piece(args, index);
    if (piece.has_memory()) {
      piece.run();
    } else {
      status = kOutOfMemory;
    }
  });
  return status;
}

}  // namespace LINVISION_ISA
}  // namespace linvision
