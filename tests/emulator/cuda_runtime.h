// Runs unchanged .cu files on the CPU, for tests: found in place of CUDA's cuda_runtime.h, compiled by a C++ compiler.
// Blocks run one after another; each thread of a block is a fiber that runs until it waits for others. One warp runs as
// far as it can before the next moves, so that a missing barrier shows; `order` says whether blocks, warps and lanes run
// forwards, backwards or now so, now so. Shared memory is filled with 0xff before each block. Covers what csrc/cuda/
// uses, and grows with it.
#pragma once

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define EMULATOR_SWITCHES_BY_HAND  // swapcontext asks the kernel for the signal mask each time; ASan knows it alone
#else
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
// Shared memory is all that a library keeps for each thread of the host; AddressSanitizer does not watch that, but a
// section, into which g++ puts no arrays of templates.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static __attribute__((section("emulated_shared")))
extern "C" __attribute__((weak, visibility("hidden"))) char __start_emulated_shared[], __stop_emulated_shared[];
#else
#define __shared__ static thread_local
#include <link.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };
struct cudaFuncAttributes {};

namespace emulator {

constexpr int kWarp = 32;
constexpr int kMultiprocessors = 4;  // few, so that loops over rows loop
constexpr size_t kStack = 64 << 10;
constexpr size_t kOffer = 64;  // bytes that a lane may offer to its warp at a time
constexpr size_t kUsualShared = 48 << 10, kMostShared = 227 << 10;  // of a block: without asking, and the most on sm_90
enum class Order { forwards, backwards, changing };
enum class State { ready, at_warp, at_block, done };

// cp.async: 16 bytes to shared memory, of which `bytes` are read and the others 0.
struct Copy { void* to; const void* from; int bytes, group; };

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStack]};
#ifdef EMULATOR_SWITCHES_BY_HAND
  void* context;
#else
  ucontext_t context;
#endif
  dim3 index;
  State state = State::done;
  int place = 0;  // the line it waits at
  unsigned mask = 0;  // the lanes it waits for
  uint64_t brought = 0, published = 0;  // to its warp; the second is what the others read until the next exchange
  bool offers = false;  // more than those 8 bytes
  alignas(8) char offer[kOffer], offered[kOffer];
  std::vector<Copy> copies;  // begun, not waited for
  int copy_groups = 0;
};

inline Order order = Order::changing;
inline bool backwards = false;  // in this launch
inline uint32_t launches = 0;
inline std::vector<std::unique_ptr<Thread>> threads;
inline decltype(Thread::context) scheduler;
inline std::function<void()> kernel;
inline int current;
inline std::vector<char> dynamic_memory;
inline std::map<const void*, size_t> dynamic_limits;
inline std::recursive_mutex one_launch;

#ifdef EMULATOR_SWITCHES_BY_HAND
// Pushes the callee's registers, keeps the stack's address in *from, and goes on where `to` was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
inline void change(void*& from, void*& to) { emulator_switch(&from, to); }
#else
inline void change(ucontext_t& from, ucontext_t& to) { swapcontext(&from, &to); }
#endif

inline void enter() {
  kernel();
  threads[current]->state = State::done;
  change(threads[current]->context, scheduler);
}

inline void prepare(Thread& thread) {
  thread.copies.clear();
  thread.copy_groups = 0;
#ifdef EMULATOR_SWITCHES_BY_HAND
  auto top = reinterpret_cast<uintptr_t>(thread.stack.get() + kStack) / 16 * 16;
  auto* words = reinterpret_cast<uint64_t*>(top) - 8;  // six registers, where to go on, and a place to return to
  std::fill(words, words + 8, 0);
  words[6] = reinterpret_cast<uintptr_t>(&enter);
  thread.context = words;
#else
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStack;
  makecontext(&thread.context, enter, 0);
#endif
}

inline void wait(State at, int place, unsigned mask = ~0u) {
  Thread& self = *threads[current];
  self.state = at;
  self.place = place;
  self.mask = mask;
  change(self.context, scheduler);
}

inline void resume(int index) {
  current = index;
  Thread& thread = *threads[index];
  threadIdx = thread.index;
  thread.state = State::ready;
  change(scheduler, thread.context);
}

// Lets the threads of a block go on if all living ones wait at one place. Returns whether any went on.
inline bool release_block(int count) {
  int place = 0;
  for (int i = 0; i < count; ++i) {
    const Thread& thread = *threads[i];
    if (thread.state == State::done) continue;
    if (thread.state != State::at_block || (place != 0 && thread.place != place)) return false;
    place = thread.place;
  }
  for (int i = 0; i < count; ++i) {
    if (threads[i]->state == State::at_block) threads[i]->state = State::ready;
  }
  return place != 0;
}

