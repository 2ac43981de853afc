// The ops of the native library for torch: checks, allocates, and calls cpu/ or cuda/. The only file that sees torch,
// through its stable ABI, so that one library serves every torch from 2.11 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "add_layer_norm.h"
#include "attention.h"
#include "bias_gelu.h"
#include "dropout_bits.h"
#include "embed_layer_norm.h"
#include "pad.h"
#include "unpad.h"

namespace fastbert {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kElementsPerTask = 1 << 15;
constexpr int64_t kProductsPerTask = 1 << 18, kSharesPerThread = 4, kLeastQueries = 128;  // of attention on CPUs

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

int32_t* ints(const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); }

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

// seed [] int64, on the device of the call
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
    check(x.dim() == 2 && x.size(1) >= 1 && x.size(1) <= kMaxInt32, "add_layer_norm: x is not [T, 1 or more]");
    return {x.data_ptr(), pointer(bias), residual.data_ptr(), gamma.data_ptr(), dtype_of(x), dtype_of(residual),
            x.size(0), static_cast<int>(x.size(1)), dropout_of(p, seed, site)};
  }
};

AddLayerNormTensors contiguous_inputs(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
                                      const Tensor& gamma) {
  return {torch::stable::contiguous(x), contiguous(bias), torch::stable::contiguous(residual),
          torch::stable::contiguous(gamma)};
}

Indices indices_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.scalar_type() == ScalarType::Long}; }

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

EmbedLayerNormTensors contiguous_tables(const Tensor& ids, const std::optional<Tensor>& types, const Tensor& positions,
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

Tensor sum_of_rows(const Tensor& x) {
  const int64_t rows = 0;
  return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
}

// dqkv [T, 3, N, D] and its sum over T, each if it is needed
std::tuple<Tensor, Tensor> attention_gradients(const Tensor& dqkv, const std::vector<bool>& needed) {
  const auto none = [&] { return empty(dqkv, {0}, dqkv.scalar_type()); };
  if (!needed[1]) return {needed[0] ? dqkv : none(), none()};
  const Tensor sums = sum_of_rows(torch::stable::flatten(dqkv, 1));
  return {needed[0] ? dqkv : none(), torch::stable::reshape(sums, {3, dqkv.size(2), dqkv.size(3)})};
}

#ifndef FASTBERT_EMULATED

// mask [B, S] -> indices [T] int64, cu_seqlens [B + 1] int32, order [B] int32; tokens: T, if it is known
std::tuple<Tensor, Tensor, Tensor> unpad_cpu(const Tensor& mask_tensor, int64_t) {
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
  Tensor order_tensor = empty_on_device_of(mask_tensor, mask.rows, ScalarType::Int);
  cpu::order_rows(mask.rows, cu_seqlens, static_cast<int32_t*>(order_tensor.data_ptr()));
  return {indices_tensor, cu_tensor, order_tensor};
}

constexpr std::align_val_t kLine{64};  // of the cache

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes) { return Memory(::operator new(bytes, kLine)); }

// Memory of a task of the kernels of rows.
class TaskMemory {
 public:
  explicit TaskMemory(int64_t hidden)
      : sums_(allocate((hidden + cpu::kRowPadding) * sizeof(float))),
        draws_(allocate((hidden + cpu::kRowPadding) * sizeof(uint16_t))) {}

  cpu::RowMemory get() const { return {static_cast<float*>(sums_.get()), static_cast<uint16_t*>(draws_.get())}; }

 private:
  Memory sums_, draws_;
};

// f(memory, first, last) for parts of the rows [0, rows)
template <typename F>
void parallel_rows(int64_t rows, int64_t hidden, F f) {
  torch::stable::parallel_for(0, rows, kElementsPerTask / hidden + 1, [&](int64_t first, int64_t last) {
    const TaskMemory memory(hidden);
    f(memory.get(), first, last);
  });
}

// f(memory, block) for the blocks of the rows [0, rows)
template <typename F>
void parallel_blocks(int64_t rows, int64_t hidden, F f) {
  const int64_t grain = kElementsPerTask / (cpu::kBlockRows * hidden) + 1;
  torch::stable::parallel_for(0, cpu::block_count(rows), grain, [&](int64_t first, int64_t last) {
    const TaskMemory memory(hidden);
    for (int64_t block = first; block < last; ++block) f(memory.get(), block);
  });
}

// x, residual [T, H] -> y [T, H] in the residual's dtype, mean [T], rstd [T]
std::tuple<Tensor, Tensor, Tensor> add_layer_norm_cpu(const Tensor& x, const std::optional<Tensor>& bias,
                                                      const Tensor& residual, const Tensor& gamma, const Tensor& beta,
                                                      double eps, double p, const std::optional<Tensor>& seed,
                                                      int64_t site) {
  const AddLayerNormTensors tensors = contiguous_inputs(x, bias, residual, gamma);
  const AddLayerNorm inputs = tensors.inputs(p, seed, site);
  const Tensor shift = torch::stable::contiguous(beta);
  const Tensor y = empty(residual, {inputs.rows, inputs.hidden}, residual.scalar_type());
  const Tensor mean = empty(x, {inputs.rows}, ScalarType::Float), rstd = empty(x, {inputs.rows}, ScalarType::Float);
  void *const out = y.data_ptr(), *const shifts = shift.data_ptr();
  float *const means = floats(mean), *const rstds = floats(rstd);
  const auto kernel = cpu::add_layer_norm();
  parallel_rows(inputs.rows, inputs.hidden, [&](cpu::RowMemory memory, int64_t first, int64_t last) {
    kernel(inputs, shifts, static_cast<float>(eps), out, means, rstds, memory, first, last);
  });
  return {y, mean, rstd};
}

