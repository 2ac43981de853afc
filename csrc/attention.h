// attention: softmax attention inside each sequence of a packed batch, and its gradient. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace fastbert {

constexpr int kMostHeadDim = 128;  // of the CUDA kernels
constexpr int kClasses[] = {64, 128, 256, 512};  // the longest sequence of each length class; one more holds longer ones
constexpr int kClassCount = 5;

// qkv [tokens, 3, heads, dim]; cu_seqlens [batch + 1]; order [batch], nullptr: as they stand; keep_bits [heads, tokens,
// width], nullptr: nothing is dropped; all contiguous.
struct Attention {
  const void* qkv;
  const int32_t *cu_seqlens, *order, *keep_bits;
  Dtype dtype;
  int64_t tokens, width;
  int heads, dim;
  float scale;  // over 0
  float keep_scale;  // what a kept probability is multiplied with
};

// Which sequences are launched together: `classes` says how many of the order each length class holds, nullptr: all are
// one launch. longest: no sequence has more tokens.
struct Sequences {
  int batch, longest;
  const int64_t* classes;
};

namespace cuda {

// All return nullptr, or in words what went wrong. `stream` is a cudaStream_t; pointers are on the stream's device.

// out [tokens, heads, dim], lse [heads, tokens]
const char* attention(const Attention& inputs, const Sequences& sequences, void* out, float* lse, void* stream);

// How many queries a block of the forward has in 16 bits: fewer, where otherwise multiprocessors would stand idle.
// pairs: of a sequence and a head.
int attention_queries(int longest, int dim, int64_t pairs, int multiprocessors);

// grad [tokens, heads, dim] -> dqkv [tokens, 3, heads, dim]. rows: memory of [2, heads, tokens]
const char* attention_backward(const Attention& inputs, const Sequences& sequences, const void* grad, const float* lse,
                               float* rows, void* dqkv, void* stream);

}  // namespace cuda

namespace cpu {

constexpr int kMostLanes = 16, kMostQueries = 2 * kMostLanes, kChunkKeys = 128;  // of every instruction set

// Of qkv [tokens, 3, heads, dim] in elements; dim's is 1. Here qkv need not be contiguous.
struct Strides {
  int64_t token, part, head;
};

// Queries first..last-1 of a sequence, in one head.
struct Share {
  int64_t sequence, head, first, last;
};

// How many bytes a share is computed in, on a line of the cache; length: of its sequence.
constexpr int64_t attention_memory(int64_t length, int64_t dim) {
  const int64_t width = (dim + kMostLanes - 1) / kMostLanes * kMostLanes;  // 5: each of the parts is rounded up
  return 4 * (2 * kMostQueries * width + kChunkKeys * kMostQueries + length * (dim + width) + 6 * kMostLanes);
}

// out [tokens, heads, dim], lse [heads, tokens]: the rows of a share. inputs.order is not read.
FASTBERT_KERNEL(attention, (const Attention& inputs, Strides strides, const Share& share, void* out, float* lse,
                            char* memory))

constexpr int64_t attention_backward_memory(int64_t length, int64_t dim) {
  const int64_t width = (dim + kMostLanes - 1) / kMostLanes * kMostLanes;
  return 4 * (length * (4 * width + 2 * kMostQueries) + 5 * kMostQueries * width);
}

// grad [tokens, heads, dim] -> dqkv [tokens, 3, heads, dim]: the rows of a sequence in one head. qkv is contiguous.
FASTBERT_KERNEL(attention_backward, (const Attention& inputs, int64_t sequence, int64_t head, const void* grad,
                                     const float* lse, void* dqkv, char* memory))

}  // namespace cpu
}  // namespace fastbert
