// Selective scan, backward. The equations stand in ops/_selective_scan_tiled.py.
//
// A piece of work is a group of channels of a sequence, walked tile by tile against the scan. Of each tile and block of
// states, the decays and states are computed again from the kept state, into cache, and used up on the way back:
//
//     G_t = C_t dy_t + carry,  carry = decay_t G_t        carry: the gradient that the tokens after t send to s_{t-1}
//
// The gradients of B and C are sums over channels: vectors of lanes that all channels of the piece add to, and that
// are summed across lanes once.

#include "selective_scan.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

// States of a block: carries and gradients of A in registers, decays, states and gradients of B and C in cache.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStates = 8;
#else
constexpr int kStates = 4;
#endif

// What is computed of a tile for one vector of channels: (tokens, lanes) each.
struct Steps {
  float *step, *update, *dy, *y;  // dy is that of the output before the gate, which is y
  float *d_step, *d_update;       // d_step lacks a factor log(2), and what reaches it through the update
  float *slope, *gate_slope;      // d step / d delta; dz is gate_slope times y
};

constexpr int kStepArrays = 8;

// What is the same for all channels of a tile, and the memory of a block of states.
struct Block {
  const float *B, *C;          // (tokens, N)
  float *decays, *states;      // (tokens, K, lanes), one token more for the states: the one before the tile is first
  float *dB, *dC;              // (tokens, K, lanes)
  int64_t count, num_states;
  bool wants_y;
};

// States of one vector of channels from n on: each (N, lanes).
struct Lanes {
  const float* rates;
  float *carry, *dA;
};

template <int K, bool kClamp>
void walk(const Block& tile, const Steps& steps, int64_t n, const float* rates) {
  const float *B = tile.B + n, *C = tile.C + n;
  Vec s[K];
  for (int k = 0; k < K; ++k) s[k] = load(tile.states + k * kLanes);
  rates += n * kLanes;
  for (int64_t t = 0; t < tile.count; ++t, B += tile.num_states, C += tile.num_states) {
    const Vec step = load(steps.step + t * kLanes), update = load(steps.update + t * kLanes);
    Vec y = {};
    float *decays = tile.decays + t * K * kLanes, *states = tile.states + (t + 1) * K * kLanes;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Vec decay = decay_of<kClamp>(step * load(rates + k * kLanes));
      s[k] = decay * s[k] + update * B[k];
      store(decays + k * kLanes, decay);
      store(states + k * kLanes, s[k]);
      if (tile.wants_y) y += s[k] * C[k];
    }
    if (tile.wants_y) store(steps.y + t * kLanes, load(steps.y + t * kLanes) + y);
  }
}

template <int K>
void walk_back(const Block& tile, const Steps& steps, int64_t n, const Lanes& lanes) {
  const float* rates = lanes.rates + n * kLanes;
  Vec carry[K], dA[K];
  for (int k = 0; k < K; ++k) carry[k] = load(lanes.carry + (n + k) * kLanes);
  for (int k = 0; k < K; ++k) dA[k] = load(lanes.dA + (n + k) * kLanes);
  for (int64_t t = tile.count - 1; t >= 0; --t) {
    const float *B = tile.B + t * tile.num_states + n, *C = tile.C + t * tile.num_states + n;
    const float *decays = tile.decays + t * K * kLanes, *states = tile.states + t * K * kLanes;
    float *dB = tile.dB + t * K * kLanes, *dC = tile.dC + t * K * kLanes;
    const Vec step = load(steps.step + t * kLanes), update = load(steps.update + t * kLanes);
    const Vec dy = load(steps.dy + t * kLanes);
    Vec d_step = load(steps.d_step + t * kLanes), d_update = load(steps.d_update + t * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Vec G = dy * C[k] + carry[k];
      store(dC + k * kLanes, load(dC + k * kLanes) + dy * load(states + (K + k) * kLanes));
      store(dB + k * kLanes, load(dB + k * kLanes) + update * G);
      d_update += G * B[k];
      carry[k] = load(decays + k * kLanes) * G;
      const Vec d_exponent = carry[k] * load(states + k * kLanes);
      d_step += d_exponent * load(rates + k * kLanes);
      dA[k] += d_exponent * step;
    }
    store(steps.d_step + t * kLanes, d_step);
    store(steps.d_update + t * kLanes, d_update);
  }
  for (int k = 0; k < K; ++k) store(lanes.carry + (n + k) * kLanes, carry[k]);
  for (int k = 0; k < K; ++k) store(lanes.dA + (n + k) * kLanes, dA[k]);
}

