#include "embed_layer_norm.h"

#include <cuda_runtime.h>

#include "dropout.cuh"
#include "indices.cuh"
#include "launch.cuh"
#include "parts.cuh"
#include "rows.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kJoiners = 8;  // warps that add up the parts of a long run

// The table's row for a token; -1 if there is none.
__device__ int64_t place_in(const Table& table, int64_t row) {
  const int64_t place = index_at(table.indices, row);
  return place >= 0 && place < table.size ? place : -1;
}

struct Places {
  int64_t word, type, position;

  __device__ bool are_real(const EmbedLayerNorm& inputs) const {
    return word >= 0 && position >= 0 && (inputs.types.data == nullptr || type >= 0);
  }
};

__device__ Places places_of(const EmbedLayerNorm& inputs, int64_t row) {
  const int64_t type = inputs.types.data != nullptr ? place_in(inputs.types, row) : -1;
  return {place_in(inputs.words, row), type, place_in(inputs.positions, row)};
}

// words + types + positions [8]
template <typename T, bool kVector>
__device__ void gather(const EmbedLayerNorm& inputs, const Places& places, int column, int left,
                       float (&total)[kColumns]) {
  float part[kColumns];
  load<kVector>(static_cast<const T*>(inputs.words.data) + places.word * inputs.hidden + column, left, total);
  if (inputs.types.data != nullptr) {
    load<kVector>(static_cast<const T*>(inputs.types.data) + places.type * inputs.hidden + column, left, part);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] += part[i];
  }
  load<kVector>(static_cast<const T*>(inputs.positions.data) + places.position * inputs.hidden + column, left, part);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) total[i] += part[i];
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kMostRowThreads, 1)
    forward(EmbedLayerNorm inputs, const T* __restrict__ beta, float eps, T* __restrict__ y, float* __restrict__ means,
            float* __restrict__ rstds, T* __restrict__ pre) {
  __shared__ RowParts parts;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const bool is_row = row < inputs.rows;
  const int column = first_column(), left = is_row ? inputs.hidden - column : 0;
  const int64_t place = row * inputs.hidden + column;
  const Places places = is_row ? places_of(inputs, row) : Places{0, 0, 0};
  const bool is_real = places.are_real(inputs);
  float total[kColumns], gamma[kColumns], shift[kColumns], mean, rstd;
  gather<T, kVector>(inputs, places, column, is_real ? left : 0, total);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (!is_real && i < left) total[i] = __uint_as_float(0x7fc00000u);  // NaN: no kernel can raise
  }
  if (pre != nullptr) store<kVector>(pre + place, left, total);
  normalize(total, left, inputs.hidden, eps, parts, mean, rstd);
  load<kVector>(static_cast<const T*>(inputs.gamma) + column, left, gamma);
  load<kVector>(beta + column, left, shift);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) total[i] = total[i] * rstd * gamma[i] + shift[i];
  if (inputs.dropout.seed != nullptr) drop(total, inputs.dropout, row, column);
  store<kVector>(y + place, left, total);
  if (is_row && column == 0) {
    means[row] = mean;
    rstds[row] = rstd;
  }
}

__device__ void store_key(int32_t* keys, int64_t row, bool is_real, int64_t place, int64_t padding, int64_t size) {
  if (keys != nullptr) keys[row] = static_cast<int32_t>(is_real && place != padding ? place : size);
}

