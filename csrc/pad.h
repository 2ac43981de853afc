// pad: packed rows back in their places, zeros in all others, and its gradient. Free of torch.
#pragma once

#include <cstdint>

namespace fastbert {

// Integers [size] that index rows.
struct Indices {
  const void* data;
  bool is_wide;  // int64, else int32
};

namespace cuda {

// All return nullptr, or in words what went wrong. `stream` is a cudaStream_t; pointers are on the stream's device.

// x [tokens, bytes], indices [tokens] -> out [rows, bytes], zeros where no index points; indices outside are left out.
// inverse: memory of [rows]
const char* pad(const void* x, Indices indices, int64_t tokens, int64_t rows, int64_t bytes, int element_size,
                int32_t* inverse, void* out, void* stream);

// grad [rows, bytes] -> its rows at indices [tokens, bytes], zeros for indices outside.
const char* pad_backward(const void* grad, Indices indices, int64_t tokens, int64_t rows, int64_t bytes,
                         int element_size, void* out, void* stream);

}  // namespace cuda
}  // namespace fastbert
