#include "unpad.h"

#include <cuda_runtime.h>

#include "launch.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;  // one warp a row
constexpr int kScanWarps = 32;
constexpr int kScanThreads = kWarp * kScanWarps;
constexpr int kRankThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// Bit i: the element at column start + i is real. The same on every lane.
template <typename Word>
__device__ unsigned real_lanes(const Word* row, int64_t start, int64_t columns, int64_t stride, Word keep) {
  const int64_t column = start + threadIdx.x;
  return __ballot_sync(kAllLanes, column < columns && (row[column * stride] & keep) != 0);
}

// lengths [rows]
template <typename Word>
__global__ void count_rows(const Word* mask, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                           Word keep, int32_t* lengths) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;
  mask += row * row_stride;
  int32_t length = 0;
#pragma unroll 4
  for (int64_t start = 0; start < columns; start += kWarp) {
    length += __popc(real_lanes(mask, start, columns, column_stride, keep));
  }
  if (threadIdx.x == 0) lengths[row] = length;
}

__device__ int64_t scan_warp(int64_t sum, int lane) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum;
}

// One block. cu_seqlens [rows + 1] holds the lengths from its second element on, and is summed in place.
__global__ void __launch_bounds__(kScanThreads) scan_lengths(int32_t* cu_seqlens, int64_t rows, int64_t* total) {
  __shared__ int64_t warp_sums[kScanWarps];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t share = (rows + kScanThreads - 1) / kScanThreads;
  const int64_t first = thread * share;
  const int64_t last = first + share < rows ? first + share : rows;

  int64_t sum = 0;
  for (int64_t row = first; row < last; ++row) sum += cu_seqlens[row + 1];
  const int64_t inclusive = scan_warp(sum, lane);
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) warp_sums[lane] = scan_warp(warp_sums[lane], lane);
  __syncthreads();

  int64_t running = inclusive - sum + (warp > 0 ? warp_sums[warp - 1] : 0);
  for (int64_t row = first; row < last; ++row) {
    running += cu_seqlens[row + 1];
    cu_seqlens[row + 1] = static_cast<int32_t>(running);
  }
  if (thread == 0) cu_seqlens[0] = 0;
  if (thread == kScanThreads - 1) *total = running;
}

// order [rows]. Each row compares itself with all others, a block's worth of which lies in shared memory at a time.
__global__ void __launch_bounds__(kRankThreads) rank_rows(const int32_t* cu_seqlens, int64_t rows, int32_t* order) {
  __shared__ int32_t lengths[kRankThreads];
  const int thread = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRankThreads + thread;
  const int32_t length = row < rows ? cu_seqlens[row + 1] - cu_seqlens[row] : 0;
  int32_t before = 0;
  for (int64_t start = 0; start < rows; start += kRankThreads) {
    const int64_t place = start + thread;
    lengths[thread] = place < rows ? cu_seqlens[place + 1] - cu_seqlens[place] : -1;  // behind all that there are
    __syncthreads();
    for (int i = 0; i < kRankThreads; ++i) {
      before += lengths[i] > length || (lengths[i] == length && start + i < row);
    }
    __syncthreads();
  }
  if (row < rows) order[before] = static_cast<int32_t>(row);
}

// indices [tokens]
template <typename Word>
__global__ void fill_rows(const Word* mask, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                          Word keep, const int32_t* cu_seqlens, int64_t tokens, int64_t* indices) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  const int64_t lanes = static_cast<int64_t>(gridDim.x) * kRowsPerBlock * kWarp;
  for (int64_t i = cu_seqlens[rows] + row * kWarp + threadIdx.x; i < tokens; i += lanes) indices[i] = -1;
  if (row >= rows) return;
  mask += row * row_stride;
  int64_t place = cu_seqlens[row];
  const unsigned lower_lanes = (1u << threadIdx.x) - 1;
#pragma unroll 4
  for (int64_t start = 0; start < columns; start += kWarp) {
    const unsigned real = real_lanes(mask, start, columns, column_stride, keep);
    const int64_t mine = place + __popc(real & lower_lanes);
    if ((real >> threadIdx.x & 1) && mine < tokens) indices[mine] = row * columns + start + threadIdx.x;
    place += __popc(real);
  }
}

cudaLaunchConfig_t warp_per_row(int64_t rows, void* stream) {
  return launch_config(dim3((rows + kRowsPerBlock - 1) / kRowsPerBlock), dim3(kWarp, kRowsPerBlock), stream);
}

}  // namespace

const char* problem() {
  cudaFuncAttributes attributes;
  return words(cudaFuncGetAttributes(&attributes, scan_lengths));
}

const char* count(const Mask& mask, int32_t* cu_seqlens, int32_t* order, int64_t* total_on_device, int64_t* total,
                  void* stream) {
  if (mask.rows > 0) {
    const cudaLaunchConfig_t config = warp_per_row(mask.rows, stream);
    const cudaError_t error = with_element_type(mask, [&](auto zero) {
      using Word = decltype(zero);
      return cudaLaunchKernelEx(&config, count_rows<Word>, static_cast<const Word*>(mask.data), mask.rows, mask.columns,
                                mask.row_stride, mask.column_stride, static_cast<Word>(mask.keep), cu_seqlens + 1);
    });
    if (error != cudaSuccess) return words(error);
  }
  const cudaLaunchConfig_t config = launch_config(dim3(1), dim3(kScanThreads), stream);
  cudaError_t error = cudaLaunchKernelEx(&config, scan_lengths, cu_seqlens, mask.rows, total_on_device);
  if (error == cudaSuccess && mask.rows > 0) {
    const auto ranks = launch_config(dim3(ceil_div(mask.rows, kRankThreads)), dim3(kRankThreads), stream);
    error = cudaLaunchKernelEx(&ranks, rank_rows, cu_seqlens, mask.rows, order);
  }
  if (error != cudaSuccess || total == nullptr) return words(error);
  error = cudaMemcpyAsync(total, total_on_device, sizeof(*total), cudaMemcpyDeviceToHost, config.stream);
  if (error != cudaSuccess) return words(error);
  return words(cudaStreamSynchronize(config.stream));
}

const char* fill(const Mask& mask, const int32_t* cu_seqlens, int64_t tokens, int64_t* indices, void* stream) {
  if (tokens == 0) return nullptr;
  const cudaLaunchConfig_t config = warp_per_row(mask.rows > 0 ? mask.rows : 1, stream);
  return words(with_element_type(mask, [&](auto zero) {
    using Word = decltype(zero);
    return cudaLaunchKernelEx(&config, fill_rows<Word>, static_cast<const Word*>(mask.data), mask.rows, mask.columns,
                              mask.row_stride, mask.column_stride, static_cast<Word>(mask.keep), cu_seqlens, tokens,
                              indices);
  }));
}

}  // namespace fastbert::cuda
