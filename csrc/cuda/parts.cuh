// Sums over rows in two passes, always in one order: blocks write partial sums [parts, columns], a second kernel adds
// them up.
#pragma once

#include <cuda_runtime.h>

#include "dtypes.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kPartWarps = 16;

// parts [count, columns] -> out [columns]; of no parts zeros.
template <typename T>
__global__ void __launch_bounds__(kWarp* kPartWarps) add_parts_kernel(const float* __restrict__ parts, int64_t count,
                                                                      int64_t columns, T* __restrict__ out) {
  __shared__ float sums[kPartWarps][kWarp];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < count; part += kPartWarps) sum += parts[part * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  double total = 0.0;
  for (int warp = 0; warp < kPartWarps; ++warp) total += sums[warp][threadIdx.x];
  out[column] = from_float<T>(static_cast<float>(total));
}

// nullptr for `out`: not needed.
inline cudaError_t add_parts(const float* parts, int64_t count, int64_t columns, Dtype dtype, void* out, void* stream) {
  if (out == nullptr || columns == 0) return cudaSuccess;
  const auto config = launch_config(dim3(ceil_div(columns, kWarp)), dim3(kWarp, kPartWarps), stream);
  return with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::Type;
    return cudaLaunchKernelEx(&config, add_parts_kernel<T>, parts, count, columns, static_cast<T*>(out));
  });
}

}  // namespace

// How many blocks share the rows: about as many as run at a time, but each slot of a block has 4 rows; with fewer the
// partial sums would be as much to move as the rows.
inline cudaError_t blocks_of_rows(int64_t rows, dim3 block, int64_t* blocks) {
  int count = 0;
  const cudaError_t error = multiprocessors(&count);
  const int64_t at_a_time = count * (1024 / (block.x * block.y * block.z));
  const int64_t few = ceil_div(rows, 4 * static_cast<int64_t>(block.z));
  *blocks = few < at_a_time ? few : at_a_time;
  return error;
}

}  // namespace fastbert::cuda
