// The entry points that Python calls, each of which runs the kernel compiled for the best instruction set of this CPU.

#include "arguments.h"

#if defined(_WIN32)
#define LINVISION_EXPORT extern "C" __declspec(dllexport)
#else
#define LINVISION_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace linvision {

#define LINVISION_KERNELS(ISA)                                       \
  namespace ISA {                                                    \
  int32_t mlstm_forward(const MlstmForward&);                        \
  int32_t depthwise_conv_forward(const DepthwiseConvForward&);       \
  int32_t depthwise_conv_backward(const DepthwiseConvBackward&);     \
  int32_t qkv_forward(const QkvForward&);                            \
  int32_t qkv_backward(const QkvBackward&);                          \
  int32_t gated_norm_forward(const GatedNormForward&);               \
  int32_t gated_norm_backward(const GatedNormBackward&);             \
  }

LINVISION_KERNELS(baseline)
#if defined(LINVISION_X86)
LINVISION_KERNELS(avx2)
LINVISION_KERNELS(avx512)
#endif

namespace {

enum Level { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

Level detect() {
#if defined(LINVISION_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

const Level kBest = detect();
Level level = kBest;

}  // namespace

#if defined(LINVISION_X86)
#define LINVISION_RUN(kernel, args)               \
  switch (level) {                                \
    case kAvx512: return avx512::kernel(args);    \
    case kAvx2: return avx2::kernel(args);        \
    default: return baseline::kernel(args);       \
  }
#else
#define LINVISION_RUN(kernel, args) return baseline::kernel(args)
#endif

}  // namespace linvision

using namespace linvision;

LINVISION_EXPORT int32_t linvision_level() { return level; }

// Runs kernels for an older CPU than this one, for tests; returns the level that is used from now on.
LINVISION_EXPORT int32_t linvision_set_level(int32_t wanted) {
  level = wanted < 0 || wanted > kBest ? kBest : static_cast<Level>(wanted);
  return level;
}

LINVISION_EXPORT int32_t linvision_mlstm_forward(const MlstmForward* args) { LINVISION_RUN(mlstm_forward, *args); }

LINVISION_EXPORT int32_t linvision_depthwise_conv_forward(const DepthwiseConvForward* args) {
  LINVISION_RUN(depthwise_conv_forward, *args);
}

LINVISION_EXPORT int32_t linvision_depthwise_conv_backward(const DepthwiseConvBackward* args) {
  LINVISION_RUN(depthwise_conv_backward, *args);
}

LINVISION_EXPORT int32_t linvision_qkv_forward(const QkvForward* args) { LINVISION_RUN(qkv_forward, *args); }

LINVISION_EXPORT int32_t linvision_qkv_backward(const QkvBackward* args) { LINVISION_RUN(qkv_backward, *args); }

LINVISION_EXPORT int32_t linvision_gated_norm_forward(const GatedNormForward* args) {
  LINVISION_RUN(gated_norm_forward, *args);
}

LINVISION_EXPORT int32_t linvision_gated_norm_backward(const GatedNormBackward* args) {
  LINVISION_RUN(gated_norm_backward, *args);
}
