// Softmax attention within windows that tile a grid of tokens, from the layer norm before it to the residual sum after it:
// each window passes through all of it while its tokens are in the second cache. For inference.

#include "arguments.h"
#include "linear.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

constexpr int64_t kPieceTokens = 100;  // of the windows that are taken together, where one has fewer
constexpr int64_t kQueries = 56;       // whose scores are alive at once
constexpr int kHeadVecs = 2;
typedef Panels<float, kHeadVecs> HeadPanels;

// Where the tokens of a piece lie; null for those that fill up windows at the edges.
template <typename T>
class Places {
 public:
  Places(const WindowAttentionForward& args, int64_t first, int64_t last)
      : windows(last - first), memory_(2 * windows * args.window * args.window * sizeof(T*) / sizeof(float)) {
    if (empty()) return;
    x = reinterpret_cast<const T**>(memory_.get());
    y = reinterpret_cast<T**>(memory_.get()) + windows * args.window * args.window;
    const int64_t side = args.window, down = (args.rows + side - 1) / side, across = (args.columns + side - 1) / side;
    int64_t token = 0;
    for (int64_t window = first; window < last; ++window) {
      const int64_t image = window / (down * across), row = window / across % down * side, column = window % across * side;
      for (int64_t r = row; r < row + side; ++r) {
        for (int64_t c = column; c < column + side; ++c, ++token) {
          const bool given = r < args.rows && c < args.columns;
          x[token] = given ? at<T>(args.x, image, r, c) : nullptr;
          y[token] = given ? at<T>(args.y, image, r, c) : nullptr;
        }
      }
    }
  }
  bool empty() const { return memory_.get() == nullptr; }

  int64_t windows;
  const T** x;
  T** y;

 private:
  const Scratch memory_;

  template <typename U>
  static U* at(const Grid& grid, int64_t image, int64_t row, int64_t column) {
    return static_cast<U*>(grid.data) + image * grid.batch + row * grid.row + column * grid.column;
  }
};

// Memory of a piece: tokens (normalised at first, attended at last), their q, k and v, and what a head needs.
template <typename T>
struct Workspace {
  int64_t window_tokens, width, head_dim, score_width;

  Workspace(const WindowAttentionForward& args, int64_t tokens)
      : window_tokens(args.window * args.window),
        width(args.qkv.inputs),
        head_dim(width / args.heads),
        score_width(round_up(window_tokens, HeadPanels::kWidth)),
        tokens_(tokens * width),
        qkv_(tokens * qkv_stride()),
        keys_(score_width * head_dim),
        values_(round_up(head_dim, HeadPanels::kWidth) * window_tokens),
        scores_(kQueries * score_width) {}
  bool empty() const {
    return tokens_.get() == nullptr || qkv_.get() == nullptr || keys_.get() == nullptr || values_.get() == nullptr ||
           scores_.get() == nullptr;
  }
  int64_t qkv_stride() const { return round_up(3 * width, Panels<T, kWeightVecs>::kWidth); }
  T* token(int64_t index) const { return reinterpret_cast<T*>(tokens_.get()) + index * width; }
  float* qkv(int64_t index) const { return qkv_.get() + index * qkv_stride(); }
  HeadPanels keys() const { return {keys_.get(), head_dim, window_tokens, nullptr}; }
  HeadPanels values() const { return {values_.get(), window_tokens, head_dim, nullptr}; }
  float* scores(int64_t row) const { return scores_.get() + row * score_width; }

 private:
  const Scratch tokens_, qkv_, keys_, values_, scores_;
};

// Turns a row of scores into 2^(score - largest) and returns the inverse of their sum.
float soften(float* scores, int64_t width) {
  Vec largest = load(scores);
  for (int64_t j = kLanes; j < width; j += kLanes) largest = maximum(largest, load(scores + j));
  const float shift = highest(largest);
  Vec sum = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - shift);
    store(scores + j, weight);
    sum += weight;
  }
  return 1.0f / total(sum);
}