// A block walks over the rows; its sums of dgamma and dbeta go to parts [2, part_count, hidden].
template <typename T, bool kVector>
__global__ void __launch_bounds__(kMostRowThreads, 1)
    backward(EmbedLayerNorm inputs, const T* __restrict__ grads, const float* __restrict__ means,
             const float* __restrict__ rstds, const T* __restrict__ pre, Keys keys, float* __restrict__ sums,
             int64_t part_count, float* __restrict__ dx) {
  __shared__ RowParts parts;
  const int hidden = inputs.hidden, column = first_column();
  float gamma[kColumns], dgamma[kColumns] = {}, dbeta[kColumns] = {};
  load<kVector>(static_cast<const T*>(inputs.gamma) + column, hidden - column, gamma);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.z;
  // the same number of rounds for all rows of a block, which meet at barriers
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.z; first < inputs.rows; first += step) {
    const int64_t row = first + threadIdx.z, place = row * hidden + column;
    const bool is_row = row < inputs.rows;
    const Places places = is_row ? places_of(inputs, row) : Places{-1, -1, -1};
    const bool is_real = places.are_real(inputs);
    if (is_row && column == 0) {
      store_key(keys.words, row, is_real, places.word, keys.word_padding, inputs.words.size);
      store_key(keys.types, row, is_real, places.type, -1, inputs.types.size);
      store_key(keys.positions, row, is_real, places.position, keys.position_padding, inputs.positions.size);
    }
    const int left = is_real ? hidden - column : 0;
    const float mean = is_real ? means[row] : 0.0f, rstd = is_real ? rstds[row] : 0.0f;
    float grad[kColumns], normalized[kColumns];
    load<kVector>(grads + place, left, grad);
    if (inputs.dropout.seed != nullptr) drop(grad, inputs.dropout, row, column);
    if (pre != nullptr) load<kVector>(pre + place, left, normalized);
    else gather<T, kVector>(inputs, places, column, left, normalized);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      normalized[i] = i < left ? (normalized[i] - mean) * rstd : 0.0f;
      dgamma[i] += grad[i] * normalized[i];
      dbeta[i] += grad[i];
    }
    normalize_backward(grad, normalized, gamma, hidden, rstd, parts);
    store<kVector>(dx + place, left, grad);
  }
  const int64_t part = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  store<kVector>(sums + part * hidden + column, hidden - column, dgamma);
  store<kVector>(sums + (part_count + part) * hidden + column, hidden - column, dbeta);
}

// The key at a place of the sorted order, -1 where there is no such place.
__device__ int32_t key_at(const int32_t* keys, int64_t at, int64_t rows) {
  return at >= 0 && at < rows ? keys[at] : -1;
}

// A warp adds up 256 columns of a chunk of sorted rows. A run that lies in one chunk goes to the table; of one that
// does not, parts [chunks, 2, hidden] takes this chunk's part: [0] of a run that began in an earlier chunk, [1] of one
// that begins here.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kWarp)
    add_chunk(const float* __restrict__ dx, const int32_t* __restrict__ keys, const int64_t* __restrict__ order,
              int64_t rows, int hidden, int64_t size, float* __restrict__ parts, T* __restrict__ table) {
  const int64_t first = blockIdx.x * kChunk;
  const int64_t last = first + kChunk < rows ? first + kChunk : rows;
  const int column = (blockIdx.y * kWarp + threadIdx.x) * kColumns, left = hidden - column;
  parts += blockIdx.x * 2 * static_cast<int64_t>(hidden) + column;
  int32_t key = key_at(keys, first, rows);
  bool is_later = key == key_at(keys, first - 1, rows);
  float total[kColumns] = {};
#pragma unroll 4
  for (int64_t at = first; at < last; ++at) {
    const int32_t after = key_at(keys, at + 1, rows);
    float row[kColumns];
    load<kVector>(dx + order[at] * hidden + column, key < size ? left : 0, row);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] += row[i];
    if (key != after || at + 1 == last) {
      const bool is_whole = key != after && !is_later;
      if (key < size && is_whole) store<kVector>(table + key * static_cast<int64_t>(hidden) + column, left, total);
      if (key < size && !is_whole) store<kVector>(parts + (is_later ? 0 : hidden), left, total);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] = 0.0f;
      is_later = false;
    }
    key = after;
  }
}

// The row of the table of the run that begins in a chunk and ends in a later one, from parts [chunks, 2, hidden].
template <typename T, bool kVector>
__global__ void __launch_bounds__(kWarp* kJoiners)
    join_runs(const int32_t* __restrict__ keys, int64_t rows, int hidden, int64_t size, const float* __restrict__ parts,
              T* __restrict__ table) {
  __shared__ float sums[kJoiners][kColumns][kWarp];
  const int64_t next = (blockIdx.x + 1) * kChunk;
  const int32_t key = key_at(keys, next - 1, rows);
  const bool goes_on = key >= 0 && key < size && key_at(keys, next, rows) == key;
  if (!goes_on || key_at(keys, blockIdx.x * kChunk - 1, rows) == key) return;  // the whole block
  const int column = (blockIdx.y * kWarp + threadIdx.x) * kColumns, left = hidden - column;
  float total[kColumns], part[kColumns];
  const int64_t begin = 2 * static_cast<int64_t>(blockIdx.x) * hidden + hidden + column;
  load<kVector>(parts + begin, threadIdx.y == 0 ? left : 0, total);
  for (int64_t at = blockIdx.x + 1 + threadIdx.y; key_at(keys, at * kChunk, rows) == key; at += kJoiners) {
    load<kVector>(parts + 2 * at * hidden + column, left, part);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[threadIdx.y][i][threadIdx.x] = total[i];
  __syncthreads();
  if (threadIdx.y != 0) return;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    for (int warp = 1; warp < kJoiners; ++warp) total[i] += sums[warp][i][threadIdx.x];
  }
  store<kVector>(table + key * static_cast<int64_t>(hidden) + column, left, total);
}

}  // namespace

