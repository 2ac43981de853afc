#include "isa.h"

#include <algorithm>
#include <atomic>

namespace fastbert::cpu {
namespace {

std::atomic<Isa> limit{Isa::avx512_bf16};

Isa best() {
  Isa found = Isa::baseline;
#ifdef FASTBERT_AVX2
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
  found = Isa::avx2;
#endif
#ifdef FASTBERT_AVX512
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
    return found;
  }
  found = Isa::avx512;
#endif
#ifdef FASTBERT_AVX512_BF16
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) found = Isa::avx512_bf16;
#endif
  return found;
}

}  // namespace

Isa isa() {
  static const Isa found = best();
  return std::min(found, limit.load(std::memory_order_relaxed));
}

void limit_isa(Isa most) { limit.store(most, std::memory_order_relaxed); }

}  // namespace fastbert::cpu
