// dropout_bits: which attention probabilities are kept, packed. Free of torch.
#pragma once

#include <cstdint>

#include "dropout.h"

namespace fastbert::cuda {

// cu_seqlens [batch + 1] -> bits [heads, tokens, words]: bit k of word w is key 32*w + k, 0 past the sequence's end.
// dropout.seed nullptr: all of a sequence's keys are kept. Returns nullptr, or in words what went wrong.
const char* dropout_bits(const Dropout& dropout, const int32_t* cu_seqlens, int64_t batch, int64_t tokens, int words,
                         int heads, int32_t* bits, void* stream);

}  // namespace fastbert::cuda
