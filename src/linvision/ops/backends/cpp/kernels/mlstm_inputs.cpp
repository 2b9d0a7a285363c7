// Queries and keys from c, values from x, by block-diagonal matrices of 4x4 blocks, and the gates from all three:
// forward and backward.

#include "mlstm_inputs.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

constexpr int kTokens = 4;  // of a tile
constexpr int kMaxGates = 64;

template <typename T>
using Rows = TokenRows<T, kTokens>;

// The gates as linear maps of c and x themselves, since q, k and v are: two rows of channels and a constant for each.
class FoldedGates {
 public:
  FoldedGates(const MlstmInputsForward& args, const ProjectionWeights& weights)
      : stride_(weights.stride), memory_(weights.num_gates * 2 * weights.stride) {
    if (memory_.get() == nullptr) return;
    for (int64_t g = 0; g < weights.num_gates; ++g) {
      Vec constant = {};
      for (int64_t c = 0; c < stride_; c += kLanes) {
        Vec parts[3];
        for (int p = 0; p < 3; ++p) {
          const Vec weight = load(weights.gate(g, p) + c);
          parts[p] = project_back(weights, p, c, Swapped(weight));
          constant += weight * load(weights.bias(p) + c);
        }
        store(row(g, 0) + c, parts[kQ] + parts[kK]);
        store(row(g, 1) + c, parts[kV]);
      }
      const int64_t gate = g / args.heads;
      constants_[g] = total(constant) + (gate < 2 ? args.gate_biases[gate][g % args.heads] : 0.0f);
    }
  }
  bool missing() const { return memory_.get() == nullptr; }
  float* row(int64_t g, int source) const { return memory_.get() + (g * 2 + source) * stride_; }
  float constant(int64_t g) const { return constants_[g]; }

 private:
  const int64_t stride_;
  const Scratch memory_;
  float constants_[kMaxGates];
};

// The gates of a tile from the tokens that are its sources.
template <typename T>
void compute_gates(const MlstmInputsForward& args, const FoldedGates& gates, const T* const (&c_rows)[kTokens],
                   const T* const (&x_rows)[kTokens], int64_t first, int64_t last) {
  for (int64_t g = 0; g < 2 * args.heads; g += kGates) {
    Vec sums[kTokens][kGates] = {};
    each_vector(args.width, [&](auto whole, int64_t c, int n) __attribute__((always_inline)) {
      constexpr bool kWhole = decltype(whole)::value;
#pragma GCC unroll 2
      for (int source = 0; source < 2; ++source) {
        Vec weight[kGates];
#pragma GCC unroll 4
        for (int j = 0; j < kGates; ++j) weight[j] = load(gates.row(g + j, source) + c);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const Vec token = load_channels<kWhole>((source == 0 ? c_rows[t] : x_rows[t]) + c, n);
#pragma GCC unroll 4
          for (int j = 0; j < kGates; ++j) sums[t][j] += token * weight[j];
        }
      }
    });
    for (int64_t t = 0; t < smaller(kTokens, last - first); ++t) {
      for (int64_t j = 0; j < smaller(kGates, 2 * args.heads - g); ++j) {
        float* out = g + j < args.heads ? args.i : args.f;
        out[(first + t) * args.heads + (g + j) % args.heads] = total(sums[t][j]) + gates.constant(g + j);
      }
    }
  }
}

