#include "pad.h"

#include <cuda_runtime.h>

#include "indices.cuh"
#include "launch.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;  // one warp a row
constexpr int kThreads = 256;

// inverse [rows]: of tokens with one index the last, so that every run gives the same
__global__ void __launch_bounds__(kThreads) invert(Indices indices, int64_t tokens, int64_t rows, int32_t* inverse) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= tokens) return;
  const int64_t row = index_at(indices, token);
  if (row >= 0 && row < rows) atomicMax(inverse + row, static_cast<int>(token));
}

template <typename Word>
__device__ Word zero() {
  if constexpr (sizeof(Word) == 16) return make_uint4(0, 0, 0, 0);
  else return 0;
}

// out[row] = x[source[row]], zeros where x [sources, words] has no such row
template <typename Word>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    gather(const Word* __restrict__ x, Indices source, int64_t rows, int64_t sources, int64_t words,
           Word* __restrict__ out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;
  const int64_t from = index_at(source, row);
  const bool has_source = from >= 0 && from < sources;
  x += has_source ? from * words : 0;
  out += row * words;
#pragma unroll 4
  for (int64_t word = threadIdx.x; word < words; word += kWarp) out[word] = has_source ? x[word] : zero<Word>();
}

template <typename Word>
cudaError_t launch_gather(const void* x, Indices source, int64_t rows, int64_t sources, int64_t bytes, void* out,
                          void* stream) {
  const auto config = launch_config(dim3(ceil_div(rows, kRowsPerBlock)), dim3(kWarp, kRowsPerBlock), stream);
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  return cudaLaunchKernelEx(&config, gather<Word>, static_cast<const Word*>(x), source, rows, sources, words,
                            static_cast<Word*>(out));
}

cudaError_t gather_rows(const void* x, Indices source, int64_t rows, int64_t sources, int64_t bytes, int element_size,
                        void* out, void* stream) {
  if (rows == 0 || bytes == 0) return cudaSuccess;
  const auto places = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out) | bytes;
  if (places % 16 == 0) return launch_gather<uint4>(x, source, rows, sources, bytes, out, stream);
  switch (element_size) {
    case 1: return launch_gather<uint8_t>(x, source, rows, sources, bytes, out, stream);
    case 2: return launch_gather<uint16_t>(x, source, rows, sources, bytes, out, stream);
    case 4: return launch_gather<uint32_t>(x, source, rows, sources, bytes, out, stream);
    default: return launch_gather<uint64_t>(x, source, rows, sources, bytes, out, stream);
  }
}

}  // namespace

const char* pad(const void* x, Indices indices, int64_t tokens, int64_t rows, int64_t bytes, int element_size,
                int32_t* inverse, void* out, void* stream) {
  if (rows == 0) return nullptr;
  cudaError_t error = cudaMemsetAsync(inverse, 0xff, rows * sizeof(int32_t), static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess && tokens > 0) {
    const auto config = launch_config(dim3(ceil_div(tokens, kThreads)), dim3(kThreads), stream);
    error = cudaLaunchKernelEx(&config, invert, indices, tokens, rows, inverse);
  }
  if (error != cudaSuccess) return words(error);
  return words(gather_rows(x, {inverse, false}, rows, tokens, bytes, element_size, out, stream));
}

const char* pad_backward(const void* grad, Indices indices, int64_t tokens, int64_t rows, int64_t bytes,
                         int element_size, void* out, void* stream) {
  return words(gather_rows(grad, indices, tokens, rows, bytes, element_size, out, stream));
}

}  // namespace fastbert::cuda
