// Online softmax (Dao 2023, "FlashAttention-2", algorithm 1): 16 bits by tensor cores, fp32 without.
#include "attention.h"

#include <cuda_runtime.h>

#include "attention.cuh"
#include "mma.cuh"

namespace fastbert::cuda {
namespace {

template <int kDims>
constexpr int kTileKeys = kDims == 128 ? 32 : 64;

template <int kDims, int kQueries>
constexpr int kForwardBytes = (kQueries + 4 * kTileKeys<kDims>) * kDims * 2;

// Where 8 elements of a row stand in a tile: so that 8 rows' share no banks.
template <int kDims>
__device__ int swizzled(int row, int chunk) {
  return row * kDims + (chunk ^ (kDims == 32 ? row / 2 % 4 : row % 8)) * 8;
}

// Begins to copy rows of a head; zeros past the `left` rows that there are and past `dim`. vectors: 16 bytes at a time,
// else element by element.
template <int kRows, int kDims, int kBlock, typename T>
__device__ void copy_tile(T* tile, const T* from, int64_t stride, int left, int dim, bool vectors) {
  constexpr int kChunks = kDims / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kChunks; i += kBlock) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const int columns = row < left ? dim - column : 0;
    T* to = tile + swizzled<kDims>(row, i % kChunks);
    const T* chunk = columns > 0 ? from + row * stride + column : from;
    if (vectors) {
      copy_16(to, chunk, columns > 0);
    } else {
#pragma unroll 1  // seldom
      for (int e = 0; e < 8; ++e) to[e] = e < columns ? chunk[e] : T{0};
    }
  }
}

// Each of kWarps warps has 16 kTiles queries. Keys and values are double-buffered.
template <typename T, int kDims, int kWarps, int kTiles>
__global__ void __launch_bounds__(kWarps* kLanes, kTiles == 1 && kDims <= 64 ? 3 : 2)  // blocks that registers leave room for
    forward(Attention inputs, int first_place, int blocks, bool vectors, T* __restrict__ out, float* __restrict__ lse) {
#ifdef FASTBERT_TENSOR_CORES
  constexpr int kBlock = kWarps * kLanes, kRows = 16 * kTiles, kQueries = kWarps * kRows, kKeys = kTileKeys<kDims>;
  const Share share = share_of(inputs, first_place, blocks, kQueries);
  if (share.left() <= 0) return;
  const int dim = inputs.dim, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int group = lane / 4, column = lane % 4 * 2;  // of a fragment
  const int64_t part = static_cast<int64_t>(inputs.heads) * dim, stride = 3 * part;
  const T* const key = head_of(static_cast<const T*>(inputs.qkv), inputs, share, 1);
  T* const queries = shared_memory<T>();  // [kQueries, kDims]; out, at the end
  T* const keys = queries + kQueries * kDims;  // [2, kKeys, kDims]
  T* const values = keys + 2 * kKeys * kDims;  // [2, kKeys, kDims]
  const auto copy_keys = [&](int first, int stage) {
    const T* from = key + first * stride;
    copy_tile<kKeys, kDims, kBlock>(keys + stage * kKeys * kDims, from, stride, share.length - first, dim, vectors);
    copy_tile<kKeys, kDims, kBlock>(values + stage * kKeys * kDims, from + part, stride, share.length - first, dim,
                                    vectors);
    commit_copies();
  };
  copy_tile<kQueries, kDims, kBlock>(queries, key - part + share.first * stride, stride, share.left(), dim, vectors);
  copy_keys(0, 0);
  wait_for_copies<0>();
  __syncthreads();

  const int my_left = share.left() - warp * kRows;  // queries of this warp, and behind
  T* const mine = queries + warp * kRows * kDims;
  uint32_t query[kTiles][kDims / 16][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int step = 0; step < kDims / 16; ++step) {
      load_matrices<false>(query[tile][step], mine + swizzled<kDims>(tile * 16 + lane % 16, step * 2 + lane / 16));
    }
  }
  const int64_t row = row_of(inputs, share) + share.first + warp * kRows + group;  // of [heads, tokens]
  const float log2_scale = inputs.scale * kLog2E;
  float sums[kTiles][kDims / 8][4] = {}, most[kTiles][2], total[kTiles][2];  // most: before scores are scaled
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    most[tile][0] = most[tile][1] = -INFINITY;
    total[tile][0] = total[tile][1] = 0.0f;
  }

  for (int first = 0, stage = 0; first < share.length; first += kKeys, stage ^= 1) {
    if (first + kKeys < share.length) copy_keys(first + kKeys, stage ^ 1);
    if (my_left > 0) {
      const int keys_left = share.length - first;
      const T* const key_tile = keys + stage * kKeys * kDims;
      const T* const value_tile = values + stage * kKeys * kDims;
      float scores[kTiles][kKeys / 8][4] = {};
#pragma unroll
      for (int step = 0; step < kDims / 16; ++step) {
#pragma unroll
        for (int pair = 0; pair < kKeys / 16; ++pair) {
          uint32_t b[4];
          load_matrices<false>(
              b, key_tile + swizzled<kDims>(pair * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma<T>(scores[tile][2 * pair], query[tile][step], b[0], b[1]);
            mma<T>(scores[tile][2 * pair + 1], query[tile][step], b[2], b[3]);
          }
        }
      }
      if (keys_left < kKeys) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (8 * n + column + e % 2 < keys_left) continue;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) scores[tile][n][e] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // rows group and group + 8 of a fragment
          float larger = most[tile][half];
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
            larger = fmaxf(larger, fmaxf(scores[tile][n][2 * half], scores[tile][n][2 * half + 1]));
          }
          larger = fmaxf(larger, __shfl_xor_sync(kWholeWarp, larger, 1));
          larger = fmaxf(larger, __shfl_xor_sync(kWholeWarp, larger, 2));
          const float shrink = fast_exp2((most[tile][half] - larger) * log2_scale), shift = -larger * log2_scale;
          most[tile][half] = larger;
          total[tile][half] *= shrink;
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              scores[tile][n][e] = fast_exp2(fmaf(scores[tile][n][e], log2_scale, shift));
              total[tile][half] += scores[tile][n][e];  // of the lane's own columns
            }
          }
