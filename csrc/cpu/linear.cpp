// A tile's rows of x, in words of 4 bytes as the weight has them, times a panel of the weight: the tile's sums stay in
// registers, its rows in a core's first two caches while all panels pass (Goto & van de Geijn 2008, "Anatomy of
// high-performance matrix multiplication").
#include "linear.h"

#include "gelu.h"
#include "products.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 14 : 6;
constexpr int kTileWidth = whole_vectors(kTileRows);  // of its rows of x, packed: [words, kTileWidth]
constexpr int kStep = 64;  // words whose products are added one after the other: a long sum in parts is more exact

// How a word of a weight is multiplied: as kParts vectors, each with a word of x of its own.
struct Floats {
  static constexpr int kParts = 1;
  using Left = float;
  using Sum = Float;
  using Right = Float;
  FASTBERT_INLINE static void split(Word word, Right (&parts)[1]) { parts[0] = bits_of<Float>(word); }
  FASTBERT_INLINE static Sum add(Sum sum, Left a, Right b) { return fma(all(a), b, sum); }
};

#ifdef __AVX512BF16__
struct BFloats {
  static constexpr int kParts = 1;
  using Left = uint32_t;
  using Sum = Float;
  using Right = Word;
  FASTBERT_INLINE static void split(Word word, Right (&parts)[1]) { parts[0] = word; }
  FASTBERT_INLINE static Sum add(Sum sum, Left a, Right b) { return add_product(sum, a, b); }
};
#else
struct BFloats {
  static constexpr int kParts = 2;
  using Left = float;
  using Sum = Float;
  using Right = Float;
  FASTBERT_INLINE static void split(Word word, Right (&parts)[2]) {
    parts[0] = bits_of<Float>(word << 16);
    parts[1] = bits_of<Float>(word & 0xffff0000u);
  }
  FASTBERT_INLINE static Sum add(Sum sum, Left a, Right b) { return fma(all(a), b, sum); }
};
#endif

#ifdef __AVX512VNNI__
struct Bytes {
  static constexpr int kParts = 1;
  using Left = uint32_t;
  using Sum = Int;
  using Right = Word;
  FASTBERT_INLINE static void split(Word word, Right (&parts)[1]) { parts[0] = word; }
  FASTBERT_INLINE static Sum add(Sum sum, Left a, Right b) {
    return bits_of<Int>(_mm512_dpbusd_epi32(bits_of<__m512i>(sum), bits_of<__m512i>(all(a)), bits_of<__m512i>(b)));
  }
};
#else
// Pairs of 16 bits: the first and third byte of a word, then the second and fourth.
struct Bytes {
  static constexpr int kParts = 2;
  using Left = uint32_t;
  using Sum = Int;
  using Right = Word;
  typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
  FASTBERT_INLINE static void split(Word word, Right (&parts)[2]) {
    parts[0] = bits_of<Word>(bits_of<Shorts>(word << 8) >> 8);
    parts[1] = bits_of<Word>(bits_of<Shorts>(word) >> 8);
  }
  FASTBERT_INLINE static Sum add(Sum sum, Left a, Right b) {
#if defined(__AVX512BW__)
    return sum + bits_of<Int>(_mm512_madd_epi16(bits_of<__m512i>(all(a)), bits_of<__m512i>(b)));
#elif defined(__AVX2__)
    return sum + bits_of<Int>(_mm256_madd_epi16(bits_of<__m256i>(all(a)), bits_of<__m256i>(b)));
#elif defined(__SSE2__)
    return sum + bits_of<Int>(_mm_madd_epi16(bits_of<__m128i>(all(a)), bits_of<__m128i>(b)));
#else
    const Int low = bits_of<Int>(b << 16) >> 16, high = bits_of<Int>(b) >> 16;
    return sum + low * static_cast<int32_t>(a & 0xffffu) + high * static_cast<int32_t>(a >> 16);
#endif
  }
};
#endif

