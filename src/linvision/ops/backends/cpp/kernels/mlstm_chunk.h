// What the mLSTM's forward and backward passes share: a chunk's copies in and out, its gates, its weights, its states.

#pragma once

#include "arguments.h"
#include "matrix.h"

namespace linvision {
namespace LINVISION_ISA {

constexpr float kEps = 1e-6f;
constexpr double kNothingYet = -1e300;  // M before the first token: minus infinity without its NaNs

// One allocation, given out piece by piece as matrices.
class Arena {
 public:
  explicit Arena(size_t floats) : memory_(floats), next_(memory_.get()) {}
  bool empty() const { return memory_.get() == nullptr; }
  Matrix take(int64_t rows, int64_t columns) {
    const Matrix matrix = {next_, columns};
    if (next_ != nullptr) next_ += rows * columns;
    return matrix;
  }

 private:
  Scratch memory_;
  float* next_;
};

// `count` tokens of a head from the `start`-th in scan order on.
struct Chunk {
  int64_t batch, head, start, count, tokens;
  bool reverse;
  int64_t token(int64_t t) const { return reverse ? tokens - 1 - start - t : start + t; }
};

// The cumulated log forget gates F and the cumulated maximum M of i_s - F_s, up to the tokens seen so far.
struct GateSums {
  double F = 0.0;
  double M = kNothingYet;
};

LINVISION_INLINE float exp_of(double x) { return exp(splat(static_cast<float>(x)))[0]; }

LINVISION_INLINE float key_scale(int64_t head_dim) { return 1.0f / __builtin_sqrtf(static_cast<float>(head_dim)); }

LINVISION_INLINE float gate_at(const Strided& gate, const Chunk& chunk, int64_t t) {
  const float* data = static_cast<const float*>(gate.data);
  return data[chunk.batch * gate.batch + chunk.token(t) * gate.token + chunk.head * gate.head];
}

// The decays of a chunk, those of tokens beyond its end such that they add nothing.
template <int64_t kLength>
struct ChunkGates {
  alignas(64) float keys[kLength];       // a_s relative to the chunk's last M, in units of log 2
  alignas(64) float queries[kLength];    // M_t relative to the chunk's last M, in units of log 2
  alignas(64) float decay_in[kLength];   // from the state before the chunk to token t
  alignas(64) float decay_out[kLength];  // from token s to the state after the chunk
  alignas(64) float floor[kLength];      // exp(-m_t)
  float carry;                           // from the state before the chunk to the one after it

  void prepare(const Strided& i, const Strided& f, const Chunk& chunk, GateSums& sums) {
    // logsigmoid(f) = min(f, 0) - log(1 + exp(-|f|)): the first part is exact, and added in double it stays so.
    alignas(64) float gate[kLength], rest[kLength];
    double a[kLength], M[kLength];
    for (int64_t t = 0; t < kLength; ++t) gate[t] = t < chunk.count ? gate_at(f, chunk, t) : 0.0f;
    for (int64_t t = 0; t < kLength; t += kLanes) {
      store(rest + t, log1p_of_fraction(exp(-absolute(load(gate + t)))));
    }
    const double before = sums.M;
    for (int64_t t = 0; t < chunk.count; ++t) {
      sums.F += static_cast<double>(gate[t] < 0 ? gate[t] : 0.0f) - rest[t];
      a[t] = gate_at(i, chunk, t) - sums.F;
      sums.M = sums.M > a[t] ? sums.M : a[t];
      M[t] = sums.M;
      floor[t] = static_cast<float>(-sums.F - M[t]);
    }
    for (int64_t t = 0; t < kLength; ++t) {
      const bool inside = t < chunk.count;
      keys[t] = inside ? static_cast<float>((a[t] - sums.M) * kLog2E64) : -1e30f;
      queries[t] = inside ? static_cast<float>((M[t] - sums.M) * kLog2E64) : 0.0f;
      decay_in[t] = inside ? static_cast<float>((before - M[t]) * kLog2E64) : 0.0f;
      if (!inside) floor[t] = 0.0f;
    }
    for (int64_t t = 0; t < kLength; t += kLanes) {
      store(decay_in + t, exp2(load(decay_in + t)));
      store(decay_out + t, exp2(load(keys + t)));
      store(floor + t, exp(load(floor + t)));
    }
    carry = exp_of(before - sums.M);
  }

