// Block-diagonal matrices of 4x4 blocks, for queries, keys and values, with the gates' weights for all three.
//
// Within a vector of channels a block of 4 is multiplied as y = sum over s < 4 of coefficients_s * swap_s(x), where
// swap_s exchanges lane j and lane j ^ s: four products of whole vectors.

#pragma once

#include "arguments.h"
#include "channels.h"

#if defined(__AVX512F__)
#define LINVISION_SWAPPED(s) 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s, \
                             8 ^ s, 9 ^ s, 10 ^ s, 11 ^ s, 12 ^ s, 13 ^ s, 14 ^ s, 15 ^ s
#elif defined(__AVX__)
#define LINVISION_SWAPPED(s) 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s
#else
#define LINVISION_SWAPPED(s) 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s
#endif

namespace linvision {
namespace LINVISION_ISA {

constexpr int kBlock = 4;
constexpr int kGates = kLanes == 16 ? 4 : 2;  // sums that stay in registers for each token of a tile
constexpr int kQ = 0, kK = 1, kV = 2;

template <int kStep>
LINVISION_INLINE Vec swap_lanes(Vec x) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, LINVISION_SWAPPED(kStep));
#else
  return __builtin_shuffle(x, IntVec{LINVISION_SWAPPED(kStep)});
#endif
}

struct Swapped {
  Vec lanes[kBlock];
  explicit inline __attribute__((always_inline)) Swapped(Vec x)
      : lanes{x, swap_lanes<1>(x), swap_lanes<2>(x), swap_lanes<3>(x)} {}
};

// The weights as the kernels read them: rows of channels, zeros up to whole vectors.
class ProjectionWeights {
 public:
  const int64_t stride, num_gates;

  ProjectionWeights(const float* const* weights, const float* const* biases, const float* const* gate_weights,
                    int64_t width, int64_t heads)
      : stride(round_up(width, kLanes)),
        num_gates(round_up(2 * heads, kGates)),
        memory_((27 + 3 * num_gates) * stride) {
    float* rows = memory_.get();
    if (rows == nullptr) return;
    memset(rows, 0, (27 + 3 * num_gates) * stride * sizeof(float));
    for (int p = 0; p < 3; ++p) {
      for (int64_t c = 0; c < width; ++c) {
        const int64_t block = c / kBlock * kBlock, j = c % kBlock;
        for (int64_t s = 0; s < kBlock; ++s) {
          rows[(p * kBlock + s) * stride + c] = weights[p][(block + j) * kBlock + (j ^ s)];
          rows[(12 + p * kBlock + s) * stride + c] = weights[p][(block + (j ^ s)) * kBlock + j];
        }
      }
      if (biases[p] != nullptr) memcpy(rows + (24 + p) * stride, biases[p], width * sizeof(float));
      for (int64_t g = 0; g < 2 * heads; ++g) {
        const float* from = gate_weights[g / heads] + (g % heads * 3 + p) * width;
        memcpy(rows + (27 + g * 3 + p) * stride, from, width * sizeof(float));
      }
    }
  }
  bool missing() const { return memory_.get() == nullptr; }
  const float* coefficients(int p, int s) const { return row(p * kBlock + s); }
  const float* transposed(int p, int s) const { return row(12 + p * kBlock + s); }
  const float* bias(int p) const { return row(24 + p); }
  const float* gate(int64_t g, int p = 0) const { return row(27 + g * 3 + p); }  // a gate's three rows are one

 private:
  const float* row(int64_t index) const { return memory_.get() + index * stride; }
  const Scratch memory_;
};

LINVISION_INLINE Vec project(const ProjectionWeights& weights, int p, int64_t c, const Swapped& x) {
  Vec y = load(weights.bias(p) + c);
#pragma GCC unroll 4
  for (int s = 0; s < kBlock; ++s) y += load(weights.coefficients(p, s) + c) * x.lanes[s];
  return y;
}

LINVISION_INLINE Vec project_back(const ProjectionWeights& weights, int p, int64_t c, const Swapped& d) {
  Vec x = {};
#pragma GCC unroll 4
  for (int s = 0; s < kBlock; ++s) x += load(weights.transposed(p, s) + c) * d.lanes[s];
  return x;
}

// In mlstm_inputs.cpp: the forward pass with weights that are laid out already.
int32_t mlstm_inputs_forward(const MlstmInputsForward& args, const ProjectionWeights& weights);

}  // namespace LINVISION_ISA
}  // namespace linvision
