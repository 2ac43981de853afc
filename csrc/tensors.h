// What the ops of the native library share: checks of tensors, and what the kernels take of them. Only this file,
// tasks.h and the ops_*.cpp see torch, through its stable ABI, so that one library serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
#include "embed_layer_norm.h"
#include "unpad.h"

namespace fastbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

inline void check(bool condition, const char* words) {
  if (!condition) throw std::runtime_error(words);
}

// Bytes of one element, and the bits that make it nonzero.
inline std::tuple<int, uint64_t> element_of(ScalarType dtype) {
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

inline Mask mask_of(const Tensor& tensor) {
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

inline Tensor empty_on_device_of(const Tensor& mask, int64_t size, ScalarType dtype) {
  try {
    return torch::stable::new_empty(mask, {size}, dtype);
  } catch (const std::exception&) {  // whose words name a line of torch's headers
    throw std::runtime_error("unpad: out of memory: torch could not allocate " + std::to_string(size) + " elements");
  }
}

inline Tensor empty_indices(const Tensor& mask, int64_t total) {
  check(total <= kMaxInt32, "unpad: mask has more than 2147483647 real tokens");
  return empty_on_device_of(mask, total, ScalarType::Long);
}

inline int32_t* ints(const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); }

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: throw std::runtime_error("a tensor is none of float32, float16 and bfloat16");
  }
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// [sizes], or [0] where it is not needed
inline Tensor empty_if(bool needed, const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return needed ? empty(like, sizes, dtype) : empty(like, {0}, dtype);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline void* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

inline void* pointer_if(bool needed, const Tensor& tensor) { return needed ? tensor.data_ptr() : nullptr; }

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// seed [] int64, on the device of the call
inline Dropout dropout_of(double p, const std::optional<Tensor>& seed, int64_t site) {
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
    check(x.dim() == 2 && x.size(1) >= 1 && x.size(1) <= kMaxInt32, "add_layer_norm: x is not [T, 1 or more]");
    return {x.data_ptr(), pointer(bias), residual.data_ptr(), gamma.data_ptr(), dtype_of(x), dtype_of(residual),
            x.size(0), static_cast<int>(x.size(1)), dropout_of(p, seed, site)};
  }
};

inline AddLayerNormTensors contiguous_inputs(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
                                      const Tensor& gamma) {
  return {torch::stable::contiguous(x), contiguous(bias), torch::stable::contiguous(residual),
          torch::stable::contiguous(gamma)};
}

inline Indices indices_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.scalar_type() == ScalarType::Long};
}

struct EmbedLayerNormTensors {
  Tensor ids;
  std::optional<Tensor> types;
  Tensor positions, words;
  std::optional<Tensor> type_table;
  Tensor position_table, gamma;

  EmbedLayerNorm inputs(double p, const std::optional<Tensor>& seed) const {
    check(words.size(1) >= 1 && words.size(1) <= kMaxInt32, "embed_layer_norm: hidden size is not 1 or more");
    const Table none = {nullptr, {nullptr, false}, 0};
    const Table kinds = has_types() ? table_of(*type_table, *types) : none;
    return {table_of(words, ids), kinds, table_of(position_table, positions), gamma.data_ptr(), dtype_of(words),
            ids.size(0), static_cast<int>(words.size(1)), dropout_of(p, seed, 3)};
  }

  bool has_types() const { return types.has_value() && type_table.has_value(); }

  static Table table_of(const Tensor& table, const Tensor& indices) {
    return {table.data_ptr(), indices_of(indices), table.size(0)};
  }
};

inline EmbedLayerNormTensors contiguous_tables(const Tensor& ids, const std::optional<Tensor>& types, const Tensor& positions,
                                        const Tensor& words, const std::optional<Tensor>& type_table,
                                        const Tensor& position_table, const Tensor& gamma) {
  using torch::stable::contiguous;
  return {contiguous(ids), fastbert::contiguous(types), contiguous(positions), contiguous(words),
          fastbert::contiguous(type_table), contiguous(position_table), contiguous(gamma)};
}

struct AttentionTensors {
  Tensor qkv, cu_seqlens;
  std::optional<Tensor> keep_bits, order;
  const std::vector<int64_t>& classes;

  AttentionTensors(const Tensor& qkv, const Tensor& cu_seqlens, const std::optional<Tensor>& keep_bits,
                   const std::optional<Tensor>& order, const std::vector<int64_t>& classes)
      : qkv(qkv), cu_seqlens(torch::stable::contiguous(cu_seqlens)),
        keep_bits(contiguous(keep_bits)), order(contiguous(order)), classes(classes) {
    check(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(2) <= kMaxInt32 && qkv.size(3) >= 1 && qkv.size(3) <= kMaxInt32,
          "attention: qkv is not [T, 3, N, 1 or more]");
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

inline Tensor sum_of_rows(const Tensor& x) {
  const int64_t rows = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
}

// dqkv [T, 3, N, D] and its sum over T, each if it is needed
inline std::tuple<Tensor, Tensor> attention_gradients(const Tensor& dqkv, const std::vector<bool>& needed) {
  const auto none = [&] { return empty(dqkv, {0}, dqkv.scalar_type()); };
  if (!needed[1]) return {needed[0] ? dqkv : none(), none()};
  const Tensor sums = sum_of_rows(torch::stable::flatten(dqkv, 1));
  return {needed[0] ? dqkv : none(), torch::stable::reshape(sums, {3, dqkv.size(2), dqkv.size(3)})};
}

// The ops that the CPU has kernels for.
inline void define_ops_of_cpu(torch::stable::detail::StableLibrary& m) {
  m.def("unpad(Tensor mask, int tokens=-1) -> (Tensor indices, Tensor cu_seqlens, Tensor order)");
  m.def(
      "attention(Tensor qkv, Tensor cu_seqlens, int max_seqlen, float scale, Tensor? keep_bits=None, float p=0.0,"
      " Tensor? order=None, int[] classes=[], Tensor? bias=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, int max_seqlen,"
      " float scale, Tensor? keep_bits, float p, Tensor? order, int[] classes, bool[] needed)"
      " -> (Tensor dqkv, Tensor dbias)");
  m.def(
      "add_layer_norm(Tensor x, Tensor? bias, Tensor residual, Tensor gamma, Tensor beta, float eps, float p=0.0,"
      " Tensor? seed=None, int site=0) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor grad, Tensor x, Tensor? bias, Tensor residual, Tensor gamma, Tensor mean,"
      " Tensor rstd, float p, Tensor? seed, int site, bool[] needed)"
      " -> (Tensor dx, Tensor dbias, Tensor dresidual, Tensor dgamma, Tensor dbeta)");
  m.def(
      "embed_layer_norm(Tensor ids, Tensor? types, Tensor positions, Tensor words, Tensor? type_table,"
      " Tensor position_table, Tensor gamma, Tensor beta, float eps, float p=0.0, Tensor? seed=None,"
      " int word_padding=-1, int position_padding=-1, bool save=False)"
      " -> (Tensor y, Tensor mean, Tensor rstd, Tensor pre)");
  m.def(
      "embed_layer_norm_backward(Tensor grad, Tensor ids, Tensor? types, Tensor positions, Tensor words,"
      " Tensor? type_table, Tensor position_table, Tensor gamma, Tensor mean, Tensor rstd, Tensor pre, float p,"
      " Tensor? seed, int word_padding, int position_padding, bool[] needed)"
      " -> (Tensor dwords, Tensor dtypes, Tensor dpositions, Tensor dgamma, Tensor dbeta)");
}

}  // namespace
}  // namespace fastbert
