// Runs unchanged .cu files on the CPU, for tests: found in place of CUDA's own cuda_runtime.h, compiled by a C++ compiler.
// Blocks run one after another; each thread of a block is a fiber that runs until it waits for others. One warp runs as
// far as it can before the next moves, so that a missing barrier shows; which warp comes first is `last_warp_first`.
// Shared memory is filled with 0xff before each block. Covers what csrc/cuda/ uses, and grows with it.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))
extern "C" char __start_emulated_shared[], __stop_emulated_shared[];

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };
struct cudaFuncAttributes {};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
enum class State { ready, at_warp, at_block, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::done;
  int place = 0;  // the line it waits at
  uint64_t slots[2];  // what the thread brings to its warp: two, since a fast lane may be one exchange ahead
  int exchanges = 0;
};

inline bool last_warp_first = false;
inline std::vector<std::unique_ptr<Thread>> threads;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline int current;

inline void enter() {
  kernel();
  threads[current]->state = State::done;
  swapcontext(&threads[current]->context, &scheduler);
}

inline void wait(State at, int place) {
  Thread& self = *threads[current];
  self.state = at;
  self.place = place;
  swapcontext(&self.context, &scheduler);
}

inline void resume(int index) {
  current = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y));
  threads[index]->state = State::ready;
  swapcontext(&scheduler, &threads[index]->context);
}

// Lets the threads of [first, last) go on if all living ones wait `at` one place. Returns whether any went on.
inline bool release(int first, int last, State at) {
  int place = 0;
  for (int i = first; i < last; ++i) {
    const Thread& thread = *threads[i];
    if (thread.state == State::done) continue;
    if (thread.state != at || (place != 0 && thread.place != place)) return false;
    place = thread.place;
  }
  for (int i = first; i < last; ++i) {
    if (threads[i]->state == at) threads[i]->state = State::ready;
  }
  return place != 0;
}

// By hand, since AddressSanitizer, which puts forbidden bytes between the arrays, would stop a memset over all of them.
__attribute__((no_sanitize_address)) inline void fill_shared_memory() {
  for (volatile char* byte = __start_emulated_shared; byte != __stop_emulated_shared; ++byte) *byte = '\xff';
}

// Returns false when threads wait for each other at different places.
inline bool run_block(int count) {
  fill_shared_memory();
  for (int i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    thread.state = State::ready;
    thread.exchanges = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
  }
  const int warps = (count + kWarp - 1) / kWarp;
  do {
    for (int step = 0; step < warps; ++step) {
      const int first = (last_warp_first ? warps - 1 - step : step) * kWarp;
      const int last = first + kWarp < count ? first + kWarp : count;
      do {
        for (int i = first; i < last; ++i) {
          if (threads[i]->state == State::ready) resume(i);
        }
      } while (release(first, last, State::at_warp));
    }
  } while (release(0, count, State::at_block));
  for (int i = 0; i < count; ++i) {
    if (threads[i]->state != State::done) return false;
  }
  return true;
}

// value of every lane of the caller's warp, 0 for lanes that have left the kernel
template <typename T, typename F>
auto exchange(int place, T value, F use) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Thread& self = *threads[current];
  const int slot = self.exchanges++ % 2;
  std::memcpy(&self.slots[slot], &value, sizeof(T));
  wait(State::at_warp, place);
  const int first = current / kWarp * kWarp;
  T lanes[kWarp] = {};
  for (int lane = 0; lane < kWarp && first + lane < static_cast<int>(blockDim.x * blockDim.y * blockDim.z); ++lane) {
    const Thread& other = *threads[first + lane];
    if (other.exchanges >= self.exchanges) std::memcpy(&lanes[lane], &other.slots[slot], sizeof(T));
  }
  return use(lanes, current - first);
}

inline unsigned ballot(int place, bool predicate) {
  return exchange(place, predicate, [](const bool* lanes, int) {
    unsigned bits = 0;
    for (int lane = 0; lane < kWarp; ++lane) bits |= static_cast<unsigned>(lanes[lane]) << lane;
    return bits;
  });
}

template <typename T>
T shfl_up(int place, T value, int distance) {
  return exchange(place, value, [=](const T* lanes, int lane) { return lanes[lane < distance ? lane : lane - distance]; });
}

}  // namespace emulator

#define __syncthreads() emulator::wait(emulator::State::at_block, __LINE__)
#define __ballot_sync(mask, predicate) emulator::ballot(__LINE__, predicate)
#define __shfl_up_sync(mask, value, distance) emulator::shfl_up(__LINE__, value, distance)
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const int count = blockDim.x * blockDim.y * blockDim.z;
  if (count < 1 || count > 1024 || gridDim.x < 1 || gridDim.y < 1 || gridDim.z < 1) return cudaErrorInvalidConfiguration;
  while (static_cast<int>(emulator::threads.size()) < count) emulator::threads.push_back(std::make_unique<emulator::Thread>());
  emulator::kernel = [&] { kernel(static_cast<P>(arguments)...); };
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        if (!emulator::run_block(count)) return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "threads wait for each other at different places" : "invalid configuration";
}