// Lets lanes go on that wait for each other at one place, all living ones of their mask.
inline bool release_warp(int first, int last) {
  bool any = false;
  for (int i = first; i < last; ++i) {
    const Thread& leader = *threads[i];
    if (leader.state != State::at_warp) continue;
    const unsigned mask = leader.mask;
    bool whole = mask >> (i - first) & 1;
    for (int j = first; j < last && whole; ++j) {
      const Thread& lane = *threads[j];
      if (!(mask >> (j - first) & 1) || lane.state == State::done) continue;
      whole = lane.state == State::at_warp && lane.place == leader.place && lane.mask == mask;
    }
    if (!whole) continue;
    any = true;
    for (int j = first; j < last; ++j) {
      Thread& lane = *threads[j];
      if (!(mask >> (j - first) & 1)) continue;
      lane.published = lane.state == State::done ? ~uint64_t{0} : lane.brought;
      if (lane.state == State::done) std::memset(lane.offered, 0xff, kOffer);
      else if (lane.offers) std::memcpy(lane.offered, lane.offer, kOffer);
      if (lane.state == State::at_warp) lane.state = State::ready;
    }
  }
  return any;
}

inline char *shared_start, *shared_stop;  // all __shared__ arrays of this library

#ifdef __SANITIZE_ADDRESS__
inline void find_shared_memory() { shared_start = __start_emulated_shared, shared_stop = __stop_emulated_shared; }
#else
inline thread_local char anchor;  // so that there is memory of this thread

inline void find_shared_memory() {
  anchor = 0;
  shared_start = shared_stop = nullptr;
  dl_iterate_phdr([](dl_phdr_info* library, size_t, void*) {
    for (int i = 0; i < library->dlpi_phnum; ++i) {
      const auto& part = library->dlpi_phdr[i];
      auto* memory = static_cast<char*>(library->dlpi_tls_data);
      if (part.p_type != PT_TLS || memory == nullptr || &anchor < memory || &anchor >= memory + part.p_memsz) continue;
      shared_start = memory, shared_stop = memory + part.p_memsz;
    }
    return 0;
  }, nullptr);
}
#endif

// By hand, since AddressSanitizer, which puts forbidden bytes between the arrays, would stop a memset over all of them.
__attribute__((no_sanitize_address)) inline void fill_shared_memory() {
  for (volatile char* byte = shared_start; byte < shared_stop; ++byte) *byte = '\xff';
  std::fill(dynamic_memory.begin(), dynamic_memory.end(), '\xff');
}

// Returns false when threads wait for each other at different places.
inline bool run_block(int count) {
  fill_shared_memory();
  for (int i = 0; i < count; ++i) {
    threads[i]->state = State::ready;
    prepare(*threads[i]);
  }
  const int warps = (count + kWarp - 1) / kWarp;
  do {
    for (int step = 0; step < warps; ++step) {
      const int first = (backwards ? warps - 1 - step : step) * kWarp;
      const int last = std::min(first + kWarp, count);
      do {
        for (int lane = 0; lane < last - first; ++lane) {
          const int i = backwards ? last - 1 - lane : first + lane;
          if (threads[i]->state == State::ready) resume(i);
        }
      } while (release_warp(first, last));
    }
  } while (release_block(count));
  for (int i = 0; i < count; ++i) {
    if (threads[i]->state != State::done) return false;
  }
  return true;
}

inline cudaError_t run_grid(const cudaLaunchConfig_t& config) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const int count = blockDim.x * blockDim.y * blockDim.z;
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  if (count < 1 || count > 1024 || blocks < 1 || gridDim.y > 65535 || gridDim.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  while (static_cast<int>(threads.size()) < count) threads.push_back(std::make_unique<Thread>());
  for (int i = 0; i < count; ++i) {
    threads[i]->index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  }
  find_shared_memory();
  dynamic_memory.assign(config.dynamicSmemBytes + 128, 0);
  const bool drawn = ++launches * 2654435761u >> 31;  // the same in every run
  backwards = order == Order::changing ? drawn : order == Order::backwards;
  for (uint64_t step = 0; step < blocks; ++step) {
    const uint64_t block = backwards ? blocks - 1 - step : step;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y);
    if (!run_block(count)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// The block's dynamic shared memory, at a multiple of 128 bytes.
inline void* dynamic_shared_memory() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(dynamic_memory.data()) + 127) / 128 * 128);
}