// grad [T, H] -> the gradients of x, bias, residual, gamma, beta
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_cpu(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, const Tensor& residual,
    const Tensor& gamma, const Tensor& mean, const Tensor& rstd, double p, const std::optional<Tensor>& seed,
    int64_t site, const std::vector<bool>& needed) {
  const AddLayerNormTensors tensors = contiguous_inputs(x, bias, residual, gamma);
  const AddLayerNorm inputs = tensors.inputs(p, seed, site);
  const Tensor grads = torch::stable::contiguous(grad), means = torch::stable::contiguous(mean),
               rstds = torch::stable::contiguous(rstd);
  const int64_t rows = inputs.rows, hidden = inputs.hidden, blocks = cpu::block_count(rows);
  const ScalarType narrow = x.scalar_type(), wide = residual.scalar_type();
  const bool has_bias = needed[1] && bias.has_value();
  const Tensor dx = empty_if(needed[0], x, {rows, hidden}, narrow), dbias = empty_if(has_bias, x, {hidden}, narrow);
  const Tensor dresidual = empty_if(needed[2], residual, {rows, hidden}, wide);
  const Tensor dgamma = empty_if(needed[3], gamma, {hidden}, wide), dbeta = empty_if(needed[4], gamma, {hidden}, wide);
  const Tensor parts = empty(x, {3, blocks, hidden}, ScalarType::Float);
  const void* const grad_rows = grads.data_ptr();
  void *const dx_rows = pointer_if(needed[0], dx), *const dresidual_rows = pointer_if(needed[2], dresidual);
  float* const sums = floats(parts);
  const float *const mean_rows = floats(means), *const rstd_rows = floats(rstds);
  const auto kernel = cpu::add_layer_norm_backward();
  parallel_blocks(rows, hidden, [&](cpu::RowMemory memory, int64_t block) {
    kernel(inputs, grad_rows, mean_rows, rstd_rows, sums, dx_rows, dresidual_rows, memory, block);
  });
  const auto sum = cpu::add_layer_norm_sum();
  const Dtype wide_dtype = inputs.residual_dtype;
  if (needed[3]) sum(sums, blocks, hidden, wide_dtype, dgamma.data_ptr());
  if (needed[4]) sum(sums + blocks * hidden, blocks, hidden, wide_dtype, dbeta.data_ptr());
  if (has_bias) sum(sums + 2 * blocks * hidden, blocks, hidden, inputs.x_dtype, dbias.data_ptr());
  return {dx, dbias, dresidual, dgamma, dbeta};
}

int64_t index_at(Indices indices, int64_t row) {
  return indices.is_wide ? static_cast<const int64_t*>(indices.data)[row]
                         : static_cast<const int32_t*>(indices.data)[row];
}

void check_indices(const EmbedLayerNorm& inputs) {
  for (const Table& table : {inputs.words, inputs.types, inputs.positions}) {
    bool inside = true;
    for (int64_t row = 0; table.data != nullptr && row < inputs.rows; ++row) {
      const int64_t index = index_at(table.indices, row);
      inside &= index >= 0 && index < table.size;
    }
    check(inside, "index out of range in self");  // PyTorch's words
  }
}

// ids, types, positions [T]; tables [., H] -> y [T, H], mean, rstd [T], the sum [T, H] if it is to be saved
std::tuple<Tensor, Tensor, Tensor, Tensor> embed_layer_norm_cpu(
    const Tensor& ids, const std::optional<Tensor>& types, const Tensor& positions, const Tensor& words,
    const std::optional<Tensor>& type_table, const Tensor& position_table, const Tensor& gamma, const Tensor& beta,
    double eps, double p, const std::optional<Tensor>& seed, int64_t, int64_t, bool save) {
  const auto tensors = contiguous_tables(ids, types, positions, words, type_table, position_table, gamma);
  const EmbedLayerNorm inputs = tensors.inputs(p, seed);
  check_indices(inputs);
  const Tensor shift = torch::stable::contiguous(beta);
  const int64_t rows = inputs.rows, hidden = inputs.hidden;
  const Tensor y = empty(words, {rows, hidden}, words.scalar_type());
  const Tensor pre = empty_if(save, words, {rows, hidden}, words.scalar_type());
  const Tensor mean = empty(words, {rows}, ScalarType::Float), rstd = empty(words, {rows}, ScalarType::Float);
  void *const out = y.data_ptr(), *const saved = pointer_if(save, pre), *const shifts = shift.data_ptr();
  float *const means = floats(mean), *const rstds = floats(rstd);
  const auto kernel = cpu::embed_layer_norm();
  parallel_rows(rows, hidden, [&](cpu::RowMemory memory, int64_t first, int64_t last) {
    kernel(inputs, shifts, static_cast<float>(eps), out, means, rstds, saved, memory, first, last);
  });
  return {y, mean, rstd, pre};
}

// dx [T, H] added up by a table's indices [T], always in the order of the rows -> the gradient of the table
Tensor table_gradient_cpu(const Tensor& dx, const Table& table, int64_t padding, const Tensor& like, Dtype dtype) {
  const int64_t rows = dx.size(0), hidden = dx.size(1);
  std::vector<std::pair<int64_t, int32_t>> pairs;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t key = index_at(table.indices, row);
    if (key != padding) pairs.emplace_back(key, static_cast<int32_t>(row));
  }
  std::sort(pairs.begin(), pairs.end());
  std::vector<int32_t> order;
  std::vector<int64_t> starts, keys;
  for (const auto& [key, row] : pairs) {
    if (keys.empty() || key != keys.back()) {
      starts.push_back(static_cast<int64_t>(order.size()));
      keys.push_back(key);
    }
    order.push_back(row);
  }
  const auto count = static_cast<int64_t>(keys.size()), tiles = count * cpu::tile_count(hidden);
  starts.push_back(static_cast<int64_t>(order.size()));
  const Groups groups = {order.data(), starts.data(), keys.data(), count};
  const Tensor out = torch::stable::new_zeros(like, {table.size, hidden});
  void* const sums = out.data_ptr();
  const float* const dx_rows = floats(dx);
  const auto kernel = cpu::embed_layer_norm_table();
  const int64_t grain = kElementsPerTask * tiles / (rows * hidden + 1) + 1;
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) {
    kernel(dx_rows, groups, hidden, dtype, sums, first, last);
  });
  return out;
}

