// Dropout of hidden states, as fastbert/ops/dropout.py defines it. Free of torch.
#pragma once

#include <cstdint>

namespace fastbert {

struct Dropout {
  const int64_t* seed;  // on the device; nullptr: nothing is dropped
  uint32_t site;
  uint32_t threshold;  // an element is kept iff its 16 bits are at least this
  float scale;  // what a kept element is multiplied with
};

}  // namespace fastbert
