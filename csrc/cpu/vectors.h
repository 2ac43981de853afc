// Vectors of the width of the instruction set that a file is compiled for, by the vector extensions of GCC and clang.
// All is in FASTBERT_ISA's namespace and without linkage: a function that the linker shared between the files would run
// on CPUs that lack its instructions. For the same reason no header of the standard library that holds code stands here.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTBERT_ISA
#define FASTBERT_ISA baseline
#endif
#define FASTBERT_INLINE [[gnu::always_inline]] inline

#include "dtype.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Float __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Long __attribute__((vector_size(kVectorBytes)));
typedef double Double __attribute__((vector_size(kVectorBytes)));  // half of the lanes
typedef float HalfFloat __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t Short __attribute__((vector_size(kVectorBytes / 2)));  // all lanes in 16 bits

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// How many of a vector's elements are there: all, or the first `count`.
struct Whole {};
struct Part {
  int count;
};

template <typename To, typename From>
FASTBERT_INLINE To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof(to));
  return to;
}

FASTBERT_INLINE Float all(float x) { return x - Float{}; }

FASTBERT_INLINE Word all(uint32_t x) { return x + Word{}; }

// a * b + c, rounded once where there is an instruction for it; on other machines than x86 by -ffp-contract, the
// compilers' default.
FASTBERT_INLINE Float fma(Float a, Float b, Float c) {
#if defined(__AVX512F__)
  return bits_of<Float>(_mm512_fmadd_ps(bits_of<__m512>(a), bits_of<__m512>(b), bits_of<__m512>(c)));
#elif defined(__FMA__)
  return bits_of<Float>(_mm256_fmadd_ps(bits_of<__m256>(a), bits_of<__m256>(b), bits_of<__m256>(c)));
#else
  return a * b + c;
#endif
}

FASTBERT_INLINE Double fma(Double a, Double b, Double c) {
#if defined(__AVX512F__)
  return bits_of<Double>(_mm512_fmadd_pd(bits_of<__m512d>(a), bits_of<__m512d>(b), bits_of<__m512d>(c)));
#elif defined(__FMA__)
  return bits_of<Double>(_mm256_fmadd_pd(bits_of<__m256d>(a), bits_of<__m256d>(b), bits_of<__m256d>(c)));
#else
  return a * b + c;
#endif
}

FASTBERT_INLINE Float select(Int where, Float yes, Float no) { return where ? yes : no; }

FASTBERT_INLINE Word select(Int where, Word yes, Word no) { return where ? yes : no; }

// Conversions. Those of x86 have names: of its vectors GCC makes halves, which go through memory.

FASTBERT_INLINE Word words_of(Short x) {
#if defined(__AVX512F__)
  return bits_of<Word>(_mm512_cvtepu16_epi32(bits_of<__m256i>(x)));
#elif defined(__AVX2__)
  return bits_of<Word>(_mm256_cvtepu16_epi32(bits_of<__m128i>(x)));
#else
  return __builtin_convertvector(x, Word);
#endif
}

// The low 16 bits of each.
FASTBERT_INLINE Short shorts_of(Word x) {
#if defined(__AVX512F__)
  return bits_of<Short>(_mm512_cvtepi32_epi16(bits_of<__m512i>(x)));
#else
  return __builtin_convertvector(x, Short);
#endif
}

FASTBERT_INLINE Double first_half(Float x) {
#if defined(__AVX512F__)
  return bits_of<Double>(_mm512_cvtps_pd(_mm512_castps512_ps256(bits_of<__m512>(x))));
#elif defined(__AVX2__)
  return bits_of<Double>(_mm256_cvtps_pd(_mm256_castps256_ps128(bits_of<__m256>(x))));
#else
  HalfFloat half;
  std::memcpy(&half, &x, sizeof(half));
  return __builtin_convertvector(half, Double);
#endif
}

FASTBERT_INLINE Double second_half(Float x) {
#if defined(__AVX512F__)
  return bits_of<Double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(bits_of<__m512>(x), 1)));
#elif defined(__AVX2__)
  return bits_of<Double>(_mm256_cvtps_pd(_mm256_extractf128_ps(bits_of<__m256>(x), 1)));
#else
  HalfFloat half;
  std::memcpy(&half, reinterpret_cast<const char*>(&x) + sizeof(half), sizeof(half));
  return __builtin_convertvector(half, Double);
#endif
}

FASTBERT_INLINE Float joined(Double first, Double second) {
  const HalfFloat halves[] = {__builtin_convertvector(first, HalfFloat), __builtin_convertvector(second, HalfFloat)};
  Float found;
  std::memcpy(&found, halves, sizeof(found));
  return found;
}

