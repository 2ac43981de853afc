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
constexpr int64_t whole(int64_t words) { return (words + kLanes - 1) / kLanes * kLanes; }

constexpr int kStep = 64;  // words whose products are added one after the other: a long sum in parts is more exact

// How a word of a weight is multiplied: as kParts vectors, each with a word of x of its own.
struct Floats {
  static constexpr int kParts = 1;
  static constexpr int64_t kAtOnce = kStep;
  using Left = float;
  using Sum = Float;
  using Right = Float;
  FASTBERT_INLINE static void split(Word word, Right (&parts)[1]) { parts[0] = bits_of<Float>(word); }
  FASTBERT_INLINE static Sum add(Sum sum, Left a, Right b) { return fma(all(a), b, sum); }
};

#ifdef __AVX512BF16__
struct BFloats {
  static constexpr int kParts = 1;
  static constexpr int64_t kAtOnce = kStep;
  using Left = uint32_t;
  using Sum = Float;
  using Right = Word;
  FASTBERT_INLINE static void split(Word word, Right (&parts)[1]) { parts[0] = word; }
  FASTBERT_INLINE static Sum add(Sum sum, Left a, Right b) { return add_product(sum, a, b); }
};
#else
struct BFloats {
  static constexpr int kParts = 2;
  static constexpr int64_t kAtOnce = kStep;
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
  static constexpr int64_t kAtOnce = INT64_MAX;  // exact in any order
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
  static constexpr int64_t kAtOnce = kStep;  // whose words stay in the first cache while the vectors of a panel pass
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

// left [count · kParts, kTileWidth], right [count, kPanel] -> sums [kHeight, kPanel], or added to them. ahead: fetched
// meanwhile, a line of the cache every kPanel words.
template <typename Kind, int kHeight, bool kAdd>
void times_panel(const typename Kind::Left* left, const uint32_t* right, int64_t count, const uint32_t* ahead,
                 typename Kind::Sum* out) {
  constexpr int kRow = kPanel / kLanes;  // vectors of a row of out
#pragma GCC unroll 1
  for (int v = 0; v < kRow; v += 2) {
    typename Kind::Sum sums[kHeight][2] = {};
    const typename Kind::Left* a = left;
    const uint32_t* b = right + v * kLanes;
    const uint32_t* soon = ahead;
#pragma GCC unroll 2
    for (int64_t i = 0; i < count; ++i, a += Kind::kParts * kTileWidth, b += kPanel, soon += kPanel) {
      __builtin_prefetch(soon, 0, 2);
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
                             const uint32_t* ahead, typename Kind::Sum* out) {
  if constexpr (kHeight > 1) {
    if (height < kHeight) return times_panel_of<Kind, kAdd, kHeight - 1>(height, left, right, count, ahead, out);
  }
  times_panel<Kind, kHeight, kAdd>(left, right, count, ahead, out);
}

template <typename Kind>
constexpr int64_t left_size(int64_t words) {  // pack_transposed fills whole vectors
  return (words * Kind::kParts + kLanes - 1) / kLanes * kLanes * kTileWidth;
}

int64_t outlier_size(const PackedWeight& weight) { return outlier_words(weight) * BFloats::kParts * kTileWidth; }

template <typename Kind>
int64_t tiles_of_block(const PackedWeight& weight, int64_t rows) {
  const int64_t bytes = 4 * (left_size<Kind>(inner_words(weight)) + outlier_size(weight));
  const int64_t fit = kBlockBytes / bytes, needed = (rows + kTileRows - 1) / kTileRows;
  return fit < 1 ? 1 : fit < needed ? fit : needed;
}

// Memory of what is asked for, one after the other, each on a line of the cache.
class Taken {
 public:
  explicit Taken(char* memory) : memory_(memory) {}

  template <typename T>
  T* next(int64_t words) {
    void* const found = memory_;
    memory_ += (words * 4 + 63) / 64 * 64;
    return static_cast<T*>(found);
  }

 private:
  char* memory_;
};

// Rows of x, packed in tiles.
template <typename Kind>
struct Packed {
  typename Kind::Left* left;  // [tiles, `left_size`]
  BFloats::Left* outliers;    // [tiles, `outlier_size`]
  float* scales;              // of the rows
};

template <typename Kind>
Packed<Kind> packed_in(Taken& memory, const PackedWeight& weight, int64_t tiles) {
  auto* const left = memory.next<typename Kind::Left>(tiles * left_size<Kind>(inner_words(weight)));
  auto* const outliers = memory.next<BFloats::Left>(tiles * outlier_size(weight));
  return {left, outliers, memory.next<float>(tiles * kTileRows)};
}

// What a thread computes in.
template <typename Kind>
struct Room {
  typename Kind::Sum* sums;  // [kTileRows, kPanel]
  Float* outlier_sums;       // [kTileRows, kPanel]
  float* row;                // [inner], in whole vectors
  uint32_t* bytes;           // of a tile's rows [kTileRows, words · kParts], each in whole vectors
};

template <typename Kind>
Room<Kind> room_in(Taken memory, const PackedWeight& weight) {
  Room<Kind> room = {};
  room.sums = memory.next<typename Kind::Sum>(kTileRows * kPanel);
  room.outlier_sums = memory.next<Float>(kTileRows * kPanel);
  if (weight.kind == Weights::int8) {
    room.row = memory.next<float>(weight.inner + kLanes);
    room.bytes = memory.next<uint32_t>(kTileRows * whole(inner_words(weight) * Kind::kParts));
  }
  return room;
}

template <typename T>
void pack_rows(Floats, const T* x, int64_t stride, int count, const PackedWeight& weight, Room<Floats>&, float* left,
               BFloats::Left*, float*) {
  pack_transposed<Numbers, kTileWidth>(x, stride, count, weight.inner, left);
}

#ifdef __AVX512BF16__
template <typename T>
FASTBERT_INLINE Word words_at(Pairs, const T* row, int dim, int column) {
  const auto half = [&](int first) {
    const int left = dim - first;
    return left >= kLanes ? load(row + first, Whole{}) : left > 0 ? load(row + first, Part{left}) : Float{};
  };
  const Short halves[] = {narrowed(half(2 * column), BFloat16{}), narrowed(half(2 * column + kLanes), BFloat16{})};
  return read<Word>(reinterpret_cast<const uint32_t*>(halves), Whole{});
}

template <typename T>
void pack_rows(BFloats, const T* x, int64_t stride, int count, const PackedWeight& weight, Room<BFloats>&,
               uint32_t* left, BFloats::Left*, float*) {
  pack_transposed<Pairs, kTileWidth>(x, stride, count, weight.inner, left);
}
#else
template <typename T>
void pack_rows(BFloats, const T* x, int64_t stride, int count, const PackedWeight& weight, Room<BFloats>&, float* left,
               BFloats::Left*, float*) {
  pack_transposed<Numbers, kTileWidth>(x, stride, count, weight.inner, left);
}
#endif

// x, which is not fused with what it is added to.
FASTBERT_INLINE Float alone(Float x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// The lanes `distance` apart, a power of two, exchanged.
template <int distance>
FASTBERT_INLINE Float exchanged(Float x) {
  Int place;
  for (int i = 0; i < kLanes; ++i) place[i] = i ^ distance;
#ifdef __clang__
  Float found;
  for (int i = 0; i < kLanes; ++i) found[i] = x[place[i]];
  return found;
#else
  return __builtin_shuffle(x, place);
#endif
}

// One step of the Walsh-Hadamard transform within a vector: of two lanes so far apart their sum and difference.
template <int distance>
FASTBERT_INLINE Float butterfly(Float x) {
  Float sign;
  for (int i = 0; i < kLanes; ++i) sign[i] = (i & distance) == 0 ? 1.0f : -1.0f;
  return fma(x, sign, exchanged<distance>(x));
}

// row [whole(inner)], blocks of `width` numbers: their Walsh-Hadamard transform, its sums of two in the reference's order
FASTBERT_INLINE void rotate(float* row, int64_t inner, int64_t width) {
  if (width > 1) {
    for (int64_t i = 0; i < inner; i += kLanes) {
      Float x = load(row + i, Whole{});
      x = butterfly<1>(x);
      if (width > 2) x = butterfly<2>(x);
      if constexpr (kLanes > 4) {
        if (width > 4) x = butterfly<4>(x);
      }
      if constexpr (kLanes > 8) {
        if (width > 8) x = butterfly<8>(x);
      }
      store(row + i, x, Whole{});
    }
  }
  int64_t half = kLanes;
  for (; 4 * half <= width; half *= 4) {  // two steps at once
    for (int64_t block = 0; block < inner; block += 4 * half) {
      for (int64_t i = block; i < block + half; i += kLanes) {
        const Float a = load(row + i, Whole{}), b = load(row + i + half, Whole{});
        const Float c = load(row + i + 2 * half, Whole{}), d = load(row + i + 3 * half, Whole{});
        const Float sum = a + b, other_sum = c + d, difference = a - b, other_difference = c - d;
        store(row + i, sum + other_sum, Whole{});
        store(row + i + half, difference + other_difference, Whole{});
        store(row + i + 2 * half, sum - other_sum, Whole{});
        store(row + i + 3 * half, difference - other_difference, Whole{});
      }
    }
  }
  for (; half < width; half *= 2) {
    for (int64_t block = 0; block < inner; block += 2 * half) {
      for (int64_t i = block; i < block + half; i += kLanes) {
        const Float a = load(row + i, Whole{}), b = load(row + i + half, Whole{});
        store(row + i, a + b, Whole{});
        store(row + i + half, a - b, Whole{});
      }
    }
  }
}

// row [whole(inner)] as unsigned bytes around 128, its largest number 127 away from it, a half to the even one; returns
// what one step is, NaN if not all are finite. Behind the row stand zeros.
FASTBERT_INLINE float quantize(const float* row, int64_t inner, uint8_t* to) {
  Float most = {}, trouble = {};
  for (int64_t i = 0; i < inner; i += kLanes) {
    const Float x = load(row + i, Whole{});
    most = larger(magnitude(x), most);
    trouble += x - x;  // 0, or NaN
  }
  float largest = 0, lost = 0;
  for (int i = 0; i < kLanes; ++i) {
    largest = most[i] > largest ? most[i] : largest;
    lost += trouble[i];
  }
  const float least = 0x1p-126f, step = largest / 127.0f, scale = step > least ? step : least, inverse = 1.0f / scale;
  for (int64_t i = 0; i < inner; i += kLanes) {
    const Float steps = alone(load(row + i, Whole{}) * inverse) + (0x1.8p23f + 128);  // the last bits hold the integer
    const Word bytes = bits_of<Word>(steps);
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(bits_of<__m512i>(bytes)));
#else
    for (int lane = 0; lane < kLanes; ++lane) to[i + lane] = static_cast<uint8_t>(bytes[lane]);
#endif
  }
  return scale + lost;
}

// A row's outliers in bfloat16, as row r of a tile.
FASTBERT_INLINE void pack_outliers(const float* row, const PackedWeight& weight, int r, BFloats::Left* to) {
  for (int64_t first = 0; first < weight.outlier_count; first += kLanes) {
    Float some = {};
    for (int64_t i = first; i < weight.outlier_count && i < first + kLanes; ++i) {
      some[i - first] = row[weight.outlier_columns[i]];
    }
    const Short bits = narrowed(some, BFloat16{});
    for (int64_t i = first; i < 2 * outlier_words(weight) && i < first + kLanes; i += 2) {
      const uint32_t low = bits[i - first], high = bits[i - first + 1];
      if constexpr (BFloats::kParts == 1) {
        to[i / 2 * kTileWidth + r] = low | high << 16;
      } else {
        to[i * kTileWidth + r] = bits_of<float>(low << 16);
        to[(i + 1) * kTileWidth + r] = bits_of<float>(high << 16);
      }
    }
  }
}

template <typename T>
void pack_rows(Bytes, const T* x, int64_t stride, int count, const PackedWeight& weight, Room<Bytes>& room,
               uint32_t* left, BFloats::Left* outliers, float* scales) {
  const int64_t words = (weight.inner + 3) / 4, width = whole(words * Bytes::kParts);
  for (int r = 0; r < count; ++r, x += stride) {
    store(room.row + weight.inner / kLanes * kLanes, Float{}, Whole{});
    for_columns(weight.inner, [&](int64_t column, auto there) {
      store(room.row + column, load(x + column, there), there);
    });
    pack_outliers(room.row, weight, r, outliers);
    for (int64_t i = 0; i < weight.outlier_count; ++i) room.row[weight.outlier_columns[i]] = 0;
    rotate(room.row, weight.inner, weight.rotated);
    uint32_t* const bytes = room.bytes + r * width;
    scales[r] = quantize(room.row, weight.inner, reinterpret_cast<uint8_t*>(bytes));
    if constexpr (Bytes::kParts == 2) {
      for (int64_t word = words; word-- > 0;) {
        const uint32_t four = bytes[word];
        bytes[2 * word] = four & 0x00ff00ffu;
        bytes[2 * word + 1] = four >> 8 & 0x00ff00ffu;
      }
    }
  }
  const auto* const rows = reinterpret_cast<const float*>(room.bytes);  // whose words are moved, not computed with
  pack_transposed<Numbers, kTileWidth>(rows, width, count, words * Bytes::kParts, reinterpret_cast<float*>(left));
}

// A tile's sums, with their scales if they are of bytes.
template <typename Kind, typename Count>
FASTBERT_INLINE Float value_of(Kind, Float sum, const Float*, float, const PackedWeight&, int64_t, Count) {
  return sum;
}

template <typename Count>
FASTBERT_INLINE Float value_of(Bytes, Int sum, const Float* outliers, float scale, const PackedWeight& weight,
                               int64_t column, Count there) {
  const Int corrected = sum - 128 * bits_of<Int>(read<Word>(weight.sums + column, there));
  const Float value = __builtin_convertvector(corrected, Float) * load(weight.scales + column, there) * scale;
  return outliers == nullptr ? value : value + *outliers;
}

// The rows `first` and so on of a panel, with bias and activation.
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
        const int64_t place = (r * kPanel + column) / kLanes;
        const Float* const outliers = inputs.weight.outlier_count > 0 ? room.outlier_sums + place : nullptr;
        const Float sum = value_of(Kind{}, room.sums[place], outliers, scales[r], inputs.weight, start + column, there);
        T* const to = static_cast<T*>(inputs.out) + (first + r) * inputs.out_stride + start + column;
        store(to, activated<T>(sum + bias, inputs.activation), there);
      }
    });
  });
}

