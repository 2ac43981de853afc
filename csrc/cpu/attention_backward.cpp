// A sequence in one head, a block of queries at a time (Dao et al. 2022, "FlashAttention", algorithm 4). Probabilities
// are computed again, [keys, queries], and divided by their total: from the rounded lse alone they would be less exact.
#include "attention.h"

#include "products.h"
#include "softmax.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

constexpr int kQueries = 2 * kLanes;  // of a block
static_assert(kQueries <= kMostQueries);

// Rows are padded to whole vectors of `width` numbers.
struct Block {
  float *keys, *values, *dkeys, *dvalues;  // [length, width]
  float *queries, *grads, *dqueries;  // [kQueries, width]
  float *query_columns, *grad_columns;  // [width, kQueries]
  float *scores, *dscores;  // [length, kQueries]
};

Block block_in(char* memory, int64_t length, int width) {
  const auto take = [&](int64_t numbers) {
    auto* const found = reinterpret_cast<float*>(memory);
    memory += numbers * 4;  // whole lines of the cache: width and kQueries are multiples of kLanes
    return found;
  };
  const int64_t all_keys = length * width, some = kQueries * width;
  Block block;
  block.keys = take(all_keys);
  block.values = take(all_keys);
  block.dkeys = take(all_keys);
  block.dvalues = take(all_keys);
  block.queries = take(some);
  block.grads = take(some);
  block.dqueries = take(some);
  block.query_columns = take(some);
  block.grad_columns = take(some);
  block.scores = take(length * kQueries);
  block.dscores = take(length * kQueries);
  return block;
}

template <typename T>
void pack(const T* from, int64_t stride, int64_t rows, int dim, float* to) {
  const int width = whole_vectors(dim);
  for (int64_t i = 0; i < rows; ++i) {
    for (int column = 0; column < dim; column += kLanes) {
      write(to + i * width + column, words_at(Numbers{}, from + i * stride, dim, column), Whole{});
    }
  }
}

template <typename T>
void unpack(const float* from, int64_t rows, int dim, T* to, int64_t stride) {
  const int width = whole_vectors(dim);
  for (int64_t i = 0; i < rows; ++i) {
    for_columns(dim, [&](int64_t column, auto there) {
      store(to + i * stride + column, load(from + i * width + column, Whole{}), there);
    });
  }
}

// One vector of queries: scores become probabilities after dropout, and the gradients of the former the scores'.
// keep: bits [count, width] of these queries, nullptr: nothing is dropped.
void softmax_backward(const Attention& inputs, int64_t length, const float* lse, const int32_t* keep, int count,
                      float* scores, float* dscores) {
  const Float shift = load(lse, Part{count});
  const Scale scale = scale_of(kLog2E);
  // For every key: what the queries' probabilities of it are multiplied with, where some are dropped.
  const auto for_keys = [&](auto f) {
    for (int64_t first = 0; first < length; first += 32) {
      Word bits = {};
      for (int i = 0; keep != nullptr && i < count; ++i) bits[i] = keep[i * inputs.width + first / 32];
      for (int64_t key = first; key < first + 32 && key < length; ++key, bits >>= 1) {
        f(key, select(bits_of<Int>(bits & 1) != 0, all(inputs.keep_scale), Float{}));
      }
    }
  };
  Float totals[4] = {}, sums[4] = {};  // of every fourth key
  for_keys([&](int64_t key, Float kept) {
    const Float p = power(load(scores + key * kQueries, Whole{}) * inputs.scale - shift, scale);
    Float dp = load(dscores + key * kQueries, Whole{});
    if (keep != nullptr) dp *= kept;
    totals[key % 4] += p;
    sums[key % 4] += p * dp;
    store(scores + key * kQueries, p, Whole{});
    store(dscores + key * kQueries, dp, Whole{});
  });
  const Float inverse = 1.0f / ((totals[0] + totals[1]) + (totals[2] + totals[3]));
  const Float delta = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse;
  for_keys([&](int64_t key, Float kept) {
    Float p = load(scores + key * kQueries, Whole{}) * inverse;
    const Float dp = load(dscores + key * kQueries, Whole{});
    store(dscores + key * kQueries, p * (dp - delta) * inputs.scale, Whole{});
    if (keep != nullptr) p *= kept;
    store(scores + key * kQueries, p, Whole{});
  });
}

