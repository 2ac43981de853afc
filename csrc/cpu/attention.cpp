// A block of queries at a time, in chunks of keys (Milakov & Gimelshein 2018, "Online normalizer calculation for
// softmax"). Scores stand as [keys, queries]: their maximum and total are taken lane by lane, and the left factor of
// both products is broadcast, the scores' keys and the output's probabilities.
#include "attention.h"

#include "products.h"
#include "softmax.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

constexpr int kQueries = 2 * kLanes;  // of a block
constexpr int kKeys = kChunkKeys;  // of a chunk, whose scores [kKeys, kQueries] fit into a core's first cache
constexpr float kLeast = -0x1.fffffep127f;  // of a maximum: finite also where all scores are -inf
static_assert(kQueries <= kMostQueries);

// What a block of queries is computed in.
template <typename Kind>
struct Block {
  typename Kind::Element *keys, *values;  // [length, words]; [words in length, padded dim]
  typename Kind::Element* queries;  // [padded words, kQueries]
  float *scores, *sums;  // [kKeys, kQueries]; [kQueries, padded dim]
  float most[kQueries], total[kQueries], factors[kQueries];
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

// keep: the bits of a chunk's keys, in `count` rows of `width` words
template <typename Kind>
void pack_bits(const int32_t* keep, int64_t width, int keys, int count, Block<Kind>& block) {
  for (int word = 0; word < (keys + 31) / 32; ++word) {
    for (int i = 0; i < kQueries; ++i) block.keep[word][i] = i < count ? keep[i * width + word] : 0;
  }
}

// One vector of queries: the scores of a chunk become probabilities, before they are divided by their total.
template <typename Kind, bool kDrop>
void softmax(int lane, int keys, bool is_first, Scale scale, Block<Kind>& block) {
  float* const column = block.scores + lane;
  const auto score = [&](int key) { return load(column + key * kQueries, Whole{}); };
  const Float old = is_first ? all(kLeast) : load(block.most + lane, Whole{});
  Float tops[4] = {old, old, old, old};  // of every fourth key: they need not wait for each other
  int key = 0;
  for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) tops[i] = larger(score(key + i), tops[i]);
  }
  for (; key < keys; ++key) tops[0] = larger(score(key), tops[0]);
  const Float top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));

  Float totals[4] = {};  // of every fourth key: more exact than one after the other
  const auto probability = [&](int key, int place) {
    const Float p = power(score(key) - top, scale);
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
    const Float factor = power(old - top, scale);
    total += load(block.total + lane, Whole{}) * factor;
    store(block.factors + lane, factor, Whole{});
  }
  store(block.most + lane, top, Whole{});
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
  const int dim = inputs.dim, words = words_in<Kind>(dim), width = whole_vectors(dim);
  const int64_t start = inputs.cu_seqlens[share.sequence], length = inputs.cu_seqlens[share.sequence + 1] - start;
  const T* const query = static_cast<const T*>(inputs.qkv) + start * strides.token + share.head * strides.head;
  Block<Kind> block = block_in<Kind>(memory, length, dim);
  const auto *keys = block.keys, *values = block.values;
  int64_t key_stride = words, value_stride = width;
  if (sizeof(T) == 4 && length <= kQueries && dim % kLanes == 0) {  // read once: where they stand
    keys = reinterpret_cast<const typename Kind::Element*>(query + strides.part);
    values = reinterpret_cast<const typename Kind::Element*>(query + 2 * strides.part);
    key_stride = value_stride = strides.token;
  } else {
    pack_keys_and_values(query + strides.part, query + 2 * strides.part, strides.token, length, dim, block);
  }

  const Scale scale = scale_of(inputs.scale * kLog2E);
  for (int64_t first = share.first; first < share.last; first += kQueries) {
    const int count = share.last - first < kQueries ? share.last - first : kQueries;
    const int64_t row = start + first;
    pack_transposed<Kind, kQueries>(query + first * strides.token, strides.token, count, dim, block.queries);
    for (int64_t chunk = 0; chunk < length; chunk += kKeys) {
      const int some = length - chunk < kKeys ? length - chunk : kKeys;
      const Factors<Kind> of_scores = {keys + chunk * key_stride, block.queries, key_stride, 1, kQueries, words};
      multiply<Kind, false>(some, whole_vectors(count) / kLanes, of_scores, nullptr, block.scores, kQueries);
      if (inputs.keep_bits != nullptr) {
        const int32_t* const keep = inputs.keep_bits + (share.head * inputs.tokens + row) * inputs.width + chunk / 32;
        pack_bits(keep, inputs.width, some, count, block);
      }
      for (int lane = 0; lane < count; lane += kLanes) {
        if (inputs.keep_bits != nullptr) {
          softmax<Kind, true>(lane, some, chunk == 0, scale, block);
        } else {
          softmax<Kind, false>(lane, some, chunk == 0, scale, block);
        }
      }
      const auto* const probabilities = reinterpret_cast<const typename Kind::Element*>(block.scores);
      const auto* const chunk_values = values + words_in<Kind>(chunk) * value_stride;
      const Factors<Kind> of_out = {probabilities, chunk_values, 1, kQueries, value_stride, words_in<Kind>(some)};
      if (chunk == 0) {
        multiply<Kind, false>(count, width / kLanes, of_out, nullptr, block.sums, width);
      } else {
        multiply<Kind, true>(count, width / kLanes, of_out, block.factors, block.sums, width);
      }
    }
    for (int lane = 0; lane < count; lane += kLanes) {
      const Float total = load(block.total + lane, Whole{});
      store(block.factors + lane, inputs.keep_scale / total, Whole{});
      store(block.total + lane, fma(log2(total), all(kLn2), load(block.most + lane, Whole{}) * inputs.scale), Whole{});
    }
    std::memcpy(lse + share.head * inputs.tokens + row, block.total, count * sizeof(float));
    for (int i = 0; i < count; ++i) {
      T* const to = out + ((row + i) * inputs.heads + share.head) * dim;
      const float* const sums = block.sums + i * width;
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
