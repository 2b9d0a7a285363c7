// A linear layer, and the two of an MLP, with the layer norm (and gate) before and the residual sum after them in one
// pass over the tokens. For inference: nothing is kept for a backward pass.

#include "arguments.h"
#include "linear.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

constexpr int64_t kPanel = Panels<float, kWeightVecs>::kWidth, kTile = Panels<float, kWeightVecs>::kRows;
constexpr int64_t kBlockRows = 12 * kTile;     // tokens of a piece of work, whose values stay in the second cache
constexpr int64_t kHiddenPanels = 8;           // of an MLP that are computed before they are summed up

// All rows in blocks, of which every thread gets the same number where they are few; and the panels of columns in groups
// where there are not even as many blocks as threads.
struct Pieces {
  int64_t rows, block, num_groups, panels, count;

  Pieces(int64_t rows, int64_t panels, int64_t threads) : rows(rows), panels(panels) {
    const int64_t shares = round_up((rows + kBlockRows - 1) / kBlockRows, threads);
    block = round_up((rows + shares - 1) / shares, kTile);
    const int64_t blocks = (rows + block - 1) / block;
    num_groups = larger(1, smaller(panels, threads / larger(1, blocks)));
    count = blocks * num_groups;
  }
  int64_t first_row(int64_t piece) const { return piece / num_groups * block; }
  int64_t num_rows(int64_t piece) const { return smaller(block, rows - first_row(piece)); }
  int64_t first_panel(int64_t piece) const { return piece % num_groups * panels / num_groups; }
  int64_t last_panel(int64_t piece) const { return (piece % num_groups + 1) * panels / num_groups; }
};

template <typename T>
T* row_of(const Rows& rows, int64_t row) {
  return rows.data == nullptr ? nullptr : static_cast<T*>(rows.data) + row * rows.stride;
}

// Rows as a product reads them: those given, or in memory of our own what a norm and a gate make of them.
template <typename T>
class Inputs {
 public:
  Inputs(const Rows& x, const LayerNorm& norm, const Rows& gate, int64_t width, int64_t first, int64_t rows)
      : memory_(norm.weight == nullptr && gate.data == nullptr ? 0 : rows * width) {
    data = row_of<T>(x, first);
    stride = x.stride;
    if ((norm.weight == nullptr && gate.data == nullptr) || memory_.get() == nullptr) return;
    T* changed = reinterpret_cast<T*>(memory_.get());
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = data + row * stride;
      T* to = changed + row * width;
      if (norm.weight != nullptr) {
        normalise(from, norm, width, to);
        from = to;
      }
      if (gate.data != nullptr) multiply_by_silu(from, row_of<T>(gate, first + row), width, to);
    }
    data = changed;
    stride = width;
  }
  bool empty() const { return memory_.get() == nullptr; }

  const T* data;
  int64_t stride;

 private:
  const Scratch memory_;
};

template <typename T>
int32_t linear(const LinearForward& args) {
  if (args.rows == 0) return kDone;
  const LaidOut<T> weights(args.layer, args.threads);
  if (weights.empty()) return kOutOfMemory;
  const Pieces pieces(args.rows, weights.panels.count(), larger(1, args.threads));
  int32_t status = kDone;
  parallel_for(args.threads, pieces.count, [&](int64_t piece) {
    const int64_t first = pieces.first_row(piece), rows = pieces.num_rows(piece);
    const Inputs<T> inputs(args.x, args.norm, args.gate, args.layer.inputs, first, rows);
    if (inputs.empty()) {
      status = kOutOfMemory;
      return;
    }
    const Output<T> output{args.layer.outputs, row_of<T>(args.residual, first), args.residual.stride,
                           row_of<T>(args.y, first), args.y.stride};
    multiply_panels(rows, inputs.data, inputs.stride, weights.panels, pieces.first_panel(piece),
                    pieces.last_panel(piece), 0, args.layer.inputs,
                    [&](int64_t row, int64_t column, Vec sums)
                        __attribute__((always_inline)) { output.finish(row, column, sums); });
  });
  return status;
}

template <typename T>
int32_t mlp(const MlpForward& args) {
  if (args.rows == 0) return kDone;
  const LaidOut<T> first_weights(args.first, args.threads), second_weights(args.second, args.threads);
  if (first_weights.empty() || second_weights.empty()) return kOutOfMemory;
  const int64_t hidden = args.first.outputs, chunk = kHiddenPanels * kPanel;
  const int64_t width = round_up(args.second.outputs, kPanel);
  const Pieces pieces(args.rows, 1, larger(1, args.threads));
  int32_t status = kDone;
  parallel_for(args.threads, pieces.count, [&](int64_t piece) {
    const int64_t first = pieces.first_row(piece), rows = pieces.num_rows(piece);
    const Inputs<T> inputs(args.x, args.norm, Rows{nullptr, 0}, args.first.inputs, first, rows);
    const Scratch activations(rows * chunk), sums_memory(rows * width);
    if (inputs.empty() || activations.get() == nullptr || sums_memory.get() == nullptr) {
      status = kOutOfMemory;
      return;
    }
    T* activated = reinterpret_cast<T*>(activations.get());
    const Output<T> output{args.second.outputs, row_of<T>(args.residual, first), args.residual.stride,
                           row_of<T>(args.y, first), args.y.stride};
    for (int64_t start = 0; start < hidden; start += chunk) {
      const int64_t depth = smaller(chunk, hidden - start), panel = start / kPanel;
      multiply_panels(rows, inputs.data, inputs.stride, first_weights.panels, panel,
                      panel + (depth + kPanel - 1) / kPanel, 0, args.first.inputs,
                      [&](int64_t row, int64_t column, Vec sums) __attribute__((always_inline)) {
                        store(activated + row * chunk + column - start, gelu(sums));
                      });
      const bool is_first = start == 0, is_last = start + depth == hidden;
      multiply_panels(rows, activated, chunk, second_weights.panels, 0, second_weights.panels.count(), start, depth,
                      [&](int64_t row, int64_t column, Vec sums) __attribute__((always_inline)) {
                        float* so_far = sums_memory.get() + row * width + column;
                        if (!is_first) sums += load(so_far);
                        is_last ? output.finish(row, column, sums) : store(so_far, sums);
                      });
    }
  });
  return status;
}

}  // namespace

int32_t linear_forward(const LinearForward& args) {
  if (args.dtype == kFloat32) return linear<float>(args);
  if constexpr (kHasBFloat16Products) return linear<BFloat16>(args);
  return kUnsupported;
}

int32_t mlp_forward(const MlpForward& args) {
  if (args.dtype == kFloat32) return mlp<float>(args);
  if constexpr (kHasBFloat16Products) return mlp<BFloat16>(args);
  return kUnsupported;
}

}  // namespace LINVISION_ISA
}  // namespace linvision
