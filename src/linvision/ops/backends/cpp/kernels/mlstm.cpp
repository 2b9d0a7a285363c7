// Chunkwise mLSTM, forward. The mathematics stands in ops/_mlstm_chunkwise.py; here a chunk never leaves the caches.
//
// One piece of work is a head of a sequence, walked chunk by chunk with its state in cache. Where there are fewer heads
// than threads, sequences are cut into segments: a first round computes what each segment adds to the state, the states
// between them follow, and a second round walks all segments at once.
//
// A chunk is copied to float32 rows, padded with zeros to whole vectors and tiles, in the order of the scan: `reverse`
// is nothing more than another order of these copies. Sequences are cut into chunks of one length, at most kChunk, of
// which as few tokens as possible are padding.

#include "mlstm_inputs.h"
#include "mlstm_chunk.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

constexpr int64_t kChunk = 32;

struct Workspace {
  int64_t width;
  Arena arena;
  Matrix q, k, v, out;  // tokens of the chunk: (kChunk, width)
  Matrix keys;          // (width, kChunk): the transpose of k
  Matrix scores;        // (kChunk, kChunk)
  Matrix C;             // (width, width)
  float* n;             // directly behind C

  explicit Workspace(int64_t width)
      : width(width),
        arena(5 * kChunk * width + kChunk * kChunk + width * width + width),
        q(arena.take(kChunk, width)),
        k(arena.take(kChunk, width)),
        v(arena.take(kChunk, width)),
        out(arena.take(kChunk, width)),
        keys(arena.take(width, kChunk)),
        scores(arena.take(kChunk, kChunk)),
        C(arena.take(width, width)),
        n(arena.take(1, width).data) {}
};

// Adds the chunk's keys and values to the state, which moves to the scale of the chunk's last token.
void add_to_state(const Workspace& w, const ChunkGates<kChunk>& gates, int64_t length) {
  for (int64_t d = 0; d < w.width; ++d) {
    for (int64_t s = 0; s < kChunk; s += kLanes) {
      store(w.keys.row(d) + s, load(w.keys.row(d) + s) * load(gates.decay_out + s));
    }
  }
  multiply(w.width, w.width, length, w.keys, w.v, w.C, gates.carry);
  scale_row(w.n, w.width, gates.carry);
  for (int64_t s = 0; s < length; ++s) add_scaled(w.n, w.k.row(s), w.width, gates.decay_out[s]);
}

// Computes the chunk's h into w.out, from the state before it.
void compute_outputs(const Workspace& w, const ChunkGates<kChunk>& gates, int64_t length, int64_t count,
                     bool has_state) {
  multiply_to_diagonal(length, w.width, w.q, w.keys, w.scores);
  if (has_state) multiply(length, w.width, w.width, w.q, w.C, w.out, 0.0f);
  float norms[kChunk];
  for (int64_t t = 0; t < length; ++t) {
    float* row = w.scores.row(t);
    norms[t] = total(weigh_row(row, gates, t));
    if (has_state) {
      norms[t] += gates.decay_in[t] * dot(w.q.row(t), w.n, w.width);
      scale_row(w.out.row(t), w.width, gates.decay_in[t]);
    }
  }
  multiply_lower(length, w.width, w.scores, w.v, w.out, has_state ? 1.0f : 0.0f);
  for (int64_t t = 0; t < count; ++t) {
    scale_row(w.out.row(t), w.width, 1.0f / denominator(norms[t], gates.floor[t]));
  }
}

int64_t chunk_length(int64_t tokens) {
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  return round_up((tokens + chunks - 1) / chunks, kTileRows);
}

// Queries, keys and values that are given.
template <typename T>
struct GivenTokens {
  const MlstmForward& args;

  void read(const Chunk& chunk, int64_t length, bool wants_queries, const Workspace& w) const {
    gather<T>(args.k, chunk, args.head_dim, key_scale(args.head_dim), w.k, length, w.width);
    gather<T>(args.v, chunk, args.head_dim, 1.0f, w.v, length, w.width);
    if (wants_queries) gather<T>(args.q, chunk, args.head_dim, 1.0f, w.q, length, w.width);
  }
};

