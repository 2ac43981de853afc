#include "isa.h"

#include <algorithm>
#include <atomic>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

bool has_amx() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 1) != 0;
#else
  return false;
#endif
}

void limit_isa(Isa most) { limit.store(most, std::memory_order_relaxed); }

}  // namespace fastbert::cpu