// grad [T, H] -> the gradients of words, type_table, position_table, gamma, beta
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embed_layer_norm_backward_cpu(
    const Tensor& grad, const Tensor& ids, const std::optional<Tensor>& types, const Tensor& positions,
    const Tensor& words, const std::optional<Tensor>& type_table, const Tensor& position_table, const Tensor& gamma,
    const Tensor& mean, const Tensor& rstd, const Tensor& pre, double p, const std::optional<Tensor>& seed,
    int64_t word_padding, int64_t position_padding, const std::vector<bool>& needed) {
  const auto tensors = contiguous_tables(ids, types, positions, words, type_table, position_table, gamma);
  const EmbedLayerNorm inputs = tensors.inputs(p, seed);
  check_indices(inputs);
  check(inputs.rows <= kMaxInt32, "embed_layer_norm: more than 2147483647 rows");
  const Tensor grads = torch::stable::contiguous(grad), means = torch::stable::contiguous(mean),
               rstds = torch::stable::contiguous(rstd), saved = torch::stable::contiguous(pre);
  const int64_t rows = inputs.rows, hidden = inputs.hidden, blocks = cpu::block_count(rows);
  const ScalarType kind = words.scalar_type();
  const Tensor parts = empty(words, {2, blocks, hidden}, ScalarType::Float);
  const Tensor dx = empty(words, {rows, hidden}, ScalarType::Float);
  const Tensor dgamma = empty_if(needed[3], words, {hidden}, kind), dbeta = empty_if(needed[4], words, {hidden}, kind);
  const void *const grad_rows = grads.data_ptr(), *const pre_rows = pointer_if(pre.dim() == 2, saved);
  float *const sums = floats(parts), *const dx_rows = floats(dx);
  const float *const mean_rows = floats(means), *const rstd_rows = floats(rstds);
  const auto kernel = cpu::embed_layer_norm_backward();
  parallel_blocks(rows, hidden, [&](cpu::RowMemory memory, int64_t block) {
    kernel(inputs, grad_rows, mean_rows, rstd_rows, pre_rows, sums, dx_rows, memory, block);
  });
  const auto sum = cpu::embed_layer_norm_sum();
  if (needed[3]) sum(sums, blocks, hidden, inputs.dtype, dgamma.data_ptr());
  if (needed[4]) sum(sums + blocks * hidden, blocks, hidden, inputs.dtype, dbeta.data_ptr());
  const auto gradient = [&](bool wanted, const Table& table, int64_t padding) {
    return wanted ? table_gradient_cpu(dx, table, padding, words, inputs.dtype) : empty(words, {0}, kind);
  };
  return {gradient(needed[0], inputs.words, word_padding),
          gradient(needed[1] && tensors.has_types(), inputs.types, -1),
          gradient(needed[2], inputs.positions, position_padding), dgamma, dbeta};
}

// The shares of a call, the longest sequences first: all queries of a sequence, or so many that all threads have
// several shares; threads 0: all.
std::vector<cpu::Share> attention_shares(const Attention& inputs, const std::vector<int32_t>& order, int64_t threads) {
  const auto length_of = [&](int64_t i) { return int64_t{inputs.cu_seqlens[i + 1]} - inputs.cu_seqlens[i]; };
  int64_t scores = 0;
  for (const int32_t i : order) scores += length_of(i) * length_of(i) * inputs.heads;
  std::vector<cpu::Share> shares;
  for (const int32_t i : order) {
    const int64_t length = length_of(i);
    int64_t queries = length;
    if (threads > 0) {
      const int64_t most = scores / (kSharesPerThread * threads * (length + 1));
      queries = std::max<int64_t>(most / kLeastQueries, 1) * kLeastQueries;
    }
    for (int64_t head = 0; head < inputs.heads; ++head) {
      for (int64_t first = 0; first < length; first += queries) {
        shares.push_back({i, head, first, std::min(first + queries, length)});
      }
    }
  }
  return shares;
}

// The sequences in the order given, else the longest first; checked is all by which the kernels find what they read.
std::vector<int32_t> attention_order(const AttentionTensors& tensors, const Attention& inputs) {
  const int64_t batch = tensors.cu_seqlens.size(0) - 1;
  int64_t longest = 0;
  bool ascend = inputs.cu_seqlens[0] >= 0 && inputs.cu_seqlens[batch] <= inputs.tokens;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t length = int64_t{inputs.cu_seqlens[i + 1]} - inputs.cu_seqlens[i];
    ascend &= length >= 0;
    longest = std::max(longest, length);
  }
  check(ascend, "attention: cu_seqlens do not ascend from 0 to T");
  check(!tensors.keep_bits.has_value() || inputs.width * 32 >= longest, "attention: keep_bits are too narrow");
  std::vector<int32_t> order(batch);
  if (inputs.order == nullptr) {
    cpu::order_rows(batch, inputs.cu_seqlens, order.data());
  } else {
    std::copy(inputs.order, inputs.order + batch, order.begin());
    check(std::all_of(order.begin(), order.end(), [=](int32_t i) { return i >= 0 && i < batch; }),
          "attention: order holds no sequences");
  }
  return order;
}

