// Tensor cores and what feeds them, in PTX of sm_80 and later; each with a twin for the CPU that keeps the places which the
// PTX ISA gives to the elements of a fragment. All lanes of a warp call mma and load_matrices together.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dtypes.cuh"

#if defined(FASTBERT_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define FASTBERT_TENSOR_CORES
#endif

namespace fastbert::cuda {

#ifdef FASTBERT_EMULATED
namespace twin {

template <typename T>
float element(uint32_t pair, int place) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * place)});
}

// A lane's share of a [16, 16] and of b [16, 8].
struct Operands {
  float a[4][2], b[2][2];
};

struct Row {
  uint16_t elements[8];
};

inline uint32_t pair(uint16_t first, uint16_t second) { return first | static_cast<uint32_t>(second) << 16; }

}  // namespace twin
#endif

// c [16, 8] += a [16, 16] * b [16, 8], T Half or BFloat16. With group = lane / 4, column = lane % 4 * 2 a lane holds, each
// with its right neighbour, of a: [group, column], [group + 8, column], [group, column + 8], [group + 8, column + 8]; of b,
// each with its lower neighbour: [column, group], [column + 8, group]; of c: [group, column], [group + 8, column].
template <typename T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef FASTBERT_EMULATED
  twin::Operands mine;
  for (int e = 0; e < 2; ++e) {
    for (int i = 0; i < 4; ++i) mine.a[i][e] = twin::element<T>(a[i], e);
    mine.b[0][e] = twin::element<T>(b0, e), mine.b[1][e] = twin::element<T>(b1, e);
  }
  emulator::offer(__LINE__, mine);
  const int group = emulator::lane() / 4, pair = emulator::lane() % 4;
  for (int k = 0; k < 16; ++k) {
    const auto& rows = emulator::offered<twin::Operands>(group * 4 + k % 8 / 2);
    for (int right = 0; right < 2; ++right) {
      const auto& columns = emulator::offered<twin::Operands>((pair * 2 + right) * 4 + k % 8 / 2);
      const float b = columns.b[k / 8][k % 2];
      c[right] += rows.a[k / 8 * 2][k % 2] * b;
      c[2 + right] += rows.a[k / 8 * 2 + 1][k % 2] * b;
    }
  }
#elif defined(FASTBERT_TENSOR_CORES)
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// Four matrices [8, 8] of 16 bits. Lane i says where row i % 8 of matrix i / 8 stands, at 16 bytes in shared memory; of each
// matrix it gets the elements [i / 4, i % 4 * 2] and the next of that row; kTransposed: of the transposed matrix.
template <bool kTransposed, typename T>
__device__ inline void load_matrices(uint32_t (&matrices)[4], const T* row) {
#ifdef FASTBERT_EMULATED
  twin::Row mine;
  for (int i = 0; i < 8; ++i) mine.elements[i] = row[i].bits;
  emulator::offer(__LINE__, mine);
  const int group = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto of = [&](int r) { return emulator::offered<twin::Row>(8 * i + r).elements; };
    matrices[i] = kTransposed ? twin::pair(of(column)[group], of(column + 1)[group])
                              : twin::pair(of(group)[column], of(group)[column + 1]);
  }
#elif defined(FASTBERT_TENSOR_CORES)
  const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(place)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(place)
                 : "memory");
  }
#endif
}

// Begins to copy 16 bytes to shared memory, zeros where there is nothing to read. They are there for the calling thread
// after `wait_for_copies`, for others after a barrier more. The twin copies then; until then there is NaN.
__device__ inline void copy_16(void* to, const void* from, bool is_there) {
#ifdef FASTBERT_EMULATED
  emulator::copy_later(to, from, is_there ? 16 : 0);
#elif defined(FASTBERT_TENSOR_CORES)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(is_there ? 16 : 0)
               : "memory");
#endif
}

// The copies that were begun since the last call are a group.
__device__ inline void commit_copies() {
#ifdef FASTBERT_EMULATED
  emulator::commit_copies();
#elif defined(FASTBERT_TENSOR_CORES)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the calling thread's groups but the last kPending.
template <int kPending>
__device__ inline void wait_for_copies() {
#ifdef FASTBERT_EMULATED
  emulator::wait_for_copies(kPending);
#elif defined(FASTBERT_TENSOR_CORES)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// 2^x within 2 units in the last place; 0 below 2^-126.
__device__ inline float fast_exp2(float x) {
#ifdef FASTBERT_TENSOR_CORES
#ifdef FASTBERT_EMULATED
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
#else
  return exp2f(x);
#endif
}

}  // namespace fastbert::cuda
