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
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "add_layer_norm.h"
#include "attention.h"
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

#ifndef FASTBERT_EMULATED

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

#endif

}  // namespace
}  // namespace fastbert

#ifndef FASTBERT_EMULATED

STABLE_TORCH_LIBRARY(fastbert_native, m) {
  m.def("unpad(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CPU, m) {
  m.impl("unpad", TORCH_BOX(&fastbert::unpad_cpu));
}

#endif

#ifdef FASTBERT_CUDA

// Weak: torch without CUDA does not have it, and never comes here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastbert {
namespace {

// The device of a call: current while this lives; its stream.
#ifdef FASTBERT_EMULATED
struct Device {
  explicit Device(const Tensor&) {}
  void* stream = nullptr;
};
#else
struct Device {
  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

void check_cuda(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(op) + ": CUDA says: " + error);
}

// mask [B, S] -> indices [T] int64, cu_seqlens [B + 1] int32. Waits once for the device, to learn T.
std::tuple<Tensor, Tensor> unpad_cuda(const Tensor& mask_tensor) {
  const Mask mask = mask_of(mask_tensor);
  check(reinterpret_cast<uintptr_t>(mask.data) % mask.element_size == 0, "unpad: mask is not aligned to its elements");
  const Device device(mask_tensor);
  Tensor cu_tensor = empty_on_device_of(mask_tensor, mask.rows + 1, ScalarType::Int);
  Tensor total_tensor = empty_on_device_of(mask_tensor, 1, ScalarType::Long);
  auto* cu_seqlens = static_cast<int32_t*>(cu_tensor.data_ptr());
  int64_t total = 0;
  check_cuda("unpad",
             cuda::count(mask, cu_seqlens, static_cast<int64_t*>(total_tensor.data_ptr()), &total, device.stream));

  Tensor indices_tensor = empty_indices(mask_tensor, total);
  check_cuda("unpad", cuda::fill(mask, cu_seqlens, static_cast<int64_t*>(indices_tensor.data_ptr()), device.stream));
  return {indices_tensor, cu_tensor};
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: throw std::runtime_error("a tensor is none of float32, float16 and bfloat16");
  }
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// [sizes], or [0] where it is not needed
Tensor empty_if(bool needed, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return needed ? empty(like, sizes, dtype) : empty(like, {0}, dtype);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

void* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

void* pointer_if(bool needed, const Tensor& tensor) { return needed ? tensor.data_ptr() : nullptr; }

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// seed [] int64 on the device
Dropout dropout_of(double p, const std::optional<Tensor>& seed, int64_t site) {
  const auto threshold = static_cast<uint32_t>(p * 65536 + 0.5);
  if (threshold == 0 || !seed.has_value()) return {nullptr, 0, 0, 1.0f};
  const float scale = threshold < 65536 ? static_cast<float>(65536.0 / (65536 - threshold)) : 0.0f;
  return {static_cast<const int64_t*>(seed->data_ptr()), static_cast<uint32_t>(site), threshold, scale};
}

struct AddLayerNormTensors {
  Tensor x;
  std::optional<Tensor> bias;
  Tensor residual, gamma;

  AddLayerNorm inputs(double p, const std::optional<Tensor>& seed, int64_t site) const {
    check(x.dim() == 2 && x.size(1) >= 1 && x.size(1) <= kMostHidden, "add_layer_norm: x is not [T, 1 to 4096]");
    return {x.data_ptr(), pointer(bias), residual.data_ptr(), gamma.data_ptr(), dtype_of(x), dtype_of(residual),
            x.size(0), static_cast<int>(x.size(1)), dropout_of(p, seed, site)};
  }
};

AddLayerNormTensors contiguous_inputs(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
                                      const Tensor& gamma) {
  return {torch::stable::contiguous(x), contiguous(bias), torch::stable::contiguous(residual),
          torch::stable::contiguous(gamma)};
}

// x, residual [T, H] -> y [T, H] in the residual's dtype, mean [T], rstd [T]
std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const std::optional<Tensor>& bias,
                                                  const Tensor& residual, const Tensor& gamma, const Tensor& beta,
                                                  double eps, double p, const std::optional<Tensor>& seed,
                                                  int64_t site) {
  const Device device(x);
  const AddLayerNormTensors tensors = contiguous_inputs(x, bias, residual, gamma);
  const AddLayerNorm inputs = tensors.inputs(p, seed, site);
  const Tensor shift = torch::stable::contiguous(beta);
  const Tensor y = empty(residual, {inputs.rows, inputs.hidden}, residual.scalar_type());
  const Tensor mean = empty(x, {inputs.rows}, ScalarType::Float), rstd = empty(x, {inputs.rows}, ScalarType::Float);
  check_cuda("add_layer_norm", cuda::add_layer_norm(inputs, shift.data_ptr(), static_cast<float>(eps), y.data_ptr(),
                                                    floats(mean), floats(rstd), device.stream));
  return {y, mean, rstd};
}

// grad [T, H] -> the gradients of x, bias, residual, gamma, beta
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
    const Tensor& gamma, const Tensor& mean, const Tensor& rstd, double p, const std::optional<Tensor>& seed,
    int64_t site, const std::vector<bool>& needed) {
  const Device device(x);
  const AddLayerNormTensors tensors = contiguous_inputs(x, bias, residual, gamma);
  const AddLayerNorm inputs = tensors.inputs(p, seed, site);
  const Tensor grads = torch::stable::contiguous(grad), means = torch::stable::contiguous(mean),
               rstds = torch::stable::contiguous(rstd);
  const int64_t rows = inputs.rows, hidden = inputs.hidden;
  const ScalarType narrow = x.scalar_type(), wide = residual.scalar_type();
  const bool has_bias = needed[1] && bias.has_value();
  const Tensor dx = empty_if(needed[0], x, {rows, hidden}, narrow), dbias = empty_if(has_bias, x, {hidden}, narrow);
  const Tensor dresidual = empty_if(needed[2], residual, {rows, hidden}, wide);
  const Tensor dgamma = empty_if(needed[3], gamma, {hidden}, wide), dbeta = empty_if(needed[4], gamma, {hidden}, wide);
  int64_t part_count = 0;
  check_cuda("add_layer_norm_backward", cuda::add_layer_norm_parts(rows, inputs.hidden, &part_count));
  const Tensor parts = empty(x, {3, part_count, hidden}, ScalarType::Float);
  check_cuda("add_layer_norm_backward",
             cuda::add_layer_norm_backward(inputs, grads.data_ptr(), floats(means), floats(rstds), floats(parts),
                                           part_count, pointer_if(needed[0], dx), pointer_if(has_bias, dbias),
                                           pointer_if(needed[2], dresidual), pointer_if(needed[3], dgamma),
                                           pointer_if(needed[4], dbeta), device.stream));
  return {dx, dbias, dresidual, dgamma, dbeta};
}

struct AttentionTensors {
  Tensor qkv, cu_seqlens;
  std::optional<Tensor> keep_bits, order;
  const std::vector<int64_t>& classes;

  AttentionTensors(const Tensor& qkv, const Tensor& cu_seqlens, const std::optional<Tensor>& keep_bits,
                   const std::optional<Tensor>& order, const std::vector<int64_t>& classes)
      : qkv(torch::stable::contiguous(qkv)), cu_seqlens(torch::stable::contiguous(cu_seqlens)),
        keep_bits(contiguous(keep_bits)), order(contiguous(order)), classes(classes) {
    check(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(3) >= 1 && qkv.size(3) <= kMostHeadDim,
          "attention: qkv is not [T, 3, N, 1 to 128]");
    check(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.size(0) >= 1 && cu_seqlens.size(0) <= kMaxInt32,
          "attention: cu_seqlens is not [B + 1] int32");
    check(classes.empty() || (order.has_value() && classes.size() == kClassCount),
          "attention: classes are not 5, or there is no order");
  }

  // keep bits [N, T, W]
  Attention inputs(double scale, double p) const {
    const auto threshold = static_cast<int>(p * 65536 + 0.5);
    const double keep_scale = threshold < 65536 ? 65536.0 / (65536 - threshold) : 0.0;
    return {qkv.data_ptr(), static_cast<const int32_t*>(cu_seqlens.data_ptr()),
            static_cast<const int32_t*>(pointer(order)), static_cast<const int32_t*>(pointer(keep_bits)), dtype_of(qkv),
            qkv.size(0), keep_bits.has_value() ? keep_bits->size(2) : 0, static_cast<int>(qkv.size(2)),
            static_cast<int>(qkv.size(3)), static_cast<float>(scale), static_cast<float>(keep_scale)};
  }

  Sequences sequences(int64_t longest) const {
    check(longest <= kMaxInt32, "attention: max_seqlen is over 2147483647");
    return {static_cast<int>(cu_seqlens.size(0) - 1), static_cast<int>(longest),
            classes.empty() ? nullptr : classes.data()};
  }
};

// qkv [T, 3, N, D] -> out [T, N, D], lse [N, T]
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen, double scale,
                                     const std::optional<Tensor>& keep_bits, double p,
                                     const std::optional<Tensor>& order, const std::vector<int64_t>& classes) {
  const Device device(qkv);
  const AttentionTensors tensors(qkv, cu_seqlens, keep_bits, order, classes);
  const Attention inputs = tensors.inputs(scale, p);
  const Tensor out = empty(qkv, {inputs.tokens, inputs.heads, inputs.dim}, qkv.scalar_type());
  const Tensor lse = empty(qkv, {inputs.heads, inputs.tokens}, ScalarType::Float);
  if (inputs.tokens == 0 || inputs.heads == 0) return {out, lse};
  check_cuda("attention", cuda::attention(inputs, tensors.sequences(max_seqlen), out.data_ptr(), floats(lse),
                                          device.stream));
  return {out, lse};
}