// kernel(share, memory) for all shares; memory_for(length, dim): how many bytes each needs
template <typename F>
void run_shares(const Attention& inputs, const std::vector<cpu::Share>& shares, int64_t threads,
                int64_t (*memory_for)(int64_t, int64_t), F kernel) {
  std::vector<size_t> starts;  // of the tasks: so many shares each that a task is worth a thread
  int64_t longest = 0, products = kProductsPerTask;
  for (size_t i = 0; i < shares.size(); ++i) {
    if (products >= kProductsPerTask) {
      starts.push_back(i);
      products = 0;
    }
    const int64_t length = inputs.cu_seqlens[shares[i].sequence + 1] - inputs.cu_seqlens[shares[i].sequence];
    products += (shares[i].last - shares[i].first + 1) * length * inputs.dim;
    longest = std::max(longest, length);
  }
  const auto tasks = static_cast<int64_t>(starts.size());
  starts.push_back(shares.size());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    const Memory memory = allocate(memory_for(longest, inputs.dim));
    for (int64_t task = next++; task < tasks; task = next++) {
      for (size_t i = starts[task]; i < starts[task + 1]; ++i) kernel(shares[i], static_cast<char*>(memory.get()));
    }
  });
}

// qkv [T, 3, N, D], in place where its last stride is 1 -> out [T, N, D], lse [N, T]
std::tuple<Tensor, Tensor> attention_cpu(const Tensor& qkv, const Tensor& cu_seqlens, int64_t, double scale,
                                         const std::optional<Tensor>& keep_bits, double p,
                                         const std::optional<Tensor>& order, const std::vector<int64_t>& classes,
                                         const std::optional<Tensor>&) {
  const bool in_place = qkv.dim() == 4 && qkv.stride(3) == 1;
  const AttentionTensors tensors(in_place ? qkv : torch::stable::contiguous(qkv), cu_seqlens, keep_bits, order, classes);
  const Attention inputs = tensors.inputs(scale, p);
  const cpu::Strides strides = {tensors.qkv.stride(0), tensors.qkv.stride(1), tensors.qkv.stride(2)};
  const Tensor out = empty(qkv, {inputs.tokens, inputs.heads, inputs.dim}, qkv.scalar_type());
  const Tensor lse = empty(qkv, {inputs.heads, inputs.tokens}, ScalarType::Float);
  const std::vector<int32_t> sequences = attention_order(tensors, inputs);
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<cpu::Share> shares = attention_shares(inputs, sequences, threads);
  void* const rows = out.data_ptr();
  float* const lses = floats(lse);
  const auto kernel = cpu::attention();
  run_shares(inputs, shares, threads, cpu::attention_memory, [&](const cpu::Share& share, char* memory) {
    kernel(inputs, strides, share, rows, lses, memory);
  });
  return {out, lse};
}

// grad [T, N, D], lse [N, T] -> dqkv [T, 3, N, D], its sum over T [3, N, D]; out is not read
std::tuple<Tensor, Tensor> attention_backward_cpu(const Tensor& grad, const Tensor& qkv, const Tensor&,
                                                  const Tensor& lse, const Tensor& cu_seqlens, int64_t, double scale,
                                                  const std::optional<Tensor>& keep_bits, double p,
                                                  const std::optional<Tensor>& order,
                                                  const std::vector<int64_t>& classes,
                                                  const std::vector<bool>& needed) {
  const AttentionTensors tensors(torch::stable::contiguous(qkv), cu_seqlens, keep_bits, order, classes);
  const Attention inputs = tensors.inputs(scale, p);
  const Tensor grads = torch::stable::contiguous(grad), lses = torch::stable::contiguous(lse);
  const Tensor dqkv = empty(qkv, {inputs.tokens, 3, inputs.heads, inputs.dim}, qkv.scalar_type());
  const std::vector<int32_t> sequences = attention_order(tensors, inputs);
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<cpu::Share> shares = attention_shares(inputs, sequences, 0);
  const void* const grad_rows = grads.data_ptr();
  void* const rows = dqkv.data_ptr();
  const float* const lse_rows = floats(lses);
  const auto kernel = cpu::attention_backward();
  run_shares(inputs, shares, threads, cpu::attention_backward_memory, [&](const cpu::Share& share, char* memory) {
    kernel(inputs, share.sequence, share.head, grad_rows, lse_rows, rows, memory);
  });
  return attention_gradients(dqkv, needed);
}

int64_t isa() { return static_cast<int64_t>(cpu::isa()); }

// Kernels use at most this instruction set from now on; returns which they use.
int64_t limit_isa(int64_t most) {
  check(most >= 0 && most <= static_cast<int64_t>(cpu::Isa::avx512_bf16), "limit_isa: there is no such instruction set");
  cpu::limit_isa(static_cast<cpu::Isa>(most));
  return isa();
}

#endif

