// Selective scan, forward. The equations stand in ops/selective_scan.py; here nothing but y leaves the caches.
//
// A piece of work is a group of channels of a sequence. Of each tile of tokens and vector of channels, step sizes,
// updates and gates come first, for all tokens at once; then the states walk through the tile in registers.

#include "selective_scan.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

// States that fit into the registers beside all else.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStates = 16;
#else
constexpr int kStates = 8;
#endif

// What the states of one vector of channels meet in a tile: step sizes, updates delta u and outputs (tokens, lanes).
struct Steps {
  float *step, *update, *y;
  const float *B, *C;  // (tokens, N)
  int64_t count, states;
};

// Walks K states from n on through the tile.
template <int K, bool kClamp>
void walk(const Steps& tile, int64_t n, const float* rates, float* state) {
  const float *B = tile.B + n, *C = tile.C + n;
  Vec s[K];
  for (int k = 0; k < K; ++k) s[k] = load(state + (n + k) * kLanes);
  rates += n * kLanes;
  for (int64_t t = 0; t < tile.count; ++t, B += tile.states, C += tile.states) {
    const Vec step = load(tile.step + t * kLanes), update = load(tile.update + t * kLanes);
    Vec y = load(tile.y + t * kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const Vec decay = decay_of<kClamp>(step * load(rates + k * kLanes));
      s[k] = decay * s[k] + update * B[k];
      y += s[k] * C[k];
    }
    store(tile.y + t * kLanes, y);
  }
  for (int k = 0; k < K; ++k) store(state + (n + k) * kLanes, s[k]);
}

template <bool kClamp>
void walk_all(const Steps& tile, const float* rates, float* state) {
  int64_t n = 0;
  for (; n + kStates <= tile.states; n += kStates) walk<kStates, kClamp>(tile, n, rates, state);
  for (; n + 4 <= tile.states; n += 4) walk<4, kClamp>(tile, n, rates, state);
  for (; n < tile.states; ++n) walk<1, kClamp>(tile, n, rates, state);
}

// Computes step sizes and updates of a vector of channels, y = D u + residual, and the gates; returns the greatest size of a step.
template <typename T>
Vec prepare(const SelectiveScan& in, const Tile& tile, int64_t channel, int lanes, const Steps& steps, float* gates) {
  const Vec bias = in.delta_bias == nullptr ? Vec{} : load_some(in.delta_bias + channel, lanes);
  const Vec D = in.D == nullptr ? Vec{} : load_some(in.D + channel, lanes);
  Vec greatest = {};
  for (int64_t t = 0; t < tile.count; ++t) {
    const Vec u = load_some(row_of<const T>(in.u, tile, t) + channel, lanes);
    Vec step = load_some(row_of<const T>(in.delta, tile, t) + channel, lanes) + bias;
    if (in.delta_softplus) step = step_size(step);
    const Vec size = absolute(step);
    greatest = size <= greatest ? greatest : size;
    store(steps.step + t * kLanes, step);
    store(steps.update + t * kLanes, step * u);
    Vec y = in.D == nullptr ? Vec{} : D * u;
    if (in.residual.data != nullptr) y += load_some(row_of<const T>(in.residual, tile, t) + channel, lanes);
    store(steps.y + t * kLanes, y);
  }
  if (in.z.data == nullptr) return greatest;
  for (int64_t t = 0; t < tile.count; ++t) {
    const Vec z = load_some(row_of<const T>(in.z, tile, t) + channel, lanes);
    store(gates + t * kLanes, z * gate_of(z));
  }
  return greatest;
}

// A piece of work and its memory.
template <typename T>
class Piece {
 public:
  Piece(const SelectiveScanForward& args, int64_t piece)
      : args_(args),
        in_(args.inputs),
        channels_(Channels::of(in_, piece)),
        per_vector_(in_.states * kLanes),
        memory_(channels_.vectors * (2 * per_vector_ + kLanes) + in_.interval * (4 * kLanes + 2 * in_.states)) {
    if (memory_.get() == nullptr) return;
    Arrays arrays(memory_.get());
    rates_ = arrays.take(channels_.vectors * per_vector_);
    states_ = arrays.take(channels_.vectors * per_vector_);
    greatest_rate_ = arrays.take(channels_.vectors * kLanes);
    gates_ = arrays.take(in_.interval * kLanes);
    steps_.step = arrays.take(in_.interval * kLanes);
    steps_.update = arrays.take(in_.interval * kLanes);
    steps_.y = arrays.take(in_.interval * kLanes);
    B_ = arrays.take(in_.interval * in_.states);
    C_ = arrays.take(in_.interval * in_.states);
    steps_.B = B_;
    steps_.C = C_;
    steps_.states = in_.states;
  }

  bool has_memory() const { return memory_.get() != nullptr; }

  void run() {
    const int64_t tiles = (in_.tokens + in_.interval - 1) / in_.interval;
    gather_rates(in_, channels_, rates_, greatest_rate_);
    gather_state(in_, channels_, args_.initial, states_);
    for (int64_t i = 0; i < tiles; ++i) {
      const Tile tile = Tile::at(in_, channels_.batch, in_.reverse ? tiles - 1 - i : i);
      steps_.count = tile.count;
      gather_states<T>(in_.B, tile, in_.states, B_);
      gather_states<T>(in_.C, tile, in_.states, C_);
      for (int64_t v = 0; v < channels_.vectors; ++v) {
        if (args_.kept != nullptr) keep(tile, v);
        run_tile(tile, v);
      }
    }
    scatter_state(in_, channels_, states_, args_.final);
  }

 private:
  void keep(const Tile& tile, int64_t v) const {
    float* const kept = args_.kept + (tile.index * in_.batch + tile.batch) * in_.states * in_.width;
    for (int64_t n = 0; n < in_.states; ++n) {
      const Vec state = load(states_ + v * per_vector_ + n * kLanes);
      store_some(kept + n * in_.width + channels_.channel(v), state, channels_.lanes(v));
    }
  }

  void run_tile(const Tile& tile, int64_t v) const {
    const int64_t channel = channels_.channel(v);
    const int lanes = channels_.lanes(v);
    const Vec greatest_step = prepare<T>(in_, tile, channel, lanes, steps_, gates_);
    if (in_range(greatest_step, load(greatest_rate_ + v * kLanes))) {
      walk_all<false>(steps_, rates_ + v * per_vector_, states_ + v * per_vector_);
    } else {
      walk_all<true>(steps_, rates_ + v * per_vector_, states_ + v * per_vector_);
    }
    for (int64_t t = 0; t < tile.count; ++t) {
      Vec y = load(steps_.y + t * kLanes);
      if (in_.z.data != nullptr) y *= load(gates_ + t * kLanes);
      store_some(row_of<T>(args_.y, tile, t) + channel, y, lanes);
    }
  }

  const SelectiveScanForward& args_;
  const SelectiveScan& in_;
  const Channels channels_;
  const int64_t per_vector_;
  const Scratch memory_;
  Steps steps_;
  float *rates_, *states_, *greatest_rate_, *gates_, *B_, *C_;
};

}  // namespace

int32_t selective_scan_forward(const SelectiveScanForward& args) {
  return args.inputs.dtype == kBFloat16 ? run_pieces<Piece<BFloat16>>(args) : run_pieces<Piece<float>>(args);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
