// The linear layers of a kernel: their weights laid out, what goes into them and what becomes of their sums.

#pragma once

#include "panels.h"

namespace linvision {
namespace LINVISION_ISA {

// The weights of a layer in panels, for all threads.
template <typename T>
class LaidOut {
 public:
  LaidOut(const Linear& layer, int threads)
      : width_(round_up(layer.outputs, Panels<T, kWeightVecs>::kWidth)), weight_(width_ * layer.inputs), bias_(width_) {
    panels = {reinterpret_cast<T*>(weight_.get()), layer.inputs, layer.outputs, layer.bias ? bias_.get() : nullptr};
    if (empty()) return;
    if (layer.bias != nullptr) {
      memset(bias_.get(), 0, width_ * sizeof(float));
      memcpy(bias_.get(), layer.bias, layer.outputs * sizeof(float));
    }
    const T* weight = static_cast<const T*>(layer.weight);
    parallel_for(threads, panels.count(), [&](int64_t index) { panels.lay_out(index, weight, layer.inputs); });
  }
  bool empty() const { return weight_.get() == nullptr || bias_.get() == nullptr; }

  Panels<T, kWeightVecs> panels;

 private:
  const int64_t width_;
  const Scratch weight_, bias_;
};

template <typename T>
LINVISION_INLINE void normalise(const T* x, const LayerNorm& norm, int64_t width, T* to) {
  const Moments moments = moments_of(x, width, norm.eps);
  each_vector(width, [&](auto whole, int64_t d, int n) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    Vec y = (load_channels<kWhole>(x + d, n) - moments.mean) * moments.scale * load_channels<kWhole>(norm.weight + d, n);
    if (norm.bias != nullptr) y += load_channels<kWhole>(norm.bias + d, n);
    store_channels<kWhole>(to + d, y, n);
  });
}

template <typename T>
LINVISION_INLINE void multiply_by_silu(const T* x, const T* gate, int64_t width, T* to) {
  each_vector(width, [&](auto whole, int64_t d, int n) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const Vec factor = silu(load_channels<kWhole>(gate + d, n));
    store_channels<kWhole>(to + d, load_channels<kWhole>(x + d, n) * factor, n);
  });
}

// Adds the residual to the sums of a layer and writes them.
template <typename T>
struct Output {
  int64_t columns;
  const T* residual;
  int64_t residual_stride;
  T* y;
  int64_t stride;

  inline __attribute__((always_inline)) void finish(int64_t row, int64_t column, Vec sums) const {
    if (column >= columns) return;
    const int n = static_cast<int>(smaller(kLanes, columns - column));
    if (residual != nullptr) sums += load_some(residual + row * residual_stride + column, n);
    store_some(y + row * stride + column, sums, n);
  }
};

}  // namespace LINVISION_ISA
}  // namespace linvision