// The ops that the CPU has kernels for.
void define_ops_of_cpu(torch::stable::detail::StableLibrary& m) {
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

#ifndef FASTBERT_EMULATED

STABLE_TORCH_LIBRARY(fastbert_native, m) {
  fastbert::define_ops_of_cpu(m);
  m.def("isa() -> int");
  m.def("limit_isa(int most) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CPU, m) {
  m.impl("unpad", TORCH_BOX(&fastbert::unpad_cpu));
  m.impl("attention", TORCH_BOX(&fastbert::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&fastbert::attention_backward_cpu));
  m.impl("add_layer_norm", TORCH_BOX(&fastbert::add_layer_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&fastbert::add_layer_norm_backward_cpu));
  m.impl("embed_layer_norm", TORCH_BOX(&fastbert::embed_layer_norm_cpu));
  m.impl("embed_layer_norm_backward", TORCH_BOX(&fastbert::embed_layer_norm_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastbert::isa));
  m.impl("limit_isa", TORCH_BOX(&fastbert::limit_isa));
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

// mask [B, S] -> indices [T] int64, cu_seqlens [B + 1] int32, order [B] int32. Waits for the device to learn T, unless
// `tokens` tells it.
std::tuple<Tensor, Tensor, Tensor> unpad_cuda(const Tensor& mask_tensor, int64_t tokens) {
  const Mask mask = mask_of(mask_tensor);
  check(reinterpret_cast<uintptr_t>(mask.data) % mask.element_size == 0, "unpad: mask is not aligned to its elements");
  const Device device(mask_tensor);
  const Tensor cu_tensor = empty_on_device_of(mask_tensor, mask.rows + 1, ScalarType::Int);
  const Tensor order_tensor = empty_on_device_of(mask_tensor, mask.rows, ScalarType::Int);
  const Tensor total_tensor = empty_on_device_of(mask_tensor, 1, ScalarType::Long);
  int64_t total = 0;
  check_cuda("unpad", cuda::count(mask, ints(cu_tensor), ints(order_tensor),
                                  static_cast<int64_t*>(total_tensor.data_ptr()), tokens < 0 ? &total : nullptr,
                                  device.stream));
  const Tensor indices_tensor = empty_indices(mask_tensor, tokens < 0 ? total : tokens);
  check_cuda("unpad", cuda::fill(mask, ints(cu_tensor), indices_tensor.size(0),
                                 static_cast<int64_t*>(indices_tensor.data_ptr()), device.stream));
  return {indices_tensor, cu_tensor, order_tensor};
}

// x, residual [T, H] -> y [T, H] in the residual's dtype, mean [T], rstd [T]
std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const std::optional<Tensor>& bias,
                                                  const Tensor& residual, const Tensor& gamma, const Tensor& beta,
                                                  double eps, double p, const std::optional<Tensor>& seed,
                                                  int64_t site) {
  const Device device(x);
  const AddLayerNormTensors tensors = contiguous_inputs(x, bias, residual, gamma);
  const AddLayerNorm inputs = tensors.inputs(p, seed, site);
  check(inputs.hidden <= kMostHidden, "add_layer_norm: hidden size is over 4096");
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
  check(inputs.hidden <= kMostHidden, "add_layer_norm: hidden size is over 4096");
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

// x [T, H], indices [T] -> [B, S, H], zeros in rows that are not in indices
Tensor pad(const Tensor& x, const Tensor& indices, int64_t batch, int64_t length) {
  const Device device(x);
  const Tensor rows = torch::stable::contiguous(x), places = torch::stable::contiguous(indices);
  const int64_t tokens = x.size(0), hidden = x.size(1), size = static_cast<int64_t>(x.element_size());
  check(batch * length <= kMaxInt32 && tokens <= kMaxInt32, "pad: more than 2147483647 rows");
  const Tensor out = empty(x, {batch, length, hidden}, x.scalar_type());
  const Tensor inverse = empty(x, {batch * length}, ScalarType::Int);
  check_cuda("pad", cuda::pad(rows.data_ptr(), indices_of(places), tokens, batch * length, hidden * size,
                              static_cast<int>(size), ints(inverse), out.data_ptr(), device.stream));
  return out;
}

// grad [B, S, H] -> its rows at indices [T, H]
Tensor pad_backward(const Tensor& grad, const Tensor& indices) {
  const Device device(grad);
  const Tensor rows = torch::stable::contiguous(grad), places = torch::stable::contiguous(indices);
  const int64_t tokens = indices.size(0), hidden = grad.size(2), size = static_cast<int64_t>(grad.element_size());
  const Tensor out = empty(grad, {tokens, hidden}, grad.scalar_type());
  check_cuda("pad_backward",
             cuda::pad_backward(rows.data_ptr(), indices_of(places), tokens, grad.size(0) * grad.size(1), hidden * size,
                                static_cast<int>(size), out.data_ptr(), device.stream));
  return out;
}

// seed [], cu_seqlens [B + 1] int32 -> int32 [N, T, ceil(max_seqlen / 32)]
Tensor dropout_bits(const Tensor& seed, int64_t site, const Tensor& cu_seqlens, int64_t tokens, int64_t max_seqlen,
                    int64_t heads, double p) {
  const Device device(seed);
  const Tensor bounds = torch::stable::contiguous(cu_seqlens);
  const int64_t words = (max_seqlen + 31) / 32;
  const Tensor bits = empty(seed, {heads, tokens, words}, ScalarType::Int);
  check_cuda("dropout_bits", cuda::dropout_bits(dropout_of(p, seed, site), ints(bounds), bounds.size(0) - 1, tokens,
                                                static_cast<int>(words), static_cast<int>(heads), ints(bits),
                                                device.stream));
  return bits;
}

// ids, types, positions [T]; tables [., H] -> y [T, H], mean, rstd [T], the sum [T, H] if it is to be saved
std::tuple<Tensor, Tensor, Tensor, Tensor> embed_layer_norm(
    const Tensor& ids, const std::optional<Tensor>& types, const Tensor& positions, const Tensor& words,
    const std::optional<Tensor>& type_table, const Tensor& position_table, const Tensor& gamma, const Tensor& beta,
    double eps, double p, const std::optional<Tensor>& seed, int64_t, int64_t, bool save) {
  const Device device(words);
  const auto tensors = contiguous_tables(ids, types, positions, words, type_table, position_table, gamma);
  const EmbedLayerNorm inputs = tensors.inputs(p, seed);
  check(inputs.hidden <= kMostHidden, "embed_layer_norm: hidden size is over 4096");
  const Tensor shift = torch::stable::contiguous(beta);
  const int64_t rows = inputs.rows, hidden = inputs.hidden;
  const Tensor y = empty(words, {rows, hidden}, words.scalar_type());
  const Tensor pre = empty_if(save, words, {rows, hidden}, words.scalar_type());
  const Tensor mean = empty(words, {rows}, ScalarType::Float), rstd = empty(words, {rows}, ScalarType::Float);
  check_cuda("embed_layer_norm",
             cuda::embed_layer_norm(inputs, shift.data_ptr(), static_cast<float>(eps), y.data_ptr(), floats(mean),
                                    floats(rstd), pointer_if(save, pre), device.stream));
  return {y, mean, rstd, pre};
}

// keys [T] in stable ascending order, and which each was
std::tuple<Tensor, Tensor> sorted(const Tensor& keys) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack = {from(keys), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// dx [T, H] added up by keys [T], always in the same order -> the gradient of a table
Tensor table_gradient(const Tensor& dx, const Tensor& keys, const Tensor& table, void* stream) {
  const int64_t rows = dx.size(0), hidden = dx.size(1), chunks = (rows + cuda::kChunk - 1) / cuda::kChunk;
  const Tensor out = torch::stable::new_zeros(table, {table.size(0), hidden});
  if (rows == 0) return out;
  const auto [ordered, order] = sorted(keys);
  const Tensor parts = empty(dx, {chunks, 2, hidden}, ScalarType::Float);
  check_cuda("embed_layer_norm_backward",
             cuda::add_runs(floats(dx), ints(ordered), static_cast<const int64_t*>(order.data_ptr()), rows,
                            static_cast<int>(hidden), table.size(0), floats(parts), dtype_of(table), out.data_ptr(),
                            stream));
  return out;
}

// grad [T, H] -> the gradients of words, type_table, position_table, gamma, beta
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embed_layer_norm_backward(
    const Tensor& grad, const Tensor& ids, const std::optional<Tensor>& types, const Tensor& positions,
    const Tensor& words, const std::optional<Tensor>& type_table, const Tensor& position_table, const Tensor& gamma,
    const Tensor& mean, const Tensor& rstd, const Tensor& pre, double p, const std::optional<Tensor>& seed,
    int64_t word_padding, int64_t position_padding, const std::vector<bool>& needed) {
  const Device device(words);
  const auto tensors = contiguous_tables(ids, types, positions, words, type_table, position_table, gamma);
  const EmbedLayerNorm inputs = tensors.inputs(p, seed);
  check(inputs.hidden <= kMostHidden, "embed_layer_norm: hidden size is over 4096");
  const Tensor grads = torch::stable::contiguous(grad), means = torch::stable::contiguous(mean),
               rstds = torch::stable::contiguous(rstd), saved = torch::stable::contiguous(pre);
  const int64_t rows = inputs.rows, hidden = inputs.hidden;
  const bool wanted[] = {needed[0], needed[1] && tensors.has_types(), needed[2]};
  const ScalarType kind = words.scalar_type();
  int64_t part_count = 0;
  check_cuda("embed_layer_norm_backward", cuda::embed_layer_norm_parts(rows, inputs.hidden, &part_count));
  const Tensor parts = empty(words, {2, part_count, hidden}, ScalarType::Float);
  const Tensor dx = empty(words, {rows, hidden}, ScalarType::Float), keys = empty(words, {3, rows}, ScalarType::Int);
  const auto keys_of = [&](int which) { return wanted[which] ? ints(keys) + which * rows : nullptr; };
  const Tensor dgamma = empty_if(needed[3], words, {hidden}, kind), dbeta = empty_if(needed[4], words, {hidden}, kind);
  check_cuda("embed_layer_norm_backward",
             cuda::embed_layer_norm_backward(
                 inputs, grads.data_ptr(), floats(means), floats(rstds), pointer_if(pre.dim() == 2, saved),
                 {keys_of(0), keys_of(1), keys_of(2), word_padding, position_padding}, floats(parts), part_count,
                 floats(dx), pointer_if(needed[3], dgamma), pointer_if(needed[4], dbeta), device.stream));
  const auto gradient = [&](int which, const Tensor& table) {
    if (!wanted[which]) return empty(words, {0}, kind);
    return table_gradient(dx, torch::stable::select(keys, 0, which), table, device.stream);
  };
  const Tensor& kinds = tensors.has_types() ? *tensors.type_table : words;
  return {gradient(0, words), gradient(1, kinds), gradient(2, position_table), dgamma, dbeta};
}

BiasGelu bias_gelu_inputs(const Tensor& x, const std::optional<Tensor>& bias, bool is_tanh) {
  return {x.data_ptr(), pointer(bias), dtype_of(x), x.size(0), x.size(1), is_tanh};
}

// x [T, I], bias [I] -> gelu(x + bias) [T, I]
Tensor bias_gelu(const Tensor& x, const std::optional<Tensor>& bias, bool is_tanh) {
  const Device device(x);
  const Tensor rows = torch::stable::contiguous(x);
  const std::optional<Tensor> shift = contiguous(bias);
  const Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  check_cuda("bias_gelu",
             cuda::bias_gelu(bias_gelu_inputs(rows, shift, is_tanh), y.data_ptr(), nullptr, device.stream));
  return y;
}

// grad * slope at pre + bias [T, I], its sums over T [I] if `sums`, and gelu(pre + bias) [T, I] if `with_y`
std::tuple<Tensor, Tensor, Tensor> gelu_gradients(const Tensor& grad, const Tensor& pre,
                                                  const std::optional<Tensor>& bias, bool is_tanh, bool sums,
                                                  bool with_y, void* stream) {
  const Tensor grads = torch::stable::contiguous(grad), rows = torch::stable::contiguous(pre);
  const std::optional<Tensor> shift = contiguous(bias);
  const int64_t tokens = pre.size(0), columns = pre.size(1);
  const ScalarType kind = pre.scalar_type();
  int64_t part_count = 0;
  check_cuda("bias_gelu_backward", cuda::bias_gelu_parts(tokens, &part_count));
  const Tensor parts = empty(pre, {sums ? part_count : 0, columns}, ScalarType::Float);
  const Tensor dx = empty(pre, {tokens, columns}, kind), dbias = empty_if(sums, pre, {columns}, kind);
  const Tensor y = empty_if(with_y, pre, {tokens, columns}, kind);
  check_cuda("bias_gelu_backward",
             cuda::bias_gelu_backward(bias_gelu_inputs(rows, shift, is_tanh), grads.data_ptr(),
                                      sums ? floats(parts) : nullptr, part_count, dx.data_ptr(),
                                      pointer_if(sums, dbias), pointer_if(with_y, y), stream));
  return {dx, dbias, y};
}

// grad [T, I] -> the gradients of x, bias
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                              bool is_tanh, const std::vector<bool>& needed) {
  const Device device(x);
  const auto [dx, dbias, y] =
      gelu_gradients(grad, x, bias, is_tanh, needed[1] && bias.has_value(), false, device.stream);
  return {needed[0] ? dx : empty(x, {0}, x.scalar_type()), dbias};
}

// Products are the library's of torch, through its dispatcher, which keeps torch's switches: TF32, determinism.

// x [T, K], weight [N, K] -> x . weight^T [T, N]
Tensor product(const Tensor& x, const Tensor& weight) {
  return torch::stable::contiguous(torch::stable::matmul(x, torch::stable::transpose(weight, 0, 1)));
}

// grad [T, N], x [T, K] -> grad^T . x [N, K]
Tensor weight_gradient(const Tensor& grad, const Tensor& x) {
  return torch::stable::matmul(torch::stable::transpose(grad, 0, 1), x);
}

// x [T, K] -> gelu(x . weight^T + bias) [T, N], and x . weight^T + bias if it is to be saved
std::tuple<Tensor, Tensor> linear_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       bool is_tanh, bool save) {
  const Device device(x);
  const Tensor made = product(x, weight);
  const std::optional<Tensor> shift = contiguous(bias);
  const Tensor y = save ? empty(made, {made.size(0), made.size(1)}, made.scalar_type()) : made;
  check_cuda("linear_gelu", cuda::bias_gelu(bias_gelu_inputs(made, shift, is_tanh), y.data_ptr(),
                                            pointer_if(save, made), device.stream));
  return {y, save ? made : empty(x, {0}, x.scalar_type())};
}

// grad [T, N] -> the gradients of x, weight, bias; an empty `pre` is computed again
std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& pre,
                                                        bool is_tanh, const std::vector<bool>& needed) {
  const Device device(x);
  const bool saved = pre.dim() == 2;
  const auto [dpre, dbias, y] =
      gelu_gradients(grad, saved ? pre : product(x, weight), saved ? std::nullopt : bias, is_tanh,
                     needed[2], false, device.stream);
  return {needed[0] ? torch::stable::matmul(dpre, weight) : empty(x, {0}, x.scalar_type()),
          needed[1] ? weight_gradient(dpre, x) : empty(x, {0}, x.scalar_type()), dbias};
}

// x [T, H], w1 [I, H], w2 [H, I] -> gelu(x . w1^T + b1) . w2^T + b2 [T, H], and x . w1^T + b1 [T, I] to be saved
std::tuple<Tensor, Tensor> feed_forward(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                                        const Tensor& w2, const std::optional<Tensor>& b2, bool is_tanh, bool save) {
  using torch::stable::detail::from;
  const auto [inner, pre] = linear_gelu(x, w1, b1, is_tanh, save);
  std::array<StableIValue, 3> stack = {from(inner), from(w2), from(b2)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), pre};
}

