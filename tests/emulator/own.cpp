// What the emulator itself promises, kernel by kernel; each returns what is wrong, in words, or nullptr.
#include <cuda_runtime.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// out [5, 32]: what every lane gets from the lane above, below, across, from lane 3, and how many lanes are even.
__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_up_sync(~0u, lane, 1);
  out[32 + lane] = __shfl_down_sync(~0u, lane, 2);
  out[64 + lane] = __shfl_xor_sync(~0u, lane, 5);
  out[96 + lane] = __shfl_sync(~0u, lane, 3);
  out[128 + lane] = __popc(__ballot_sync(~0u, lane % 2 == 0));
}

// Halves of a warp that go their own ways, by masks.
__global__ void halves(int* out) {
  const int lane = threadIdx.x;
  if (lane < 16) {
    int sum = lane;
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffu, sum, distance);
    out[lane] = sum;
  } else {
    out[lane] = __any_sync(0xffff0000u, lane == 20) + 2 * __all_sync(0xffff0000u, lane > 15);
    __syncwarp(0xffff0000u);
  }
}

template <typename T>
__global__ void shared(float* out) {
  __shared__ T fixed[4];
  auto* dynamic = static_cast<float*>(emulator::dynamic_shared_memory());
  if (threadIdx.x == 0) fixed[1] = dynamic[1] = 7;
  __syncthreads();
  out[2 * threadIdx.x] = fixed[threadIdx.x];
  out[2 * threadIdx.x + 1] = dynamic[threadIdx.x];
}

template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), int blocks, int threads, size_t bytes, A... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = bytes;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

EXPORT const char* run_shuffles(int* out) { return launch(shuffles, 1, 32, 0, out); }
EXPORT const char* run_halves(int* out) { return launch(halves, 1, 32, 0, out); }
EXPORT const char* run_shared(float* out, int blocks) { return launch(shared<float>, blocks, 2, 16, out); }
EXPORT const char* run_with_much_memory(float* out, int bytes, bool asks) {
  if (asks && cudaFuncSetAttribute(shared<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess) {
    return "asked for too much";
  }
  return launch(shared<float>, 1, 2, bytes, out);
}
