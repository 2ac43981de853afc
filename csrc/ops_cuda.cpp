// The ops for tensors on a GPU: allocates, and calls cuda/ or torch's products.
#ifdef FASTBERT_CUDA
#include "tensors.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <utility>

#include "bias_gelu.h"
#include "dropout_bits.h"
#include "pad.h"

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
