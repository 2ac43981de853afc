// How the ops for tensors on a CPU share work out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "attention.h"
#include "tensors.h"
#include "wake.h"

namespace fastbert {
namespace {

constexpr int64_t kProductsPerTask = 1 << 18, kSharesPerThread = 4, kLeastQueries = 128;  // of attention

constexpr std::align_val_t kLine{64};  // of the cache

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

using Memory = std::unique_ptr<void, Free>;

inline Memory allocate(size_t bytes) { return Memory(::operator new(bytes, kLine)); }

// f(slot) in a parallel region, for the slots [0, threads)
template <typename F>
void run_slots(int64_t threads, F f) {
  Region region(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      region.enter(slot);
      f(slot);
    }
  });
}

// f(first, last) for parts of [0, count), each of one thread and at least so large as `least`
template <typename F>
void run_ranges(int64_t count, int64_t least, F f) {
  const int64_t parts = std::clamp<int64_t>(count / least, 1, torch::stable::get_num_threads());
  run_slots(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
}

// f(task, slot) for the tasks [0, tasks), each taken by whichever thread is free; slot: below threads, of one thread
// at a time.
template <typename F>
void run_tasks(int64_t tasks, int64_t threads, F f) {
  std::atomic<int64_t> next{0};
  run_slots(std::min(tasks, threads), [&](int64_t slot) {
    for (int64_t task = next++; task < tasks; task = next++) f(task, slot);
  });
}

// Steps that threads take together in one parallel region. A step is tasks, each taken by whichever thread is free, and
// begins when all tasks of the one before have ended. Nobody waits for a thread that is late, or that there is not: only
// for tasks that somebody has begun.
class Team {
 public:
  // steps: at most so many
  Team(int64_t threads, size_t steps)
      : threads_(threads), memory_(allocate(sizeof(Step) * steps)), steps_(static_cast<Step*>(memory_.get())) {
    std::uninitialized_default_construct_n(steps_, steps);
  }

  // One of the threads. All of them take the same steps in the same order.
  class Member {
   public:
    Member(Team& team, int64_t slot) : team_(team), slot_(slot) {}

    // f(task, slot) for the tasks [0, tasks); slot: below threads, of one thread at a time
    template <typename F>
    void step(int64_t tasks, F f) {
      Step& step = team_.steps_[next_++];
      for (int64_t task = step.taken++; task < tasks; task = step.taken++) {
        f(task, slot_);
        step.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; step.done.load(std::memory_order_acquire) < tasks; ++spins) {
        if (spins < kSpins) {
          pause();
        } else {
          std::this_thread::yield();  // whoever has the task may need this core
        }
      }
    }

   private:
    Team& team_;
    int64_t slot_;
    size_t next_ = 0;
  };

  // program(member) in every thread
  template <typename F>
  void run(F program) {
    run_slots(threads_, [&](int64_t slot) {
      Member member(*this, slot);
      program(member);
    });
  }

 private:
  struct alignas(64) Step {
    std::atomic<int64_t> taken{0}, done{0};
  };

  static constexpr int kSpins = 4000;  // about 50 microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int64_t threads_;
  Memory memory_;
  Step* steps_;
};

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

// Which shares a task is, and how many bytes each thread needs.
struct AttentionTasks {
  std::vector<size_t> starts;
  int64_t bytes;

  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
};

// products: how many at least are worth a task; memory_for(length, dim): how many bytes a share needs
inline AttentionTasks attention_tasks(const Attention& inputs, const std::vector<cpu::Share>& shares, int64_t least,
                                      int64_t (*memory_for)(int64_t, int64_t)) {
  std::vector<size_t> starts;
  int64_t longest = 0, products = least;
  for (size_t i = 0; i < shares.size(); ++i) {
    if (products >= least) {
      starts.push_back(i);
      products = 0;
    }
    const int64_t length = inputs.cu_seqlens[shares[i].sequence + 1] - inputs.cu_seqlens[shares[i].sequence];
    products += (shares[i].last - shares[i].first + 1) * length * inputs.dim;
    longest = std::max(longest, length);
  }
  starts.push_back(shares.size());
  return {std::move(starts), (memory_for(longest, inputs.dim) + 63) / 64 * 64};
}

// kernel(share, memory) for all shares
template <typename F>
void run_shares(const Attention& inputs, const std::vector<cpu::Share>& shares, int64_t threads,
                int64_t (*memory_for)(int64_t, int64_t), F kernel) {
  const AttentionTasks tasks = attention_tasks(inputs, shares, kProductsPerTask, memory_for);
  const Memory memory = allocate(tasks.bytes * std::min(tasks.count(), threads));
  run_tasks(tasks.count(), threads, [&](int64_t task, int64_t slot) {
    char* const mine = static_cast<char*>(memory.get()) + slot * tasks.bytes;
    for (size_t i = tasks.starts[task]; i < tasks.starts[task + 1]; ++i) kernel(shares[i], mine);
  });
}

}  // namespace
}  // namespace fastbert
