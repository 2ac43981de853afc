#include "add_layer_norm.h"

#include <cuda_runtime.h>

#include "dropout.cuh"
#include "launch.cuh"
#include "parts.cuh"
#include "rows.cuh"

namespace fastbert::cuda {
namespace {

// residual + dropout(x + bias) [8]
template <typename X, typename R, bool kVector>
__device__ void add(const AddLayerNorm& inputs, int64_t row, int column, int left, float (&total)[kColumns]) {
  float residual[kColumns], bias[kColumns];
  const int64_t place = row * inputs.hidden + column;
  load<kVector>(static_cast<const X*>(inputs.x) + place, left, total);
  load<kVector>(static_cast<const R*>(inputs.residual) + place, left, residual);
  if (inputs.bias != nullptr) {
    load<kVector>(static_cast<const X*>(inputs.bias) + column, left, bias);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) total[i] += bias[i];
  }
  if (inputs.dropout.seed != nullptr) drop(total, inputs.dropout, row, column);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) total[i] += residual[i];
}

template <typename X, typename R, bool kVector>
__global__ void __launch_bounds__(kMostRowThreads, 1)
    forward(AddLayerNorm inputs, const R* __restrict__ beta, float eps, R* __restrict__ y, float* __restrict__ means,
            float* __restrict__ rstds) {
  __shared__ RowParts parts;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const int column = first_column();
  const int left = row < inputs.rows ? inputs.hidden - column : 0;
  float total[kColumns], gamma[kColumns], shift[kColumns], mean, rstd;
  add<X, R, kVector>(inputs, row, column, left, total);
  normalize(total, left, inputs.hidden, eps, parts, mean, rstd);
  load<kVector>(static_cast<const R*>(inputs.gamma) + column, left, gamma);
  load<kVector>(beta + column, left, shift);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) total[i] = total[i] * rstd * gamma[i] + shift[i];
  store<kVector>(y + row * inputs.hidden + column, left, total);
  if (row < inputs.rows && column == 0) {
    means[row] = mean;
    rstds[row] = rstd;
  }
}

// A block walks over the rows; its sums of dgamma, dbeta and dbias go to parts [3, part_count, hidden].
template <typename X, typename R, bool kVector>
__global__ void __launch_bounds__(kMostRowThreads, 1)
    backward(AddLayerNorm inputs, const R* __restrict__ grads, const float* __restrict__ means,
             const float* __restrict__ rstds, float* __restrict__ sums, int64_t part_count, X* __restrict__ dx,
             R* __restrict__ dresidual) {
  __shared__ RowParts parts;
  const int hidden = inputs.hidden, column = first_column();
  float gamma[kColumns], dgamma[kColumns] = {}, dbeta[kColumns] = {}, dbias[kColumns] = {};
  load<kVector>(static_cast<const R*>(inputs.gamma) + column, hidden - column, gamma);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.z;
  // the same number of rounds for all rows of a block, which meet at barriers
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.z; first < inputs.rows; first += step) {
    const int64_t row = first + threadIdx.z, place = row * hidden + column;
    const bool is_row = row < inputs.rows;
    const int left = is_row ? hidden - column : 0;
    const float mean = is_row ? means[row] : 0.0f, rstd = is_row ? rstds[row] : 0.0f;
    float grad[kColumns], normalized[kColumns];
    load<kVector>(grads + place, left, grad);
    add<X, R, kVector>(inputs, row, column, left, normalized);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      normalized[i] = i < left ? (normalized[i] - mean) * rstd : 0.0f;
      dgamma[i] += grad[i] * normalized[i];
      dbeta[i] += grad[i];
    }
    normalize_backward(grad, normalized, gamma, hidden, rstd, parts);
    if (dresidual != nullptr) store<kVector>(dresidual + place, left, grad);
    if (inputs.dropout.seed != nullptr) {
      if constexpr (sizeof(X) == sizeof(R)) {  // as autograd does it: the sum's gradient is a tensor of its dtype
#pragma unroll
        for (int i = 0; i < kColumns; ++i) grad[i] = rounded_to<X>(grad[i]);
      }
      drop(grad, inputs.dropout, row, column);
    }
    if (dx != nullptr) store<kVector>(dx + place, left, grad);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) dbias[i] += i < left ? grad[i] : 0.0f;
  }
  const int64_t part = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  store<kVector>(sums + part * hidden + column, hidden - column, dgamma);
  store<kVector>(sums + (part_count + part) * hidden + column, hidden - column, dbeta);
  store<kVector>(sums + (2 * part_count + part) * hidden + column, hidden - column, dbias);
}

