// Rows of [rows, hidden] in blocks: a thread holds 8 columns of one row, `blockDim.y` warps a row, a block `blockDim.z`
// rows. 8 are what one 128-bit access moves in 16 bits, and what one counter of dropout decides.
#pragma once

#include <cuda_runtime.h>

#include "dtypes.cuh"

namespace fastbert::cuda {

constexpr int kWarp = 32;
constexpr int kColumns = 8;  // of a thread
constexpr int kMostRowWarps = 16, kMostRows = 4;  // of a block
constexpr int kMostRowThreads = kWarp * kMostRowWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

inline dim3 row_block(int hidden) {
  const int warps = (hidden + kWarp * kColumns - 1) / (kWarp * kColumns);
  return dim3(kWarp, warps, warps < kMostRows ? kMostRows / warps : 1);
}

// The first column of the calling thread.
__device__ inline int first_column() { return (threadIdx.y * kWarp + threadIdx.x) * kColumns; }

__device__ inline void unpack(uint32_t pair, Half, float& first, float& second) {
  first = to_float(Half{static_cast<uint16_t>(pair)});
  second = to_float(Half{static_cast<uint16_t>(pair >> 16)});
}

__device__ inline void unpack(uint32_t pair, BFloat16, float& first, float& second) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}

// 8 elements from `from` on; zeros from the element `left` on, and nothing is read there. kVector: left is 8 or none,
// and `from` stands at 16 bytes.
template <bool kVector, typename T>
__device__ inline void load(const T* __restrict__ from, int left, float (&x)[kColumns]) {
  if constexpr (!kVector) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[i] = i < left ? to_float(from[i]) : 0.0f;
  } else if constexpr (sizeof(T) == 4) {
    float4 low = make_float4(0, 0, 0, 0), high = low;
    if (left > 0) {
      low = reinterpret_cast<const float4*>(from)[0];
      high = reinterpret_cast<const float4*>(from)[1];
    }
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    uint4 pairs = make_uint4(0, 0, 0, 0);
    if (left > 0) pairs = *reinterpret_cast<const uint4*>(from);
    unpack(pairs.x, T{}, x[0], x[1]);
    unpack(pairs.y, T{}, x[2], x[3]);
    unpack(pairs.z, T{}, x[4], x[5]);
    unpack(pairs.w, T{}, x[6], x[7]);
  }
}

// As `load`: the elements before `left` are written.
template <bool kVector, typename T>
__device__ inline void store(T* __restrict__ to, int left, const float (&x)[kColumns]) {
  if constexpr (!kVector) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i < left) to[i] = from_float<T>(x[i]);
    }
  } else if (left > 0) {
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
      *reinterpret_cast<uint4*>(to) = make_uint4(pair_of<T>(x[0], x[1]), pair_of<T>(x[2], x[3]),
                                                 pair_of<T>(x[4], x[5]), pair_of<T>(x[6], x[7]));
    }
  }
}

// A sum and what it lost to rounding: float64 would take its place, but is slow on most cards.
struct Sum {
  float value, rest;
};

__device__ inline Sum plus(Sum a, Sum b) {
  const float value = a.value + b.value, of_b = value - a.value;  // Knuth's TwoSum
  const float lost = (a.value - (value - of_b)) + (b.value - of_b);
  return {value, a.rest + b.rest + lost};
}

// The sum of 8 products, with what their rounding loses.
__device__ inline Sum dot(const float (&a)[kColumns], const float (&b)[kColumns]) {
  Sum sum = {a[0] * b[0], fmaf(a[0], b[0], -(a[0] * b[0]))};
#pragma unroll
  for (int i = 1; i < kColumns; ++i) {
    const float product = a[i] * b[i];
    sum = plus(sum, {product, fmaf(a[i], b[i], -product)});
  }
  return sum;
}

__device__ inline Sum sum_of(const float (&x)[kColumns]) {
  Sum sum = {x[0], 0.0f};
#pragma unroll
  for (int i = 1; i < kColumns; ++i) sum = plus(sum, {x[i], 0.0f});
  return sum;
}

using RowParts = Sum[2][kMostRows][kMostRowWarps];

// The sum over `size`, rounded once.
__device__ inline float mean_of(Sum sum, int size) {
  const float mean = sum.value / size;
  return mean + (fmaf(-mean, size, sum.value) + sum.rest) / size;
}

// The mean over a row of what its threads bring, on all of them. parts: shared memory of the row; a second call needs
// memory of its own, a third may take the first's.
__device__ inline float row_mean(Sum sum, int hidden, Sum (&parts)[kMostRowWarps]) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float value = __shfl_xor_sync(kAllLanes, sum.value, distance);
    const float rest = __shfl_xor_sync(kAllLanes, sum.rest, distance);
    sum = plus(sum, {value, rest});
  }
  if (blockDim.y == 1) return mean_of(sum, hidden);
  if (threadIdx.x == 0) parts[threadIdx.y] = sum;
  __syncthreads();
  Sum total = parts[0];
  for (int warp = 1; warp < blockDim.y; ++warp) total = plus(total, parts[warp]);
  return mean_of(total, hidden);
}

// x [8], zeros outside the row -> x - mean, zeros outside; mean and rstd (Ba et al. 2016, biased variance).
__device__ inline void normalize(float (&x)[kColumns], int left, int hidden, float eps, RowParts& parts, float& mean,
                                 float& rstd) {
  mean = row_mean(sum_of(x), hidden, parts[0][threadIdx.z]);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) x[i] = i < left ? x[i] - mean : 0.0f;
  rstd = __frsqrt_rn(row_mean(dot(x, x), hidden, parts[1][threadIdx.z]) + eps);
}

// grad [8], zeros outside the row, -> the gradient of LayerNorm's input:
// rstd * (grad*gamma - mean(grad*gamma) - normalized * mean(grad*gamma * normalized)).
__device__ inline void normalize_backward(float (&grad)[kColumns], const float (&normalized)[kColumns],
                                          const float (&gamma)[kColumns], int hidden, float rstd, RowParts& parts) {
  const float mean = row_mean(dot(grad, gamma), hidden, parts[0][threadIdx.z]);
  float scaled[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) scaled[i] = grad[i] * gamma[i];
  const float projection = row_mean(dot(scaled, normalized), hidden, parts[1][threadIdx.z]);
  const float scale = hidden == 1 ? 0.0f : rstd;  // what one element is normalized to does not depend on it
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    grad[i] = fmaf(grad[i], gamma[i], -fmaf(normalized[i], projection, mean)) * scale;  // where they cancel, exact
  }
}

}  // namespace fastbert::cuda