// grad [T, H] -> the gradients of x, w1, b1, w2, b2; an empty `pre` is computed again
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad, const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
    const Tensor& pre, bool is_tanh, const std::vector<bool>& needed) {
  const Device device(x);
  const bool saved = pre.dim() == 2, first = needed[0] || needed[1] || needed[2];
  const auto none = [&] { return empty(x, {0}, x.scalar_type()); };  // no two outputs share memory
  Tensor dx = none(), dw1 = none(), db1 = none(), dw2 = none();
  if (first || needed[3]) {
    const Tensor made = saved ? torch::stable::contiguous(pre) : product(x, w1);
    const std::optional<Tensor> bias = saved ? std::nullopt : contiguous(b1);
    Tensor inner = none();
    if (first) {
      const auto [dpre, sums, y] =
          gelu_gradients(torch::stable::matmul(grad, w2), made, bias, is_tanh, needed[2], needed[3], device.stream);
      if (needed[0]) dx = torch::stable::matmul(dpre, w1);
      if (needed[1]) dw1 = weight_gradient(dpre, x);
      db1 = sums;
      inner = y;
    } else {
      inner = bias_gelu(made, bias, is_tanh);
    }
    if (needed[3]) dw2 = weight_gradient(grad, inner);
  }
  return {dx, dw1, db1, dw2, needed[4] ? sum_of_rows(grad) : none()};
}

