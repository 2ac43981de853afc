#include "bias_gelu.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "gelu.cuh"
#include "launch.cuh"
#include "parts.cuh"
#include "rows.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kAcross = 64, kDown = 4;  // threads of a block: 512 columns of 4 rows
constexpr int kBlockColumns = kAcross * kColumns;

__device__ int block_column() { return (blockIdx.y * kAcross + threadIdx.x) * kColumns; }

// x + bias [8]
template <typename T, bool kVector>
__device__ void add_bias(const BiasGelu& inputs, int64_t place, const float (&bias)[kColumns], int left,
                         float (&pre)[kColumns]) {
  load<kVector>(static_cast<const T*>(inputs.x) + place, left, pre);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) pre[i] += bias[i];
}

template <typename T, bool kVector>
__device__ void load_bias(const BiasGelu& inputs, int column, float (&bias)[kColumns]) {
  const int left = inputs.bias != nullptr ? static_cast<int>(inputs.columns) - column : 0;
  load<kVector>(static_cast<const T*>(inputs.bias) + column, left, bias);
}

template <typename T, bool kTanh, bool kVector>
__global__ void __launch_bounds__(kAcross* kDown) forward(BiasGelu inputs, T* y, T* pre_out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDown + threadIdx.y;
  const int column = block_column(), left = row < inputs.rows ? static_cast<int>(inputs.columns) - column : 0;
  const int64_t place = row * inputs.columns + column;
  float bias[kColumns], pre[kColumns];
  load_bias<T, kVector>(inputs, column, bias);
  add_bias<T, kVector>(inputs, place, bias, left, pre);
  if (pre_out != nullptr) store<kVector>(pre_out + place, left, pre);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) pre[i] = gelu<T, kTanh>(pre[i]);
  store<kVector>(y + place, left, pre);
}

// A block walks over the rows; its sums of dx over them go to parts [gridDim.x, columns].
template <typename T, bool kTanh, bool kVector>
__global__ void __launch_bounds__(kAcross* kDown, 1)
    backward(BiasGelu inputs, const T* grads, float* parts, T* dx, T* y) {
  __shared__ float sums[kDown][kBlockColumns];
  const int column = block_column(), within = static_cast<int>(inputs.columns) - column;
  float bias[kColumns], dbias[kColumns] = {};
  load_bias<T, kVector>(inputs, column, bias);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kDown;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kDown + threadIdx.y; row < inputs.rows; row += step) {
    const int64_t place = row * inputs.columns + column;
    float grad[kColumns], pre[kColumns];
    load<kVector>(grads + place, within, grad);
    add_bias<T, kVector>(inputs, place, bias, within, pre);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      grad[i] *= gelu_slope<T, kTanh>(pre[i]);
      dbias[i] += grad[i];
    }
    store<kVector>(dx + place, within, grad);
    if (y == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) pre[i] = gelu<T, kTanh>(pre[i]);
    store<kVector>(y + place, within, pre);
  }
  if (parts == nullptr) return;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[threadIdx.y][threadIdx.x * kColumns + i] = dbias[i];
  __syncthreads();
  for (int i = threadIdx.y * kAcross + threadIdx.x; i < kBlockColumns; i += kAcross * kDown) {
    const int64_t at = static_cast<int64_t>(blockIdx.y) * kBlockColumns + i;
    if (at >= inputs.columns) continue;
    float total = 0.0f;
    for (int down = 0; down < kDown; ++down) total += sums[down][i];
    parts[blockIdx.x * inputs.columns + at] = total;
  }
}

// Calls f with Is<T> of the dtype, and two std::bool_constant: by tanh, with 128-bit accesses.
template <typename F>
cudaError_t with_variant(const BiasGelu& inputs, bool vectors, F f) {
  return with_type(inputs.dtype, [&](auto type) {
    const auto with_vectors = [&](auto is_tanh) {
      return vectors ? f(type, is_tanh, std::true_type{}) : f(type, is_tanh, std::false_type{});
    };
    return inputs.is_tanh ? with_vectors(std::true_type{}) : with_vectors(std::false_type{});
  });
}

}  // namespace

const char* bias_gelu(const BiasGelu& inputs, void* y, void* pre, void* stream) {
  if (inputs.rows == 0 || inputs.columns == 0) return nullptr;
  const dim3 grid(ceil_div(inputs.rows, kDown), ceil_div(inputs.columns, kBlockColumns));
  const auto config = launch_config(grid, dim3(kAcross, kDown), stream);
  const bool vectors = fits_vectors(inputs.columns, inputs.x, inputs.bias, y, pre);
  return words(with_variant(inputs, vectors, [&](auto type, auto is_tanh, auto is_vector) {
    using T = typename decltype(type)::Type;
    return cudaLaunchKernelEx(&config, forward<T, decltype(is_tanh)::value, decltype(is_vector)::value>, inputs,
                              static_cast<T*>(y), static_cast<T*>(pre));
  }));
}

const char* bias_gelu_parts(int64_t rows, int64_t* parts) {
  return words(blocks_of_rows(rows, dim3(kAcross, 1, kDown), parts));
}

const char* bias_gelu_backward(const BiasGelu& inputs, const void* grad, float* parts, int64_t part_count, void* dx,
                               void* dbias, void* y, void* stream) {
  if (part_count > 0 && inputs.columns > 0) {
    const auto config = launch_config(dim3(part_count, ceil_div(inputs.columns, kBlockColumns)), dim3(kAcross, kDown),
                                      stream);
    const bool vectors = fits_vectors(inputs.columns, inputs.x, inputs.bias, grad, dx, y);
    const cudaError_t error = with_variant(inputs, vectors, [&](auto type, auto is_tanh, auto is_vector) {
      using T = typename decltype(type)::Type;
      return cudaLaunchKernelEx(&config, backward<T, decltype(is_tanh)::value, decltype(is_vector)::value>, inputs,
                                static_cast<const T*>(grad), parts, static_cast<T*>(dx), static_cast<T*>(y));
    });
    if (error != cudaSuccess) return words(error);
  }
  return words(add_parts(parts, part_count, inputs.columns, inputs.dtype, dbias, stream));
}

}  // namespace fastbert::cuda