FASTBERT_INLINE double sum_of(Double x) {
  for (int width = kLanes / 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

// 16-bit formats

FASTBERT_INLINE Float widened(Short bits, BFloat16) { return bits_of<Float>(words_of(bits) << 16); }

// To the nearest, ties to even; NaN stays NaN. Not by AVX512_BF16, which takes subnormals for zeros.
FASTBERT_INLINE Short narrowed(Float x, BFloat16) {
  const Word bits = bits_of<Word>(x), rounded = bits + (0x7fff + (bits >> 16 & 1));
  return shorts_of(select(x == x, rounded, bits | 0x400000) >> 16);
}

FASTBERT_INLINE Float widened(Short bits, Half) {
#if defined(__AVX512F__)
  return bits_of<Float>(_mm512_cvtph_ps(bits_of<__m256i>(bits)));
#elif defined(__F16C__)
  return bits_of<Float>(_mm256_cvtph_ps(bits_of<__m128i>(bits)));
#else
  const Word word = words_of(bits) << 16, magnitude = word + word;
  const Float normal = bits_of<Float>((magnitude >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const Float subnormal = bits_of<Float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  const Word found = bits_of<Word>(select(magnitude < (1u << 27), subnormal, normal));
  return bits_of<Float>(found | (word & 0x80000000u));
#endif
}

FASTBERT_INLINE Short narrowed(Float x, Half) {
#if defined(__AVX512F__)
  return bits_of<Short>(_mm512_cvtps_ph(bits_of<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bits_of<Short>(_mm256_cvtps_ph(bits_of<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const Word word = bits_of<Word>(x), twice = word + word;
  // what is too large becomes infinite; then a power of two is added below which the sum has the bits to be rounded
  const Float magnitude = bits_of<Float>(word & 0x7fffffffu) * 0x1p112f * 0x1p-110f;
  const Word exponent = twice & 0xff000000u;
  const Word least = select(exponent < 0x71000000u, all(0x71000000u), exponent);
  const Word sum = bits_of<Word>(bits_of<Float>((least >> 1) + 0x07800000u) + magnitude);
  const Word found = select(twice > 0xff000000u, all(0x7e00u), (sum >> 13 & 0x7c00u) + (sum & 0xfffu));
  return shorts_of(found | (word >> 16 & 0x8000u));
#endif
}

// Memory, of any alignment

template <typename V, typename T>
FASTBERT_INLINE V read(const T* from, Whole) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  V found;
  std::memcpy(&found, from, sizeof(found));
  return found;
}

template <typename V, typename T>
FASTBERT_INLINE V read(const T* from, Part part) {
  V found = {};
  std::memcpy(&found, from, part.count * sizeof(T));
  return found;
}

template <typename V, typename T>
FASTBERT_INLINE void write(T* to, V x, Whole) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  std::memcpy(to, &x, sizeof(x));
}

template <typename V, typename T>
FASTBERT_INLINE void write(T* to, V x, Part part) {
  std::memcpy(to, &x, part.count * sizeof(T));
}

// The elements that are there; zeros behind them.
template <typename T, typename Count>
FASTBERT_INLINE Float load(const T* from, Count count) {
  if constexpr (sizeof(T) == 4) {
    return read<Float>(from, count);
  } else {
    return widened(read<Short>(from, count), T{});
  }
}

template <typename T, typename Count>
FASTBERT_INLINE void store(T* to, Float x, Count count) {
  if constexpr (sizeof(T) == 4) {
    write(to, x, count);
  } else {
    write(to, narrowed(x, T{}), count);
  }
}

FASTBERT_INLINE Float only(Float x, Whole, Float = Float{}) { return x; }

// The elements that are there; `other` in place of those that are not.
FASTBERT_INLINE Float only(Float x, Part part, Float other = Float{}) {
  Int place;
  for (int i = 0; i < kLanes; ++i) place[i] = i;
  return select(place < part.count, x, other);
}

template <typename T>
FASTBERT_INLINE Float rounded_to(Float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return widened(narrowed(x, T{}), T{});
  }
}

// Calls f(column, count) for all columns, a vector of them at a time.
template <typename F>
FASTBERT_INLINE void for_columns(int64_t columns, F f) {
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) f(column, Whole{});
  if (column < columns) f(column, Part{static_cast<int>(columns - column)});
}

template <typename T>
struct Is {
  using Type = T;
};

// Calls f with Is<T> of the type of a dtype.
template <typename F>
auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(Is<float>{});
    case Dtype::float16: return f(Is<Half>{});
    default: return f(Is<BFloat16>{});
  }
}

}  // namespace
}  // namespace fastbert::cpu::FASTBERT_ISA