#pragma unroll
          for (int n = 0; n < kDims / 8; ++n) {
            sums[tile][n][2 * half] *= shrink;
            sums[tile][n][2 * half + 1] *= shrink;
          }
        }
      }
      if (inputs.keep_bits != nullptr) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int mine_down = 16 * tile + 8 * half;
            const int32_t* words = inputs.keep_bits + (row + mine_down) * inputs.width + first / 32;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
              const bool is_there = group + mine_down < my_left && n / 4 * 32 < keys_left;
              const uint32_t word = is_there ? static_cast<uint32_t>(words[n / 4]) >> column : 0;
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                if (!(word >> (n % 4 * 8 + e) & 1)) scores[tile][n][2 * half + e] = 0.0f;
              }
            }
          }
        }
      }
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
        uint32_t probabilities[kTiles][4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* two = &scores[tile][2 * step + i / 2][i % 2 * 2];
            probabilities[tile][i] = pair_of<T>(two[0], two[1]);
          }
        }
#pragma unroll
        for (int pair = 0; pair < kDims / 16; ++pair) {
          uint32_t b[4];
          load_matrices<true>(b, value_tile + swizzled<kDims>(step * 16 + lane % 16, pair * 2 + lane / 16));
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma<T>(sums[tile][2 * pair], probabilities[tile], b[0], b[1]);
            mma<T>(sums[tile][2 * pair + 1], probabilities[tile], b[2], b[3]);
          }
        }
      }
    }
    wait_for_copies<0>();
    __syncthreads();
  }
  if (my_left <= 0) return;

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine_down = 16 * tile + 8 * half;
      float all = total[tile][half];
      all += __shfl_xor_sync(kWholeWarp, all, 1);
      all += __shfl_xor_sync(kWholeWarp, all, 2);
      if (column == 0 && group + mine_down < my_left) {
        lse[row + mine_down] = most[tile][half] * inputs.scale + logf(all);
      }
      const float factor = inputs.keep_scale / all;
#pragma unroll
      for (int n = 0; n < kDims / 8; ++n) {
        T* place = mine + swizzled<kDims>(group + mine_down, n) + column;
        *reinterpret_cast<uint32_t*>(place) =
            pair_of<T>(sums[tile][n][2 * half] * factor, sums[tile][n][2 * half + 1] * factor);
      }
    }
  }
  __syncwarp();
  T* const to = out + (share.start + share.first + warp * kRows) * part + share.head * dim;
#pragma unroll
  for (int i = lane; i < kRows * (kDims / 8); i += kLanes) {
    const int down = i / (kDims / 8), chunk = i % (kDims / 8);
    const int columns = down < my_left ? dim - chunk * 8 : 0;
    const T* from = mine + swizzled<kDims>(down, chunk);
    T* place = to + down * part + chunk * 8;
    if (vectors) {
      if (columns > 0) *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        if (e < columns) place[e] = from[e];
      }
    }
  }
#endif
}

