// linear: x times a packed weight transposed, with a bias and GELU. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fastbert {

enum class Activation { none, gelu, gelu_tanh };

namespace cpu {

// What products of packed weights are added up from, and what a word of 4 bytes of them holds: 1 float32, 2 bfloat16
// or 4 int8 (times unsigned ones).
enum class Weights { float32, bfloat16, int8 };

constexpr int kPanel = 32;  // rows of a weight that stand side by side when it is packed

// weight [columns, inner] packed: [panels of columns][words of inner][kPanel] words, zeros where there is none. The same
// for every instruction set. Of int8 also what a step is and the sum of each of its columns [columns]; the columns of x
// that are multiplied in bfloat16 instead, [outlier_count] of them, with outliers [panels][outlier_words][kPanel]; the
// others are rotated in blocks of so many, a power of two that divides inner.
struct PackedWeight {
  const void* words;
  Weights kind;
  int64_t columns, inner;
  const float* scales;
  const int32_t* sums;
  const int64_t* outlier_columns;
  const uint32_t* outliers;
  int64_t outlier_count, rotated;
};

// static, as all functions here: of the files compiled for several instruction sets none may share one
static constexpr int words_each(Weights kind) { return kind == Weights::float32 ? 1 : kind == Weights::bfloat16 ? 2 : 4; }

static inline int64_t inner_words(const PackedWeight& weight) {
  return (weight.inner + words_each(weight.kind) - 1) / words_each(weight.kind);
}

static inline int64_t outlier_words(const PackedWeight& weight) { return (weight.outlier_count + 1) / 2; }

static inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// x [rows, weight.inner], a row x_stride elements apart; bias [weight.columns] of bias_dtype or nullptr -> out
// [rows, weight.columns], a row out_stride elements apart.
struct Linear {
  const void* x;
  Dtype x_dtype;
  int64_t rows, x_stride;
  PackedWeight weight;
  const void* bias;
  Dtype bias_dtype;
  Activation activation;
  void* out;
  Dtype out_dtype;
  int64_t out_stride;
};

constexpr int64_t kBlockBytes = 1 << 19;  // of packed rows of x: with a panel of the weight they fit a second cache

// Bytes of so many rows of x, packed as any instruction set multiplies them: in tiles of 14 rows that are 16 wide, or
// of 6 that are 8 wide, with their scales.
static inline int64_t packed_bytes(const PackedWeight& weight, int64_t rows) {
  const int64_t width = rows * 4 / 3 + 16;
  return 4 * (width * (2 * inner_words(weight) + 16 + 2 * outlier_words(weight)) + rows + 32) + 3 * 64;
}

// Bytes of what a thread computes in: a tile's sums twice; of int8 a row, a tile's rows of bytes.
static inline int64_t room_bytes(const PackedWeight& weight) {
  const int64_t words = inner_words(weight);
  const int64_t bytes = weight.kind == Weights::int8 ? 4 * (weight.inner + 64) + 4 * 16 * (2 * words + 64) : 0;
  return 2 * 4 * 16 * kPanel + bytes + 4 * 64;
}

// Bytes of memory, on a line of the cache, that a task of so many rows needs: packed rows, in whole blocks or one tile.
static inline int64_t linear_memory(const PackedWeight& weight, int64_t rows) {
  const int64_t tile = packed_bytes(weight, 1);
  return (tile > kBlockBytes ? tile : kBlockBytes) + 4 * (rows + 32) + 3 * 64 + room_bytes(weight);
}

// The rows [first, last) of out; memory: `linear_memory` bytes.
FASTBERT_KERNEL(linear, (const Linear& inputs, int64_t first, int64_t last, char* memory))

// The same in two steps, for few rows: a part of x's rows packed, of so many parts, and from all of them the panels
// [first, last) of out. packed: `packed_bytes` of all rows, shared; room: `room_bytes`, of one thread.
FASTBERT_KERNEL(linear_rows, (const Linear& inputs, int64_t part, int64_t parts, char* packed, char* room))

FASTBERT_KERNEL(linear_panels, (const Linear& inputs, int64_t first, int64_t last, char* packed, char* room))

}  // namespace cpu
}  // namespace fastbert
