// bias_gelu: gelu(x + bias) behind a product of a library, and its gradients. Free of torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastbert {

// x [rows, columns], bias [columns] or nullptr, of one dtype, contiguous.
struct BiasGelu {
  const void *x, *bias;
  Dtype dtype;
  int64_t rows, columns;
  bool is_tanh;  // by tanh, else by erf
};

namespace cuda {

// All return nullptr, or in words what went wrong. `stream` is a cudaStream_t; pointers are on the stream's device.

// y, pre [rows, columns]: gelu(x + bias), and x + bias if not nullptr; each may be x's memory.
const char* bias_gelu(const BiasGelu& inputs, void* y, void* pre, void* stream);

// How many partial sums of the bias's gradient the backward makes.
const char* bias_gelu_parts(int64_t rows, int64_t* parts);

// grad [rows, columns] -> dx [rows, columns], which may be grad's memory; dbias [columns], y = gelu(x + bias): nullptr
// where not needed. parts: memory of [`bias_gelu_parts`, columns], or nullptr without dbias
const char* bias_gelu_backward(const BiasGelu& inputs, const void* grad, float* parts, int64_t part_count, void* dx,
                               void* dbias, void* y, void* stream);

}  // namespace cuda
}  // namespace fastbert