// Queries and keys that are projected from c, values from x.
template <typename T>
struct ProjectedTokens {
  const MlstmInputsForward& args;
  const ProjectionWeights& weights;
  int64_t head_dim;

  void read(const Chunk& chunk, int64_t length, bool, const Workspace& w) const {
    const int64_t start = chunk.head * head_dim;
    const float scale = key_scale(head_dim);
    const auto row_of = [&](const Strided& tensor, int64_t t) {
      return static_cast<const T*>(tensor.data) + chunk.batch * tensor.batch + chunk.token(t) * tensor.token + start;
    };
    const Matrix copies[] = {w.q, w.k, w.v};
    for (int64_t t = 0; t < length; ++t) {
      float *q = w.q.row(t), *k = w.k.row(t), *v = w.v.row(t);
      if (t >= chunk.count) {
        for (const Matrix& rows : copies) memset(rows.row(t), 0, w.width * sizeof(float));
        continue;
      }
      const T *c = row_of(args.c, t), *x = row_of(args.x, t);
      each_vector(head_dim, [&](auto whole, int64_t j, int n) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        const Swapped from_c(load_channels<kWhole>(c + j, n)), from_x(load_channels<kWhole>(x + j, n));
        store(q + j, within<kWhole>(project(weights, kQ, start + j, from_c), n));
        store(k + j, within<kWhole>(project(weights, kK, start + j, from_c), n) * scale);
        store(v + j, within<kWhole>(project(weights, kV, start + j, from_x), n));
      });
    }
  }
};

struct Segment {
  int64_t batch, head, start, stop;
};

// Walks a segment from the state in the workspace. Without outputs only the state moves on.
template <typename T, typename Tokens>
void walk(const MlstmForward& args, const Tokens& tokens, const Segment& segment, Workspace& w, GateSums& sums,
          bool has_state, bool wants_outputs, bool wants_state) {
  const int64_t length = chunk_length(args.tokens);
  ChunkGates<kChunk> gates;
  for (int64_t start = segment.start; start < segment.stop; start += length) {
    const Chunk chunk = {segment.batch, segment.head, start, smaller(length, segment.stop - start), args.tokens,
                         args.reverse != 0};
    const bool feeds = wants_state || start + length < segment.stop;
    gates.prepare(args.i, args.f, chunk, sums);
    tokens.read(chunk, length, wants_outputs, w);
    transpose(length, w.width, w.k, w.keys);
    if (wants_outputs) {
      compute_outputs(w, gates, length, chunk.count, has_state);
      scatter<T>(args.h, chunk, args.head_dim, w.out);
    }
    if (feeds) add_to_state(w, gates, length);
    has_state = true;
  }
}

// Brings the state of a head from one segment to the next: state = state before and what the segment added.
void append(float* C, float* n, GateSums& sums, const float* added_C, const float* added_n, const GateSums& added,
            int64_t width) {
  const double M_added = added.M - sums.F;
  const double M = sums.M > M_added ? sums.M : M_added;
  const float keep = exp_of(sums.M - M), add = exp_of(M_added - M);
  for (int64_t j = 0; j < width * width; ++j) C[j] = keep * C[j] + add * added_C[j];
  for (int64_t j = 0; j < width; ++j) n[j] = keep * n[j] + add * added_n[j];
  sums = {sums.F + added.F, M};
}

