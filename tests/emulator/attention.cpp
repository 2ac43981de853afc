// attention.cu, attention_backward.cu and mma.cuh on the CPU, as plain C functions. `order` 1 runs the last block and warp
// first. `emulated_bug` chooses one of the errors that a test has planted, 0: none.
int emulated_bug = 0;

#include "cuda/attention.cu"
#include "cuda/attention_backward.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))

using fastbert::Attention;
using fastbert::Sequences;
using fastbert::cuda::BFloat16;
using fastbert::cuda::Half;

EXPORT void emulated_setting(int bug, int order) {
  emulated_bug = bug;
  emulator::order = order ? emulator::Order::backwards : emulator::Order::forwards;
}

EXPORT const char* emulated_attention(const Attention* inputs, const Sequences* sequences, void* out, float* lse) {
  return fastbert::cuda::attention(*inputs, *sequences, out, lse, nullptr);
}

EXPORT const char* emulated_attention_backward(const Attention* inputs, const Sequences* sequences, const void* grad,
                                               const float* lse, float* rows, void* dqkv) {
  return fastbert::cuda::attention_backward(*inputs, *sequences, grad, lse, rows, dqkv, nullptr);
}

EXPORT int emulated_attention_queries(int longest, int dim, int64_t pairs, int multiprocessors) {
  return fastbert::cuda::attention_queries(longest, dim, pairs, multiprocessors);
}

namespace {

// One warp: a [32, 4], b [32, 2], c [32, 4] by lane
template <typename T>
__global__ void product(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t mine[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) mine[i] = a[4 * lane + i], sums[i] = c[4 * lane + i];
  fastbert::cuda::mma<T>(sums, mine, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = sums[i];
}

// One warp: four matrices [8, 8], each row where `places` says -> [32, 4] by lane
template <bool kTransposed>
__global__ void matrices(const Half* memory, const int* places, uint32_t* loaded) {
  uint32_t mine[4];
  fastbert::cuda::load_matrices<kTransposed>(mine, memory + 8 * places[threadIdx.x]);
  for (int i = 0; i < 4; ++i) loaded[4 * threadIdx.x + i] = mine[i];
}

// One thread copies 8 elements in a group each to `to` [3, 8], the last from nowhere. seen [4, 3, 8]: what stands there
// before a wait, after one for all but 2 groups, all but 1, and all.
__global__ void copies(const Half* from, Half* to, Half* seen) {
  const auto look = [&](int time) {
    for (int i = 0; i < 24; ++i) seen[24 * time + i] = to[i];
  };
  for (int i = 0; i < 3; ++i) {
    fastbert::cuda::copy_16(to + 8 * i, from + 8 * i, i < 2);
    fastbert::cuda::commit_copies();
  }
  look(0);
  fastbert::cuda::wait_for_copies<2>();
  look(1);
  fastbert::cuda::wait_for_copies<1>();
  look(2);
  fastbert::cuda::wait_for_copies<0>();
  look(3);
}

const cudaLaunchConfig_t one_warp = {dim3(1), dim3(32), 0, nullptr}, one_thread = {dim3(1), dim3(1), 0, nullptr};

}  // namespace

EXPORT void emulated_product(int is_half, const uint32_t* a, const uint32_t* b, float* c) {
  cudaLaunchKernelEx(&one_warp, is_half ? product<Half> : product<BFloat16>, a, b, c);
}

EXPORT void emulated_matrices(int transposed, const Half* memory, const int* places, uint32_t* loaded) {
  cudaLaunchKernelEx(&one_warp, transposed ? matrices<true> : matrices<false>, memory, places, loaded);
}

EXPORT void emulated_copies(const Half* from, Half* to, Half* seen) {
  cudaLaunchKernelEx(&one_thread, copies, from, to, seen);
}
