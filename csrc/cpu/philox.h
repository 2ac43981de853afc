// Which elements dropout keeps: Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the
// counter (column >> 3, row, site, head), 16 bits an element, low halves first.
#pragma once

#include "dropout.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

constexpr int kRounds = 7;
constexpr int kColumnsPerCounter = 8;
constexpr int kCounters = kLanes / 2;  // of a vector: each stands in 64 bits
constexpr int kDraws = kCounters * kColumnsPerCounter;  // made at a time

// The products of the low 32 bits of every 64.
FASTBERT_INLINE Long product(Long x, uint64_t multiplier) {
  const Long by = x - x + multiplier;
#if defined(__AVX512F__)
  return bits_of<Long>(_mm512_mul_epu32(bits_of<__m512i>(x), bits_of<__m512i>(by)));
#elif defined(__AVX2__)
  return bits_of<Long>(_mm256_mul_epu32(bits_of<__m256i>(x), bits_of<__m256i>(by)));
#elif defined(__SSE2__)
  return bits_of<Long>(_mm_mul_epu32(bits_of<__m128i>(x), bits_of<__m128i>(by)));
#else
  return (x & 0xffffffffu) * by;
#endif
}

// x[0], y[0], x[2], y[2], ...
FASTBERT_INLINE Long evens(Long x, Long y) {
#if defined(__AVX512F__)
  return bits_of<Long>(_mm512_unpacklo_epi64(bits_of<__m512i>(x), bits_of<__m512i>(y)));
#elif defined(__AVX2__)
  return bits_of<Long>(_mm256_unpacklo_epi64(bits_of<__m256i>(x), bits_of<__m256i>(y)));
#else
  return Long{x[0], y[0]};
#endif
}

// x[1], y[1], x[3], y[3], ...
FASTBERT_INLINE Long odds(Long x, Long y) {
#if defined(__AVX512F__)
  return bits_of<Long>(_mm512_unpackhi_epi64(bits_of<__m512i>(x), bits_of<__m512i>(y)));
#elif defined(__AVX2__)
  return bits_of<Long>(_mm256_unpackhi_epi64(bits_of<__m256i>(x), bits_of<__m256i>(y)));
#else
  return Long{x[1], y[1]};
#endif
}

// draws: the 16 bits of the elements of kCounters counters from `counter` on.
FASTBERT_INLINE void draw(uint64_t seed, uint32_t counter, uint32_t row, uint32_t site, uint32_t head, uint16_t* draws) {
  uint64_t low = seed & 0xffffffffu, high = seed >> 32;
  Long a, b = Long{} + row, c = Long{} + site, d = Long{} + head;  // what stands above their low 32 bits is not read
  for (int i = 0; i < kCounters; ++i) a[i] = counter + i / 2 + i % 2 * (kCounters / 2);  // as evens and odds take them
  for (int round = 0; round < kRounds; ++round) {
    const Long left = product(a, 0xD2511F53u), right = product(c, 0xCD9E8D57u);
    a = (right >> 32) ^ b ^ low;
    b = right;
    c = (left >> 32) ^ d ^ high;
    d = left;
    low = (low + 0x9E3779B9u) & 0xffffffffu;
    high = (high + 0xBB67AE85u) & 0xffffffffu;
  }
  const Long first = (a & 0xffffffffu) | b << 32, second = (c & 0xffffffffu) | d << 32;  // 4 elements each
  const Long halves[] = {evens(first, second), odds(first, second)};
  std::memcpy(draws, halves, sizeof(halves));
}

// The 16 bits of the elements of a row; memory of [hidden], rounded up to kDraws.
FASTBERT_INLINE void draw_row(const Dropout& dropout, int64_t row, int64_t hidden, uint16_t* draws) {
  for (int64_t column = 0; column < hidden; column += kDraws) {
    draw(static_cast<uint64_t>(*dropout.seed), static_cast<uint32_t>(column / kColumnsPerCounter),
         static_cast<uint32_t>(row), dropout.site, 0, draws + column);
  }
}

// x after dropout by what was drawn for its elements.
FASTBERT_INLINE Float drop(Float x, const Dropout& dropout, const uint16_t* draws) {
  const Word drawn = words_of(read<Short>(draws, Whole{}));
  return select(drawn >= dropout.threshold, x * dropout.scale, Float{});
}

}  // namespace
}  // namespace fastbert::cpu::FASTBERT_ISA