const char* embed_layer_norm(const EmbedLayerNorm& inputs, const void* beta, float eps, void* y, float* mean,
                             float* rstd, void* pre, void* stream) {
  if (inputs.rows == 0) return nullptr;
  const dim3 block = row_block(inputs.hidden);
  const auto config = launch_config(dim3(ceil_div(inputs.rows, block.z)), block, stream);
  const bool vectors = fits_vectors(inputs.hidden, inputs.words.data, inputs.types.data, inputs.positions.data,
                                    inputs.gamma, beta, y, pre);
  return words(with_type(inputs.dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    const auto kernel = vectors ? forward<T, true> : forward<T, false>;
    return cudaLaunchKernelEx(&config, kernel, inputs, static_cast<const T*>(beta), eps, static_cast<T*>(y), mean, rstd,
                              static_cast<T*>(pre));
  }));
}

const char* embed_layer_norm_parts(int64_t rows, int hidden, int64_t* parts) {
  const dim3 block = row_block(hidden);
  const cudaError_t error = blocks_of_rows(rows, block, parts);
  *parts *= block.z;
  return words(error);
}

const char* embed_layer_norm_backward(const EmbedLayerNorm& inputs, const void* grad, const float* mean,
                                      const float* rstd, const void* pre, const Keys& keys, float* parts,
                                      int64_t part_count, float* dx, void* dgamma, void* dbeta, void* stream) {
  const int hidden = inputs.hidden;
  if (part_count > 0) {
    const dim3 block = row_block(hidden);
    const auto config = launch_config(dim3(part_count / block.z), block, stream);
    const bool vectors = fits_vectors(hidden, inputs.words.data, inputs.types.data, inputs.positions.data, inputs.gamma,
                                      grad, pre, parts, dx);
    const cudaError_t error = with_type(inputs.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      const auto kernel = vectors ? backward<T, true> : backward<T, false>;
      return cudaLaunchKernelEx(&config, kernel, inputs, static_cast<const T*>(grad), mean, rstd,
                                static_cast<const T*>(pre), keys, parts, part_count, dx);
    });
    if (error != cudaSuccess) return words(error);
  }
  const cudaError_t error = add_parts(parts, part_count, hidden, inputs.dtype, dgamma, stream);
  if (error != cudaSuccess) return words(error);
  return words(add_parts(parts + part_count * hidden, part_count, hidden, inputs.dtype, dbeta, stream));
}

const char* add_runs(const float* dx, const int32_t* keys, const int64_t* order, int64_t rows, int hidden, int64_t size,
                     float* parts, Dtype dtype, void* table, void* stream) {
  if (rows == 0) return nullptr;
  const dim3 grid(ceil_div(rows, kChunk), ceil_div(hidden, kWarp * kColumns));
  const auto chunks = launch_config(grid, dim3(kWarp), stream);
  const auto joins = launch_config(grid, dim3(kWarp, kJoiners), stream);
  const bool vectors = fits_vectors(hidden, dx, parts, table);
  return words(with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    const auto add = vectors ? add_chunk<T, true> : add_chunk<T, false>;
    const auto join = vectors ? join_runs<T, true> : join_runs<T, false>;
    T* rows_of_table = static_cast<T*>(table);
    const cudaError_t error =
        cudaLaunchKernelEx(&chunks, add, dx, keys, order, rows, hidden, size, parts, rows_of_table);
    if (error != cudaSuccess) return error;
    return cudaLaunchKernelEx(&joins, join, keys, rows, hidden, size, parts, rows_of_table);
  }));
}

}  // namespace fastbert::cuda
