// Chunkwise mLSTM, backward. The mathematics stands in ops/_mlstm_chunkwise.py.
//
// One piece of work is a head of a sequence. It is walked twice: forwards to compute the states before all chunks
// again, then back, with the gradient of the state in cache. Gradients of the gates follow from q . dq and k . dk,
// whose differences are summed on the way back.

#include "mlstm_chunk.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

constexpr int64_t kChunk = 32;
using Gates = ChunkGates<kChunk>;

struct Workspace {
  int64_t width;
  Arena arena;
  Matrix q, k, v, dh, h, dq, dk, dv;               // tokens of a chunk: (kChunk, width)
  Matrix columns;                                  // (width, kChunk): the transpose of one of these
  Matrix weights, weighted, d_scores, transposed;  // (kChunk, kChunk)
  Matrix C, dC, C_transposed;                      // (width, width)
  float *n, *dn;

  explicit Workspace(int64_t width)
      : width(width),
        arena(9 * kChunk * width + 4 * kChunk * kChunk + 3 * width * width + 2 * width),
        q(arena.take(kChunk, width)),
        k(arena.take(kChunk, width)),
        v(arena.take(kChunk, width)),
        dh(arena.take(kChunk, width)),
        h(arena.take(kChunk, width)),
        dq(arena.take(kChunk, width)),
        dk(arena.take(kChunk, width)),
        dv(arena.take(kChunk, width)),
        columns(arena.take(width, kChunk)),
        weights(arena.take(kChunk, kChunk)),
        weighted(arena.take(kChunk, kChunk)),
        d_scores(arena.take(kChunk, kChunk)),
        transposed(arena.take(kChunk, kChunk)),
        C(arena.take(width, width)),
        dC(arena.take(width, width)),
        C_transposed(arena.take(width, width)),
        n(arena.take(1, width).data),
        dn(arena.take(1, width).data) {}
};

// What the way forwards leaves for the way back.
struct Kept {
  Gates* gates;   // of each chunk
  float* states;  // C^T and n before each chunk
  int64_t state_size;
  float* C(int64_t chunk) const { return states + chunk * state_size; }
};

// to = the transpose of `from`, its columns times `factors`.
void transpose_scaled(const Workspace& w, Matrix from, const float* factors) {
  transpose(kChunk, w.width, from, w.columns);
  for (int64_t d = 0; d < w.width; ++d) {
    for (int64_t t = 0; t < kChunk; t += kLanes) {
      store(w.columns.row(d) + t, load(w.columns.row(d) + t) * load(factors + t));
    }
  }
}

// state = scale state + rows^T values, where each row counts as often as `factors` says.
void add_outer_products(const Workspace& w, Matrix state, float* vector, Matrix rows, const float* factors,
                        Matrix values, const float* vector_factors, float scale) {
  transpose_scaled(w, rows, factors);
  multiply(w.width, w.width, kChunk, w.columns, values, state, scale);
  scale_row(vector, w.width, scale);
  for (int64_t t = 0; t < kChunk; ++t) add_scaled(vector, rows.row(t), w.width, vector_factors[t]);
}

// Row by row: to = factors (to + add vector).
void add_and_scale_rows(const Workspace& w, Matrix to, const float* vector, const float* add, const float* factors) {
  for (int64_t t = 0; t < kChunk; ++t) {
    if (add != nullptr) add_scaled(to.row(t), vector, w.width, add[t]);
    scale_row(to.row(t), w.width, factors[t]);
  }
}

// Divides dh by the denominators of h and writes the gradients of the norms. C^T and n are the state before the chunk.
void divide_by_norms(const Workspace& w, const Gates& gates, const float* n, int64_t count, float* d_norms) {
  transpose(kChunk, w.width, w.k, w.columns);
  multiply_to_diagonal(kChunk, w.width, w.q, w.columns, w.weighted);
  for (int64_t t = 0; t < kChunk; ++t) {
    float norm = total(weigh_row(w.weighted.row(t), gates, t, w.weights.row(t)));
    if (n != nullptr) norm += gates.decay_in[t] * dot(w.q.row(t), n, w.width);
    const float size = norm < 0 ? -norm : norm, divisor = denominator(norm, gates.floor[t]);
    const float sign = norm < 0 ? -1.0f : 1.0f;
    const bool counts = t < count && size > gates.floor[t];
    d_norms[t] = counts ? -sign * dot(w.dh.row(t), w.h.row(t), w.width) / divisor : 0.0f;
    scale_row(w.dh.row(t), w.width, 1.0f / divisor);
  }
}

