// Which elements dropout keeps: Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the
// counter (column >> 3, row, site, head), 16 bits an element, low halves first.
#pragma once

#include <cuda_runtime.h>

#include "dropout.h"
#include "rows.cuh"

namespace fastbert::cuda {

constexpr int kRounds = 7;

__device__ inline uint4 philox(uint4 counter, uint64_t seed) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t left = counter.x * 0xD2511F53u, left_high = __umulhi(counter.x, 0xD2511F53u);
    const uint32_t right = counter.z * 0xCD9E8D57u, right_high = __umulhi(counter.z, 0xCD9E8D57u);
    counter = make_uint4(right_high ^ counter.y ^ low, right, left_high ^ counter.w ^ high, left);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return counter;
}

// Bit k: the k-th of the 8 elements of a counter is kept.
__device__ inline uint32_t kept_bits(uint4 drawn, uint32_t threshold) {
  const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((words[i] & 0xffffu) >= threshold) << (2 * i);
    bits |= static_cast<uint32_t>((words[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return bits;
}

// 8 columns of a row of hidden states after dropout.
__device__ inline void drop(float (&x)[kColumns], const Dropout& dropout, int64_t row, int column) {
  const uint4 counter = make_uint4(column / kColumns, static_cast<uint32_t>(row), dropout.site, 0);
  const uint32_t bits = kept_bits(philox(counter, *dropout.seed), dropout.threshold);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) x[i] = bits >> i & 1 ? x[i] * dropout.scale : 0.0f;
}

}  // namespace fastbert::cuda
