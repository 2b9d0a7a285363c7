// The entry points that Python calls, each of which runs the kernel compiled for the best instruction set of this CPU.

#include "arguments.h"

#if defined(_WIN32)
#define LINVISION_EXPORT extern "C" __declspec(dllexport)
#else
#define LINVISION_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Every kernel with the structure of its arguments.
#define LINVISION_KERNELS(X)                        \
  X(mlstm_forward, MlstmForward)                    \
  X(projected_mlstm_forward, ProjectedMlstmForward) \
  X(mlstm_backward, MlstmBackward)                  \
  X(selective_scan_forward, SelectiveScanForward)   \
  X(selective_scan_backward, SelectiveScanBackward) \
  X(depthwise_conv_forward, DepthwiseConvForward)   \
  X(depthwise_conv_backward, DepthwiseConvBackward) \
  X(mlstm_inputs_forward, MlstmInputsForward)       \
  X(mlstm_inputs_backward, MlstmInputsBackward)     \
  X(gated_norm_forward, GatedNormForward)           \
  X(gated_norm_backward, GatedNormBackward)         \
  X(linear_forward, LinearForward)                  \
  X(mlp_forward, MlpForward)                        \
  X(window_attention_forward, WindowAttentionForward)

namespace linvision {

#define LINVISION_DECLARE(kernel, Arguments) int32_t kernel(const Arguments&);
namespace baseline {
LINVISION_KERNELS(LINVISION_DECLARE)
}
#if defined(LINVISION_X86)
namespace avx2 {
LINVISION_KERNELS(LINVISION_DECLARE)
}
namespace avx512 {
LINVISION_KERNELS(LINVISION_DECLARE)
}
#endif
#if defined(LINVISION_AVX512_BF16)
namespace avx512_bf16 {
LINVISION_KERNELS(LINVISION_DECLARE)
}
#elif defined(LINVISION_X86)
namespace avx512_bf16 = avx512;  // this compiler does not know those instructions
#endif

namespace {

enum Level { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512BFloat16 = 3 };

Level detect() {
#if defined(LINVISION_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#if defined(LINVISION_AVX512_BF16)
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return kAvx512BFloat16;
#endif
  if (avx2 && avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

const Level kBest = detect();
Level level = kBest;

}  // namespace
}  // namespace linvision

using namespace linvision;

#if defined(LINVISION_X86)
#define LINVISION_EXPORT_KERNEL(kernel, Arguments)                          \
  LINVISION_EXPORT int32_t linvision_##kernel(const Arguments* arguments) { \
    switch (level) {                                                        \
      case kAvx512BFloat16: return avx512_bf16::kernel(*arguments);         \
      case kAvx512: return avx512::kernel(*arguments);                      \
      case kAvx2: return avx2::kernel(*arguments);                          \
      default: return baseline::kernel(*arguments);                         \
    }                                                                       \
  }
#else
#define LINVISION_EXPORT_KERNEL(kernel, Arguments) \
  LINVISION_EXPORT int32_t linvision_##kernel(const Arguments* arguments) { return baseline::kernel(*arguments); }
#endif

LINVISION_KERNELS(LINVISION_EXPORT_KERNEL)

LINVISION_EXPORT int32_t linvision_level() { return level; }

// Runs kernels for an older CPU than this one, for tests; returns the level that is used from now on.
LINVISION_EXPORT int32_t linvision_set_level(int32_t wanted) {
  level = wanted < 0 || wanted > kBest ? kBest : static_cast<Level>(wanted);
  return level;
}
