#include "dropout_bits.h"

#include <cuda_runtime.h>

#include "dropout.cuh"
#include "launch.cuh"

namespace fastbert::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kCounters = 4;  // of 8 keys each, in a word

// The length of the sequence in which a packed row stands, 0 behind the last. By bisection: log2(batch) steps on a few
// cached lines are little beside the generator.
__device__ int length_at(int64_t row, const int32_t* __restrict__ cu_seqlens, int64_t batch) {
  int64_t first = 0, last = batch;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (cu_seqlens[middle + 1] > row) last = middle;
    else first = middle + 1;
  }
  return first < batch ? cu_seqlens[first + 1] - cu_seqlens[first] : 0;
}

// A thread makes one word of one row.
__global__ void __launch_bounds__(kThreads) bits_kernel(Dropout dropout, const int32_t* __restrict__ cu_seqlens,
                                                        int64_t batch, int64_t tokens, int words,
                                                        int32_t* __restrict__ bits) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= tokens * words) return;
  const int64_t row = place / words;
  const int word = static_cast<int>(place - row * words);
  const int left = length_at(row, cu_seqlens, batch) - 32 * word;  // keys of the sequence from this word on
  uint32_t kept = left > 0 ? ~0u : 0u;
  if (left > 0 && dropout.seed != nullptr) {
    kept = 0;
#pragma unroll
    for (int i = 0; i < kCounters; ++i) {
      const uint4 counter = make_uint4(kCounters * word + i, static_cast<uint32_t>(row), dropout.site, blockIdx.y);
      kept |= kept_bits(philox(counter, *dropout.seed), dropout.threshold) << (8 * i);
    }
  }
  if (left > 0 && left < 32) kept &= (1u << left) - 1;
  bits[blockIdx.y * tokens * words + place] = static_cast<int32_t>(kept);
}

}  // namespace

const char* dropout_bits(const Dropout& dropout, const int32_t* cu_seqlens, int64_t batch, int64_t tokens, int words,
                         int heads, int32_t* bits, void* stream) {
  if (tokens == 0 || words == 0 || heads == 0) return nullptr;
  const auto config = launch_config(dim3(ceil_div(tokens * words, kThreads), heads), dim3(kThreads), stream);
  return cuda::words(cudaLaunchKernelEx(&config, bits_kernel, dropout, cu_seqlens, batch, tokens, words, bits));
}

}  // namespace fastbert::cuda