// A piece of work, its memory and its place in what is returned.
template <typename T>
class Piece {
 public:
  Piece(const SelectiveScanBackward& args, int64_t piece)
      : args_(args),
        in_(args.inputs),
        channels_(Channels::of(in_, piece)),
        per_vector_(in_.states * kLanes),
        memory_(channels_.vectors * (3 * per_vector_ + (2 + kStepArrays * in_.interval) * kLanes) +
                in_.interval * (4 * kStates * kLanes + 2 * in_.states) + kStates * kLanes) {
    if (memory_.get() == nullptr) return;
    Arrays arrays(memory_.get());
    const int64_t vectors = channels_.vectors, of_tile = in_.interval * kStates * kLanes;
    rates_ = arrays.take(vectors * per_vector_);
    carry_ = arrays.take(vectors * per_vector_);
    dA_ = arrays.take(vectors * per_vector_);
    greatest_rate_ = arrays.take(vectors * kLanes);
    clamps_ = arrays.take(vectors * kLanes);
    block_.decays = arrays.take(of_tile);
    block_.states = arrays.take(of_tile + kStates * kLanes);
    block_.dB = arrays.take(of_tile);
    block_.dC = arrays.take(of_tile);
    steps_ = arrays.take(vectors * kStepArrays * in_.interval * kLanes);
    B_ = arrays.take(in_.interval * in_.states);
    C_ = arrays.take(in_.interval * in_.states);
  }

  bool has_memory() const { return memory_.get() != nullptr; }

