// unpad.cu on the CPU, as plain C functions. `order` 1 runs the last block and warp first.
#include "cuda/unpad.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))

using fastbert::Mask;

EXPORT const char* emulated_count(const Mask* mask, int order, int32_t* cu_seqlens, int32_t* ranked, int64_t* total) {
  emulator::order = order ? emulator::Order::backwards : emulator::Order::forwards;
  int64_t total_on_device = -1;
  return fastbert::cuda::count(*mask, cu_seqlens, ranked, &total_on_device, total, nullptr);
}

EXPORT const char* emulated_fill(const Mask* mask, int order, const int32_t* cu_seqlens, int64_t tokens,
                                 int64_t* indices) {
  emulator::order = order ? emulator::Order::backwards : emulator::Order::forwards;
  return fastbert::cuda::fill(*mask, cu_seqlens, tokens, indices, nullptr);
}
