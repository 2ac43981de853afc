#include <algorithm>
#include <cstring>
#include <numeric>

#include "unpad.h"

namespace fastbert::cpu {
namespace {

// One element. By memcpy, since memory that came to torch from elsewhere need not be aligned.
template <typename Word>
inline Word load(const char* element) {
  Word word;
  std::memcpy(&word, element, sizeof(Word));
  return word;
}

// `stride` in bytes
template <typename Word>
inline int32_t count_row(const char* row, int64_t columns, int64_t stride, Word keep) {
  int32_t length = 0;
  for (int64_t column = 0; column < columns; ++column) length += (load<Word>(row + column * stride) & keep) != 0;
  return length;
}

}  // namespace

void count_rows(const Mask& mask, int64_t first, int64_t last, int32_t* lengths) {
  with_element_type(mask, [&](auto zero) {
    using Word = decltype(zero);
    constexpr int64_t bytes = sizeof(Word);
    const auto keep = static_cast<Word>(mask.keep);
    for (int64_t row = first; row < last; ++row) {
      const char* elements = static_cast<const char*>(mask.data) + row * mask.row_stride * bytes;  // [columns]
      lengths[row] = mask.column_stride == 1 ? count_row(elements, mask.columns, bytes, keep)
                                             : count_row(elements, mask.columns, mask.column_stride * bytes, keep);
    }
  });
}

void fill_rows(const Mask& mask, int64_t first, int64_t last, const int32_t* cu_seqlens, int64_t* indices) {
  with_element_type(mask, [&](auto zero) {
    using Word = decltype(zero);
    constexpr int64_t bytes = sizeof(Word);
    const auto keep = static_cast<Word>(mask.keep);
    for (int64_t row = first; row < last; ++row) {
      const char* elements = static_cast<const char*>(mask.data) + row * mask.row_stride * bytes;  // [columns]
      int64_t* out = indices + cu_seqlens[row];
      for (int64_t column = 0; column < mask.columns; ++column) {
        if ((load<Word>(elements + column * mask.column_stride * bytes) & keep) != 0) {
          *out++ = row * mask.columns + column;
        }
      }
    }
  });
}

void order_rows(int64_t rows, const int32_t* cu_seqlens, int32_t* order) {
  std::iota(order, order + rows, 0);
  std::stable_sort(order, order + rows, [=](int32_t a, int32_t b) {
    return cu_seqlens[a + 1] - cu_seqlens[a] > cu_seqlens[b + 1] - cu_seqlens[b];
  });
}

}  // namespace fastbert::cpu