  void run() {
    const int64_t tiles = (in_.tokens + in_.interval - 1) / in_.interval;
    gather_rates(in_, channels_, rates_, greatest_rate_);
    gather_state(in_, channels_, args_.d_final, carry_);
    memset(dA_, 0, channels_.vectors * per_vector_ * sizeof(float));
    for (int64_t v = 0; v < channels_.vectors; ++v) start_sums(v);
    block_.B = B_;
    block_.C = C_;
    block_.num_states = in_.states;
    block_.wants_y = in_.z.data != nullptr;
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile tile = Tile::at(in_, channels_.batch, in_.reverse ? i : tiles - 1 - i);
      block_.count = tile.count;
      gather_states<T>(in_.B, tile, in_.states, B_);
      gather_states<T>(in_.C, tile, in_.states, C_);
      for (int64_t v = 0; v < channels_.vectors; ++v) prepare(tile, v);
      int64_t n = 0;
      for (; n + kStates <= in_.states; n += kStates) run_block<kStates>(tile, n);
      for (; n + 4 <= in_.states; n += 4) run_block<4>(tile, n);
      for (; n < in_.states; ++n) run_block<1>(tile, n);
      for (int64_t v = 0; v < channels_.vectors; ++v) finish(tile, v);
    }
    scatter_state(in_, channels_, carry_, args_.d_initial);
    for (int64_t v = 0; v < channels_.vectors; ++v) {
      float* const dA = args_.dA + channels_.batch * in_.states * in_.width + channels_.channel(v);
      for (int64_t n = 0; n < in_.states; ++n) {
        store_some(dA + n * in_.width, load(dA_ + v * per_vector_ + n * kLanes), channels_.lanes(v));
      }
    }
  }

 private:
  Steps steps(int64_t v) const {
    const int64_t size = in_.interval * kLanes;
    float* const p = steps_ + v * kStepArrays * size;
    return {p, p + size, p + 2 * size, p + 3 * size, p + 4 * size, p + 5 * size, p + 6 * size, p + 7 * size};
  }

  Vec vector_of(const float* x, int64_t v) const {
    return x == nullptr ? Vec{} : load_some(x + channels_.channel(v), channels_.lanes(v));
  }

  template <typename U>
  Vec tokens_of(const Strided& x, const Tile& tile, int64_t t, int64_t v) const {
    return load_some(row_of<const U>(x, tile, t) + channels_.channel(v), channels_.lanes(v));
  }

  float* sums_of(float* x, int64_t v) const { return x + channels_.batch * in_.width + channels_.channel(v); }

  void start_sums(int64_t v) const {
    if (args_.dD != nullptr) store_some(sums_of(args_.dD, v), Vec{}, channels_.lanes(v));
    if (args_.d_bias != nullptr) store_some(sums_of(args_.d_bias, v), Vec{}, channels_.lanes(v));
  }

  void prepare(const Tile& tile, int64_t v) {
    const Steps to = steps(v);
    const Vec bias = vector_of(in_.delta_bias, v), D = vector_of(in_.D, v);
    Vec greatest = {};
    for (int64_t t = 0; t < tile.count; ++t) {
      const Vec u = tokens_of<T>(in_.u, tile, t, v), delta = tokens_of<T>(in_.delta, tile, t, v) + bias;
      Vec dy = tokens_of<T>(args_.dy, tile, t, v);
      const Vec step = in_.delta_softplus ? step_size(delta) : delta;
      const Vec size = absolute(step);
      greatest = size <= greatest ? greatest : size;
      if (in_.z.data != nullptr) {
        const Vec z = tokens_of<T>(in_.z, tile, t, v), gate = gate_of(z);
        store(to.gate_slope + t * kLanes, dy * gate * (1.0f + z * (1.0f - gate)));
        Vec y = in_.D == nullptr ? Vec{} : D * u;
        if (in_.residual.data != nullptr) y += tokens_of<T>(in_.residual, tile, t, v);
        store(to.y + t * kLanes, y);
        dy *= z * gate;
      }
      store(to.slope + t * kLanes, in_.delta_softplus ? gate_of(delta) : splat(1.0f));
      store(to.step + t * kLanes, step);
      store(to.update + t * kLanes, step * u);
      store(to.dy + t * kLanes, dy);
      store(to.d_step + t * kLanes, Vec{});
      store(to.d_update + t * kLanes, Vec{});
    }
    clamps_[v] = in_range(greatest, load(greatest_rate_ + v * kLanes)) ? 0.0f : 1.0f;
  }

  template <int K>
  void run_block(const Tile& tile, int64_t n) {
    memset(block_.dB, 0, tile.count * K * kLanes * sizeof(float));
    memset(block_.dC, 0, tile.count * K * kLanes * sizeof(float));
    const float* kept = args_.kept + ((tile.index * in_.batch + tile.batch) * in_.states + n) * in_.width;
    for (int64_t v = 0; v < channels_.vectors; ++v) {
      const Lanes lanes = {rates_ + v * per_vector_, carry_ + v * per_vector_, dA_ + v * per_vector_};
      for (int k = 0; k < K; ++k) store(block_.states + k * kLanes, vector_of(kept + k * in_.width, v));
      if (clamps_[v] == 0.0f) {
        walk<K, false>(block_, steps(v), n, lanes.rates);
      } else {
        walk<K, true>(block_, steps(v), n, lanes.rates);
      }
      walk_back<K>(block_, steps(v), n, lanes);
    }
    const int64_t group = channels_.first / in_.group;
    for (int64_t t = 0; t < tile.count; ++t) {
      const int64_t row = ((group * in_.batch + tile.batch) * in_.tokens + tile.token(t)) * in_.states + n;
      for (int k = 0; k < K; ++k) {
        args_.dB[row + k] = total(load(block_.dB + (t * K + k) * kLanes));
        args_.dC[row + k] = total(load(block_.dC + (t * K + k) * kLanes));
      }
    }
  }

  void finish(const Tile& tile, int64_t v) const {
    const Steps from = steps(v);
    const Vec D = vector_of(in_.D, v);
    const int lanes = channels_.lanes(v);
    Vec dD = {}, d_bias = {};
    const auto write = [&](const Strided& x, int64_t t, Vec value) {
      store_some(row_of<T>(x, tile, t) + channels_.channel(v), value, lanes);
    };
    for (int64_t t = 0; t < tile.count; ++t) {
      const Vec u = tokens_of<T>(in_.u, tile, t, v), dy = load(from.dy + t * kLanes);
      const Vec d_update = load(from.d_update + t * kLanes);
      Vec du = d_update * load(from.step + t * kLanes);
      if (in_.D != nullptr) du += dy * D;
      const Vec d_delta = (load(from.d_step + t * kLanes) * kLn2 + d_update * u) * load(from.slope + t * kLanes);
      dD += dy * u;
      d_bias += d_delta;
      write(args_.du, t, du);
      write(args_.d_delta, t, d_delta);
      if (in_.residual.data != nullptr) write(args_.d_residual, t, dy);
      if (in_.z.data != nullptr) write(args_.dz, t, load(from.gate_slope + t * kLanes) * load(from.y + t * kLanes));
    }
    add_sums(args_.dD, v, dD);
    add_sums(args_.d_bias, v, d_bias);
  }

  void add_sums(float* x, int64_t v, Vec value) const {
    if (x == nullptr) return;
    float* const p = sums_of(x, v);
    store_some(p, load_some(p, channels_.lanes(v)) + value, channels_.lanes(v));
  }

  const SelectiveScanBackward& args_;
  const SelectiveScan& in_;
  const Channels channels_;
  const int64_t per_vector_;
  const Scratch memory_;
  Block block_;
  float *rates_, *carry_, *dA_, *greatest_rate_, *clamps_, *steps_, *B_, *C_;
};

}  // namespace

int32_t selective_scan_backward(const SelectiveScanBackward& args) {
  return args.inputs.dtype == kBFloat16 ? run_pieces<Piece<BFloat16>>(args) : run_pieces<Piece<float>>(args);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
