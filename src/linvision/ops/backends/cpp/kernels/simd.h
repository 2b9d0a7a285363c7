// Vectors of floats as wide as the instruction set that this file is compiled for, and what kernels compute on them.
//
// Every kernel is compiled several times, once for each instruction set, into a namespace of its own (LINVISION_ISA).
// Nothing here may come from a standard template: the linker would keep one copy of it for all instruction sets.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace linvision {
namespace LINVISION_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(kLanes * 2), aligned(2)));

#define LINVISION_INLINE static inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};

LINVISION_INLINE Vec splat(float x) { return Vec{} + x; }

LINVISION_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

LINVISION_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }

LINVISION_INLINE IntVec bits_of(Vec x) { return reinterpret_cast<IntVec>(x); }

LINVISION_INLINE Vec from_bits(IntVec x) { return reinterpret_cast<Vec>(x); }

LINVISION_INLINE Vec load(const BFloat16* p) {
  const HalfVec half = *reinterpret_cast<const UnalignedHalfVec*>(p);
  return from_bits(__builtin_convertvector(half, IntVec) << 16);
}

// Rounds to the nearest, ties to even; a NaN stays one. Below 1.2e-38 the instruction flushes to zero.
LINVISION_INLINE void store(BFloat16* p, Vec x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &half, sizeof half);
#else
  const IntVec bits = bits_of(x);
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec chosen = (x == x) ? rounded : IntVec{} + 0x7fc0;
  *reinterpret_cast<UnalignedHalfVec*>(p) = __builtin_convertvector(chosen, HalfVec);
#endif
}

LINVISION_INLINE float to_float(float x) { return x; }

LINVISION_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

LINVISION_INLINE void from_float(float* p, float x) { *p = x; }

LINVISION_INLINE void from_float(BFloat16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  p->bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

// The first n lanes from memory, zeros in the others; and the first n lanes to memory.
template <typename T>
LINVISION_INLINE Vec load_some(const T* p, int n) {
  if (n >= kLanes) return load(p);
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

template <typename T>
LINVISION_INLINE void store_some(T* p, Vec x, int n) {
  if (n >= kLanes) return store(p, x);
  float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) from_float(p + i, lanes[i]);
}

LINVISION_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

LINVISION_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }

LINVISION_INLINE Vec absolute(Vec x) { return from_bits(bits_of(x) & 0x7fffffff); }

// The sum of all lanes, in pairs.
LINVISION_INLINE float total(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

// The largest of all lanes; a NaN may be passed over.
LINVISION_INLINE float highest(Vec x) {
  float lanes[kLanes], result = x[0];
  store(lanes, x);
  for (int j = 1; j < kLanes; ++j) result = lanes[j] > result ? lanes[j] : result;
  return result;
}

// 2^x to 2e-7 of its value: 2^n from the exponent's bits, 2^f with |f| <= 1/2 as the Taylor series of degree 6.
// Below -126 the result is 2^-126 (or rather less than 1.2e-38, where float32 ends), above 127.5 it is 2^127.5.
LINVISION_INLINE Vec exp2(Vec x) {
  x = x < -126.0f ? splat(-126.0f) : x;  // in this order a NaN stays one
  x = x > 127.49f ? splat(127.49f) : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return from_bits(bits_of(p) + (bits_of(shifted) << 23));
}

constexpr float kLog2E = 1.44269504f;

LINVISION_INLINE Vec exp(Vec x) { return exp2(x * kLog2E); }

LINVISION_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

LINVISION_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

// x times the normal distribution's cumulated density, to 3e-7 of x: 1/2 + u P(u^2) / Q(u^2), a minimax fit for |u| <= 5.2.
// Below, the density is less than 1e-7, and 0 here.
LINVISION_INLINE Vec gelu(Vec x) {
  const Vec u = minimum(maximum(x, splat(-5.2f)), splat(5.2f)), s = u * u;
  Vec p = splat(5.840642506e-6f);
  p = p * s + 3.142639730e-4f;
  p = p * s + 5.518735477e-3f;
  p = p * s + 4.959352473e-2f;
  p = p * s + 3.989419173e-1f;
  Vec q = splat(5.019014205e-7f);
  q = q * s + 1.127410750e-4f;
  q = q * s + 2.703750337e-3f;
  q = q * s + 3.733986507e-2f;
  q = q * s + 2.909732969e-1f;
  q = q * s + 1.0f;
  const Vec density = u * p / q + 0.5f;
  return x * (x < -5.2f ? Vec{} : density);
}

// log(1 + x) for 0 <= x <= 1 to 2e-7 of its value: 2 artanh(s) with s = x / (2 + x) <= 1/3, as a series in s^2.
LINVISION_INLINE Vec log1p_of_fraction(Vec x) {
  const Vec s = x / (2.0f + x);
  const Vec s2 = s * s;
  Vec p = splat(2.0f / 15);
  p = p * s2 + 2.0f / 13;
  p = p * s2 + 2.0f / 11;
  p = p * s2 + 2.0f / 9;
  p = p * s2 + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 + 2.0f;
  return p * s;
}

// Memory of one thread, aligned to cache lines; get() is null where there was none left.
class Scratch {
 public:
  explicit Scratch(size_t floats) : data_(nullptr) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, (floats + kLanes) * sizeof(float)) == 0) data_ = static_cast<float*>(data);
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

LINVISION_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

LINVISION_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Consecutive indices of a loop that one thread works on first.
struct alignas(64) Share {
  int64_t next;
  int64_t end;
};
constexpr int64_t kMaxShares = 64;

// Runs body(index) for every index below count on so many threads. Each begins with its own share, consecutive indices,
// as in every kernel: a thread finds the images that it worked on before in its own cache (from another core they come
// at a third of the rate, where cores do not share one). Threads that are done help the others. One thread needs no
// OpenMP, which a forked process may not have.
template <typename Body>
LINVISION_INLINE void parallel_for(int num_threads, int64_t count, const Body& body) {
  if (num_threads <= 1 || count <= 1) {
    for (int64_t index = 0; index < count; ++index) body(index);
    return;
  }
  Share shares[kMaxShares];
  const int64_t num_shares = smaller(smaller(num_threads, kMaxShares), count);
  for (int64_t i = 0; i < num_shares; ++i) {
    shares[i].next = count * i / num_shares;
    shares[i].end = count * (i + 1) / num_shares;
  }
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int thread = 0; thread < num_threads; ++thread) {
    for (int64_t i = 0; i < num_shares; ++i) {
      Share& share = shares[(thread + i) % num_shares];
      for (int64_t index; (index = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED)) < share.end;) body(index);
    }
  }
}

}  // namespace LINVISION_ISA
}  // namespace linvision
