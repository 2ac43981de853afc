// LayerNorm of a row and its gradient, a vector of the row at a time; sums in float64.
#pragma once

#include "philox.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

// a * b + c, rounded once: in float64 where there is no instruction for it.
FASTBERT_INLINE Float fused(Float a, Float b, Float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return joined(fma(first_half(a), first_half(b), first_half(c)), fma(second_half(a), second_half(b), second_half(c)));
#endif
}

// A sum of vectors.
struct Sum {
  Double first = {}, second = {};

  FASTBERT_INLINE void add(Float x) {
    first += first_half(x);
    second += second_half(x);
  }

  FASTBERT_INLINE Float rounded() const { return joined(first, second); }
};

// Mean and variance in one pass: sums of x - origin and of its square. The origin is an element of the row, so that the
// square of the mean, which is subtracted, is at most `hidden` times the variance.
struct Moments {
  float origin;
  Double first = {}, second = {}, first_squares = {}, second_squares = {};

  template <typename Count>
  FASTBERT_INLINE void add(Float x, Count count) {
    x = only(x, count, all(origin));
    const Double low = first_half(x) - static_cast<double>(origin), high = second_half(x) - static_cast<double>(origin);
    first += low;
    second += high;
    first_squares = fma(low, low, first_squares);
    second_squares = fma(high, high, second_squares);
  }

  // (Ba et al. 2016, biased variance)
  FASTBERT_INLINE void finish(int64_t hidden, float eps, float& mean, float& rstd) const {
    const double offset = sum_of(first + second) / hidden;
    const double squares = sum_of(first_squares + second_squares) / hidden - offset * offset;
    mean = static_cast<float>(origin + offset);
    rstd = static_cast<float>(1 / __builtin_sqrt((squares < 0 ? 0 : squares) + eps));
  }
};

// The gradient of LayerNorm's input: rstd * (grad*gamma - mean(grad*gamma) - normalized * mean(grad*gamma*normalized)).
struct Slope {
  Double first = {}, second = {}, first_projection = {}, second_projection = {};
  float mean, projection, scale;

  FASTBERT_INLINE void add(Float grad, Float gamma, Float normalized) {
    const Double low = first_half(grad) * first_half(gamma), high = second_half(grad) * second_half(gamma);
    first += low;
    second += high;
    first_projection = fma(low, first_half(normalized), first_projection);
    second_projection = fma(high, second_half(normalized), second_projection);
  }

  FASTBERT_INLINE void finish(int64_t hidden, float rstd) {
    mean = static_cast<float>(sum_of(first + second) / hidden);
    projection = static_cast<float>(sum_of(first_projection + second_projection) / hidden);
    scale = hidden == 1 ? 0.0f : rstd;  // what one element is normalized to does not depend on it
  }

  FASTBERT_INLINE Float of(Float grad, Float gamma, Float normalized) const {
    return fused(grad, gamma, -fused(normalized, all(projection), all(mean))) * scale;
  }
};

// to [hidden] += x
template <typename Count>
FASTBERT_INLINE void add_to(float* to, Float x, Count count) {
  store(to, load(to, count) + x, count);
}

FASTBERT_INLINE void clear(float* to, int64_t hidden) {
  for_columns(hidden, [&](int64_t column, auto count) { store(to + column, Float{}, count); });
}

// parts [count, hidden] -> their sum [hidden]
template <typename T>
FASTBERT_INLINE void add_parts(const float* parts, int64_t count, int64_t hidden, T* out) {
  for_columns(hidden, [&](int64_t column, auto width) {
    Sum sum;
    for (int64_t part = 0; part < count; ++part) sum.add(load(parts + part * hidden + column, width));
    store(out + column, sum.rounded(), width);
  });
}

}  // namespace
}  // namespace fastbert::cpu::FASTBERT_ISA
