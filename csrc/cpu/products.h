// Products of small matrices in packed words, whose sums stay in registers.
#pragma once

#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

constexpr int kRows = kLanes == 16 ? 8 : 6;  // of a tile of a product: its sums, two vectors a row, stay in registers

// What the products multiply, in words of 4 bytes: numbers, or pairs of bfloat16, whose two products are added up.
struct Numbers {
  using Element = float;
  using Words = Float;
  static constexpr int kEach = 1;
};

FASTBERT_INLINE Float add_product(Float sum, float a, Float b) { return fma(all(a), b, sum); }

template <typename T>
struct KindOf {
  using Type = Numbers;
};

// A row's words from `column` on, zeros behind its end.
template <typename T>
FASTBERT_INLINE Float words_at(Numbers, const T* row, int dim, int column) {
  const int left = dim - column;
  return left >= kLanes ? load(row + column, Whole{}) : load(row + column, Part{left});
}

// Rows `row` and, if it is there, row + 1, as words.
template <typename T>
FASTBERT_INLINE Float words_of_rows(Numbers, const T* row, const T*, int dim, int column) {
  return words_at(Numbers{}, row, dim, column);
}

#ifdef __AVX512BF16__
struct Pairs {
  using Element = uint32_t;
  using Words = Word;
  static constexpr int kEach = 2;

  static Word joined(Float low, Float high) {
    typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes)));
    Shorts place;
    for (int i = 0; i < 2 * kLanes; ++i) place[i] = i / 2 + i % 2 * kLanes;
    const auto both = bits_of<Shorts>(_mm512_cvtne2ps_pbh(bits_of<__m512>(high), bits_of<__m512>(low)));
    return bits_of<Word>(__builtin_shuffle(both, place));
  }
};

FASTBERT_INLINE Float add_product(Float sum, uint32_t a, Word b) {
  return bits_of<Float>(_mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(all(a)), bits_of<__m512bh>(b)));
}

template <>
struct KindOf<BFloat16> {
  using Type = Pairs;
};

FASTBERT_INLINE Word words_at(Pairs, const BFloat16* row, int dim, int column) {
  const int left = dim - 2 * column;
  Word words = {};
  if (left >= 2 * kLanes) {
    std::memcpy(&words, row + 2 * column, kVectorBytes);
  } else {
    std::memcpy(&words, row + 2 * column, left * sizeof(BFloat16));
  }
  return words;
}

FASTBERT_INLINE Word words_of_rows(Pairs, const BFloat16* row, const BFloat16* next, int dim, int column) {
  const auto widened = [&](const BFloat16* from) {
    const int left = dim - column;
    const Short bits = left >= kLanes ? read<Short>(from + column, Whole{}) : read<Short>(from + column, Part{left});
    return __builtin_convertvector(bits, Word);
  };
  return next == nullptr ? widened(row) : widened(row) | widened(next) << 16;
}
#endif

constexpr int whole_vectors(int columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

template <typename Kind>
constexpr int words_in(int numbers) {
  return (numbers + Kind::kEach - 1) / Kind::kEach;
}

// The elements of two vectors in turn, of their first halves or of their second ones.
template <bool kSecond>
FASTBERT_INLINE Float zipped(Float a, Float b) {
  Int place;
  for (int i = 0; i < kLanes; ++i) place[i] = i / 2 + i % 2 * kLanes + kSecond * (kLanes / 2);
#ifdef __clang__
  Float found;
  for (int i = 0; i < kLanes; ++i) found[i] = i % 2 ? b[place[i] - kLanes] : a[place[i]];
  return found;
#else
  return __builtin_shuffle(a, b, place);
#endif
}

FASTBERT_INLINE void transpose(Float (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Float turned[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      turned[2 * i] = zipped<false>(rows[i], rows[i + kLanes / 2]);
      turned[2 * i + 1] = zipped<true>(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
}

// Rows as columns of words: from [count, dim], a row `stride` apart -> to [padded words, kColumns], zeros in columns
// that are not there but share a vector with others.
template <typename Kind, int kColumns, typename T>
void pack_transposed(const T* from, int64_t stride, int count, int dim, typename Kind::Element* to) {
  for (int first = 0; first < count; first += kLanes) {
    for (int column = 0; column < words_in<Kind>(dim); column += kLanes) {
      Float square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = Float{};
        if (first + i < count) square[i] = bits_of<Float>(words_at(Kind{}, from + (first + i) * stride, dim, column));
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) write(to + (column + i) * kColumns + first, square[i], Whole{});
    }
  }
}

// left [rows, count], its elements `row` and `step` apart, times right [count, columns].
template <typename Kind>
struct Factors {
  const typename Kind::Element *left, *right;
  int64_t row, step, width;  // width: of right
  int64_t count;
};

// The product of kHeight rows and kVectors vectors of columns; kAdd: and out, times each row's factor if there are any,
// added last: a long sum in parts is more exact.
template <typename Kind, int kHeight, int kVectors, bool kAdd>
void tile(Factors<Kind> of, const float* factors, float* out, int64_t out_width) {
  Float sums[kHeight][kVectors] = {};
  for (int64_t i = 0; i < of.count; ++i, of.left += of.step, of.right += of.width) {
    typename Kind::Words right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = read<typename Kind::Words>(of.right + v * kLanes, Whole{});
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = add_product(sums[r][v], of.left[r * of.row], right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* const to = out + r * out_width + v * kLanes;
      if constexpr (kAdd) {
        const Float old = load(to, Whole{});
        sums[r][v] += factors == nullptr ? old : old * factors[r];
      }
      store(to, sums[r][v], Whole{});
    }
  }
}

template <typename Kind, int kVectors, bool kAdd, int kHeight = kRows>
FASTBERT_INLINE void tile_of(int height, const Factors<Kind>& of, const float* factors, float* out,
                             int64_t out_width) {
  if constexpr (kHeight > 1) {
    if (height < kHeight) return tile_of<Kind, kVectors, kAdd, kHeight - 1>(height, of, factors, out, out_width);
  }
  tile<Kind, kHeight, kVectors, kAdd>(of, factors, out, out_width);
}

// The product, in tiles that are about equally high: a tile of one row takes as long as one of four.
template <typename Kind, bool kAdd>
void multiply(int rows, int vectors, const Factors<Kind>& of, const float* factors, float* out, int64_t out_width) {
  const int tiles = (rows + kRows - 1) / kRows;
  for (int v = 0; v < vectors; v += 2) {
    for (int first = 0, left = tiles; left > 0; --left) {
      const int height = (rows - first) / left;
      Factors<Kind> part = of;
      part.left += first * of.row;
      part.right += v * kLanes;
      const float* const scales = factors == nullptr ? nullptr : factors + first;
      float* const to = out + first * out_width + v * kLanes;
      if (v + 1 < vectors) {
        tile_of<Kind, 2, kAdd>(height, part, scales, to, out_width);
      } else {
        tile_of<Kind, 1, kAdd>(height, part, scales, to, out_width);
      }
      first += height;
    }
  }
}

}  // namespace
}  // namespace fastbert::cpu::FASTBERT_ISA
