// The dtypes of the kernels' floating tensors. Free of torch.
#pragma once

#include <cstdint>

namespace fastbert {

enum class Dtype { float32, float16, bfloat16 };

}  // namespace fastbert
