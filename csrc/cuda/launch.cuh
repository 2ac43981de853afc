// What host functions share: configurations, and errors in words.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastbert::cuda {

inline const char* words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // else torch's next check of its own would find this error
  return cudaGetErrorString(error);
}

inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : error;
}

// Whether 128-bit accesses fit: rows of 8 elements each and memory at 16 bytes. nullptr is no obstacle.
template <typename... P>
bool fits_vectors(int64_t columns, const P*... pointers) {
  return columns % 8 == 0 && ((reinterpret_cast<uintptr_t>(pointers) | ... | 0) % 16) == 0;
}

}  // namespace fastbert::cuda
