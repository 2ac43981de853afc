// The ops of the native library for torch: checks, allocates, and calls cpu/ or cuda/. The only file that sees torch,
// through its stable ABI, so that one library serves every torch from 2.11 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

#include "unpad.h"

namespace fastbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kElementsPerTask = 1 << 15;

void check(bool condition, const char* words) {
  if (!condition) throw std::runtime_error(words);
}

// Bytes of one element, and the bits that make it nonzero.
std::tuple<int, uint64_t> element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return {1, ~uint64_t{0}};
    case ScalarType::Short: return {2, ~uint64_t{0}};
    case ScalarType::Int: return {4, ~uint64_t{0}};
    case ScalarType::Long: return {8, ~uint64_t{0}};
    case ScalarType::Half:
    case ScalarType::BFloat16: return {2, 0x7fff};
    case ScalarType::Float: return {4, 0x7fffffff};
    case ScalarType::Double: return {8, 0x7fffffffffffffff};
    default:
      throw std::runtime_error(
          "unpad: mask must be bool, uint8, int8, int16, int32, int64, float16, bfloat16, float32 or float64");
  }
}

Mask mask_of(const Tensor& tensor) {
  check(tensor.dim() == 2, "unpad: mask must be 2-D: [batch, length]");
  check(tensor.size(0) <= kMaxInt32, "unpad: mask has more than 2147483647 rows");
  check(tensor.size(1) <= kMaxInt32, "unpad: mask has rows of more than 2147483647 elements");
  const auto [element_size, keep] = element_of(tensor.scalar_type());
  Mask mask = {tensor.data_ptr(), tensor.size(0), tensor.size(1), 0, 0, element_size, keep};
  if (tensor.numel() == 0) return mask;
  // where there is only one element a stride may be any number, and stays 0
  if (mask.rows > 1) mask.row_stride = tensor.stride(0);
  if (mask.columns > 1) mask.column_stride = tensor.stride(1);
  const int64_t last =
      tensor.storage_offset() + (mask.rows - 1) * mask.row_stride + (mask.columns - 1) * mask.column_stride;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  check((last + 1) * element_size <= bytes, "unpad: mask reaches beyond its storage, which was resized");
  return mask;
}

Tensor empty_on_device_of(const Tensor& mask, int64_t size, ScalarType dtype) {
  try {
    return torch::stable::new_empty(mask, {size}, dtype);
  } catch (const std::exception&) {  // whose words name a line of torch's headers
    throw std::runtime_error("unpad: out of memory: torch could not allocate " + std::to_string(size) + " elements");
  }
}

Tensor empty_indices(const Tensor& mask, int64_t total) {
  check(total <= kMaxInt32, "unpad: mask has more than 2147483647 real tokens");
  return empty_on_device_of(mask, total, ScalarType::Long);
}

// mask [B, S] -> indices [T] int64, cu_seqlens [B + 1] int32
std::tuple<Tensor, Tensor> unpad_cpu(const Tensor& mask_tensor) {
  const Mask mask = mask_of(mask_tensor);
  Tensor cu_tensor = empty_on_device_of(mask_tensor, mask.rows + 1, ScalarType::Int);
  auto* cu_seqlens = static_cast<int32_t*>(cu_tensor.data_ptr());
  const int64_t rows_per_task = kElementsPerTask / (mask.columns + 1) + 1;

  torch::stable::parallel_for(0, mask.rows, rows_per_task, [&](int64_t first, int64_t last) {
    cpu::count_rows(mask, first, last, cu_seqlens + 1);
  });
  int64_t total = 0;
  cu_seqlens[0] = 0;
  for (int64_t row = 0; row < mask.rows; ++row) {
    total += cu_seqlens[row + 1];
    cu_seqlens[row + 1] = static_cast<int32_t>(total);
  }

  Tensor indices_tensor = empty_indices(mask_tensor, total);
  auto* indices = static_cast<int64_t*>(indices_tensor.data_ptr());
  torch::stable::parallel_for(0, mask.rows, rows_per_task, [&](int64_t first, int64_t last) {
    cpu::fill_rows(mask, first, last, cu_seqlens, indices);
  });
  return {indices_tensor, cu_tensor};
}

}  // namespace
}  // namespace fastbert

STABLE_TORCH_LIBRARY(fastbert_native, m) {
  m.def("unpad(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CPU, m) {
  m.impl("unpad", TORCH_BOX(&fastbert::unpad_cpu));
}

#ifdef FASTBERT_CUDA

// Weak: torch without CUDA does not have it, and never comes here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastbert {
namespace {

void check_cuda(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("unpad: CUDA says: ") + error);
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// mask [B, S] -> indices [T] int64, cu_seqlens [B + 1] int32. Waits once for the device, to learn T.
std::tuple<Tensor, Tensor> unpad_cuda(const Tensor& mask_tensor) {
  const Mask mask = mask_of(mask_tensor);
  check(reinterpret_cast<uintptr_t>(mask.data) % mask.element_size == 0, "unpad: mask is not aligned to its elements");
  const torch::stable::accelerator::DeviceGuard guard(mask_tensor.get_device_index());
  void* stream = current_stream(mask_tensor.get_device_index());
  Tensor cu_tensor = empty_on_device_of(mask_tensor, mask.rows + 1, ScalarType::Int);
  Tensor total_tensor = empty_on_device_of(mask_tensor, 1, ScalarType::Long);
  auto* cu_seqlens = static_cast<int32_t*>(cu_tensor.data_ptr());
  int64_t total = 0;
  check_cuda(cuda::count(mask, cu_seqlens, static_cast<int64_t*>(total_tensor.data_ptr()), &total, stream));

  Tensor indices_tensor = empty_indices(mask_tensor, total);
  check_cuda(cuda::fill(mask, cu_seqlens, static_cast<int64_t*>(indices_tensor.data_ptr()), stream));
  return {indices_tensor, cu_tensor};
}

std::string cuda_problem() {
  const char* problem = cuda::problem();
  return problem == nullptr ? "" : problem;
}

}  // namespace
}  // namespace fastbert

STABLE_TORCH_LIBRARY_FRAGMENT(fastbert_native, m) {
  m.def("cuda_problem() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CUDA, m) {
  m.impl("unpad", TORCH_BOX(&fastbert::unpad_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&fastbert::cuda_problem));
}

#endif  // FASTBERT_CUDA
