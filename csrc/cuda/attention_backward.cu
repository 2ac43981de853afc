// Recomputes probabilities from lse (Dao et al. 2022, "FlashAttention", algorithm 4) in two kernels, without tensor cores
// and without atomics: right before fast.
#include <cuda_runtime.h>

#include "attention.cuh"
#include "attention.h"

namespace fastbert::cuda {
namespace {

template <typename T>
struct Gradients {
  const T* grad;  // [tokens, heads, dim]
  const float* lse;  // [heads, tokens]
  float *delta, *inverse;  // [heads, tokens]: a row's sum of P * dP; what takes the rounding of lse out of it
  T* dqkv;  // [tokens, 3, heads, dim]
};

template <int kDims>
constexpr int kBackwardBytes = (4 * Plain<kDims>::kTile + 2 * Plain<kDims>::kScores) * sizeof(float);

// exp(score * scale - lse), without a rounded product inside exp2.
__device__ float probability_of(float score, float scale, float lse) { return exp2f((score * scale - lse) * kLog2E); }

// dq of 32 queries, and their rows of delta and inverse. Two passes over the keys: summed from probabilities delta is as
// exact as softmax's own gradient, which it is not from the rounded out (one token with dropout broke the parity rule).
template <typename T, int kDims>
__global__ void __launch_bounds__(kThreads, 2)
    dq_kernel(Attention inputs, int first_place, int blocks, Gradients<T> gradients) {
  using Tile = Plain<kDims>;
  const Share share = share_of(inputs, first_place, blocks, kSide);
  if (share.left() <= 0) return;
  const int dim = inputs.dim, down = threadIdx.x / 8 * 2, across = threadIdx.x % 8;  // the first of a thread's products
  const int64_t part = static_cast<int64_t>(inputs.heads) * dim, stride = 3 * part;
  const T* const key = head_of(static_cast<const T*>(inputs.qkv), inputs, share, 1);
  float* const queries = shared_memory<float>();
  float *const grads = queries + Tile::kTile, *const keys = grads + Tile::kTile, *const values = keys + Tile::kTile;
  float* const scores = values + Tile::kTile;
  const int64_t row = row_of(inputs, share) + share.first;
  Tile::load(queries, key - part + share.first * stride, stride, share.left(), dim);
  Tile::load(grads, gradients.grad + (share.start + share.first) * part + share.head * dim, part, share.left(), dim);
  float lse[2];
  for (int r = 0; r < 2; ++r) lse[r] = down + r < share.left() ? gradients.lse[row + down + r] : 0.0f;

  // The thread's probabilities and their gradients.
  const auto weigh = [&](int first, float (&probabilities)[2][4], float (&dprobabilities)[2][4]) {
    Tile::load(keys, key + first * stride, stride, share.length - first, dim);
    Tile::load(values, key + part + first * stride, stride, share.length - first, dim);
    __syncthreads();
    Tile::products(probabilities, queries, keys, dim);
    Tile::products(dprobabilities, grads, values, dim);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool drops = inputs.keep_bits != nullptr && down + r < share.left();
      const uint32_t kept = kept_keys(drops ? inputs.keep_bits + (row + down + r) * inputs.width : nullptr, first);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = across + 8 * i;
        const bool is_key = first + column < share.length;
        probabilities[r][i] = is_key ? probability_of(probabilities[r][i], inputs.scale, lse[r]) : 0.0f;
        dprobabilities[r][i] = kept >> column & 1 ? dprobabilities[r][i] * inputs.keep_scale : 0.0f;
      }
    }
  };
  float probabilities[2][4], dprobabilities[2][4], delta[2] = {}, inverse[2] = {};
  for (int first = 0; first < share.length; first += kSide) {
    weigh(first, probabilities, dprobabilities);
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f, total = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum = fmaf(probabilities[r][i], dprobabilities[r][i], sum);
        total += probabilities[r][i];
      }
      delta[r] += sum_of_eight(sum);
      inverse[r] += sum_of_eight(total);
    }
    __syncthreads();
  }
  for (int r = 0; r < 2; ++r) {
    delta[r] /= inverse[r];
    inverse[r] = 1.0f / inverse[r];
    if (across != 0 || down + r >= share.left()) continue;
    gradients.delta[row + down + r] = delta[r];
    gradients.inverse[row + down + r] = inverse[r];
  }
  float sums[Tile::kShare] = {};
  for (int first = 0; first < share.length; first += kSide) {
    weigh(first, probabilities, dprobabilities);
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[(down + r) * kScoresStride + across + 8 * i] =
            probabilities[r][i] * inverse[r] * (dprobabilities[r][i] - delta[r]);
      }
    }
    __syncwarp();  // a warp has the scores of its own rows
    Tile::template add_rows<false>(sums, 1.0f, scores, keys);
    __syncthreads();
  }
  T* const to = head_of(gradients.dqkv, inputs, share, 0) + share.first * stride;
  Tile::store(to, stride, share.left(), dim, sums, inputs.scale);
}

