// What the CPU's kernels of rows share. Free of torch.
#pragma once

#include <cstdint>

namespace fastbert::cpu {

// Sums over rows are made in blocks of so many, whatever the number of threads, and the blocks' sums then added up.
constexpr int64_t kBlockRows = 32;

static constexpr int64_t block_count(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Memory of one task, each [hidden + kRowPadding]: vectors may reach beyond a row.
constexpr int64_t kRowPadding = 64;
struct RowMemory {
  float* sums;
  uint16_t* draws;
};

}  // namespace fastbert::cpu