// The gradient of the scores into w.d_scores, zero beyond the diagonal.
void differentiate_scores(const Workspace& w, const float* d_norms) {
  transpose(kChunk, w.width, w.v, w.columns);
  multiply_to_diagonal(kChunk, w.width, w.dh, w.columns, w.d_scores);
  for (int64_t t = 0; t < kChunk; ++t) {
    for (int64_t s = 0; s < kChunk; s += kLanes) {
      float *gradients = w.d_scores.row(t) + s, *weights = w.weights.row(t) + s;
      const Vec weight = load(weights);
      const Vec gradient = (load(gradients) + d_norms[t]) * weight;
      store(gradients, s <= t ? gradient : Vec{});
    }
  }
}

// One chunk on the way back: w.q ... w.h are given, w.dq, w.dk and w.dv are made, w.dC and w.dn move on.
void walk_back(const Workspace& w, const Gates& gates, float* C_before, int64_t count, bool has_gradient) {
  const Matrix C = {C_before, w.width};
  float* n = C_before == nullptr ? nullptr : C_before + w.width * w.width;
  alignas(64) float d_norms[kChunk], ones[kChunk], d_norms_in[kChunk];
  divide_by_norms(w, gates, n, count, d_norms);
  differentiate_scores(w, d_norms);

  const float after = has_gradient ? 1.0f : 0.0f;
  if (has_gradient) {
    for (int64_t t = 0; t < kChunk; ++t) ones[t] = 1.0f;
    multiply(kChunk, w.width, w.width, w.k, w.dC, w.dv, 0.0f);
    add_and_scale_rows(w, w.dv, nullptr, nullptr, gates.decay_out);
    transpose(w.width, w.width, w.dC, w.C_transposed);
    multiply(kChunk, w.width, w.width, w.v, w.C_transposed, w.dk, 0.0f);
    add_and_scale_rows(w, w.dk, w.dn, ones, gates.decay_out);
  }
  transpose(kChunk, kChunk, w.weighted, w.transposed);
  multiply_upper(kChunk, w.width, w.transposed, w.dh, w.dv, after);
  transpose(kChunk, kChunk, w.d_scores, w.transposed);
  multiply_upper(kChunk, w.width, w.transposed, w.q, w.dk, after);

  if (C_before != nullptr) {
    transpose(w.width, w.width, C, w.C_transposed);
    multiply(kChunk, w.width, w.width, w.dh, w.C_transposed, w.dq, 0.0f);
    add_and_scale_rows(w, w.dq, n, d_norms, gates.decay_in);
    for (int64_t t = 0; t < kChunk; ++t) d_norms_in[t] = d_norms[t] * gates.decay_in[t];
    add_outer_products(w, w.dC, w.dn, w.q, gates.decay_in, w.dh, d_norms_in, has_gradient ? gates.carry : 0.0f);
  }
  multiply_lower(kChunk, w.width, w.d_scores, w.k, w.dq, C_before == nullptr ? 0.0f : 1.0f);
}

// Writes the gradients of the gates; `sum_behind` is what reaches the log forget gates from the tokens behind.
void differentiate_gates(const MlstmBackward& args, const Chunk& chunk, const Workspace& w, double& sum_behind) {
  const int64_t head = chunk.batch * args.di.batch + chunk.head * args.di.head;
  for (int64_t t = chunk.count - 1; t >= 0; --t) {
    const int64_t place = head + chunk.token(t) * args.di.token;
    const float from_key = dot(w.dk.row(t), w.k.row(t), w.width);
    sum_behind += static_cast<double>(dot(w.dq.row(t), w.q.row(t), w.width)) - from_key;
    const float closed = sigmoid(splat(-gate_at(args.f, chunk, t)))[0];
    static_cast<float*>(args.di.data)[place] = from_key;
    static_cast<float*>(args.df.data)[place] = static_cast<float>(sum_behind * closed);
  }
}

