// GELU and its slope in fp32 (Hendrycks & Gimpel 2016), as exact as results in T need it; fits of kernels/gelu.py.
#pragma once

#include <cuda_runtime.h>

#include "dtypes.cuh"

namespace fastbert::cuda {

constexpr float kClip = 14.5f;     // 2^P is 0 in fp32 from here on
constexpr float kTanhClip = 7.0f;  // 1 + tanh is 0 from here on: even in fp64 it has lost its last bits
constexpr float kSqrtHalf = 0.7071067811865476f;
constexpr float kPeak = 0.3989422804014327f;  // of the normal density, 1/sqrt(2*pi)
constexpr float kHalfLog2E = 0.7213475204444817f;
constexpr float kCubic = 0.044715f;
constexpr float kTwiceScale = 1.5957691216057308f;  // 2*sqrt(2/pi)
constexpr float kTwiceScaleLog2E = 2.302208198144325f;

// log2 Phi(-a), a >= 0
__device__ inline float log2_tail(float a, BFloat16) {
  float p = fmaf(a, 1.0177235708397347e-05f, -0.00037828495260328054f);
  p = fmaf(p, a, 0.005647020414471626f);
  p = fmaf(p, a, -0.04658089578151703f);
  p = fmaf(p, a, -0.46712982654571533f);
  p = fmaf(p, a, -1.1478705406188965f);
  return fmaf(p, a, -1.0f);
}

__device__ inline float log2_tail(float a, Half) {
  float p = fmaf(a, -1.1341884373905486e-06f, 4.7084104153327644e-05f);
  p = fmaf(p, a, -0.0008156743715517223f);
  p = fmaf(p, a, 0.008069975301623344f);
  p = fmaf(p, a, -0.05313098803162575f);
  p = fmaf(p, a, -0.4591824412345886f);
  p = fmaf(p, a, -1.1510261297225952f);
  return fmaf(p, a, -1.0f);
}

// Phi(x); exactly 0 and 1 far out
template <typename T>
__device__ inline float normal_cdf(float x) {
  if constexpr (sizeof(T) == 4) {
    return 0.5f * erfcf(-x * kSqrtHalf);  // 1 + erf cancels where x < 0
  } else {
    const float tail = exp2f(log2_tail(fminf(fabsf(x), kClip), T{}));
    return x > 0.0f ? 1.0f - tail : tail;
  }
}

// (1 + tanh u)/2 and (1 - tanh u)/2 for u = sqrt(2/pi)*(x + 0.044715*x^3), none by a difference
__device__ inline void tanh_parts(float x, float& weight, float& rest) {
  const float a = fminf(fabsf(x), kTanhClip);
  const float e = a < kTanhClip ? exp2f(-a * fmaf(a * a, kCubic, 1.0f) * kTwiceScaleLog2E) : 0.0f;  // e^(-2u)
  const float larger = 1.0f / (1.0f + e), smaller = e * larger;
  weight = x > 0.0f ? larger : smaller;
  rest = x > 0.0f ? smaller : larger;
}

template <typename T, bool kTanh>
__device__ inline float gelu(float x) {
  if constexpr (kTanh) {
    float weight, rest;
    tanh_parts(x, weight, rest);
    return x * weight;
  } else {
    return x * normal_cdf<T>(x);
  }
}

// Phi(x) + x*phi(x), or its tanh form
template <typename T, bool kTanh>
__device__ inline float gelu_slope(float x) {
  if constexpr (kTanh) {
    float weight, rest;
    tanh_parts(x, weight, rest);
    const float a = fminf(fabsf(x), kTanhClip);
    return fmaf(x * (weight * rest), fmaf(a * a, 3 * kCubic, 1.0f) * kTwiceScale, weight);
  } else {
    return fmaf(x, exp2f(-x * x * kHalfLog2E) * kPeak, normal_cdf<T>(x));
  }
}

}  // namespace fastbert::cuda