template <typename T>
int32_t forward(const MlstmInputsForward& args, const ProjectionWeights& weights) {
  if (weights.missing()) return kOutOfMemory;
  const FoldedGates gates(args, weights);
  if (gates.missing()) return kOutOfMemory;
  const TokenBlocks blocks(args.batch * args.tokens, kTokens, 8 * larger(1, args.threads));
  int32_t status = kDone;
  parallel_for(args.threads, blocks.count, [&](int64_t block) {
    const Scratch spare(2 * weights.stride);
    if (spare.get() == nullptr) {
      status = kOutOfMemory;
      return;
    }
    memset(spare.get(), 0, weights.stride * sizeof(float));
    const T* zeros = reinterpret_cast<const T*>(spare.get());
    T* nowhere = reinterpret_cast<T*>(spare.get() + weights.stride);
    const int64_t last = blocks.last(block);
    for (int64_t first = blocks.first(block); first < last; first += kTokens) {
      const Rows<const T> c_rows(args.c, args.tokens, first, last, zeros);
      const Rows<const T> x_rows(args.x, args.tokens, first, last, zeros);
      const Rows<T> q_rows(args.q, args.tokens, first, last, nowhere);
      const Rows<T> k_rows(args.k, args.tokens, first, last, nowhere);
      const Rows<T> v_rows(args.v, args.tokens, first, last, nowhere);
      const int64_t projected = args.q.data == nullptr ? 0 : args.width;
      each_vector(projected, [&](auto whole, int64_t c, int n) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          __builtin_prefetch(c_rows.rows[t] + c + kTokens * args.c.token);  // of the next tile
          __builtin_prefetch(x_rows.rows[t] + c + kTokens * args.x.token);
          const Swapped from_c(load_channels<kWhole>(c_rows.rows[t] + c, n));
          const Swapped from_x(load_channels<kWhole>(x_rows.rows[t] + c, n));
          const Vec q = project(weights, kQ, c, from_c), k = project(weights, kK, c, from_c);
          const Vec v = project(weights, kV, c, from_x);
          store_channels<kWhole>(q_rows.rows[t] + c, q, n);
          store_channels<kWhole>(k_rows.rows[t] + c, k, n);
          store_channels<kWhole>(v_rows.rows[t] + c, v, n);
        }
      });
      compute_gates(args, gates, c_rows.rows, x_rows.rows, first, last);
    }
  });
  return status;
}

// The gradients of the weights, in rows as Weights has them; the last row, num_gates long, is for the gates' biases.
struct Gradients {
  float* data;
  int64_t stride, num_gates;

  static int64_t size(const ProjectionWeights& weights) {
    return (15 + 3 * weights.num_gates) * weights.stride + round_up(weights.num_gates, kLanes);
  }
  float* coefficients(int p, int s) const { return data + (p * kBlock + s) * stride; }
  float* bias(int p) const { return data + (12 + p) * stride; }
  float* gate(int64_t g, int p) const { return data + (15 + g * 3 + p) * stride; }
  float* gate_biases() const { return data + (15 + 3 * num_gates) * stride; }

  void write(const MlstmInputsBackward& args) const {
    for (int p = 0; p < 3; ++p) {
      for (int64_t c = 0; c < args.width; ++c) {
        const int64_t j = c % kBlock;
        for (int64_t s = 0; s < kBlock; ++s) args.dweights[p][c * kBlock + (j ^ s)] = coefficients(p, s)[c];
      }
      if (args.dbiases[p] != nullptr) memcpy(args.dbiases[p], bias(p), args.width * sizeof(float));
      for (int64_t g = 0; g < 2 * args.heads; ++g) {
        float* to = args.dgate_weights[g / args.heads] + (g % args.heads * 3 + p) * args.width;
        memcpy(to, gate(g, p), args.width * sizeof(float));
      }
    }
    for (int64_t gate = 0; gate < 2; ++gate) {
      memcpy(args.dgate_biases[gate], gate_biases() + gate * args.heads, args.heads * sizeof(float));
    }
  }
};

// Carries the gradients dy of one of q, k and v at channels c, ... of a tile, and those of the gates, on to its source
// and to the weights.
template <bool kWhole, typename T>
LINVISION_INLINE void differentiate(const ProjectionWeights& weights, const Gradients& gradients, int p, int64_t c,
                                    int n,
                                    const T* const (&source)[kTokens], const T* const (&dy)[kTokens],
                                    const float (&gates)[kMaxGates][kTokens], int64_t num_gates,
                                    Vec (&d_source)[kTokens]) {
  Vec y[kTokens], d[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    y[t] = project(weights, p, c, Swapped(load_channels<kWhole>(source[t] + c, n)));
    d[t] = load_channels<kWhole>(dy[t] + c, n);
  }
  for (int64_t g = 0; g < num_gates; ++g) {
    const Vec weight = load(weights.gate(g, p) + c);
    Vec sum = load(gradients.gate(g, p) + c);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      d[t] += weight * gates[g][t];
      sum += y[t] * gates[g][t];
    }
    store(gradients.gate(g, p) + c, sum);
  }
  Vec sums[kBlock], d_bias = load(gradients.bias(p) + c);
#pragma GCC unroll 4
  for (int s = 0; s < kBlock; ++s) sums[s] = load(gradients.coefficients(p, s) + c);
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const Swapped x(load_channels<kWhole>(source[t] + c, n));
#pragma GCC unroll 4
    for (int s = 0; s < kBlock; ++s) sums[s] += d[t] * x.lanes[s];
    d_bias += d[t];
    d_source[t] += project_back(weights, p, c, Swapped(d[t]));
  }