// dk and dv of 32 keys.
template <typename T, int kDims>
__global__ void __launch_bounds__(kThreads, 2)
    dkdv_kernel(Attention inputs, int first_place, int blocks, Gradients<T> gradients) {
  using Tile = Plain<kDims>;
  const Share share = share_of(inputs, first_place, blocks, kSide);
  if (share.left() <= 0) return;
  const int dim = inputs.dim, down = threadIdx.x / 8 * 2, across = threadIdx.x % 8;  // the first of a thread's products
  const int64_t part = static_cast<int64_t>(inputs.heads) * dim, stride = 3 * part;
  const T* const query = head_of(static_cast<const T*>(inputs.qkv), inputs, share, 0);
  const T* const grad = gradients.grad + share.start * part + share.head * dim;
  float* const keys = shared_memory<float>();
  float *const values = keys + Tile::kTile, *const queries = values + Tile::kTile, *const grads = queries + Tile::kTile;
  float *const scores = grads + Tile::kTile, *const dropped = scores + Tile::kScores;
  const int64_t row = row_of(inputs, share);
  float dkey[Tile::kShare] = {}, dvalue[Tile::kShare] = {};
  Tile::load(keys, query + part + share.first * stride, stride, share.left(), dim);
  Tile::load(values, query + 2 * part + share.first * stride, stride, share.left(), dim);
  for (int first = 0; first < share.length; first += kSide) {
    const int left = share.length - first;
    Tile::load(queries, query + first * stride, stride, left, dim);
    Tile::load(grads, grad + first * part, part, left, dim);
    __syncthreads();
    float found[2][4], dfound[2][4];
    Tile::products(found, queries, keys, dim);
    Tile::products(dfound, grads, values, dim);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool is_there = down + r < left;
      const int64_t my_row = row + first + down + r;
      const float lse = is_there ? gradients.lse[my_row] : 0.0f, delta = is_there ? gradients.delta[my_row] : 0.0f;
      const float inverse = is_there ? gradients.inverse[my_row] : 0.0f;
      const bool drops = inputs.keep_bits != nullptr && is_there;
      const uint32_t kept = kept_keys(drops ? inputs.keep_bits + my_row * inputs.width : nullptr, share.first);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = across + 8 * i, place = (down + r) * kScoresStride + column;
        const float probability = probability_of(found[r][i], inputs.scale, lse) * inverse;
        const bool is_kept = kept >> column & 1;
        const float dprobability = is_kept ? dfound[r][i] * inputs.keep_scale : 0.0f;
        scores[place] = probability * (dprobability - delta);
        dropped[place] = is_kept ? probability : 0.0f;
      }
    }
    __syncthreads();
    Tile::template add_rows<true>(dkey, 1.0f, scores, queries);
    Tile::template add_rows<true>(dvalue, 1.0f, dropped, grads);
    __syncthreads();
  }
  T* const to = head_of(gradients.dqkv, inputs, share, 1) + share.first * stride;
  Tile::store(to, stride, share.left(), dim, dkey, inputs.scale);
  Tile::store(to + part, stride, share.left(), dim, dvalue, inputs.keep_scale);
}

}  // namespace

const char* attention_backward(const Attention& inputs, const Sequences& sequences, const void* grad, const float* lse,
                               float* rows, void* dqkv, void* stream) {
  return each_launch(sequences, [&](int first, int count, int longest) {
    return with_type(inputs.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      return with_padded_dim(inputs.dim, [&](auto dims) {
        constexpr int kDims = decltype(dims)::value;
        const Gradients<T> gradients = {static_cast<const T*>(grad), lse, rows,
                                        rows + inputs.heads * inputs.tokens, static_cast<T*>(dqkv)};
        const auto launch = [&](auto* kernel) {
          return launch_shares<kSide, kThreads, kBackwardBytes<kDims>>(kernel, inputs, first, count, longest, stream,
                                                                       gradients);
        };
        const char* error = launch(dq_kernel<T, kDims>);
        return error != nullptr ? error : launch(dkdv_kernel<T, kDims>);
      });
    });
  });
}

}  // namespace fastbert::cuda
