// A block of queries at a time, in chunks of keys (Milakov & Gimelshein 2018, "Online normalizer calculation for
// softmax"). Scores stand as [keys, queries]: their maximum and total are taken lane by lane, and the left factor of
// both products is broadcast, the scores' keys and the output's probabilities.
#include "attention.h"

#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

constexpr int kQueries = 2 * kLanes;  // of a block
constexpr int kKeys = 128;  // of a chunk, whose scores [kKeys, kQueries] fit into a core's first cache
constexpr int kRows = kLanes == 16 ? 8 : 6;  // of a tile of a product: its sums, two vectors a row, stay in registers
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
static_assert(kQueries <= kMostQueries && kLanes <= kMostLanes && kKeys == kChunkKeys);

// What the products multiply, in words of 4 bytes: numbers, or pairs of bfloat16, whose two products are added up.
struct Numbers {
  using Element = float;
  using Words = Float;
  static constexpr int kEach = 1;
};

FASTBERT_INLINE Float add_product(Float sum, float a, Float b) { return sum + a * b; }

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

FASTBERT_INLINE Float larger(Float a, Float b) { return select(a > b, a, b); }

// 2^x for x below 128, within 2e-9 before it is rounded; 0 from -127 down. NaN stays NaN.
FASTBERT_INLINE Float exp2(Float x) {
  constexpr float kRound = 0x1.8p23f + 127;  // so large a float has no fraction; its last bits become the exponent
  x = larger(all(-127.0f), x);
  const Float large = x + kRound, f = x - (large - kRound);  // |f| <= 1/2
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

// left [rows, count], its elements `row` and `step` apart, times right [count, columns].
template <typename Kind>
struct Factors {
  const typename Kind::Element *left, *right;
  int64_t row, step, width;  // width: of right
  int64_t count;
};

// The product of kHeight rows and kVectors vectors of columns; kAdd: and out times each row's factor.
template <typename Kind, int kHeight, int kVectors, bool kAdd>
void tile(Factors<Kind> of, const float* factors, float* out, int64_t out_width) {
  Float sums[kHeight][kVectors] = {};
  if constexpr (kAdd) {
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = load(out + r * out_width + v * kLanes, Whole{}) * factors[r];
    }
  }
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
    for (int v = 0; v < kVectors; ++v) store(out + r * out_width + v * kLanes, sums[r][v], Whole{});
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
      float* const to = out + first * out_width + v * kLanes;
      if (v + 1 < vectors) {
        tile_of<Kind, 2, kAdd>(height, part, factors + first, to, out_width);
      } else {
        tile_of<Kind, 1, kAdd>(height, part, factors + first, to, out_width);
      }
      first += height;
    }
  }
}

// What a block of queries is computed in.
template <typename Kind>
struct Block {
  typename Kind::Element *keys, *values;  // [length, words]; [words in length, padded dim]
  typename Kind::Element* queries;  // [padded words, kQueries]
  float *scores, *sums;  // [kKeys, kQueries]; [kQueries, padded dim]
  float most[kQueries], shift[kQueries], total[kQueries], factors[kQueries];
  uint32_t keep[kKeys / 32][kQueries];
};

template <typename Kind, typename T>
void pack_keys_and_values(const T* key, const T* value, int64_t stride, int64_t length, int dim, Block<Kind>& block) {
  const int words = words_in<Kind>(dim);
  auto* to = block.keys;
  for (int64_t i = 0; i < length; ++i, to += words) {  // the last vector of a row reaches into the next
    for (int column = 0; column < words; column += kLanes) {
      write(to + column, words_at(Kind{}, key + i * stride, dim, column), Whole{});
    }
  }
  to = block.values;
  for (int64_t i = 0; i < length; i += Kind::kEach, to += whole_vectors(dim)) {
    const T* const row = value + i * stride;
    for (int column = 0; column < dim; column += kLanes) {
      write(to + column, words_of_rows(Kind{}, row, i + 1 < length ? row + stride : nullptr, dim, column), Whole{});
    }
  }
}

template <typename Kind, typename T>
void pack_queries(const T* query, int64_t stride, int count, int dim, Block<Kind>& block) {
  for (int first = 0; first < count; first += kLanes) {
    for (int column = 0; column < words_in<Kind>(dim); column += kLanes) {
      Float square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = Float{};
        if (first + i < count) {
          square[i] = bits_of<Float>(words_at(Kind{}, query + (first + i) * stride, dim, column));
        }
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) write(block.queries + (column + i) * kQueries + first, square[i], Whole{});
    }
  }
}

// keep: the bits of a chunk's keys, in `count` rows of `width` words
template <typename Kind>
void pack_bits(const int32_t* keep, int64_t width, int keys, int count, Block<Kind>& block) {
  for (int word = 0; word < (keys + 31) / 32; ++word) {
    for (int i = 0; i < kQueries; ++i) block.keep[word][i] = i < count ? keep[i * width + word] : 0;
  }
}

