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

// Computes step sizes and updates of a vector of channels, y = D u, and the gates; returns the greatest size of a step.
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
    store(steps.y + t * kLanes, in.D == nullptr ? Vec{} : D * u);
  }
  if (in.z.data == nullptr) return greatest;
  for (int64_t t = 0; t < tile.count; ++t) {
    const Vec z = load_some(row_of<const T>(in.z, tile, t) + channel, lanes);
    store(gates + t * kLanes, z * gate_of(z));
  }
  return greatest;
}

template <typename T>
int32_t forward(const SelectiveScanForward& args) {
  const SelectiveScan& in = args.inputs;
  const int64_t pieces = in.batch * Channels::groups(in), tiles = (in.tokens + in.interval - 1) / in.interval;
  int32_t status = kDone;
  parallel_for(in.threads, pieces, [&](int64_t piece) {
    const Channels channels = Channels::of(in, piece);
    const int64_t per_vector = in.states * kLanes;
    const Scratch memory(channels.vectors * (2 * per_vector + kLanes) + in.interval * (4 * kLanes + 2 * in.states));
    if (memory.get() == nullptr) {
      status = kOutOfMemory;
      return;
    }
    Arrays arrays(memory.get());
    float *const rates = arrays.take(channels.vectors * per_vector), *const state = arrays.take(channels.vectors * per_vector);
    float *const greatest_rate = arrays.take(channels.vectors * kLanes), *const gates = arrays.take(in.interval * kLanes);
    Steps steps;
    steps.step = arrays.take(in.interval * kLanes);
    steps.update = arrays.take(in.interval * kLanes);
    steps.y = arrays.take(in.interval * kLanes);
    float *const B = arrays.take(in.interval * in.states), *const C = arrays.take(in.interval * in.states);
    steps.B = B;
    steps.C = C;
    steps.states = in.states;
    gather_rates(in, channels, rates, greatest_rate);
    gather_state(in, channels, args.initial, state);

    for (int64_t index = 0; index < tiles; ++index) {
      const Tile tile = Tile::at(in, channels.batch, in.reverse ? tiles - 1 - index : index);
      steps.count = tile.count;
      gather_states<T>(in.B, tile, in.states, B);
      gather_states<T>(in.C, tile, in.states, C);
      for (int64_t v = 0; v < channels.vectors; ++v) {
        const int64_t channel = channels.channel(v);
        const int lanes = channels.lanes(v);
        float *const s = state + v * per_vector, *const A = rates + v * per_vector;
        if (args.kept != nullptr) {
          float* kept = args.kept + (tile.index * in.batch + tile.batch) * in.states * in.width + channel;
          for (int64_t n = 0; n < in.states; ++n) store_some(kept + n * in.width, load(s + n * kLanes), lanes);
        }
        const Vec greatest_step = prepare<T>(in, tile, channel, lanes, steps, gates);
        if (in_range(greatest_step, load(greatest_rate + v * kLanes))) {
          walk_all<false>(steps, A, s);
        } else {
          walk_all<true>(steps, A, s);
        }
        for (int64_t t = 0; t < tile.count; ++t) {
          Vec y = load(steps.y + t * kLanes);
          if (in.z.data != nullptr) y *= load(gates + t * kLanes);
          store_some(row_of<T>(args.y, tile, t) + channel, y, lanes);
        }
      }
    }
    scatter_state(in, channels, state, args.final);
  });
  return status;
}

}  // namespace

int32_t selective_scan_forward(const SelectiveScanForward& args) {
  return args.inputs.dtype == kBFloat16 ? forward<BFloat16>(args) : forward<float>(args);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
