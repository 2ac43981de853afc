// GELU in fp32 (Hendrycks & Gimpel 2016), as exact as results in T need it: x·Φ(x), whose tail Φ(-a), a >= 0, keeps its
// relative error, where 1 + erf cancels.
#pragma once

#include "linear.h"
#include "softmax.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

FASTBERT_INLINE Float magnitude(Float x) { return bits_of<Float>(bits_of<Word>(x) & 0x7fffffffu); }

FASTBERT_INLINE Float at_most(Float x, float most) { return select(x > most, all(most), x); }  // NaN stays NaN

// Φ(-a) = e^(-a²/2)·t·Q(t), t = 1 / (1 + 0.21·a), Q a minimax fit (Lawson 1961) on [0, 14.5]: relative error 2e-8 in
// float64, 4e-7 as it is computed; 0 where it is below 2^-127.
FASTBERT_INLINE Float normal_tail(Float a, float) {
  const Float square = a * a, lost = fma(a, a, -square), t = 1.0f / fma(a, all(0.21f), all(1.0f));
  Float q = fma(t, all(-0.07129548490047455f), all(0.28180786967277527f));
  q = fma(q, t, all(-0.32650014758110046f));
  q = fma(q, t, all(0.3449946641921997f));
  q = fma(q, t, all(-0.09077824652194977f));
  q = fma(q, t, all(0.12347457557916641f));
  q = fma(q, t, all(0.06956909596920013f));
  q = fma(q, t, all(0.0850125327706337f));
  q = fma(q, t, all(0.08371514827013016f));
  return power(-square, scale_of(kLog2E / 2)) * fma(lost, all(-0.5f), all(1.0f)) * (q * t);
}

// Φ(-a) = 2^P(a), P(0) = -1, a minimax fit of log2 Φ(-a) on [0, 14.5]: relative error 2.9e-4 up to 5, 4.3% up to 9.
FASTBERT_INLINE Float normal_tail(Float a, BFloat16) {
  Float p = fma(a, all(1.0177235708397347e-05f), all(-0.00037828495260328054f));
  p = fma(p, a, all(0.005647020414471626f));
  p = fma(p, a, all(-0.04658089578151703f));
  p = fma(p, a, all(-0.46712982654571533f));
  p = fma(p, a, all(-1.1478705406188965f));
  return power(fma(p, a, all(-1.0f)), {1.0f, 0.0f});
}

// The same for fp16, which ends at Φ(-5.4): relative error 2.9e-5 up to 5.
FASTBERT_INLINE Float normal_tail(Float a, Half) {
  Float p = fma(a, all(-1.1341884373905486e-06f), all(4.7084104153327644e-05f));
  p = fma(p, a, all(-0.0008156743715517223f));
  p = fma(p, a, all(0.008069975301623344f));
  p = fma(p, a, all(-0.05313098803162575f));
  p = fma(p, a, all(-0.4591824412345886f));
  p = fma(p, a, all(-1.1510261297225952f));
  return power(fma(p, a, all(-1.0f)), {1.0f, 0.0f});
}

template <typename T>
FASTBERT_INLINE Float gelu(Float x) {
  const Float tail = normal_tail(at_most(magnitude(x), 14.5f), T{});
  return x * select(x > 0.0f, 1.0f - tail, tail);
}

// x·(1 + tanh u)/2, u = √(2/π)·(x + 0.044715·x³), neither factor by a difference; 0 from -7 down, where even float64's
// 1 + tanh has lost its last bits.
FASTBERT_INLINE Float gelu_tanh(Float x) {
  const Float a = at_most(magnitude(x), 7.0f);
  const Float twice = a * fma(a * a, all(0.044715f), all(1.0f));  // 2u is this times the factor below
  const Float e = select(a < 7.0f, power(-twice, scale_of(1.5957691216057308 * kLog2E)), a - a);
  const Float larger = 1.0f / (1.0f + e);
  return x * select(x > 0.0f, larger, e * larger);
}

template <typename T>
FASTBERT_INLINE Float activated(Float x, Activation activation) {
  switch (activation) {
    case Activation::gelu: return gelu<T>(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    default: return x;
  }
}

}  // namespace
}  // namespace fastbert::cpu::FASTBERT_ISA