// grad [T, N, D], lse [N, T] -> dqkv [T, 3, N, D]; out is not read
Tensor attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                          const Tensor& cu_seqlens, int64_t max_seqlen, double scale,
                          const std::optional<Tensor>& keep_bits, double p, const std::optional<Tensor>& order,
                          const std::vector<int64_t>& classes) {
  const Device device(qkv);
  const AttentionTensors tensors(qkv, cu_seqlens, keep_bits, order, classes);
  const Attention inputs = tensors.inputs(scale, p);
  const Tensor grads = torch::stable::contiguous(grad), lses = torch::stable::contiguous(lse);
  const Tensor dqkv = empty(qkv, {inputs.tokens, 3, inputs.heads, inputs.dim}, qkv.scalar_type());
  if (inputs.tokens == 0 || inputs.heads == 0) return dqkv;
  const Tensor rows = empty(qkv, {2, inputs.heads, inputs.tokens}, ScalarType::Float);
  check_cuda("attention_backward",
             cuda::attention_backward(inputs, tensors.sequences(max_seqlen), grads.data_ptr(), floats(lses),
                                      floats(rows), dqkv.data_ptr(), device.stream));
  return dqkv;
}

std::string cuda_problem() {
  const char* problem = cuda::problem();
  return problem == nullptr ? "" : problem;
}

}  // namespace
}  // namespace fastbert