int64_t tiles_in(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// The first row of a tile: tiles are about equally high.
int64_t tile_start(int64_t tile, int64_t rows) { return rows * tile / tiles_in(rows); }

// The tiles [first_tile, last_tile) of the rows first, first + 1, ... of x, of which there are so many.
template <typename Kind>
void pack_tiles(const Linear& inputs, int64_t first, int64_t rows, int64_t first_tile, int64_t last_tile,
                const Packed<Kind>& packed, Room<Kind>& room) {
  const PackedWeight& weight = inputs.weight;
  const int64_t size = left_size<Kind>(inner_words(weight));
  with_type(inputs.x_dtype, [&](auto type) {
    const auto* const x = static_cast<const typename decltype(type)::Type*>(inputs.x);
    for (int64_t i = first_tile; i < last_tile; ++i) {
      const int64_t row = tile_start(i, rows), height = tile_start(i + 1, rows) - row;
      pack_rows(Kind{}, x + (first + row) * inputs.x_stride, inputs.x_stride, height, weight, room,
                packed.left + i * size, packed.outliers + i * outlier_size(weight), packed.scales + row);
    }
  });
}

// The packed rows, which are first, first + 1, ... of out, times the panels [first_panel, last_panel).
template <typename Kind>
void multiply_panels(const Linear& inputs, int64_t first, int64_t rows, int64_t first_panel, int64_t last_panel,
                     const Packed<Kind>& packed, const Room<Kind>& room) {
  const PackedWeight& weight = inputs.weight;
  const int64_t words = inner_words(weight), tiles = tiles_in(rows), wide = outlier_words(weight);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const uint32_t* const right = static_cast<const uint32_t*>(weight.words) + panel * words * kPanel;
    for (int64_t i = 0; i < tiles; ++i) {
      const auto* const left = packed.left + i * left_size<Kind>(words);
      const int64_t start = tile_start(i, rows);
      const int height = static_cast<int>(tile_start(i + 1, rows) - start);
      // while the first two tiles pass: the next panel, half of the lines each
      const bool is_next = i < 2 && panel + 1 < last_panel;
      const uint32_t* const ahead = is_next ? right + words * kPanel + i * kPanel / 2 : right;
      for (int64_t word = 0; word < words; word += Kind::kAtOnce) {
        const int64_t count = words - word < Kind::kAtOnce ? words - word : Kind::kAtOnce;
        const auto* const part = left + word * Kind::kParts * kTileWidth;
        if (word == 0) {
          times_panel_of<Kind, false>(height, part, right, count, ahead, room.sums);
        } else {
          times_panel_of<Kind, true>(height, part, right + word * kPanel, count, ahead + word * kPanel, room.sums);
        }
      }
      if (wide > 0) {
        const uint32_t* const outliers = weight.outliers + panel * wide * kPanel;
        const auto* const own = packed.outliers + i * outlier_size(weight);
        times_panel_of<BFloats, false>(height, own, outliers, wide, outliers, room.outlier_sums);
      }
      finish<Kind>(inputs, room, packed.scales + start, first + start, height, panel);
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

void linear(const Linear& inputs, int64_t first, int64_t last, char* memory) {
  with_kind(inputs.weight.kind, [&](auto kind) {
    using Kind = decltype(kind);
    const PackedWeight& weight = inputs.weight;
    const int64_t most = tiles_of_block<Kind>(weight, last - first);
    Taken taken(memory);
    const Packed<Kind> packed = packed_in<Kind>(taken, weight, most);
    Room<Kind> room = room_in<Kind>(taken, weight);
    for (; first < last; first += most * kTileRows) {
      const int64_t rows = last - first < most * kTileRows ? last - first : most * kTileRows;
      pack_tiles(inputs, first, rows, 0, tiles_in(rows), packed, room);
      multiply_panels(inputs, first, rows, 0, panels_of(weight.columns), packed, room);
    }
  });
}

void linear_rows(const Linear& inputs, int64_t part, int64_t parts, char* packed, char* room) {
  with_kind(inputs.weight.kind, [&](auto kind) {
    using Kind = decltype(kind);
    const int64_t tiles = tiles_in(inputs.rows);
    Taken taken(packed);
    const Packed<Kind> rows = packed_in<Kind>(taken, inputs.weight, tiles);
    Room<Kind> own = room_in<Kind>(Taken(room), inputs.weight);
    pack_tiles(inputs, 0, inputs.rows, tiles * part / parts, tiles * (part + 1) / parts, rows, own);
  });
}

void linear_panels(const Linear& inputs, int64_t first, int64_t last, char* packed, char* room) {
  with_kind(inputs.weight.kind, [&](auto kind) {
    using Kind = decltype(kind);
    Taken taken(packed);
    const Packed<Kind> rows = packed_in<Kind>(taken, inputs.weight, tiles_in(inputs.rows));
    multiply_panels(inputs, 0, inputs.rows, first, last, rows, room_in<Kind>(Taken(room), inputs.weight));
  });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
