// Threads that sleep are woken on cores of their own.
#pragma once

#include <cstdint>

namespace fastbert {

// A parallel region of torch's threads, from before it begins until after its end.
//
// Threads that have been idle are asleep, and Linux may wake a thread on the core of the one that wakes it though others
// sleep, as was seen in a virtual machine (docs/tuning.md): there it waits for its turn, while the region waits for it. So
// they are kept off that core until the region has ended.
class Region {
 public:
  explicit Region(int64_t threads);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // Called by the thread that runs a slot [0, threads), so that the next region knows it.
  void enter(int64_t slot);

 private:
  struct Mates;  // the threads of the calling thread's regions

  Mates& mates_;
  bool is_shared_, are_apart_ = false;
};

}  // namespace fastbert
