// embed_layer_norm: dropout(LayerNorm(words + token types + positions)) and the gradients of the tables. Free of torch.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "dtype.h"
#include "isa.h"
#include "pad.h"
#include "rows.h"

namespace fastbert {

// Rows of a table of `size` rows at `indices`; data nullptr: there is none.
struct Table {
  const void* data;
  Indices indices;
  int64_t size;
};

// indices [rows]; tables [size, hidden], gamma [hidden] of one dtype; all contiguous.
struct EmbedLayerNorm {
  Table words, types, positions;
  const void* gamma;
  Dtype dtype;
  int64_t rows;
  int hidden;
  Dropout dropout;
};

// The rows of the tables to which rows' gradients belong, [rows]; the table's size: to none. nullptr: not wanted.
struct Keys {
  int32_t *words, *types, *positions;
  int64_t word_padding, position_padding;  // the row that gets no gradient; -1: none
};

namespace cuda {

// All return nullptr, or in words what went wrong. `stream` is a cudaStream_t; pointers are on the stream's device.

// y [rows, hidden]; mean, rstd [rows]; pre [rows, hidden]: the sum, or nullptr. A row with an index outside its table
// is NaN: nothing is read there.
const char* embed_layer_norm(const EmbedLayerNorm& inputs, const void* beta, float eps, void* y, float* mean,
                             float* rstd, void* pre, void* stream);

// How many partial sums of the gains' gradients the backward makes.
const char* embed_layer_norm_parts(int64_t rows, int hidden, int64_t* parts);

// grad [rows, hidden]; pre as saved, or nullptr: gathered again -> dx [rows, hidden], keys, dgamma, dbeta [hidden] or
// nullptr. parts: memory of [2, `embed_layer_norm_parts`, hidden]
const char* embed_layer_norm_backward(const EmbedLayerNorm& inputs, const void* grad, const float* mean,
                                      const float* rstd, const void* pre, const Keys& keys, float* parts,
                                      int64_t part_count, float* dx, void* dgamma, void* dbeta, void* stream);

constexpr int64_t kChunk = 32;  // sorted rows that are added up at a time

// dx [rows, hidden] in sorted `order`, added up over runs of equal `keys` -> rows of table [size, hidden], else zeros.
// parts: memory of [ceil(rows / kChunk), 2, hidden]
const char* add_runs(const float* dx, const int32_t* keys, const int64_t* order, int64_t rows, int hidden, int64_t size,
                     float* parts, Dtype dtype, void* table, void* stream);

}  // namespace cuda

// Rows of a matrix that belong together: those of group i are order[starts[i]] to order[starts[i + 1] - 1].
struct Groups {
  const int32_t* order;
  const int64_t* starts;
  const int64_t* keys;  // of each group
  int64_t count;
};

namespace cpu {

// The rows first..last-1 of cuda::embed_layer_norm. All indices lie inside their tables.
FASTBERT_KERNEL(embed_layer_norm, (const EmbedLayerNorm& inputs, const void* beta, float eps, void* y, float* mean,
                                   float* rstd, void* pre, RowMemory memory, int64_t first, int64_t last))

// A block of rows: dx [rows, hidden]; its sums of dgamma and dbeta go to parts [2, `block_count`, hidden].
FASTBERT_KERNEL(embed_layer_norm_backward, (const EmbedLayerNorm& inputs, const void* grad, const float* mean,
                                            const float* rstd, const void* pre, float* parts, float* dx,
                                            RowMemory memory, int64_t block))

constexpr int64_t kTile = 64;  // columns that are added up at a time

static constexpr int64_t tile_count(int64_t hidden) { return (hidden + kTile - 1) / kTile; }

// dx [rows, hidden] -> at the key of each group in table [size, hidden] the sum of its rows. Of the tiles of all
// groups, a group's after one another, those first..last-1.
FASTBERT_KERNEL(embed_layer_norm_table, (const float* dx, const Groups& groups, int64_t hidden, Dtype dtype,
                                         void* table, int64_t first, int64_t last))

// parts [count, hidden] -> their sum [hidden]
FASTBERT_KERNEL(embed_layer_norm_sum, (const float* parts, int64_t count, int64_t hidden, Dtype dtype, void* out))

}  // namespace cpu
}  // namespace fastbert