template <typename T, typename Tokens>
int32_t forward(const MlstmForward& args, const Tokens& tokens) {
  const int64_t width = round_up(args.head_dim, kLanes), heads = args.batch * args.heads;
  const int64_t state_size = width * width + width;
  const bool wants_final = args.final.C != nullptr;
  int64_t num_segments = 1;
  while (heads * num_segments < args.threads && args.tokens > 4 * kChunk * num_segments) ++num_segments;
  const int64_t length = round_up((args.tokens + num_segments - 1) / num_segments, chunk_length(args.tokens));
  num_segments = (args.tokens + length - 1) / length;
  const auto segment_of = [&](int64_t index) {
    const int64_t head = index / num_segments, start = index % num_segments * length;
    return Segment{head / args.heads, head % args.heads, start, smaller(start + length, args.tokens)};
  };

  // States before every segment: (heads, segments), and their sums over the gates.
  const Scratch states(num_segments > 1 ? heads * num_segments * state_size : 0);
  const Scratch sums_memory(num_segments > 1 ? heads * num_segments * 4 : 0);
  if (states.get() == nullptr || sums_memory.get() == nullptr) return kOutOfMemory;
  GateSums* all_sums = reinterpret_cast<GateSums*>(sums_memory.get());
  int32_t status = kDone;

  if (num_segments > 1) {
    parallel_for(args.threads, heads * num_segments, [&](int64_t index) {
      Workspace w(width);
      if (w.arena.empty()) {
        status = kOutOfMemory;
        return;
      }
      GateSums sums;
      memset(w.C.data, 0, state_size * sizeof(float));
      walk<T>(args, tokens, segment_of(index), w, sums, false, false, true);
      memcpy(states.get() + index * state_size, w.C.data, state_size * sizeof(float));
      all_sums[index] = sums;
    });
    if (status != kDone) return status;
    const Scratch carried(2 * state_size);
    if (carried.get() == nullptr) return kOutOfMemory;
    for (int64_t head = 0; head < heads; ++head) {
      float *state = carried.get(), *added = carried.get() + state_size;
      GateSums sums;
      load_state(args.initial, head, args.head_dim, width, state, state + width * width, sums);
      for (int64_t index = head * num_segments; index < (head + 1) * num_segments; ++index) {
        float* slot = states.get() + index * state_size;
        const GateSums added_sums = all_sums[index];
        memcpy(added, slot, state_size * sizeof(float));
        memcpy(slot, state, state_size * sizeof(float));
        all_sums[index] = sums;
        append(state, state + width * width, sums, added, added + width * width, added_sums, width);
      }
    }
  }

  parallel_for(args.threads, heads * num_segments, [&](int64_t index) {
    Workspace w(width);
    if (w.arena.empty()) {
      status = kOutOfMemory;
      return;
    }
    const int64_t head = index / num_segments, place = index % num_segments;
    GateSums sums;
    if (num_segments > 1) {
      memcpy(w.C.data, states.get() + index * state_size, state_size * sizeof(float));
      sums = all_sums[index];
    } else {
      load_state(args.initial, head, args.head_dim, width, w.C.data, w.n, sums);
    }
    const bool is_last = place == num_segments - 1, has_state = place > 0 || args.initial.C != nullptr;
    walk<T>(args, tokens, segment_of(index), w, sums, has_state, true, is_last && wants_final);
    if (is_last && wants_final) store_state(args.final, head, args.head_dim, width, w.C.data, w.n, sums);
  });
  return status;
}

}  // namespace

int32_t mlstm_forward(const MlstmForward& args) {
  return args.dtype == kBFloat16 ? forward<BFloat16>(args, GivenTokens<BFloat16>{args})
                                 : forward<float>(args, GivenTokens<float>{args});
}

int32_t projected_mlstm_forward(const ProjectedMlstmForward& args) {
  const MlstmInputsForward& from = args.inputs;
  const ProjectionWeights weights(from.weights, from.biases, from.gate_weights, from.width, from.heads);
  const int32_t status = mlstm_inputs_forward(from, weights);
  if (status != kDone) return status;
  const int64_t head_dim = args.mlstm.head_dim;
  return from.dtype == kBFloat16 ? forward<BFloat16>(args.mlstm, ProjectedTokens<BFloat16>{from, weights, head_dim})
                                 : forward<float>(args.mlstm, ProjectedTokens<float>{from, weights, head_dim});
}

}  // namespace LINVISION_ISA
}  // namespace linvision