// left [count · kParts, kTileWidth], right [count, kPanel] -> sums [kHeight, kPanel], or added to them
template <typename Kind, int kHeight, bool kAdd>
void times_panel(const typename Kind::Left* left, const uint32_t* right, int64_t count, typename Kind::Sum* out) {
  constexpr int kRow = kPanel / kLanes;  // vectors of a row of out
#pragma GCC unroll 1
  for (int v = 0; v < kRow; v += 2) {
    typename Kind::Sum sums[kHeight][2] = {};
    const typename Kind::Left* a = left;
    const uint32_t* b = right + v * kLanes;
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; ++i, a += Kind::kParts * kTileWidth, b += kPanel) {
      typename Kind::Right first[Kind::kParts], second[Kind::kParts];
      Kind::split(read<Word>(b, Whole{}), first);
      Kind::split(read<Word>(b + kLanes, Whole{}), second);
#pragma GCC unroll 2
      for (int part = 0; part < Kind::kParts; ++part) {
#pragma GCC unroll 16
        for (int r = 0; r < kHeight; ++r) {
          sums[r][0] = Kind::add(sums[r][0], a[part * kTileWidth + r], first[part]);
          sums[r][1] = Kind::add(sums[r][1], a[part * kTileWidth + r], second[part]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if constexpr (kAdd) sums[r][j] += out[r * kRow + v + j];
        out[r * kRow + v + j] = sums[r][j];
      }
    }
  }
}

template <typename Kind, bool kAdd, int kHeight = kTileRows>
FASTBERT_INLINE void times_panel_of(int height, const typename Kind::Left* left, const uint32_t* right, int64_t count,
                             typename Kind::Sum* out) {
  if constexpr (kHeight > 1) {
    if (height < kHeight) return times_panel_of<Kind, kAdd, kHeight - 1>(height, left, right, count, out);
  }
  times_panel<Kind, kHeight, kAdd>(left, right, count, out);
}

template <typename Kind>
constexpr int64_t left_size(int64_t words) {  // pack_transposed fills whole vectors
  return (words * Kind::kParts + kLanes - 1) / kLanes * kLanes * kTileWidth;
}

template <typename Kind>
int64_t tiles_of_block(int64_t words, int64_t rows) {
  const int64_t fit = kBlockBytes / (left_size<Kind>(words) * 4), needed = (rows + kTileRows - 1) / kTileRows;
  return fit < 1 ? 1 : fit < needed ? fit : needed;
}

// What a task computes in.
template <typename Kind>
struct Room {
  typename Kind::Left* left;  // [tiles, `left_size`]
  typename Kind::Sum* sums;   // [kTileRows, kPanel]
  float* scales;              // of the rows [tiles, kTileRows]
  uint32_t* quantized;        // a row of bytes
};

template <typename Kind>
Room<Kind> room_in(char* memory, int64_t words, int64_t rows) {
  const auto take = [&](int64_t bytes) {
    void* const found = memory;
    memory += (bytes + 63) / 64 * 64;
    return found;
  };
  const int64_t tiles = tiles_of_block<Kind>(words, rows);
  Room<Kind> room;
  room.left = static_cast<typename Kind::Left*>(take(tiles * left_size<Kind>(words) * 4));
  room.sums = static_cast<typename Kind::Sum*>(take(kTileRows * kPanel * 4));
  room.scales = static_cast<float*>(take(tiles * kTileRows * 4));
  room.quantized = static_cast<uint32_t*>(take((words + 2 * kLanes) * 4));
  return room;
}

template <typename T>
void pack_rows(Floats, const T* x, int64_t stride, int count, int64_t inner, Room<Floats>&, float* left, float*) {
  pack_transposed<Numbers, kTileWidth>(x, stride, count, inner, left);
}

#ifdef __AVX512BF16__
template <typename T>
FASTBERT_INLINE Word words_at(Pairs, const T* row, int dim, int column) {
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes)));
  const auto half = [&](int first) {
    const int left = dim - first;
    return left >= kLanes ? load(row + first, Whole{}) : left > 0 ? load(row + first, Part{left}) : Float{};
  };
  const Short halves[] = {narrowed(half(2 * column), BFloat16{}), narrowed(half(2 * column + kLanes), BFloat16{})};
  return read<Word>(reinterpret_cast<const uint32_t*>(halves), Whole{});
}