// qkv [T, 3, N, D] -> out [T, N, D], lse [N, T]
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen, double scale,
                                     const std::optional<Tensor>& keep_bits, double p,
                                     const std::optional<Tensor>& order, const std::vector<int64_t>& classes,
                                     const std::optional<Tensor>&) {
  const Device device(qkv);
  const AttentionTensors tensors(torch::stable::contiguous(qkv), cu_seqlens, keep_bits, order, classes);
  check(qkv.size(3) <= kMostHeadDim, "attention: head_dim is over 128");
  const Attention inputs = tensors.inputs(scale, p);
  const Tensor out = empty(qkv, {inputs.tokens, inputs.heads, inputs.dim}, qkv.scalar_type());
  const Tensor lse = empty(qkv, {inputs.heads, inputs.tokens}, ScalarType::Float);
  if (inputs.tokens == 0 || inputs.heads == 0) return {out, lse};
  check_cuda("attention", cuda::attention(inputs, tensors.sequences(max_seqlen), out.data_ptr(), floats(lse),
                                          device.stream));
  return {out, lse};
}

// grad [T, N, D], lse [N, T] -> dqkv [T, 3, N, D], its sum over T [3, N, D]; out is not read
std::tuple<Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& out,
                                              const Tensor& lse, const Tensor& cu_seqlens, int64_t max_seqlen,
                                              double scale, const std::optional<Tensor>& keep_bits, double p,
                                              const std::optional<Tensor>& order, const std::vector<int64_t>& classes,
                                              const std::vector<bool>& needed) {
  const Device device(qkv);
  const AttentionTensors tensors(torch::stable::contiguous(qkv), cu_seqlens, keep_bits, order, classes);
  check(qkv.size(3) <= kMostHeadDim, "attention: head_dim is over 128");
  const Attention inputs = tensors.inputs(scale, p);
  const Tensor grads = torch::stable::contiguous(grad), lses = torch::stable::contiguous(lse);
  const Tensor dqkv = empty(qkv, {inputs.tokens, 3, inputs.heads, inputs.dim}, qkv.scalar_type());
  if (inputs.tokens == 0 || inputs.heads == 0) return attention_gradients(dqkv, needed);
  const Tensor rows = empty(qkv, {2, inputs.heads, inputs.tokens}, ScalarType::Float);
  check_cuda("attention_backward",
             cuda::attention_backward(inputs, tensors.sequences(max_seqlen), grads.data_ptr(), floats(lses),
                                      floats(rows), dqkv.data_ptr(), device.stream));
  return attention_gradients(dqkv, needed);
}