// Calls f with Is<X>, Is<R> of the two dtypes: the same, or 16 bits beside float32.
template <typename F>
auto with_types(const AddLayerNorm& inputs, F f) {
  return with_type(inputs.x_dtype, [&](auto x) {
    return inputs.residual_dtype == Dtype::float32 ? f(x, Is<float>{}) : f(x, x);
  });
}

}  // namespace

const char* add_layer_norm(const AddLayerNorm& inputs, const void* beta, float eps, void* y, float* mean, float* rstd,
                           void* stream) {
  if (inputs.rows == 0) return nullptr;
  const dim3 block = row_block(inputs.hidden);
  const auto config = launch_config(dim3(ceil_div(inputs.rows, block.z)), block, stream);
  const bool vectors = fits_vectors(inputs.hidden, inputs.x, inputs.bias, inputs.residual, inputs.gamma, beta, y);
  return words(with_types(inputs, [&](auto x, auto r) {
    using X = typename decltype(x)::Type;
    using R = typename decltype(r)::Type;
    const auto kernel = vectors ? forward<X, R, true> : forward<X, R, false>;
    return cudaLaunchKernelEx(&config, kernel, inputs, static_cast<const R*>(beta), eps, static_cast<R*>(y), mean,
                              rstd);
  }));
}

const char* add_layer_norm_parts(int64_t rows, int hidden, int64_t* parts) {
  const dim3 block = row_block(hidden);
  const cudaError_t error = blocks_of_rows(rows, block, parts);
  *parts *= block.z;
  return words(error);
}

const char* add_layer_norm_backward(const AddLayerNorm& inputs, const void* grad, const float* mean, const float* rstd,
                                    float* parts, int64_t part_count, void* dx, void* dbias, void* dresidual,
                                    void* dgamma, void* dbeta, void* stream) {
  const int hidden = inputs.hidden;
  if (part_count > 0) {
    const dim3 block = row_block(hidden);
    const auto config = launch_config(dim3(part_count / block.z), block, stream);
    const bool vectors =
        fits_vectors(hidden, inputs.x, inputs.bias, inputs.residual, inputs.gamma, grad, parts, dx, dresidual);
    const cudaError_t error = with_types(inputs, [&](auto x, auto r) {
      using X = typename decltype(x)::Type;
      using R = typename decltype(r)::Type;
      const auto kernel = vectors ? backward<X, R, true> : backward<X, R, false>;
      return cudaLaunchKernelEx(&config, kernel, inputs, static_cast<const R*>(grad), mean, rstd, parts, part_count,
                                static_cast<X*>(dx), static_cast<R*>(dresidual));
    });
    if (error != cudaSuccess) return words(error);
  }
  cudaError_t error = add_parts(parts, part_count, hidden, inputs.residual_dtype, dgamma, stream);
  if (error != cudaSuccess) return words(error);
  error = add_parts(parts + part_count * hidden, part_count, hidden, inputs.residual_dtype, dbeta, stream);
  if (error != cudaSuccess) return words(error);
  return words(add_parts(parts + 2 * part_count * hidden, part_count, hidden, inputs.x_dtype, dbias, stream));
}

}  // namespace fastbert::cuda