template <typename T>
void bring(int place, unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  std::memcpy(&threads[current]->brought, &value, sizeof(T));
  wait(State::at_warp, place, mask);
}

// What a lane of the caller's warp brought; all bits set for one that has left the kernel or is not there.
template <typename T>
T taken(int lane) {
  const int first = current / kWarp * kWarp;
  const int count = blockDim.x * blockDim.y * blockDim.z;
  uint64_t bits = first + lane < count ? threads[first + lane]->published : ~uint64_t{0};
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return current % kWarp; }

// To all lanes of the caller's warp, and what a lane offered; all bits set where it has left the kernel.
template <typename T>
void offer(int place, const T& value) {
  static_assert(sizeof(T) <= kOffer && std::is_trivially_copyable_v<T>);
  Thread& self = *threads[current];
  std::memcpy(self.offer, &value, sizeof(T));
  self.offers = true;
  wait(State::at_warp, place);
  self.offers = false;
}
template <typename T>
const T& offered(int lane) {
  return *reinterpret_cast<const T*>(threads[current / kWarp * kWarp + lane]->offered);
}

// What a copy will overwrite is neither old nor new until it is waited for.
inline void copy_later(void* to, const void* from, int bytes) {
  Thread& self = *threads[current];
  std::memset(to, 0xff, 16);
  self.copies.push_back({to, from, bytes, self.copy_groups});
}
inline void commit_copies() { ++threads[current]->copy_groups; }
inline void wait_for_copies(int pending) {
  Thread& self = *threads[current];
  auto& copies = self.copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < self.copy_groups - pending; ++done) {
    const Copy& copy = copies[done];
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + done);
}

template <typename T, typename F>
T shuffle(int place, unsigned mask, T value, F from) {
  bring(place, mask, value);
  const int source = from(lane());
  return taken<T>(source >= 0 && source < kWarp ? source : lane());
}

inline unsigned ballot(int place, unsigned mask, bool predicate) {
  const int first = current / kWarp * kWarp, self = lane();
  bring(place, mask, uint64_t{predicate});
  unsigned bits = 0;
  for (int i = 0; i < kWarp; ++i) {
    const bool is_there = first + i < static_cast<int>(blockDim.x * blockDim.y * blockDim.z) && (mask >> i & 1);
    bits |= static_cast<unsigned>(is_there && taken<uint64_t>(i) == 1) << i;
  }
  return self >= 0 ? bits : 0;
}

}  // namespace emulator

#define __syncthreads() emulator::wait(emulator::State::at_block, __LINE__)
#define __syncwarp(...) emulator::bring(__LINE__, emulator::mask_of(__VA_ARGS__), 0)
#define __ballot_sync(mask, predicate) emulator::ballot(__LINE__, mask, predicate)
#define __any_sync(mask, predicate) (emulator::ballot(__LINE__, mask, predicate) != 0)
#define __all_sync(mask, predicate) (emulator::ballot(__LINE__, mask, !(predicate)) == 0)
#define __shfl_sync(mask, value, from) emulator::shuffle(__LINE__, mask, value, [&](int) { return (from) % 32; })
#define __shfl_up_sync(mask, value, by) \
  emulator::shuffle(__LINE__, mask, value, [&](int lane) { return lane - (by); })
#define __shfl_down_sync(mask, value, by) \
  emulator::shuffle(__LINE__, mask, value, [&](int lane) { return lane + (by); })
#define __shfl_xor_sync(mask, value, by) \
  emulator::shuffle(__LINE__, mask, value, [&](int lane) { return lane ^ (by); })
namespace emulator {
inline unsigned mask_of(unsigned mask = ~0u) { return mask; }
}  // namespace emulator

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint32_t __float_as_uint(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline int atomicMax(int* at, int value) { const int old = *at; *at = std::max(old, value); return old; }
template <typename T>
T __ldg(const T* at) { return *at; }
using std::max;
using std::min;

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const std::lock_guard<std::recursive_mutex> guard(emulator::one_launch);
  const auto asked = emulator::dynamic_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = asked == emulator::dynamic_limits.end() ? emulator::kUsualShared : asked->second;
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  emulator::kernel = [&] { kernel(static_cast<P>(arguments)...); };
  return emulator::run_grid(*config);
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulator::kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard<std::recursive_mutex> guard(emulator::one_launch);
  emulator::dynamic_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::kMultiprocessors;
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "threads wait for each other at different places"
         : error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration";
}