std::string cuda_problem() {
  const char* problem = cuda::problem();
  return problem == nullptr ? "" : problem;
}

}  // namespace
}  // namespace fastbert

// The emulated library has the same kernels, compiled for the CPU, under the name FASTBERT_EMULATED.
#define FASTBERT_NAMED(library, ...) library(__VA_ARGS__)
#ifdef FASTBERT_EMULATED
#define FASTBERT_LIBRARY FASTBERT_EMULATED
#define FASTBERT_DEVICE CPU
FASTBERT_NAMED(STABLE_TORCH_LIBRARY, FASTBERT_LIBRARY, m) {
  fastbert::define_ops_of_cpu(m);
}
#else
#define FASTBERT_LIBRARY fastbert_native
#define FASTBERT_DEVICE CUDA
#endif

FASTBERT_NAMED(STABLE_TORCH_LIBRARY_FRAGMENT, FASTBERT_LIBRARY, m) {
  m.def("cuda_problem() -> str");
  m.def("pad(Tensor x, Tensor indices, int batch, int length) -> Tensor out");
  m.def("pad_backward(Tensor grad, Tensor indices) -> Tensor dx");
  m.def(
      "dropout_bits(Tensor seed, int site, Tensor cu_seqlens, int tokens, int max_seqlen, int heads, float p)"
      " -> Tensor bits");
  // a bool where fastbert's op has a string: torch's header for strings leaks each
  m.def("bias_gelu(Tensor x, Tensor? bias=None, bool is_tanh=False) -> Tensor y");
  m.def(
      "bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool is_tanh, bool[] needed)"
      " -> (Tensor dx, Tensor dbias)");
  m.def(
      "linear_gelu(Tensor x, Tensor weight, Tensor? bias=None, bool is_tanh=False, bool save=False)"
      " -> (Tensor y, Tensor pre)");
  m.def(
      "linear_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor pre, bool is_tanh,"
      " bool[] needed) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "feed_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool is_tanh=False, bool save=False)"
      " -> (Tensor y, Tensor pre)");
  m.def(
      "feed_forward_backward(Tensor grad, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor pre, bool is_tanh,"
      " bool[] needed) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
}

FASTBERT_NAMED(STABLE_TORCH_LIBRARY_IMPL, FASTBERT_LIBRARY, FASTBERT_DEVICE, m) {
  m.impl("unpad", TORCH_BOX(&fastbert::unpad_cuda));
  m.impl("attention", TORCH_BOX(&fastbert::attention));
  m.impl("attention_backward", TORCH_BOX(&fastbert::attention_backward));
  m.impl("add_layer_norm", TORCH_BOX(&fastbert::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&fastbert::add_layer_norm_backward));
  m.impl("pad", TORCH_BOX(&fastbert::pad));
  m.impl("pad_backward", TORCH_BOX(&fastbert::pad_backward));
  m.impl("dropout_bits", TORCH_BOX(&fastbert::dropout_bits));
  m.impl("embed_layer_norm", TORCH_BOX(&fastbert::embed_layer_norm));
  m.impl("embed_layer_norm_backward", TORCH_BOX(&fastbert::embed_layer_norm_backward));
  m.impl("bias_gelu", TORCH_BOX(&fastbert::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&fastbert::bias_gelu_backward));
  m.impl("linear_gelu", TORCH_BOX(&fastbert::linear_gelu));
  m.impl("linear_gelu_backward", TORCH_BOX(&fastbert::linear_gelu_backward));
  m.impl("feed_forward", TORCH_BOX(&fastbert::feed_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&fastbert::feed_forward_backward));
}

FASTBERT_NAMED(STABLE_TORCH_LIBRARY_IMPL, FASTBERT_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_problem", TORCH_BOX(&fastbert::cuda_problem));
}

#endif  // FASTBERT_CUDA
