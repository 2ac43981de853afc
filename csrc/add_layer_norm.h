// add_layer_norm: LayerNorm(residual + dropout(x + bias)) and its gradients. Free of torch.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "dtype.h"
#include "isa.h"
#include "rows.h"

namespace fastbert {

constexpr int64_t kMostHidden = 4096;  // of the CUDA kernels

// x, residual [rows, hidden]; bias, gamma, beta [hidden]; all contiguous. x and bias have one dtype, the others the
// same or, beside 16 bits, float32. bias may be nullptr.
struct AddLayerNorm {
  const void *x, *bias, *residual, *gamma;
  Dtype x_dtype, residual_dtype;
  int64_t rows;
  int hidden;
  Dropout dropout;
};

namespace cuda {

// All return nullptr, or in words what went wrong. `stream` is a cudaStream_t; pointers are on the stream's device.

// y [rows, hidden] in the residual's dtype; mean, rstd [rows]
const char* add_layer_norm(const AddLayerNorm& inputs, const void* beta, float eps, void* y, float* mean, float* rstd,
                           void* stream);

// How many partial sums of the gains' gradients the backward makes.
const char* add_layer_norm_parts(int64_t rows, int hidden, int64_t* parts);

// grad [rows, hidden] in the residual's dtype -> gradients in the dtypes of their inputs, nullptr: not needed.
// parts: memory of [3, `add_layer_norm_parts`, hidden]
const char* add_layer_norm_backward(const AddLayerNorm& inputs, const void* grad, const float* mean, const float* rstd,
                                    float* parts, int64_t part_count, void* dx, void* dbias, void* dresidual,
                                    void* dgamma, void* dbeta, void* stream);

}  // namespace cuda

namespace cpu {

// The rows first..last-1 of cuda::add_layer_norm.
FASTBERT_KERNEL(add_layer_norm, (const AddLayerNorm& inputs, const void* beta, float eps, void* y, float* mean,
                                 float* rstd, RowMemory memory, int64_t first, int64_t last))

// A block of the rows of cuda::add_layer_norm_backward; its sums go to parts [3, `block_count`, hidden].
FASTBERT_KERNEL(add_layer_norm_backward, (const AddLayerNorm& inputs, const void* grad, const float* mean,
                                          const float* rstd, float* parts, void* dx, void* dresidual,
                                          RowMemory memory, int64_t block))

// parts [count, hidden] -> their sum [hidden]
FASTBERT_KERNEL(add_layer_norm_sum, (const float* parts, int64_t count, int64_t hidden, Dtype dtype, void* out))

}  // namespace cpu
}  // namespace fastbert
