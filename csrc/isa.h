// The instruction sets that the vector code of cpu/ is compiled for, and which of them runs. Free of torch.
#pragma once

namespace fastbert::cpu {

// avx2: with FMA and F16C; avx512: F, BW, VL and DQ; avx512_bf16: with VNNI too. On other machines baseline alone.
enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The best one that this library holds and this CPU has, up to the limit.
Isa isa();

void limit_isa(Isa most);

// Whether the CPU has matrix units (AMX), which nothing here uses.
bool has_amx();

}  // namespace fastbert::cpu

#ifdef FASTBERT_AVX2
#define FASTBERT_IF_AVX2(...) __VA_ARGS__
#else
#define FASTBERT_IF_AVX2(...)
#endif
#ifdef FASTBERT_AVX512
#define FASTBERT_IF_AVX512(...) __VA_ARGS__
#else
#define FASTBERT_IF_AVX512(...)
#endif
#ifdef FASTBERT_AVX512_BF16
#define FASTBERT_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define FASTBERT_IF_AVX512_BF16(...)
#endif

// Declares a kernel in the namespace of each instruction set, where cpu/<op>.cpp defines it, and name(), which gives
// the one that runs: asked once a call, so that all of its tasks take the same. Static: of the files compiled for
// several sets none may share a function with another.
#define FASTBERT_KERNEL(name, parameters)                                                            \
  namespace baseline {                                                                               \
  void name parameters;                                                                              \
  }                                                                                                  \
  FASTBERT_IF_AVX2(namespace avx2 { void name parameters; })                                         \
  FASTBERT_IF_AVX512(namespace avx512 { void name parameters; })                                     \
  FASTBERT_IF_AVX512_BF16(namespace avx512_bf16 { void name parameters; })                           \
  [[maybe_unused]] static auto name() {                                                              \
    switch (isa()) {                                                                                 \
      FASTBERT_IF_AVX512_BF16(case Isa::avx512_bf16 : return &avx512_bf16::name;)                    \
      FASTBERT_IF_AVX512(case Isa::avx512 : return &avx512::name;)                                   \
      FASTBERT_IF_AVX2(case Isa::avx2 : return &avx2::name;)                                         \
      default: return &baseline::name;                                                               \
    }                                                                                                \
  }
