// 16-bit floats as raw bits, rounded to the nearest, ties to even, NaN kept. On sm_75 bfloat16 is rounded by integers.
#pragma once

#include <cuda_runtime.h>

#include "dtype.h"

namespace fastbert::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

__device__ inline float to_float(Half x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent > 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return __uint_as_float(sign | __float_as_uint(subnormal));
#endif
}

template <typename T>
__device__ T from_float(float x);

template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

template <>
__device__ inline BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
__device__ inline Half from_float<Half>(float x) {
#ifdef __CUDA_ARCH__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: a whole number of 2^-24, to which the addition rounds
    const float rounded = __uint_as_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (__float_as_uint(rounded) - __float_as_uint(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// x as it is read again after it was stored as a T.
template <typename T>
__device__ inline float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

// Two elements in 32 bits, the first in the low half.
template <typename T>
__device__ inline uint32_t pair_of(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ inline uint32_t pair_of<BFloat16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

template <>
__device__ inline uint32_t pair_of<Half>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#endif

template <typename T>
struct Is {
  using Type = T;
};

// Calls f with an Is<T> of the dtype's T.
template <typename F>
auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(Is<float>{});
    case Dtype::float16: return f(Is<Half>{});
    default: return f(Is<BFloat16>{});
  }
}

}  // namespace fastbert::cuda