#pragma GCC unroll 4
  for (int s = 0; s < kBlock; ++s) store(gradients.coefficients(p, s) + c, sums[s]);
  store(gradients.bias(p) + c, d_bias);
}

template <typename T>
int32_t backward(const MlstmInputsBackward& args) {
  const ProjectionWeights weights(args.weights, args.biases, args.gate_weights, args.width, args.heads);
  const TokenBlocks blocks(args.batch * args.tokens, kTokens, 4 * larger(1, args.threads));
  const int64_t num_gates = 2 * args.heads, size = Gradients::size(weights), num_parts = larger(1, blocks.count);
  const Scratch parts(num_parts * size);
  if (weights.missing() || parts.get() == nullptr) return kOutOfMemory;
  memset(parts.get(), 0, num_parts * size * sizeof(float));
  int32_t status = kDone;
  parallel_for(args.threads, blocks.count, [&](int64_t block) {
    const Scratch spare(2 * weights.stride);
    if (spare.get() == nullptr) {
      status = kOutOfMemory;
      return;
    }
    memset(spare.get(), 0, weights.stride * sizeof(float));
    const T* zeros = reinterpret_cast<const T*>(spare.get());
    T* nowhere = reinterpret_cast<T*>(spare.get() + weights.stride);
    const Gradients gradients = {parts.get() + block * size, weights.stride, weights.num_gates};
    const int64_t last = blocks.last(block);
    for (int64_t first = blocks.first(block); first < last; first += kTokens) {
      float gates[kMaxGates][kTokens] = {};
      for (int64_t t = 0; t < smaller(kTokens, last - first); ++t) {
        for (int64_t g = 0; g < num_gates; ++g) {
          const float* d_gate = g < args.heads ? args.di : args.df;
          gates[g][t] = d_gate[(first + t) * args.heads + g % args.heads];
          gradients.gate_biases()[g] += gates[g][t];
        }
      }
      const Rows<const T> c_rows(args.c, args.tokens, first, last, zeros);
      const Rows<const T> x_rows(args.x, args.tokens, first, last, zeros);
      const Rows<const T> dq(args.dq, args.tokens, first, last, zeros);
      const Rows<const T> dk(args.dk, args.tokens, first, last, zeros);
      const Rows<const T> dv(args.dv, args.tokens, first, last, zeros);
      const Rows<T> dc(args.dc, args.tokens, first, last, nowhere);
      const Rows<T> dx(args.dx, args.tokens, first, last, nowhere);
      each_vector(args.width, [&](auto whole, int64_t c, int n) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        for (int t = 0; t < kTokens; ++t) {  // the next tile's, for the caches
          __builtin_prefetch(c_rows.rows[t] + c + kTokens * args.c.token);
          __builtin_prefetch(x_rows.rows[t] + c + kTokens * args.x.token);
          __builtin_prefetch(dq.rows[t] + c + kTokens * args.dq.token);
          __builtin_prefetch(dk.rows[t] + c + kTokens * args.dk.token);
          __builtin_prefetch(dv.rows[t] + c + kTokens * args.dv.token);
        }
        Vec d[kTokens] = {};
        differentiate<kWhole>(weights, gradients, kQ, c, n, c_rows.rows, dq.rows, gates, num_gates, d);
        differentiate<kWhole>(weights, gradients, kK, c, n, c_rows.rows, dk.rows, gates, num_gates, d);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          store_channels<kWhole>(dc.rows[t] + c, d[t], n);
          d[t] = Vec{};
        }
        differentiate<kWhole>(weights, gradients, kV, c, n, x_rows.rows, dv.rows, gates, num_gates, d);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) store_channels<kWhole>(dx.rows[t] + c, d[t], n);
      });
    }
  });
  if (status != kDone) return status;
  add_parts(parts.get(), num_parts, size);
  Gradients{parts.get(), weights.stride, weights.num_gates}.write(args);
  return kDone;
}

}  // namespace

int32_t mlstm_inputs_forward(const MlstmInputsForward& args, const ProjectionWeights& weights) {
  return args.dtype == kBFloat16 ? forward<BFloat16>(args, weights) : forward<float>(args, weights);
}

int32_t mlstm_inputs_forward(const MlstmInputsForward& args) {
  const ProjectionWeights weights(args.weights, args.biases, args.gate_weights, args.width, args.heads);
  return mlstm_inputs_forward(args, weights);
}

int32_t mlstm_inputs_backward(const MlstmInputsBackward& args) {
  return args.dtype == kBFloat16 ? backward<BFloat16>(args) : backward<float>(args);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