 private:
  static constexpr double kLog2E64 = 1.4426950408889634;
};

// Turns row t of Q K^T into weighted scores, zero beyond the diagonal, and returns their sum in lanes; `weights`, where
// given, receives the weights themselves.
template <int64_t kLength>
LINVISION_INLINE Vec weigh_row(float* row, const ChunkGates<kLength>& gates, int64_t t, float* weights = nullptr) {
  Vec sums = {};
  const IntVec lane = [] {
    IntVec lanes;
    for (int j = 0; j < kLanes; ++j) lanes[j] = j;
    return lanes;
  }();
  const int64_t end = round_up(t + 1, kLanes);
  for (int64_t s = 0; s < kLength; s += kLanes) {
    Vec weight = {}, weighted = {};
    if (s < end) {
      const IntVec seen = lane + static_cast<int32_t>(s) <= static_cast<int32_t>(t);
      weight = seen ? exp2(load(gates.keys + s) - gates.queries[t]) : Vec{};
      weighted = seen ? load(row + s) * weight : Vec{};
    }
    store(row + s, weighted);
    if (weights != nullptr) store(weights + s, weight);
    sums += weighted;
  }
  return sums;
}

LINVISION_INLINE float denominator(float norm, float floor) {
  const float size = norm < 0 ? -norm : norm;
  return (size > floor ? size : floor) + kEps;
}

// Copies a chunk's rows of tokens (B, S, H, D) to float32, times `scale`, zeros around them.
template <typename T>
void gather(const Strided& from, const Chunk& chunk, int64_t head_dim, float scale, Matrix to, int64_t rows,
            int64_t width) {
  const T* base = static_cast<const T*>(from.data) + chunk.batch * from.batch + chunk.head * from.head;
  for (int64_t t = 0; t < rows; ++t) {
    float* row = to.row(t);
    if (t >= chunk.count) {
      memset(row, 0, width * sizeof(float));
      continue;
    }
    const T* token = base + chunk.token(t) * from.token;
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, load_some(token + j, head_dim - j) * scale);
  }
}

// Copies the chunk's tokens back from float32.
template <typename T>
void scatter(const Strided& to, const Chunk& chunk, int64_t head_dim, Matrix from) {
  T* base = static_cast<T*>(to.data) + chunk.batch * to.batch + chunk.head * to.head;
  for (int64_t t = 0; t < chunk.count; ++t) {
    T* token = base + chunk.token(t) * to.token;
    for (int64_t j = 0; j < head_dim; j += kLanes) store_some(token + j, load(from.row(t) + j), head_dim - j);
  }
}

// Copies the matrix and the vector of one head between contiguous memory and rows of `width` floats.
[[maybe_unused]] static void load_matrix(const float* from, int64_t head_dim, int64_t width, float* to) {
  memset(to, 0, width * width * sizeof(float));
  for (int64_t d = 0; d < head_dim; ++d) memcpy(to + d * width, from + d * head_dim, head_dim * sizeof(float));
}

[[maybe_unused]] static void store_matrix(const float* from, int64_t head_dim, int64_t width, float* to) {
  for (int64_t d = 0; d < head_dim; ++d) memcpy(to + d * head_dim, from + d * width, head_dim * sizeof(float));
}

[[maybe_unused]] static void load_state(const MlstmState& state, int64_t head, int64_t head_dim, int64_t width,
                                        float* C, float* n, GateSums& sums) {
  memset(n, 0, width * sizeof(float));
  sums = GateSums{};
  if (state.C == nullptr) {
    memset(C, 0, width * width * sizeof(float));
    return;
  }
  load_matrix(state.C + head * head_dim * head_dim, head_dim, width, C);
  memcpy(n, state.n + head * head_dim, head_dim * sizeof(float));
  if (state.m != nullptr && state.m[head] > kNothingYet) sums.M = state.m[head];
}

[[maybe_unused]] static void store_state(const MlstmState& state, int64_t head, int64_t head_dim, int64_t width,
                                         const float* C, const float* n, const GateSums& sums) {
  store_matrix(C, head_dim, width, state.C + head * head_dim * head_dim);
  memcpy(state.n + head * head_dim, n, head_dim * sizeof(float));
  if (state.m != nullptr) state.m[head] = static_cast<float>(sums.F + sums.M);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