// fp32, without rounded products inside exp2.
template <int kDims>
__global__ void __launch_bounds__(kThreads, 4)
    plain_forward(Attention inputs, int first_place, int blocks, float* __restrict__ out, float* __restrict__ lse) {
  using Tile = Plain<kDims>;
  const Share share = share_of(inputs, first_place, blocks, kSide);
  if (share.left() <= 0) return;
  const int dim = inputs.dim, down = threadIdx.x / 8 * 2, across = threadIdx.x % 8;  // the first of a thread's products
  const int64_t part = static_cast<int64_t>(inputs.heads) * dim, stride = 3 * part;
  const float* const key = head_of(static_cast<const float*>(inputs.qkv), inputs, share, 1);
  float* const queries = shared_memory<float>();
  float *const keys = queries + Tile::kTile, *const values = keys + Tile::kTile, *const scores = values + Tile::kTile;
  float* const factors = scores + Tile::kScores;  // [32]
  const int64_t row = row_of(inputs, share) + share.first;
  float sums[Tile::kShare] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {};
  Tile::load(queries, key - part + share.first * stride, stride, share.left(), dim);
  for (int first = 0; first < share.length; first += kSide) {
    Tile::load(keys, key + first * stride, stride, share.length - first, dim);
    Tile::load(values, key + part + first * stride, stride, share.length - first, dim);
    __syncthreads();
    float found[2][4];
    Tile::products(found, queries, keys, dim);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float larger = most[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + across + 8 * i >= share.length) found[r][i] = -INFINITY;
        larger = fmaxf(larger, found[r][i]);
      }
      larger = most_of_eight(larger);
      const float shrink = exp2f((most[r] - larger) * (inputs.scale * kLog2E));
      most[r] = larger;
      const bool drops = inputs.keep_bits != nullptr && down + r < share.left();
      const int32_t* keep = drops ? inputs.keep_bits + (row + down + r) * inputs.width : nullptr;
      const uint32_t kept = kept_keys(keep, first);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float probability = exp2f((found[r][i] - larger) * (inputs.scale * kLog2E));
        sum += probability;
        scores[(down + r) * kScoresStride + across + 8 * i] = kept >> (across + 8 * i) & 1 ? probability : 0.0f;
      }
      total[r] = total[r] * shrink + sum_of_eight(sum);
      if (across == 0) factors[down + r] = shrink;
    }
    __syncwarp();  // a warp has the scores of its own rows
    Tile::template add_rows<false>(sums, factors[threadIdx.x / 4], scores, values);
    __syncthreads();
  }
  for (int r = 0; r < 2; ++r) {
    if (across != 0) continue;
    factors[down + r] = inputs.keep_scale / total[r];
    if (down + r < share.left()) lse[row + down + r] = most[r] * inputs.scale + logf(total[r]);
  }
  __syncwarp();
  Tile::store(out + (share.start + share.first) * part + share.head * dim, part, share.left(), dim, sums,
              factors[threadIdx.x / 4]);
}

// queries: what attention_queries says.
template <typename T, int kDims, int kWarps, int kTiles>
const char* launch_forward(const Attention& inputs, int first, int count, int longest, T* out, float* lse, void* stream) {
  constexpr int kQueries = 16 * kWarps * kTiles;
  const bool vectors = fits_vectors(inputs.dim, inputs.qkv, out);
  return launch_shares<kQueries, kWarps * kLanes, kForwardBytes<kDims, kQueries>>(
      forward<T, kDims, kWarps, kTiles>, inputs, first, count, longest, stream, vectors, out, lse);
}

}  // namespace

int attention_queries(int longest, int dim, int64_t pairs, int multiprocessors) {
  const int most = dim <= 64 ? 128 : 64, fewer = most / 2;
  return longest <= fewer || pairs * ceil_div(longest, most) < multiprocessors ? fewer : most;
}

const char* attention(const Attention& inputs, const Sequences& sequences, void* out, float* lse, void* stream) {
  int processors = 0;
  const cudaError_t error = multiprocessors(&processors);
  if (error != cudaSuccess) return words(error);
  return each_launch(sequences, [&](int first, int count, int longest) {
    const int64_t pairs = static_cast<int64_t>(count) * inputs.heads;
    const int queries = attention_queries(longest, inputs.dim, pairs, processors);
    return with_type(inputs.dtype, [&](auto type) {
      using T = typename decltype(type)::Type;
      return with_padded_dim(inputs.dim, [&](auto dims) {
        constexpr int kDims = decltype(dims)::value;
        T* const to = static_cast<T*>(out);
        if constexpr (sizeof(T) == 4) {
          constexpr int kBytes = (3 * Plain<kDims>::kTile + Plain<kDims>::kScores + kSide) * sizeof(float);
          return launch_shares<kSide, kThreads, kBytes>(plain_forward<kDims>, inputs, first, count, longest, stream, to,
                                                        lse);
        } else if constexpr (kDims == 128) {
          return queries == 64 ? launch_forward<T, kDims, 4, 1>(inputs, first, count, longest, to, lse, stream)
                               : launch_forward<T, kDims, 2, 1>(inputs, first, count, longest, to, lse, stream);
        } else {
          return queries == 128 ? launch_forward<T, kDims, 4, 2>(inputs, first, count, longest, to, lse, stream)
                                : launch_forward<T, kDims, 4, 1>(inputs, first, count, longest, to, lse, stream);
        }
      });
    });
  });
}

}  // namespace fastbert::cuda