// One head of the window whose tokens start at `first`.
template <typename T>
void attend(const Workspace<T>& w, int64_t first, int64_t head) {
  const int64_t n = w.window_tokens, stride = w.qkv_stride(), channel = head * w.head_dim;
  const float* q = w.qkv(first) + channel;
  const float *k = q + w.width, *v = k + w.width;
  const HeadPanels keys = w.keys(), values = w.values();
  for (int64_t index = 0; index < keys.count(); ++index) keys.lay_out(index, k, stride);
  for (int64_t index = 0; index < values.count(); ++index) values.copy(index, v, stride);

  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(w.head_dim));
  for (int64_t start = 0; start < n; start += kQueries) {
    const int64_t rows = smaller(kQueries, n - start);
    multiply_panels(rows, q + start * stride, stride, keys,
                    [&](int64_t row, int64_t column, Vec sums)
                        __attribute__((always_inline)) { store(w.scores(row) + column, sums * scale); });
    float inverse[kQueries];
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = n; j < w.score_width; ++j) w.scores(row)[j] = -3e38f;  // no keys: their weights come out as 1e-38
      inverse[row] = soften(w.scores(row), w.score_width);
    }
    multiply_panels(rows, w.scores(0), w.score_width, values,
                    [&](int64_t row, int64_t column, Vec sums) __attribute__((always_inline)) {
                      const int64_t left = w.head_dim - column;
                      if (left <= 0) return;
                      store_some(w.token(first + start + row) + channel + column, sums * inverse[row],
                                 static_cast<int>(smaller(kLanes, left)));
                    });
  }
}

template <typename T>
void attend_windows(const WindowAttentionForward& args, const Places<T>& places, const Workspace<T>& w,
                    const LaidOut<T>& qkv_weights, const LaidOut<T>& proj_weights) {
  const int64_t tokens = places.windows * w.window_tokens;
  for (int64_t t = 0; t < tokens; ++t) {
    if (places.x[t] == nullptr) {
      memset(static_cast<void*>(w.token(t)), 0, w.width * sizeof(T));
    } else {
      normalise(places.x[t], args.norm, w.width, w.token(t));
    }
  }
  multiply_panels(tokens, w.token(0), w.width, qkv_weights.panels,
                  [&](int64_t row, int64_t column, Vec sums) __attribute__((always_inline)) {
                    store(w.qkv(row) + column, sums);
                  });
  for (int64_t window = 0; window < places.windows; ++window) {
    for (int64_t head = 0; head < args.heads; ++head) attend(w, window * w.window_tokens, head);
  }
  multiply_panels(tokens, w.token(0), w.width, proj_weights.panels,
                  [&](int64_t row, int64_t column, Vec sums) __attribute__((always_inline)) {
                    if (places.x[row] != nullptr) {
                      Output<T>{args.proj.outputs, places.x[row], 0, places.y[row], 0}.finish(0, column, sums);
                    }
                  });
}

template <typename T>
int32_t forward(const WindowAttentionForward& args) {
  const LaidOut<T> qkv_weights(args.qkv, args.threads), proj_weights(args.proj, args.threads);
  if (qkv_weights.empty() || proj_weights.empty()) return kOutOfMemory;
  const int64_t side = args.window, window_tokens = side * side;
  const int64_t windows = args.batch * ((args.rows + side - 1) / side) * ((args.columns + side - 1) / side);
  const int64_t together = larger(1, smaller(kPieceTokens / window_tokens, windows / larger(1, args.threads)));
  int32_t status = kDone;
  parallel_for(args.threads, (windows + together - 1) / together, [&](int64_t piece) {
    const int64_t first = piece * together, last = smaller(windows, first + together);
    const Workspace<T> workspace(args, (last - first) * window_tokens);
    const Places<T> places(args, first, last);
    if (workspace.empty() || places.empty()) {
      status = kOutOfMemory;
      return;
    }
    attend_windows(args, places, workspace, qkv_weights, proj_weights);
  });
  return status;
}

}  // namespace

int32_t window_attention_forward(const WindowAttentionForward& args) {
  if (args.dtype == kFloat32) return forward<float>(args);
  if constexpr (kHasBFloat16Products) return forward<BFloat16>(args);
  return kUnsupported;
}

}  // namespace LINVISION_ISA
}  // namespace linvision