// The emulated library has the same kernels, compiled for the CPU, under a name of its own.
#define FASTBERT_NAMED(library, ...) library(__VA_ARGS__)
#ifdef FASTBERT_EMULATED
#define FASTBERT_LIBRARY fastbert_emulated
#define FASTBERT_DEVICE CPU
STABLE_TORCH_LIBRARY(fastbert_emulated, m) {
  m.def("unpad(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)");
}
#else
#define FASTBERT_LIBRARY fastbert_native
#define FASTBERT_DEVICE CUDA
#endif

FASTBERT_NAMED(STABLE_TORCH_LIBRARY_FRAGMENT, FASTBERT_LIBRARY, m) {
  m.def("cuda_problem() -> str");
  m.def(
      "attention(Tensor qkv, Tensor cu_seqlens, int max_seqlen, float scale, Tensor? keep_bits=None, float p=0.0,"
      " Tensor? order=None, int[] classes=[]) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, int max_seqlen,"
      " float scale, Tensor? keep_bits, float p, Tensor? order=None, int[] classes=[]) -> Tensor dqkv");
  m.def(
      "add_layer_norm(Tensor x, Tensor? bias, Tensor residual, Tensor gamma, Tensor beta, float eps, float p=0.0,"
      " Tensor? seed=None, int site=0) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor grad, Tensor x, Tensor? bias, Tensor residual, Tensor gamma, Tensor mean,"
      " Tensor rstd, float p, Tensor? seed, int site, bool[] needed)"
      " -> (Tensor dx, Tensor dbias, Tensor dresidual, Tensor dgamma, Tensor dbeta)");
}

FASTBERT_NAMED(STABLE_TORCH_LIBRARY_IMPL, FASTBERT_LIBRARY, FASTBERT_DEVICE, m) {
  m.impl("unpad", TORCH_BOX(&fastbert::unpad_cuda));
  m.impl("attention", TORCH_BOX(&fastbert::attention));
  m.impl("attention_backward", TORCH_BOX(&fastbert::attention_backward));
  m.impl("add_layer_norm", TORCH_BOX(&fastbert::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&fastbert::add_layer_norm_backward));
}

FASTBERT_NAMED(STABLE_TORCH_LIBRARY_IMPL, FASTBERT_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&fastbert::cuda_problem));
}

#endif  // FASTBERT_CUDA
