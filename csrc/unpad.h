// unpad: which elements of a padding mask are real tokens. Shared by cpu/ and cuda/; free of torch.
#pragma once

#include <cstdint>

namespace fastbert {

// [rows, columns] with strides in elements. An element is real when (bits & keep) != 0: `keep` is all ones for bool and
// integers, all but the sign bit for floats, so that -0.0 is padding and NaN is real.
struct Mask {
  const void* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  int element_size;  // 1, 2, 4 or 8 bytes
  uint64_t keep;
};

// Calls f with a zero of the unsigned type that is as wide as one element of the mask.
template <typename F>
auto with_element_type(const Mask& mask, F f) {
  switch (mask.element_size) {
    case 1: return f(uint8_t{0});
    case 2: return f(uint16_t{0});
    case 4: return f(uint32_t{0});
    default: return f(uint64_t{0});
  }
}

namespace cpu {

// lengths [rows]: real elements of the rows first..last-1.
void count_rows(const Mask& mask, int64_t first, int64_t last, int32_t* lengths);

// indices [T]: row * columns + column of every real element of the rows first..last-1, at cu_seqlens[row] onwards.
void fill_rows(const Mask& mask, int64_t first, int64_t last, const int32_t* cu_seqlens, int64_t* indices);

// order [rows]: the rows by how many real elements they have, most first, those alike as they stand.
void order_rows(int64_t rows, const int32_t* cu_seqlens, int32_t* order);

}  // namespace cpu

namespace cuda {

// All return nullptr, or in words what went wrong. `stream` is a cudaStream_t; pointers are on the stream's device.

// nullptr when the current device, its driver and this library fit together.
const char* problem();

// cu_seqlens [rows + 1], order [rows] as cpu::order_rows, and the number of real tokens, which, unless `total` is
// nullptr, is read back to the host: that waits for the stream.
const char* count(const Mask& mask, int32_t* cu_seqlens, int32_t* order, int64_t* total_on_device, int64_t* total,
                  void* stream);

// indices [tokens], as cpu::fill_rows for all rows. Of more than there are the last are -1, of fewer the last left out.
const char* fill(const Mask& mask, const int32_t* cu_seqlens, int64_t tokens, int64_t* indices, void* stream);

}  // namespace cuda
}  // namespace fastbert
