#include "embed_layer_norm.h"

#include "layer_norm.h"
#include "philox.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

FASTBERT_INLINE int64_t index_at(Indices indices, int64_t row) {
  return indices.is_wide ? static_cast<const int64_t*>(indices.data)[row]
                         : static_cast<const int32_t*>(indices.data)[row];
}

// A table's row for a token; nullptr: there is no table.
template <typename T>
FASTBERT_INLINE const T* row_of(const Table& table, int64_t row, int64_t hidden) {
  return table.data == nullptr ? nullptr : static_cast<const T*>(table.data) + index_at(table.indices, row) * hidden;
}

template <typename T>
struct Rows {
  const T *word, *type, *position;

  FASTBERT_INLINE Rows(const EmbedLayerNorm& inputs, int64_t row)
      : word(row_of<T>(inputs.words, row, inputs.hidden)),
        type(row_of<T>(inputs.types, row, inputs.hidden)),
        position(row_of<T>(inputs.positions, row, inputs.hidden)) {}

  // words + types + positions, a vector of a row
  template <typename Count>
  FASTBERT_INLINE Float sum_at(int64_t column, Count count) const {
    Float sum = load(word + column, count);
    if (type != nullptr) sum += load(type + column, count);
    return sum + load(position + column, count);
  }
};

template <typename T>
void forward(const EmbedLayerNorm inputs, const T* beta, float eps, T* y, float* means, float* rstds, T* pre,
             RowMemory memory, int64_t first, int64_t last) {
  const auto* gamma = static_cast<const T*>(inputs.gamma);
  const int64_t hidden = inputs.hidden;
  const uint16_t* draws = inputs.dropout.seed != nullptr ? memory.draws : nullptr;
  float* sums = memory.sums;
  for (int64_t row = first; row < last; ++row) {
    const Rows<T> rows(inputs, row);
    Moments moments{rows.sum_at(0, Part{1})[0]};
    for_columns(hidden, [&](int64_t column, auto count) {
      const Float sum = rows.sum_at(column, count);
      store(sums + column, sum, count);
      if (pre != nullptr) store(pre + row * hidden + column, sum, count);
      moments.add(sum, count);
    });
    moments.finish(hidden, eps, means[row], rstds[row]);
    const float mean = means[row], rstd = rstds[row];
    if (draws != nullptr) draw_row(inputs.dropout, row, hidden, memory.draws);
    T* out = y + row * hidden;
    for_columns(hidden, [&](int64_t column, auto count) {
      const Float normalized = (load(sums + column, count) - mean) * rstd;
      Float found = fused(normalized, load(gamma + column, count), load(beta + column, count));
      if (draws != nullptr) found = drop(found, inputs.dropout, draws + column);
      store(out + column, found, count);
    });
  }
}

// The rows of a block; parts [2, blocks, hidden]
template <typename T>
void backward(const EmbedLayerNorm inputs, const T* grads, const float* means, const float* rstds, const T* pre,
              float* parts, float* dx, RowMemory memory, int64_t block) {
  const auto* gamma = static_cast<const T*>(inputs.gamma);
  const int64_t hidden = inputs.hidden;
  float *dgamma = parts + block * hidden, *dbeta = dgamma + block_count(inputs.rows) * hidden;
  const uint16_t* draws = inputs.dropout.seed != nullptr ? memory.draws : nullptr;
  float* normals = memory.sums;
  clear(dgamma, hidden);
  clear(dbeta, hidden);
  for (int64_t row = block * kBlockRows; row < (block + 1) * kBlockRows && row < inputs.rows; ++row) {
    const Rows<T> rows(inputs, row);
    const T* saved = pre == nullptr ? nullptr : pre + row * hidden;
    const float mean = means[row], rstd = rstds[row];
    float* out = dx + row * hidden;
    if (draws != nullptr) draw_row(inputs.dropout, row, hidden, memory.draws);
    Slope slope;
    for_columns(hidden, [&](int64_t column, auto count) {
      Float grad = load(grads + row * hidden + column, count);
      if (draws != nullptr) grad = drop(grad, inputs.dropout, draws + column);
      const Float sum = saved != nullptr ? load(saved + column, count) : rows.sum_at(column, count);
      const Float normalized = (sum - mean) * rstd;
      store(normals + column, normalized, count);
      store(out + column, grad, count);
      slope.add(grad, load(gamma + column, count), normalized);
      add_to(dgamma + column, grad * normalized, count);
      add_to(dbeta + column, grad, count);
    });
    slope.finish(hidden, rstd);
    for_columns(hidden, [&](int64_t column, auto count) {
      const Float grad = load(out + column, count);
      store(out + column, slope.of(grad, load(gamma + column, count), load(normals + column, count)), count);
    });
  }
}

template <typename T>
void add_groups(const float* dx, const Groups& groups, int64_t hidden, T* table, int64_t first, int64_t last) {
  const int64_t tiles = tile_count(hidden);
  for (int64_t at = first; at < last; ++at) {
    const int64_t group = at / tiles, start = at % tiles * kTile;
    const int64_t width = hidden - start < kTile ? hidden - start : kTile;
    Sum sums[kTile / kLanes];
    for (int64_t place = groups.starts[group]; place < groups.starts[group + 1]; ++place) {
      const float* row = dx + groups.order[place] * hidden + start;
      for_columns(width, [&](int64_t column, auto count) { sums[column / kLanes].add(load(row + column, count)); });
    }
    T* out = table + groups.keys[group] * hidden + start;
    for_columns(width, [&](int64_t column, auto count) {
      store(out + column, sums[column / kLanes].rounded(), count);
    });
  }
}

}  // namespace

void embed_layer_norm(const EmbedLayerNorm& inputs, const void* beta, float eps, void* y, float* mean, float* rstd,
                      void* pre, RowMemory memory, int64_t first, int64_t last) {
  with_type(inputs.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    forward(inputs, static_cast<const T*>(beta), eps, static_cast<T*>(y), mean, rstd, static_cast<T*>(pre), memory,
            first, last);
  });
}

void embed_layer_norm_backward(const EmbedLayerNorm& inputs, const void* grad, const float* mean, const float* rstd,
                               const void* pre, float* parts, float* dx, RowMemory memory, int64_t block) {
  with_type(inputs.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    backward(inputs, static_cast<const T*>(grad), mean, rstd, static_cast<const T*>(pre), parts, dx, memory, block);
  });
}

void embed_layer_norm_table(const float* dx, const Groups& groups, int64_t hidden, Dtype dtype, void* table,
                            int64_t first, int64_t last) {
  with_type(dtype, [&](auto type) {
    add_groups(dx, groups, hidden, static_cast<typename decltype(type)::Type*>(table), first, last);
  });
}

void embed_layer_norm_sum(const float* parts, int64_t count, int64_t hidden, Dtype dtype, void* out) {
  with_type(dtype, [&](auto type) { add_parts(parts, count, hidden, static_cast<typename decltype(type)::Type*>(out)); });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
