// How the ops for tensors on a CPU share work out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "tensors.h"

namespace fastbert {
namespace {

constexpr int64_t kProductsPerTask = 1 << 18, kSharesPerThread = 4, kLeastQueries = 128;  // of attention

constexpr std::align_val_t kLine{64};  // of the cache

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

using Memory = std::unique_ptr<void, Free>;

inline Memory allocate(size_t bytes) { return Memory(::operator new(bytes, kLine)); }

// f(task, slot) for the tasks [0, tasks), each taken by whichever thread is free; slot: below threads, of one thread
// at a time.
template <typename F>
void run_tasks(int64_t tasks, int64_t threads, F f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t slot, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) f(task, slot);
  });
}

// The shares of a call, the longest sequences first: all queries of a sequence, or so many that all threads have
// several shares; threads 0: all.
inline std::vector<cpu::Share> attention_shares(const Attention& inputs, const std::vector<int32_t>& order,
                                                int64_t threads) {
  const auto length_of = [&](int64_t i) { return int64_t{inputs.cu_seqlens[i + 1]} - inputs.cu_seqlens[i]; };
  int64_t scores = 0;
  for (const int32_t i : order) scores += length_of(i) * length_of(i) * inputs.heads;
  std::vector<cpu::Share> shares;
  for (const int32_t i : order) {
    const int64_t length = length_of(i);
    int64_t queries = length;
    if (threads > 0) {
      const int64_t most = scores / (kSharesPerThread * threads * (length + 1));
      queries = std::max<int64_t>(most / kLeastQueries, 1) * kLeastQueries;
    }
    for (int64_t head = 0; head < inputs.heads; ++head) {
      for (int64_t first = 0; first < length; first += queries) {
        shares.push_back({i, head, first, std::min(first + queries, length)});
      }
    }
  }
  return shares;
}

// The sequences in the order given, else the longest first; checked is all by which the kernels find what they read.
inline std::vector<int32_t> attention_order(const AttentionTensors& tensors, const Attention& inputs) {
  const int64_t batch = tensors.cu_seqlens.size(0) - 1;
  int64_t longest = 0;
  bool ascend = inputs.cu_seqlens[0] >= 0 && inputs.cu_seqlens[batch] <= inputs.tokens;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t length = int64_t{inputs.cu_seqlens[i + 1]} - inputs.cu_seqlens[i];
    ascend &= length >= 0;
    longest = std::max(longest, length);
  }
  check(ascend, "attention: cu_seqlens do not ascend from 0 to T");
  check(!tensors.keep_bits.has_value() || inputs.width * 32 >= longest, "attention: keep_bits are too narrow");
  std::vector<int32_t> order(batch);
  if (inputs.order == nullptr) {
    cpu::order_rows(batch, inputs.cu_seqlens, order.data());
  } else {
    std::copy(inputs.order, inputs.order + batch, order.begin());
    check(std::all_of(order.begin(), order.end(), [=](int32_t i) { return i >= 0 && i < batch; }),
          "attention: order holds no sequences");
  }
  return order;
}

// kernel(share, memory) for all shares; memory_for(length, dim): how many bytes each needs
template <typename F>
void run_shares(const Attention& inputs, const std::vector<cpu::Share>& shares, int64_t threads,
                int64_t (*memory_for)(int64_t, int64_t), F kernel) {
  std::vector<size_t> starts;  // of the tasks: so many shares each that a task is worth a thread
  int64_t longest = 0, products = kProductsPerTask;
  for (size_t i = 0; i < shares.size(); ++i) {
    if (products >= kProductsPerTask) {
      starts.push_back(i);
      products = 0;
    }
    const int64_t length = inputs.cu_seqlens[shares[i].sequence + 1] - inputs.cu_seqlens[shares[i].sequence];
    products += (shares[i].last - shares[i].first + 1) * length * inputs.dim;
    longest = std::max(longest, length);
  }
  const auto tasks = static_cast<int64_t>(starts.size());
  starts.push_back(shares.size());
  const int64_t bytes = (memory_for(longest, inputs.dim) + 63) / 64 * 64, slots = std::min(tasks, threads);
  const Memory memory = allocate(bytes * slots);
  run_tasks(tasks, threads, [&](int64_t task, int64_t slot) {
    char* const mine = static_cast<char*>(memory.get()) + slot * bytes;
    for (size_t i = starts[task]; i < starts[task + 1]; ++i) kernel(shares[i], mine);
  });
}

}  // namespace
}  // namespace fastbert
