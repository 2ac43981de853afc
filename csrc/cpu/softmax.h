// Powers of two and logarithms for softmax.
#pragma once

#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.693147181f;

FASTBERT_INLINE Float larger(Float a, Float b) { return select(a > b, a, b); }

// A factor, high + low: rounded alone it would shift all powers one way.
struct Scale {
  float high, low;
};

FASTBERT_INLINE Scale scale_of(double x) {
  const auto high = static_cast<float>(x);
  return {high, static_cast<float>(x - high)};
}

// 2^(x * scale) for products up to 1, within 2e-9 before it is rounded; 0 from -127 down. NaN stays NaN.
FASTBERT_INLINE Float power(Float x, Scale scale) {
  constexpr float kRound = 0x1.8p23f + 127;  // so large a float has no fraction; its last bits become the exponent
  const Float least = all(-127.0f / scale.high), inside = larger(least, x);
  const Float large = fma(inside, all(scale.high), all(kRound)), whole = large - kRound;
  const Float f = fma(inside, all(scale.low), fma(inside, all(scale.high), -whole));  // |f| <= 1/2
  Float y = fma(f, all(0.00015353361959569156f), all(0.0013398873852565885f));
  y = fma(f, y, all(0.00961843691766262f));
  y = fma(f, y, all(0.055503323674201965f));
  y = fma(f, y, all(0.24022647738456726f));
  y = fma(f, y, all(0.6931471824645996f));
  y = fma(f, y, all(1.0f));
  return y * bits_of<Float>(bits_of<Word>(large) << 23);
}

// log2 of a normal x by the series of artanh((m - 1) / (m + 1)), m its mantissa; of 0 -inf. NaN stays NaN.
FASTBERT_INLINE Float log2(Float x) {
  constexpr uint32_t kLeast = 0x3f3504f3;  // 1 / sqrt(2)
  const Word above = bits_of<Word>(x) - kLeast;
  const Float exponent = __builtin_convertvector(bits_of<Int>(above) >> 23, Float);
  const Float m = bits_of<Float>((above & 0x007fffffu) + kLeast);
  const Float s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Float y = fma(square, all(0.3205989f), all(0.4121986f));
  y = fma(square, y, all(0.5770780f));
  y = fma(square, y, all(0.9617967f));
  y = fma(square, y, all(2.8853901f));
  return select(x > 0.0f, fma(s, y, exponent), x - __builtin_inff());
}

}  // namespace
}  // namespace fastbert::cpu::FASTBERT_ISA