// out [rows, width] += left . right [count, width], where left's elements are `row` and `step` apart
void add_products(int64_t rows, const float* left, int64_t row, int64_t step, const float* right, int64_t count,
                 int width, bool is_first, float* out) {
  const Factors<Numbers> of = {left, right, row, step, width, count};
  if (is_first) {
    multiply<Numbers, false>(rows, width / kLanes, of, nullptr, out, width);
  } else {
    multiply<Numbers, true>(rows, width / kLanes, of, nullptr, out, width);
  }
}

template <typename T>
void backward(const Attention& inputs, int64_t sequence, int64_t head, const T* grad, const float* lse, T* dqkv,
              char* memory) {
  const int dim = inputs.dim, width = whole_vectors(dim);
  const int64_t start = inputs.cu_seqlens[sequence], length = inputs.cu_seqlens[sequence + 1] - start;
  const int64_t part = static_cast<int64_t>(inputs.heads) * dim, stride = 3 * part;
  const T* const query = static_cast<const T*>(inputs.qkv) + start * stride + head * dim;
  T* const dquery = dqkv + start * stride + head * dim;
  const T* const dout = grad + start * part + head * dim;
  const Block block = block_in(memory, length, width);
  pack(query + part, stride, length, dim, block.keys);
  pack(query + 2 * part, stride, length, dim, block.values);

  for (int64_t first = 0; first < length; first += kQueries) {
    const int count = length - first < kQueries ? length - first : kQueries;
    const int vectors = whole_vectors(count) / kLanes;
    const int64_t row = head * inputs.tokens + start + first;
    pack(query + first * stride, stride, count, dim, block.queries);
    pack(dout + first * part, part, count, dim, block.grads);
    pack_transposed<Numbers, kQueries>(query + first * stride, stride, count, dim, block.query_columns);
    pack_transposed<Numbers, kQueries>(dout + first * part, part, count, dim, block.grad_columns);
    const Factors<Numbers> of_scores = {block.keys, block.query_columns, width, 1, kQueries, dim};
    const Factors<Numbers> of_dscores = {block.values, block.grad_columns, width, 1, kQueries, dim};
    multiply<Numbers, false>(length, vectors, of_scores, nullptr, block.scores, kQueries);
    multiply<Numbers, false>(length, vectors, of_dscores, nullptr, block.dscores, kQueries);
    for (int lane = 0; lane < count; lane += kLanes) {
      const int32_t* const keep =
          inputs.keep_bits == nullptr ? nullptr : inputs.keep_bits + (row + lane) * inputs.width;
      softmax_backward(inputs, length, lse + row + lane, keep, count - lane < kLanes ? count - lane : kLanes,
                       block.scores + lane, block.dscores + lane);
    }
    add_products(length, block.scores, kQueries, 1, block.grads, count, width, first == 0, block.dvalues);
    add_products(length, block.dscores, kQueries, 1, block.queries, count, width, first == 0, block.dkeys);
    for (int64_t key = 0; key < length; key += kChunkKeys) {
      const int64_t keys = length - key < kChunkKeys ? length - key : kChunkKeys;
      add_products(count, block.dscores + key * kQueries, 1, kQueries, block.keys + key * width, keys, width, key == 0,
                  block.dqueries);
    }
    unpack(block.dqueries, count, dim, dquery + first * stride, stride);
  }
  unpack(block.dkeys, length, dim, dquery + part, stride);
  unpack(block.dvalues, length, dim, dquery + 2 * part, stride);
}

}  // namespace

void attention_backward(const Attention& inputs, int64_t sequence, int64_t head, const void* grad, const float* lse,
                        void* dqkv, char* memory) {
  with_type(inputs.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    backward(inputs, sequence, head, static_cast<const T*>(grad), lse, static_cast<T*>(dqkv), memory);
  });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