template <typename T>
void pack_rows(BFloats, const T* x, int64_t stride, int count, int64_t inner, Room<BFloats>&, uint32_t* left, float*) {
  pack_transposed<Pairs, kTileWidth>(x, stride, count, inner, left);
}
#else
template <typename T>
void pack_rows(BFloats, const T* x, int64_t stride, int count, int64_t inner, Room<BFloats>&, float* left, float*) {
  pack_transposed<Numbers, kTileWidth>(x, stride, count, inner, left);
}
#endif

// x * inverse, rounded to the nearest integer, ties to even, and 128 more; the product is not rounded before.
FASTBERT_INLINE Word steps_of(Float x, float inverse) {
#if defined(__FMA__) || !defined(__x86_64__)
  return bits_of<Word>(fma(x, all(inverse), all(0x1.8p23f + 128))) & 0xff;  // the last bits hold the integer
#else
  const Double both[] = {first_half(x) * inverse + (0x1.8p52 + 128), second_half(x) * inverse + (0x1.8p52 + 128)};
  Word steps;
  for (int i = 0; i < kLanes; ++i) {
    const double one = both[2 * i / kLanes][i % (kLanes / 2)];
    steps[i] = static_cast<uint32_t>(bits_of<uint64_t>(one)) & 0xff;
  }
  return steps;
#endif
}

// A row as unsigned bytes around 128, its largest number 127 away from it; returns what one step is. A NaN or an
// infinity makes it NaN.
template <typename T>
float quantize(const T* x, int64_t inner, uint8_t* to) {
  Float most = {}, all_there = {};
  for_columns(inner, [&](int64_t column, auto there) {
    const Float value = load(x + column, there);
    most = larger(magnitude(value), most);
    all_there += value - value;  // 0, or NaN
  });
  float largest = 0, trouble = 0;
  for (int i = 0; i < kLanes; ++i) {
    largest = most[i] > largest ? most[i] : largest;
    trouble += all_there[i];
  }
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for_columns(inner, [&](int64_t column, auto there) {
    const Word steps = steps_of(load(x + column, there), inverse);
    for (int i = 0; i < kLanes; ++i) to[column + i] = static_cast<uint8_t>(steps[i]);  // more than are there: there is room
  });
  return largest / 127.0f + trouble;
}

template <typename T>
void pack_rows(Bytes, const T* x, int64_t stride, int count, int64_t inner, Room<Bytes>& room, uint32_t* left,
               float* scales) {
  const int64_t words = (inner + 3) / 4;
  Word* const zeros = reinterpret_cast<Word*>(left);
  for (int64_t i = 0; i < left_size<Bytes>(words) / kLanes; ++i) zeros[i] = Word{};
  for (int r = 0; r < count; ++r) {
    scales[r] = quantize(x + r * stride, inner, reinterpret_cast<uint8_t*>(room.quantized));
    for (int64_t word = 0; word < words; ++word) {
      if constexpr (Bytes::kParts == 1) {
        left[word * kTileWidth + r] = room.quantized[word];
      } else {
        left[2 * word * kTileWidth + r] = room.quantized[word] & 0x00ff00ffu;
        left[(2 * word + 1) * kTileWidth + r] = room.quantized[word] >> 8 & 0x00ff00ffu;
      }
    }
  }
}

