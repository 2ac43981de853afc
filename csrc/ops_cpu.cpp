// The ops for tensors on a CPU: allocates, shares the work out among threads, and calls cpu/.
#ifndef FASTBERT_EMULATED
#include <algorithm>
#include <array>
#include <utility>

#include "tasks.h"
#include "tensors.h"

namespace fastbert {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

// mask [B, S] -> indices [T] int64, cu_seqlens [B + 1] int32, order [B] int32; tokens: T, if it is known
std::tuple<Tensor, Tensor, Tensor> unpad_cpu(const Tensor& mask_tensor, int64_t) {
  const Mask mask = mask_of(mask_tensor);
  Tensor cu_tensor = empty_on_device_of(mask_tensor, mask.rows + 1, ScalarType::Int);
  auto* cu_seqlens = static_cast<int32_t*>(cu_tensor.data_ptr());
  const int64_t rows_per_task = kElementsPerTask / (mask.columns + 1) + 1;

  run_ranges(mask.rows, rows_per_task, [&](int64_t first, int64_t last) {
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
  run_ranges(mask.rows, rows_per_task, [&](int64_t first, int64_t last) {
    cpu::fill_rows(mask, first, last, cu_seqlens, indices);
  });
  Tensor order_tensor = empty_on_device_of(mask_tensor, mask.rows, ScalarType::Int);
  cpu::order_rows(mask.rows, cu_seqlens, static_cast<int32_t*>(order_tensor.data_ptr()));
  return {indices_tensor, cu_tensor, order_tensor};
}

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
  run_ranges(rows, kElementsPerTask / hidden + 1, [&](int64_t first, int64_t last) {
    const TaskMemory memory(hidden);
    f(memory.get(), first, last);
  });
}

// f(memory, block) for the blocks of the rows [0, rows)
template <typename F>
void parallel_blocks(int64_t rows, int64_t hidden, F f) {
  const int64_t grain = kElementsPerTask / (cpu::kBlockRows * hidden) + 1;
  run_ranges(cpu::block_count(rows), grain, [&](int64_t first, int64_t last) {
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
  run_ranges(tiles, grain, [&](int64_t first, int64_t last) {
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

}  // namespace
}  // namespace fastbert

STABLE_TORCH_LIBRARY(fastbert_native, m) {
  fastbert::define_ops_of_cpu(m);
  m.def("isa() -> int");
  m.def("has_amx() -> bool");
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
  m.impl("has_amx", TORCH_BOX(&fastbert::cpu::has_amx));
  m.impl("limit_isa", TORCH_BOX(&fastbert::limit_isa));
}

#endif
