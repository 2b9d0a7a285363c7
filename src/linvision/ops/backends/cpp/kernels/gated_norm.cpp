// The norm of each head, skip and gate at the end of a ViL layer, in one pass over the tokens; forward and backward.

#include "arguments.h"
#include "channels.h"

namespace linvision {
namespace LINVISION_ISA {
namespace {

// The parameters of a head at channels d, ...
struct Affine {
  Vec scale, shift, skip;

  template <bool kWhole>
  static inline __attribute__((always_inline)) Affine at(const float* weight, const float* bias, const float* skip,
                                                         int64_t channel, int n) {
    return {1.0f + load_channels<kWhole>(weight + channel, n),
            bias == nullptr ? Vec{} : load_channels<kWhole>(bias + channel, n),
            load_channels<kWhole>(skip + channel, n)};
  }
};

template <typename T>
LINVISION_INLINE T* token_of(const Strided& tensor, int64_t tokens, int64_t at) {
  return static_cast<T*>(tensor.data) + at / tokens * tensor.batch + at % tokens * tensor.token;
}

template <typename T>
int32_t forward(const GatedNormForward& args) {
  const TokenBlocks blocks(args.batch * args.tokens, 1, 8 * larger(1, args.threads));
  parallel_for(args.threads, blocks.count, [&](int64_t block) {
    for (int64_t at = blocks.first(block); at < blocks.last(block); ++at) {
      const T* c = token_of<const T>(args.c, args.tokens, at);
      const T* z = args.z.data == nullptr ? nullptr : token_of<const T>(args.z, args.tokens, at);
      T* y = token_of<T>(args.y, args.tokens, at);
      for (int64_t head = 0; head < args.heads; ++head) {
        const T* h = token_of<const T>(args.h, args.tokens, at) + head * args.h.head;
        const Moments moments = moments_of(h, args.head_dim, args.eps);
        const int64_t start = head * args.head_dim;
        each_vector(args.head_dim, [&](auto whole, int64_t d, int n) __attribute__((always_inline)) {
          constexpr bool kWhole = decltype(whole)::value;
          const Affine affine = Affine::at<kWhole>(args.weight, args.bias, args.skip, start + d, n);
          const Vec normalised = (load_channels<kWhole>(h + d, n) - moments.mean) * moments.scale;
          const Vec skipped = affine.skip * load_channels<kWhole>(c + start + d, n);
          Vec sum = normalised * affine.scale + affine.shift + skipped;
          if (z != nullptr) sum *= silu(load_channels<kWhole>(z + start + d, n));
          store_channels<kWhole>(y + start + d, sum, n);
        });
      }
    }
  });
  return kDone;
}

// The gradients of weight, bias and skip: for each, the heads, each padded to whole vectors.
struct Gradients {
  float* data;
  int64_t stride, heads;
  float* weight(int64_t head) const { return data + head * stride; }
  float* bias(int64_t head) const { return weight(heads + head); }
  float* skip(int64_t head) const { return weight(2 * heads + head); }
};

// One head of one token: pointers to its channels, and `kept`, room for the gradient of the normalised values.
template <typename T>
struct HeadRows {
  const T *h, *c, *z, *dy;
  T *dh, *dc, *dz;
  float* kept;
};

template <typename T>
LINVISION_INLINE void differentiate(const GatedNormBackward& args, const Gradients& gradients, int64_t head,
                                    const HeadRows<T>& rows) {
  const Moments moments = moments_of(rows.h, args.head_dim, args.eps);
  const int64_t start = head * args.head_dim;
  float *d_weight = gradients.weight(head), *d_bias = gradients.bias(head), *d_skip = gradients.skip(head);
  Vec sum = {}, product = {};
  each_vector(args.head_dim, [&](auto whole, int64_t d, int n) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const Affine affine = Affine::at<kWhole>(args.weight, args.bias, args.skip, start + d, n);
    const Vec normalised = (load_channels<kWhole>(rows.h + d, n) - moments.mean) * moments.scale;
    const Vec c = load_channels<kWhole>(rows.c + d, n), z = load_channels<kWhole>(rows.z + d, n);
    const Vec dy = load_channels<kWhole>(rows.dy + d, n), gate = sigmoid(z);
    const Vec inner = normalised * affine.scale + affine.shift + affine.skip * c;
    const Vec d_inner = dy * z * gate;
    store_channels<kWhole>(rows.dz + d, dy * inner * silu_slope(z, gate), n);
    store_channels<kWhole>(rows.dc + d, d_inner * affine.skip, n);
    store(d_weight + d, load(d_weight + d) + d_inner * normalised);
    store(d_bias + d, load(d_bias + d) + d_inner);
    store(d_skip + d, load(d_skip + d) + d_inner * c);
    const Vec d_normalised = d_inner * affine.scale;
    store(rows.kept + d, d_normalised);
    sum += d_normalised;
    product += d_normalised * normalised;
  });
  const float mean = total(sum) / static_cast<float>(args.head_dim);
  const float slope = total(product) / static_cast<float>(args.head_dim);
  each_vector(args.head_dim, [&](auto whole, int64_t d, int n) __attribute__((always_inline)) {
    constexpr bool kWhole = decltype(whole)::value;
    const Vec normalised = (load_channels<kWhole>(rows.h + d, n) - moments.mean) * moments.scale;
    store_channels<kWhole>(rows.dh + d, (load(rows.kept + d) - mean - normalised * slope) * moments.scale, n);
  });
}

template <typename T>
int32_t backward(const GatedNormBackward& args) {
  const TokenBlocks blocks(args.batch * args.tokens, 1, 4 * larger(1, args.threads));
  const int64_t stride = round_up(args.head_dim, kLanes), size = 3 * args.heads * stride;
  const int64_t num_parts = larger(1, blocks.count);
  const Scratch parts(num_parts * (size + stride));  // after the gradients, room for one head a part
  if (parts.get() == nullptr) return kOutOfMemory;
  memset(parts.get(), 0, num_parts * size * sizeof(float));
  parallel_for(args.threads, blocks.count, [&](int64_t block) {
    const Gradients gradients = {parts.get() + block * size, stride, args.heads};
    float* kept = parts.get() + num_parts * size + block * stride;
    for (int64_t at = blocks.first(block); at < blocks.last(block); ++at) {
      for (int64_t head = 0; head < args.heads; ++head) {
        const auto place = [&](const Strided& tensor) {
          return token_of<T>(tensor, args.tokens, at) + head * args.head_dim;
        };
        const auto place_of_head = [&](const Strided& tensor) {
          return token_of<T>(tensor, args.tokens, at) + head * tensor.head;
        };
        const HeadRows<T> rows = {place_of_head(args.h), place(args.c), place(args.z), place(args.dy),
                                  place_of_head(args.dh), place(args.dc), place(args.dz), kept};
        differentiate(args, gradients, head, rows);
      }
    }
  });
  add_parts(parts.get(), num_parts, size);
  const Gradients gradients = {parts.get(), stride, args.heads};
  for (int64_t head = 0; head < args.heads; ++head) {
    const int64_t start = head * args.head_dim, bytes = args.head_dim * sizeof(float);
    memcpy(args.dweight + start, gradients.weight(head), bytes);
    memcpy(args.dskip + start, gradients.skip(head), bytes);
    if (args.dbias != nullptr) memcpy(args.dbias + start, gradients.bias(head), bytes);
  }
  return kDone;
}

}  // namespace

int32_t gated_norm_forward(const GatedNormForward& args) {
  return args.dtype == kBFloat16 ? forward<BFloat16>(args) : forward<float>(args);
}

int32_t gated_norm_backward(const GatedNormBackward& args) {
  return args.dtype == kBFloat16 ? backward<BFloat16>(args) : backward<float>(args);
}

}  // namespace LINVISION_ISA
}  // namespace linvision
