// attention: softmax attention inside each sequence of a packed batch, and its gradient. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastbert {

constexpr int kMostHeadDim = 128;
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
}  // namespace fastbert