template <typename T>
void differentiate_head(const MlstmBackward& args, int64_t head, Workspace& w, const Kept& kept) {
  const int64_t num_chunks = (args.tokens + kChunk - 1) / kChunk, size = args.head_dim;
  const float scale = key_scale(size);
  const bool has_initial = args.initial.C != nullptr, has_final = args.d_final.C != nullptr;
  const auto chunk_at = [&](int64_t index) {
    const int64_t start = index * kChunk;
    return Chunk{head / args.heads, head % args.heads, start, smaller(kChunk, args.tokens - start), args.tokens,
                 args.reverse != 0};
  };

  GateSums sums;
  load_state(args.initial, head, size, w.width, w.C.data, w.n, sums);
  for (int64_t index = 0; index < num_chunks; ++index) {
    const Chunk chunk = chunk_at(index);
    memcpy(kept.C(index), w.C.data, w.width * w.width * sizeof(float));
    memcpy(kept.C(index) + w.width * w.width, w.n, w.width * sizeof(float));
    kept.gates[index].prepare(args.i, args.f, chunk, sums);
    if (index + 1 == num_chunks && !has_final) break;
    gather<T>(args.k, chunk, size, scale, w.k, kChunk, w.width);
    gather<T>(args.v, chunk, size, 1.0f, w.v, kChunk, w.width);
    const Gates& gates = kept.gates[index];
    add_outer_products(w, w.C, w.n, w.k, gates.decay_out, w.v, gates.decay_out, gates.carry);
  }

  double sum_behind = 0.0;
  GateSums unused;
  load_state(args.d_final, head, size, w.width, w.dC.data, w.dn, unused);
  if (has_final) {
    for (int64_t d = 0; d < w.width; ++d) sum_behind += dot(w.dC.row(d), w.C.row(d), w.width);
    sum_behind += dot(w.dn, w.n, w.width);
  }
  for (int64_t index = num_chunks - 1; index >= 0; --index) {
    const Chunk chunk = chunk_at(index);
    gather<T>(args.q, chunk, size, 1.0f, w.q, kChunk, w.width);
    gather<T>(args.k, chunk, size, scale, w.k, kChunk, w.width);
    gather<T>(args.v, chunk, size, 1.0f, w.v, kChunk, w.width);
    gather<T>(args.h, chunk, size, 1.0f, w.h, kChunk, w.width);
    gather<T>(args.dh, chunk, size, 1.0f, w.dh, kChunk, w.width);
    const bool is_fed = index > 0 || has_initial, has_gradient = index + 1 < num_chunks || has_final;
    walk_back(w, kept.gates[index], is_fed ? kept.C(index) : nullptr, chunk.count, has_gradient);
    differentiate_gates(args, chunk, w, sum_behind);
    for (int64_t t = 0; t < chunk.count; ++t) scale_row(w.dk.row(t), w.width, scale);
    scatter<T>(args.dq, chunk, size, w.dq);
    scatter<T>(args.dk, chunk, size, w.dk);
    scatter<T>(args.dv, chunk, size, w.dv);
  }
  if (has_initial) store_state(args.d_initial, head, size, w.width, w.dC.data, w.dn, unused);
}

template <typename T>
int32_t backward(const MlstmBackward& args) {
  const int64_t width = round_up(args.head_dim, kLanes), num_chunks = (args.tokens + kChunk - 1) / kChunk;
  const int64_t state_size = width * width + width;
  int32_t status = kDone;
  parallel_for(args.threads, args.batch * args.heads, [&](int64_t head) {
    Workspace w(width);
    const Scratch states(num_chunks * state_size), gates(num_chunks * sizeof(Gates) / sizeof(float));
    if (w.arena.empty() || states.get() == nullptr || gates.get() == nullptr) {
      status = kOutOfMemory;
      return;
    }
    differentiate_head<T>(args, head, w, {reinterpret_cast<Gates*>(gates.get()), states.get(), state_size});
  });
  return status;
}

}  // namespace

int32_t mlstm_backward(const MlstmBackward& args) {
  return args.dtype == kBFloat16 ? backward<BFloat16>(args) : backward<float>(args);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
