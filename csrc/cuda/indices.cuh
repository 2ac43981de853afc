// Indices of rows, int32 or int64.
#pragma once

#include <cuda_runtime.h>

#include "pad.h"

namespace fastbert::cuda {

__device__ inline int64_t index_at(Indices indices, int64_t place) {
  return indices.is_wide ? static_cast<const int64_t*>(indices.data)[place]
                         : static_cast<const int32_t*>(indices.data)[place];
}

}  // namespace fastbert::cuda