// One vector of queries: the scores of a chunk become probabilities, before they are divided by their total.
template <typename Kind, bool kDrop>
void softmax(int lane, int keys, bool is_first, float scale, Block<Kind>& block) {
  float* const column = block.scores + lane;
  const auto score = [&](int key) { return load(column + key * kQueries, Whole{}); };
  const Float old = is_first ? all(-__builtin_inff()) : load(block.most + lane, Whole{});
  Float tops[4] = {old, old, old, old};  // of every fourth key: they need not wait for each other
  int key = 0;
  for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) tops[i] = larger(score(key + i), tops[i]);
  }
  for (; key < keys; ++key) tops[0] = larger(score(key), tops[0]);
  const Float top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
  const Float shift = larger(all(-1e38f), top * scale);  // finite also where all scores are -inf

  Float totals[4] = {};  // of every fourth key: more exact than one after the other
  const auto probability = [&](int key, int place) {
    const Float p = exp2(score(key) * scale - shift);
    totals[place] += p;
    if constexpr (!kDrop) return p;
    const Word bit = read<Word>(block.keep[key / 32] + lane, Whole{}) << (31 - key % 32);
    return bits_of<Float>(bits_of<Int>(p) & bits_of<Int>(bit) >> 31);
  };
  const auto convert = [&](int key, int place) {
    if constexpr (Kind::kEach == 1) {
      write(column + key * kQueries, probability(key, place), Whole{});
    } else {
      const Float low = probability(key, place), high = key + 1 < keys ? probability(key + 1, place + 1) : Float{};
      write(column + key / 2 * kQueries, bits_of<Float>(Kind::joined(low, high)), Whole{});
    }
  };
  for (key = 0; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i += Kind::kEach) convert(key + i, i);
  }
  for (; key < keys; key += Kind::kEach) convert(key, 0);

  Float total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  if (!is_first) {
    const Float factor = exp2(load(block.shift + lane, Whole{}) - shift);
    total += load(block.total + lane, Whole{}) * factor;
    store(block.factors + lane, factor, Whole{});
  }
  store(block.most + lane, top, Whole{});
  store(block.shift + lane, shift, Whole{});
  store(block.total + lane, total, Whole{});
}

template <typename Kind>
Block<Kind> block_in(char* memory, int64_t length, int dim) {
  const auto take = [&](int64_t words) {
    void* const found = memory;
    memory += (words * 4 + 63) / 64 * 64;
    return found;
  };
  using Element = typename Kind::Element;
  Block<Kind> block;
  block.queries = static_cast<Element*>(take(whole_vectors(words_in<Kind>(dim)) * kQueries));
  block.scores = static_cast<float*>(take(kKeys * kQueries));
  block.sums = static_cast<float*>(take(kQueries * whole_vectors(dim)));
  block.keys = static_cast<Element*>(take(length * words_in<Kind>(dim) + kLanes));
  block.values = static_cast<Element*>(take(words_in<Kind>(length) * whole_vectors(dim)));
  return block;
}

template <typename Kind, typename T>
void attend(const Attention& inputs, Strides strides, const Share& share, T* out, float* lse, char* memory) {
  const int dim = inputs.dim, words = words_in<Kind>(dim), vectors = whole_vectors(dim) / kLanes;
  const int64_t start = inputs.cu_seqlens[share.sequence], length = inputs.cu_seqlens[share.sequence + 1] - start;
  const T* const query = static_cast<const T*>(inputs.qkv) + start * strides.token + share.head * strides.head;
  Block<Kind> block = block_in<Kind>(memory, length, dim);
  pack_keys_and_values(query + strides.part, query + 2 * strides.part, strides.token, length, dim, block);

  const float scale = inputs.scale * kLog2E;
  for (int64_t first = share.first; first < share.last; first += kQueries) {
    const int count = share.last - first < kQueries ? share.last - first : kQueries;
    const int64_t row = start + first;
    pack_queries(query + first * strides.token, strides.token, count, dim, block);
    for (int64_t key = 0; key < length; key += kKeys) {
      const int keys = length - key < kKeys ? length - key : kKeys;
      const Factors<Kind> of_scores = {block.keys + key * words, block.queries, words, 1, kQueries, words};
      multiply<Kind, false>(keys, whole_vectors(count) / kLanes, of_scores, nullptr, block.scores, kQueries);
      if (inputs.keep_bits != nullptr) {
        const int32_t* const keep = inputs.keep_bits + (share.head * inputs.tokens + row) * inputs.width + key / 32;
        pack_bits(keep, inputs.width, keys, count, block);
      }
      for (int lane = 0; lane < count; lane += kLanes) {
        if (inputs.keep_bits != nullptr) {
          softmax<Kind, true>(lane, keys, key == 0, scale, block);
        } else {
          softmax<Kind, false>(lane, keys, key == 0, scale, block);
        }
      }
      const auto* const probabilities = reinterpret_cast<const typename Kind::Element*>(block.scores);
      const auto* const values = block.values + words_in<Kind>(key) * whole_vectors(dim);
      const Factors<Kind> of_out = {probabilities, values, 1, kQueries, whole_vectors(dim), words_in<Kind>(keys)};
      if (key == 0) {
        multiply<Kind, false>(count, vectors, of_out, nullptr, block.sums, whole_vectors(dim));
      } else {
        multiply<Kind, true>(count, vectors, of_out, block.factors, block.sums, whole_vectors(dim));
      }
    }
    for (int lane = 0; lane < count; lane += kLanes) {
      const Float total = load(block.total + lane, Whole{});
      store(block.factors + lane, inputs.keep_scale / total, Whole{});
      store(block.total + lane, (load(block.shift + lane, Whole{}) + log2(total)) * kLn2, Whole{});
    }
    std::memcpy(lse + share.head * inputs.tokens + row, block.total, count * sizeof(float));
    for (int i = 0; i < count; ++i) {
      T* const to = out + ((row + i) * inputs.heads + share.head) * dim;
      const float* const sums = block.sums + i * whole_vectors(dim);
      for_columns(dim, [&](int64_t column, auto there) {
        store(to + column, load(sums + column, Whole{}) * block.factors[i], there);
      });
    }
  }
}

}  // namespace

void attention(const Attention& inputs, Strides strides, const Share& share, void* out, float* lse, char* memory) {
  with_type(inputs.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    attend<typename KindOf<T>::Type>(inputs, strides, share, static_cast<T*>(out), lse, memory);
  });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