// The tile's sums, times their scales if they are of bytes, with bias and activation.
template <typename Kind>
FASTBERT_INLINE Float value_of(const Kind&, const typename Kind::Sum& sum, float, const PackedWeight&, int64_t) {
  return sum;
}

FASTBERT_INLINE Float value_of(const Bytes&, const Int& sum, float scale, const PackedWeight& weight, int64_t column) {
  const Int corrected = sum - 128 * read<Int>(weight.sums + column, Whole{});
  return __builtin_convertvector(corrected, Float) * (load(weight.scales + column, Whole{}) * scale);
}

template <typename Kind>
void finish(const Linear& inputs, const Room<Kind>& room, const float* scales, int64_t first, int height,
            int64_t panel) {
  const int64_t start = panel * kPanel, left = inputs.weight.columns - start;
  with_type(inputs.out_dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    for_columns(left < kPanel ? left : kPanel, [&](int64_t column, auto there) {
      Float bias = {};
      if (inputs.bias != nullptr) {
        with_type(inputs.bias_dtype, [&](auto bias_type) {
          bias = load(static_cast<const typename decltype(bias_type)::Type*>(inputs.bias) + start + column, there);
        });
      }
      for (int r = 0; r < height; ++r) {
        const auto& sum = room.sums[(r * kPanel + column) / kLanes];
        const Float value = value_of(Kind{}, sum, scales[r], inputs.weight, start + column) + bias;
        T* const to = static_cast<T*>(inputs.out) + (first + r) * inputs.out_stride + start + column;
        store(to, activated<T>(value, inputs.activation), there);
      }
    });
  });
}

template <typename Kind>
void multiply_rows(const Linear& inputs, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
                   char* memory) {
  const PackedWeight& weight = inputs.weight;
  const int64_t words = inner_words(weight), block = tiles_of_block<Kind>(words, last - first) * kTileRows;
  Room<Kind> room = room_in<Kind>(memory, words, last - first);
  const auto* const packed = static_cast<const uint32_t*>(weight.words);
  for (; first < last; first += block) {
    const int64_t rows = last - first < block ? last - first : block, tiles = (rows + kTileRows - 1) / kTileRows;
    const auto start_of = [&](int64_t i) { return rows * i / tiles; };  // tiles are about equally high
    for (int64_t i = 0; i < tiles; ++i) {
      with_type(inputs.x_dtype, [&](auto type) {
        const auto* const x = static_cast<const typename decltype(type)::Type*>(inputs.x);
        const int64_t row = start_of(i);
        pack_rows(Kind{}, x + (first + row) * inputs.x_stride, inputs.x_stride, start_of(i + 1) - row, weight.inner,
                  room, room.left + i * left_size<Kind>(words), room.scales + row);
      });
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const uint32_t* const right = packed + panel * words * kPanel;
      for (int64_t i = 0; i < tiles; ++i) {
        const auto* const left = room.left + i * left_size<Kind>(words);
        const int height = start_of(i + 1) - start_of(i);
        for (int64_t word = 0; word < words; word += kStep) {
          const int64_t count = words - word < kStep ? words - word : kStep;
          const auto* const part = left + word * Kind::kParts * kTileWidth;
          if (word == 0) {
            times_panel_of<Kind, false>(height, part, right, count, room.sums);
          } else {
            times_panel_of<Kind, true>(height, part, right + word * kPanel, count, room.sums);
          }
        }
        finish<Kind>(inputs, room, room.scales + start_of(i), first + start_of(i), height, panel);
      }
    }
  }
}

template <typename F>
auto with_kind(Weights kind, F f) {
  switch (kind) {
    case Weights::float32: return f(Floats{});
    case Weights::bfloat16: return f(BFloats{});
    default: return f(Bytes{});
  }
}

}  // namespace

void linear(const Linear& inputs, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel, char* memory) {
  with_kind(inputs.weight.kind, [&](auto kind) {
    multiply_rows<decltype(kind)>(inputs, first, last, first_panel, last_panel, memory);
  });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
