// What attention's kernels share: which queries or keys a block has, launches by length class, and tiles of fp32 in shared
// memory for the kernels without tensor cores.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "attention.h"
#include "dtypes.cuh"
#include "launch.cuh"

namespace fastbert::cuda {

constexpr int kLanes = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int kMostShared = 99 << 10;  // bytes of a block on sm_86, sm_89 and sm_120

// At a multiple of 128 bytes.
template <typename T>
__device__ inline T* shared_memory() {
#ifdef FASTBERT_EMULATED
  return static_cast<T*>(emulator::dynamic_shared_memory());
#else
  extern __shared__ __align__(128) char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

// Of a block: its sequence's first token and length, its head, and its first row (query or key) inside the sequence.
struct Share {
  int64_t start;
  int length, head, first;

  __device__ int left() const { return length - first; }
};

// first: the launch's first place in the order; blocks: of a sequence and a head, `rows` rows each.
__device__ inline Share share_of(const Attention& inputs, int first, int blocks, int rows) {
  const int pair = blockIdx.x / blocks, place = first + pair / inputs.heads;
  const int sequence = inputs.order == nullptr ? place : inputs.order[place];
  const int start = inputs.cu_seqlens[sequence];
  return {start, inputs.cu_seqlens[sequence + 1] - start, pair % inputs.heads,
          static_cast<int>(blockIdx.x) % blocks * rows};
}

// Where the head of a block begins in the first token of its sequence; part 0, 1, 2: query, key, value.
template <typename T>
__device__ inline T* head_of(T* qkv, const Attention& inputs, const Share& share, int part) {
  return qkv + ((share.start * 3 + part) * inputs.heads + share.head) * inputs.dim;
}

// Where the row of a block's sequence stands in a tensor [heads, tokens].
__device__ inline int64_t row_of(const Attention& inputs, const Share& share) {
  return share.head * inputs.tokens + share.start;
}

// Calls launch(first place in the order, number of sequences, longest) for each class, longer ones first; stops at an error.
template <typename F>
const char* each_launch(const Sequences& sequences, F launch) {
  if (sequences.longest <= 0) return nullptr;
  if (sequences.classes == nullptr) {
    return sequences.batch > 0 ? launch(0, sequences.batch, sequences.longest) : nullptr;
  }
  int first = 0;
  for (int i = kClassCount - 1; i >= 0; --i) {
    const int count = static_cast<int>(sequences.classes[i]);
    const int longest = i == kClassCount - 1 ? sequences.longest : std::min(kClasses[i], sequences.longest);
    const char* error = count > 0 ? launch(first, count, longest) : nullptr;
    if (error != nullptr) return error;
    first += count;
  }
  return nullptr;
}

// Launches `kernel(inputs, first, blocks, more...)`: a block of kBlock threads for kRows rows of each sequence and head.
template <int kRows, int kBlock, int kShared, typename K, typename... A>
const char* launch_shares(K* kernel, const Attention& inputs, int first, int count, int longest, void* stream,
                          A... more) {
  static_assert(kShared <= kMostShared);
  const int64_t blocks = ceil_div(longest, kRows), all = blocks * inputs.heads * count;
  if (all > kMostBlocks) return "attention has more than 2147483647 blocks";
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return words(error);
  auto config = launch_config(dim3(static_cast<unsigned>(all)), dim3(kBlock), stream);
  config.dynamicSmemBytes = kShared;
  return words(cudaLaunchKernelEx(&config, kernel, inputs, first, static_cast<int>(blocks), more...));
}

// Calls f with a std::integral_constant of 32, 64 or 128: what a head is padded to.
template <typename F>
auto with_padded_dim(int dim, F f) {
  if (dim <= 32) return f(std::integral_constant<int, 32>{});
  if (dim <= 64) return f(std::integral_constant<int, 64>{});
  return f(std::integral_constant<int, 128>{});
}

// Bit i of the result: the probability of key `key` + i of a row is kept. keep: the row's bits, nullptr: all are.
__device__ inline uint32_t kept_keys(const int32_t* keep, int key) {
  return keep == nullptr ? 0xffffffffu : static_cast<uint32_t>(keep[key / 32]);
}

// Without tensor cores: 128 threads, tiles of 32 queries by 32 keys in fp32.

constexpr int kSide = 32;
constexpr int kThreads = 128;
constexpr int kScoresStride = kSide + 1;  // odd, so that neither rows nor columns meet in a bank

template <int kDims>
struct Plain {
  static constexpr int kStride = kDims + 1;
  static constexpr int kTile = kSide * kStride, kScores = kSide * kScoresStride;  // floats
  static constexpr int kShare = kDims / 4;  // of a row, what a thread sums up: columns thread % 4, + 4, + 8 ...

  // Rows of a head; zeros past the `left` rows that there are.
  template <typename T>
  __device__ static void load(float* tile, const T* from, int64_t stride, int left, int dim) {
    for (int i = threadIdx.x; i < kSide * kDims; i += kThreads) {
      const int row = i / kDims, column = i % kDims;
      const bool is_there = row < left && column < dim;
      tile[row * kStride + column] = is_there ? to_float(from[row * stride + column]) : 0.0f;
    }
  }

  // The products of rows of a and b that a thread has: rows thread / 8 * 2 and the next by rows thread % 8 + 8 i.
  __device__ static void products(float (&found)[2][4], const float* a, const float* b, int dim) {
    const float* rows = a + threadIdx.x / 8 * 2 * kStride;
    const float* columns = b + threadIdx.x % 8 * kStride;
    for (int r = 0; r < 2; ++r) {
      for (int i = 0; i < 4; ++i) found[r][i] = 0.0f;
    }
    for (int k = 0; k < dim; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        found[0][i] = fmaf(rows[k], columns[8 * i * kStride + k], found[0][i]);
        found[1][i] = fmaf(rows[kStride + k], columns[8 * i * kStride + k], found[1][i]);
      }
    }
  }

  // sums [kShare] of row thread / 4: shrink times themselves and weights [32] of that row (kColumn: of that column) times
  // rows of the tile, which are added up first: so fewer roundings meet in long sequences.
  template <bool kColumn>
  __device__ static void add_rows(float (&sums)[kShare], float shrink, const float* weights, const float* tile) {
    const int row = threadIdx.x / 4;
    float added[kShare] = {};
    for (int k = 0; k < kSide; ++k) {
      const float weight = weights[kColumn ? k * kScoresStride + row : row * kScoresStride + k];
#pragma unroll
      for (int i = 0; i < kShare; ++i) added[i] = fmaf(weight, tile[k * kStride + threadIdx.x % 4 + 4 * i], added[i]);
    }
#pragma unroll
    for (int i = 0; i < kShare; ++i) sums[i] = fmaf(sums[i], shrink, added[i]);
  }

  // factor * sums to the thread's row of a head.
  template <typename T>
  __device__ static void store(T* to, int64_t stride, int left, int dim, const float (&sums)[kShare], float factor) {
    const int row = threadIdx.x / 4;
    if (row >= left) return;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int column = threadIdx.x % 4 + 4 * i;
      if (column < dim) to[row * stride + column] = from_float<T>(sums[i] * factor);
    }
  }
};

// The sum or the maximum over the 8 threads that have a row's products.
__device__ inline float sum_of_eight(float x) {
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

__device__ inline float most_of_eight(float x) {
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, distance));
  return x;
}

}  // namespace fastbert::cuda
