#include "wake.h"

#include <algorithm>
#include <chrono>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastbert {
namespace {

constexpr int64_t kIdle = 1000;  // microseconds from which threads may be asleep

int64_t now() {
  using namespace std::chrono;
  return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

#if defined(__linux__)
using Thread = pid_t;

Thread this_thread() {
  static thread_local const auto thread = static_cast<Thread>(syscall(SYS_gettid));
  return thread;
}

// Where a thread may run; kept from the calling thread's core while it is so.
struct Cores {
  Thread thread = 0;
  cpu_set_t all;
  bool is_apart = false;

  void keep_apart() {
    if (thread == 0 || thread == this_thread() || syscall(SYS_tgkill, getpid(), thread, 0) != 0) return;
    const int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE || sched_getaffinity(thread, sizeof(all), &all) != 0) return;
    cpu_set_t others = all;
    CPU_CLR(here, &others);
    const int left = CPU_COUNT(&others);
    is_apart = left > 0 && left < CPU_COUNT(&all) && sched_setaffinity(thread, sizeof(others), &others) == 0;
  }

  void let_go() {
    if (is_apart) sched_setaffinity(thread, sizeof(all), &all);
    is_apart = false;
  }
};
#else
using Thread = int;

Thread this_thread() { return 0; }

struct Cores {
  Thread thread = 0;

  void keep_apart() {}
  void let_go() {}
};
#endif

}  // namespace

struct Region::Mates {
  std::vector<Cores> cores;  // of the thread of each slot
  int64_t last_end = 0;

  static Mates& of_this_thread() {
    static thread_local Mates mates;
    return mates;
  }
};

Region::Region(int64_t threads) : mates_(Mates::of_this_thread()), is_shared_(threads > 1) {
  if (!is_shared_) return;
  mates_.cores.resize(std::max<size_t>(mates_.cores.size(), threads));
  are_apart_ = now() - mates_.last_end > kIdle;
  if (are_apart_) std::for_each(mates_.cores.begin(), mates_.cores.end(), [](Cores& cores) { cores.keep_apart(); });
}

Region::~Region() {
  if (are_apart_) std::for_each(mates_.cores.begin(), mates_.cores.end(), [](Cores& cores) { cores.let_go(); });
  if (is_shared_) mates_.last_end = now();
}

void Region::enter(int64_t slot) {
  if (is_shared_) mates_.cores[slot].thread = this_thread();
}

}  // namespace fastbert
