#include "unpad.h"

namespace fastbert::cpu {
namespace {

template <typename Word>
inline int32_t count_row(const Word* row, int64_t columns, int64_t stride, Word keep) {
  int32_t length = 0;
  for (int64_t column = 0; column < columns; ++column) length += (row[column * stride] & keep) != 0;
  return length;
}

}  // namespace

void count_rows(const Mask& mask, int64_t first, int64_t last, int32_t* lengths) {
  with_element_type(mask, [&](auto zero) {
    using Word = decltype(zero);
    const auto keep = static_cast<Word>(mask.keep);
    for (int64_t row = first; row < last; ++row) {
      const Word* elements = static_cast<const Word*>(mask.data) + row * mask.row_stride;  // [columns]
      lengths[row] = mask.column_stride == 1 ? count_row(elements, mask.columns, 1, keep)
                                             : count_row(elements, mask.columns, mask.column_stride, keep);
    }
  });
}

void fill_rows(const Mask& mask, int64_t first, int64_t last, const int32_t* cu_seqlens, int64_t* indices) {
  with_element_type(mask, [&](auto zero) {
    using Word = decltype(zero);
    const auto keep = static_cast<Word>(mask.keep);
    for (int64_t row = first; row < last; ++row) {
      const Word* elements = static_cast<const Word*>(mask.data) + row * mask.row_stride;  // [columns]
      int64_t* out = indices + cu_seqlens[row];
      for (int64_t column = 0; column < mask.columns; ++column) {
        if ((elements[column * mask.column_stride] & keep) != 0) *out++ = row * mask.columns + column;
      }
    }
  });
}

}  // namespace fastbert::cpu
