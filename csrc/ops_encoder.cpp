// The products of packed weights and the whole encoder for tensors on a CPU: allocates, shares the work out among
// threads, and calls cpu/.
#ifndef FASTBERT_EMULATED
#include "linear.h"

#include <algorithm>
#include <array>

#include "tasks.h"
#include "tensors.h"

namespace fastbert {
namespace {

using cpu::Linear;

constexpr int64_t kTaskRows = 112;  // of a product: with them in a core's second cache, its weight passes once
constexpr int64_t kFewRows = 28;  // up to here a thread's rows are too few to pay for passing a whole weight

// The tensors of a packed weight, as torch hands them over.
struct WeightTensors {
  const Tensor& words;  // [panels, words, kPanel, numbers in a word]
  // of int8: what a step of each row is and the sum of each row [columns]; the columns in float32 [C] and their panels
  const Tensor *scales, *sums, *exact_columns, *exact;
};

bool is_dense(const Tensor& tensor, ScalarType dtype, int64_t size) {
  return tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == size;
}

// rotated: columns are rotated in blocks of the greatest number that divides both it and inner
cpu::PackedWeight packed_weight(const WeightTensors& tensors, int64_t columns, int64_t inner, int64_t rotated) {
  const Tensor& words = tensors.words;
  const ScalarType dtype = words.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Char,
        "linear: a packed weight is none of float32, bfloat16 and int8");
  const auto kind = dtype == ScalarType::Float      ? cpu::Weights::float32
                    : dtype == ScalarType::BFloat16 ? cpu::Weights::bfloat16
                                                    : cpu::Weights::int8;
  cpu::PackedWeight weight = {words.data_ptr(), kind, columns, inner};
  weight.rotated = 1;
  const int64_t panels = cpu::panels_of(columns);
  check(words.dim() == 4 && words.is_contiguous() && words.size(0) == panels &&
            words.size(1) == cpu::inner_words(weight) && words.size(2) == cpu::kPanel &&
            words.size(3) == cpu::words_each(kind),
        "linear: a packed weight has another shape than [panels, words, 32, numbers in a word]");
  if (kind != cpu::Weights::int8) return weight;
  check(tensors.scales != nullptr && is_dense(*tensors.scales, ScalarType::Float, columns) &&
            is_dense(*tensors.sums, ScalarType::Int, columns),
        "linear: a weight of int8 needs scales and sums, [N] float32 and int32");
  weight.scales = floats(*tensors.scales);
  weight.sums = ints(*tensors.sums);
  weight.exact_count = tensors.exact_columns->numel();
  check(is_dense(*tensors.exact_columns, ScalarType::Long, weight.exact_count) &&
            is_dense(*tensors.exact, ScalarType::Float, panels * weight.exact_count * cpu::kPanel),
        "linear: a weight's exact columns are not [C] int64 and [panels, C, 32] float32");
  weight.exact_columns = static_cast<const int64_t*>(tensors.exact_columns->data_ptr());
  const int64_t* const last = weight.exact_columns + weight.exact_count;
  check(std::all_of(weight.exact_columns, last, [=](int64_t i) { return i >= 0 && i < inner; }),
        "linear: an exact column is none of the weight's");
  weight.exact = floats(*tensors.exact);
  while (weight.rotated < rotated && inner % (2 * weight.rotated) == 0) weight.rotated *= 2;
  return weight;
}

// One tensor, or five of int8.
cpu::PackedWeight packed_weight(const std::vector<Tensor>& parts, int64_t columns, int64_t inner, int64_t rotated = 1) {
  check(parts.size() == 1 || parts.size() == 5, "linear: a packed weight is one tensor, or five of int8");
  if (parts.size() == 1) return packed_weight({parts[0], nullptr, nullptr, nullptr, nullptr}, columns, inner, 1);
  return packed_weight({parts[0], &parts[1], &parts[2], &parts[3], &parts[4]}, columns, inner, rotated);
}

// A bias [columns] of the dtype of a call, or none.
const void* bias_of(const std::optional<Tensor>& bias, int64_t columns, Dtype dtype) {
  if (!bias.has_value()) return nullptr;
  check(bias->dim() == 1 && bias->size(0) == columns && dtype_of(*bias) == dtype,
        "linear: bias is not [N] in x's dtype");
  return bias->data_ptr();
}

// The threads of a call, each with memory of its own for products with some weights.
class Workers {
 public:
  // rows: of the largest task; more: bytes of each thread for other things
  Workers(std::initializer_list<const cpu::PackedWeight*> weights, int64_t rows, int64_t more = 0)
      : threads_(torch::stable::get_num_threads()), products_(0), more_(more) {
    for (const auto* weight : weights) {
      products_ = std::max(products_, cpu::linear_memory(*weight, rows));
    }
    products_ = (products_ + 63) / 64 * 64;
    memory_ = allocate((products_ + more_) * threads_);
  }

  int64_t threads() const { return threads_; }
  char* products(int64_t slot) const { return static_cast<char*>(memory_.get()) + slot * (products_ + more_); }
  char* more(int64_t slot) const { return products(slot) + products_; }

 private:
  int64_t threads_, products_, more_;
  Memory memory_;
};

// How many tasks so many rows are shared out in, all about equally many.
int64_t row_tasks(int64_t rows, int64_t threads) {
  return threads * ((rows + threads * kTaskRows - 1) / (threads * kTaskRows));
}

// Whether a call has so few rows that threads share out a weight's panels instead.
bool is_few(int64_t rows, int64_t threads) { return threads > 1 && rows < threads * kFewRows; }

// A whole product, by all threads.
void multiply(const Linear& inputs, const Workers& workers) {
  const auto kernel = cpu::linear();
  const int64_t rows = inputs.rows, panels = cpu::panels_of(inputs.weight.columns), threads = workers.threads();
  if (is_few(rows, threads)) {
    const int64_t tasks = std::min(panels, threads);
    run_tasks(tasks, threads, [&](int64_t task, int64_t slot) {
      kernel(inputs, 0, rows, panels * task / tasks, panels * (task + 1) / tasks, workers.products(slot));
    });
  } else {
    const int64_t tasks = row_tasks(rows, threads);
    run_tasks(tasks, threads, [&](int64_t task, int64_t slot) {
      kernel(inputs, rows * task / tasks, rows * (task + 1) / tasks, 0, panels, workers.products(slot));
    });
  }
}

int64_t most_rows(int64_t rows, int64_t threads) { return is_few(rows, threads) ? rows : kTaskRows; }

// x [T, K] -> activation(x · weightᵀ + bias) [T, columns] in x's dtype; activation: 0 none, 1 GELU by erf, 2 by tanh
Tensor linear_cpu(const Tensor& x, const std::vector<Tensor>& parts, int64_t columns, const std::optional<Tensor>& bias,
                  int64_t activation, int64_t rotated) {
  check(x.dim() == 2, "linear: x is not [T, K]");
  const Tensor rows = torch::stable::contiguous(x);
  const std::optional<Tensor> shift = contiguous(bias);
  const Dtype dtype = dtype_of(x);
  const cpu::PackedWeight weight = packed_weight(parts, columns, x.size(1), rotated);
  const Tensor out = empty(x, {x.size(0), columns}, x.scalar_type());
  const Workers workers({&weight}, most_rows(x.size(0), torch::stable::get_num_threads()));
  multiply({rows.data_ptr(), dtype, x.size(0), x.size(1), weight, bias_of(shift, columns, dtype), dtype,
            static_cast<Activation>(activation), out.data_ptr(), dtype, columns},
           workers);
  return out;
}

// The rows of a task of the feed-forward: GELU's output [rows, intermediate] of the dtype, in memory of its own.
Linear first_of(const void* x, Dtype x_dtype, int64_t rows, const cpu::PackedWeight& weight, const void* bias,
                bool is_tanh, void* inner, Dtype dtype) {
  const auto activation = is_tanh ? Activation::gelu_tanh : Activation::gelu;
  return {x, x_dtype, rows, weight.inner, weight, bias, dtype, activation, inner, dtype, weight.columns};
}

Linear second_of(const void* inner, Dtype dtype, int64_t rows, const cpu::PackedWeight& weight, const void* bias,
                 void* out, Dtype out_dtype) {
  return {inner, dtype, rows, weight.inner, weight, bias, dtype, Activation::none, out, out_dtype, weight.columns};
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

char* row_of(const void* x, int64_t row, int64_t width, Dtype dtype) {
  return static_cast<char*>(const_cast<void*>(x)) + row * width * bytes_of(dtype);
}

// f(inputs) for the rows of one task, by one thread
void multiply_here(const Linear& inputs, char* memory) {
  cpu::linear()(inputs, 0, inputs.rows, 0, cpu::panels_of(inputs.weight.columns), memory);
}

// x [T, H] -> gelu(x · w1ᵀ + b1) · w2ᵀ + b2 [T, columns] in x's dtype
Tensor feed_forward_cpu(const Tensor& x, const std::vector<Tensor>& w1, int64_t intermediate,
                        const std::optional<Tensor>& b1, const std::vector<Tensor>& w2, int64_t columns,
                        const std::optional<Tensor>& b2, bool is_tanh) {
  check(x.dim() == 2, "feed_forward: x is not [T, H]");
  const Tensor rows = torch::stable::contiguous(x);
  const std::optional<Tensor> shift1 = contiguous(b1), shift2 = contiguous(b2);
  const Dtype dtype = dtype_of(x);
  const cpu::PackedWeight first = packed_weight(w1, intermediate, x.size(1));
  const cpu::PackedWeight second = packed_weight(w2, columns, intermediate);
  const void *const bias1 = bias_of(shift1, intermediate, dtype), *const bias2 = bias_of(shift2, columns, dtype);
  const int64_t tokens = x.size(0), hidden = x.size(1), threads = torch::stable::get_num_threads();
  const Tensor out = empty(x, {tokens, columns}, x.scalar_type());
  const bool few = is_few(tokens, threads);
  const int64_t most = most_rows(tokens, threads), inner_bytes = (most * intermediate * bytes_of(dtype) + 63) / 64 * 64;
  const Workers workers({&first, &second}, most, few ? 0 : inner_bytes);
  if (few) {
    const Memory inner = allocate(inner_bytes);
    multiply(first_of(rows.data_ptr(), dtype, tokens, first, bias1, is_tanh, inner.get(), dtype), workers);
    multiply(second_of(inner.get(), dtype, tokens, second, bias2, out.data_ptr(), dtype), workers);
    return out;
  }
  const void* const from = rows.data_ptr();
  void* const to = out.data_ptr();
  const int64_t tasks = row_tasks(tokens, threads);
  run_tasks(tasks, threads, [&](int64_t task, int64_t slot) {
    const int64_t row = tokens * task / tasks, count = tokens * (task + 1) / tasks - row;
    char* const inner = workers.more(slot);
    multiply_here(first_of(row_of(from, row, hidden, dtype), dtype, count, first, bias1, is_tanh, inner, dtype),
                  workers.products(slot));
    multiply_here(second_of(inner, dtype, count, second, bias2, row_of(to, row, columns, dtype), dtype),
                  workers.products(slot));
  });
  return out;
}

// A layer's parameters: of each product the packed weight and its bias of the dtype, of each LayerNorm gamma and beta.
struct Layer {
  cpu::PackedWeight qkv, out, first, second;
  const void *qkv_bias, *out_bias, *first_bias, *second_bias;
  const float *gamma1, *beta1, *gamma2, *beta2;
};

// of each product: packed weight, scales, sums, exact columns, exact, bias; of each LayerNorm two
constexpr size_t kLayerTensors = 28;

Layer layer_of(const Tensor* tensors, int64_t hidden, int64_t inner, int64_t intermediate, int64_t rotated,
               Dtype dtype) {
  const auto weight = [&](int place, int64_t columns, int64_t width) {
    const Tensor* const parts = tensors + place;
    return packed_weight({parts[0], parts + 1, parts + 2, parts + 3, parts + 4}, columns, width, rotated);
  };
  const auto bias = [&](int place, int64_t columns) { return bias_of(tensors[place + 5], columns, dtype); };
  const auto gain = [&](int place) {
    const Tensor& tensor = tensors[place];
    check(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == hidden,
          "encoder_forward: a LayerNorm's gamma or beta is not [H] float32");
    return static_cast<const float*>(tensor.data_ptr());
  };
  return {weight(0, 3 * inner, hidden), weight(6, hidden, inner), weight(14, intermediate, hidden),
          weight(20, hidden, intermediate), bias(0, 3 * inner), bias(6, hidden), bias(14, intermediate),
          bias(20, hidden), gain(12), gain(13), gain(26), gain(27)};
}

// The layers on packed tokens: what all of them share.
class Encoder {
 public:
  // x [T, H] float32, changed in place; qkv [T, 3, N, D] and context [T, N, D] of the dtype; lse [N, T]
  Encoder(float* x, int64_t tokens, int64_t hidden, const Attention& attention, std::vector<cpu::Share> shares,
          void* context, float* lse, int64_t intermediate, float eps, bool is_tanh, const Workers& workers)
      : x_(x), tokens_(tokens), hidden_(hidden), inner_(int64_t{attention.heads} * attention.dim),
        intermediate_(intermediate), attention_(attention), shares_(std::move(shares)), context_(context), lse_(lse),
        eps_(eps), is_tanh_(is_tanh), workers_(workers) {}

  // Bytes of each thread for the rest of a layer in tasks of so many rows.
  static int64_t bytes(int64_t rows, int64_t hidden, int64_t intermediate) {
    return (4 * (rows * (2 * hidden + intermediate + 2) + hidden + cpu::kRowPadding) + 63) / 64 * 64;
  }

  // x's q, k and v, of all rows
  void start(const Layer& layer) {
    multiply(qkv_of(layer, 0, tokens_), workers_);
  }

  // One layer, from its q, k and v on; next: whose q, k and v are made of its output, nullptr: it is the last
  void run(const Layer& layer, const Layer* next) {
    const int64_t row = 3 * inner_, part = inner_, head = attention_.dim;
    const auto kernel = cpu::attention();
    run_shares(attention_, shares_, workers_.threads(), cpu::attention_memory,
               [&](const cpu::Share& share, char* memory) {
                 kernel(attention_, {row, part, head}, share, context_, lse_, memory);
               });
    if (is_few(tokens_, workers_.threads())) {
      finish_few(layer, next);
      return;
    }
    const int64_t tasks = row_tasks(tokens_, workers_.threads());
    run_tasks(tasks, workers_.threads(), [&](int64_t task, int64_t slot) {
      const int64_t first = tokens_ * task / tasks, rows = tokens_ * (task + 1) / tasks - first;
      const Places places = places_in(workers_.more(slot), rows);
      char* const memory = workers_.products(slot);
      multiply_here(out_of(layer, first, rows, places.sum), memory);
      norm(places, layer.gamma1, layer.beta1, x_ + first * hidden_, places.middle, rows);
      multiply_here(first_of(places.middle, Dtype::float32, rows, layer.first, layer.first_bias, is_tanh_, places.inner,
                             attention_.dtype), memory);
      multiply_here(second_of(places.inner, attention_.dtype, rows, layer.second, layer.second_bias, places.sum,
                              Dtype::float32), memory);
      norm(places, layer.gamma2, layer.beta2, places.middle, x_ + first * hidden_, rows);
      if (next != nullptr) multiply_here(qkv_of(*next, first, rows), memory);
    });
  }

 private:
  // What some rows are computed in: [rows, H] twice, [rows, I] of the dtype at most float32, means, rstds, a row.
  struct Places {
    float *sum, *middle, *inner, *mean, *rstd;
    cpu::RowMemory row;
  };

  Places places_in(char* memory, int64_t rows) const {
    float* const sum = reinterpret_cast<float*>(memory);
    float* const middle = sum + rows * hidden_;
    float* const inner = middle + rows * hidden_;
    float* const mean = inner + rows * intermediate_;
    return {sum, middle, inner, mean, mean + rows, {mean + 2 * rows, nullptr}};
  }

  Linear qkv_of(const Layer& layer, int64_t first, int64_t rows) const {
    void* const to = row_of(attention_.qkv, first, 3 * inner_, attention_.dtype);
    return {x_ + first * hidden_, Dtype::float32, rows, hidden_, layer.qkv, layer.qkv_bias, attention_.dtype,
            Activation::none, to, attention_.dtype, 3 * inner_};
  }

  Linear out_of(const Layer& layer, int64_t first, int64_t rows, float* to) const {
    return second_of(row_of(context_, first, inner_, attention_.dtype), attention_.dtype, rows, layer.out,
                     layer.out_bias, to, Dtype::float32);
  }

  // places.sum + residual, normalized
  void norm(const Places& places, const float* gamma, const float* beta, const float* residual, float* to,
            int64_t rows) const {
    const AddLayerNorm inputs = {places.sum,         nullptr, residual,
                                 gamma,              Dtype::float32, Dtype::float32,
                                 rows,               static_cast<int>(hidden_), {nullptr, 0, 0, 1.0f}};
    cpu::add_layer_norm()(inputs, beta, eps_, to, places.mean, places.rstd, places.row, 0, rows);
  }

  // The rest of a layer for few rows: the threads share out each product's panels.
  void finish_few(const Layer& layer, const Layer* next) {
    const Memory memory = allocate(bytes(tokens_, hidden_, intermediate_));
    const Places places = places_in(static_cast<char*>(memory.get()), tokens_);
    multiply(out_of(layer, 0, tokens_, places.sum), workers_);
    norm(places, layer.gamma1, layer.beta1, x_, places.middle, tokens_);
    multiply(first_of(places.middle, Dtype::float32, tokens_, layer.first, layer.first_bias, is_tanh_, places.inner,
                      attention_.dtype), workers_);
    multiply(second_of(places.inner, attention_.dtype, tokens_, layer.second, layer.second_bias, places.sum,
                       Dtype::float32), workers_);
    norm(places, layer.gamma2, layer.beta2, places.middle, x_, tokens_);
    if (next != nullptr) start(*next);
  }

  float* x_;
  int64_t tokens_, hidden_, inner_, intermediate_;
  Attention attention_;
  std::vector<cpu::Share> shares_;
  void* context_;
  float* lse_;
  float eps_;
  bool is_tanh_;
  const Workers& workers_;
};

// x [T, H] float32 -> [T, H] behind all layers; tensors: kLayerTensors a layer, empty ones where a weight is not of int8.
// Attention and GELU's output are of the biases' dtype. rotated: as `packed_weight` takes it.
Tensor encoder_forward(const Tensor& x, const Tensor& cu_seqlens, const std::vector<Tensor>& given, int64_t heads,
                       int64_t dim, int64_t intermediate, double scale, double eps, bool is_tanh,
                       int64_t rotated) {
  check(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.size(1) >= 1 && x.size(1) <= kMaxInt32,
        "encoder_forward: x is not [T, 1 or more] float32");
  check(!given.empty() && given.size() % kLayerTensors == 0, "encoder_forward: the tensors are not 28 a layer");
  check(heads >= 1 && dim >= 1 && 3 * heads * dim <= kMaxInt32 && scale > 0,
        "encoder_forward: heads, head dim or scale are not over 0");
  std::vector<Tensor> tensors;
  for (const Tensor& tensor : given) {
    tensors.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  }
  const int64_t tokens = x.size(0), hidden = x.size(1), inner = heads * dim;
  const Tensor out = empty(x, {tokens, hidden}, ScalarType::Float);
  const Tensor from = torch::stable::contiguous(x);
  std::copy(floats(from), floats(from) + tokens * hidden, floats(out));
  if (tokens == 0) return out;
  const ScalarType scalar = tensors[5].scalar_type();
  const Dtype dtype = dtype_of(tensors[5]);
  std::vector<Layer> layers;
  for (size_t i = 0; i < tensors.size(); i += kLayerTensors) {
    layers.push_back(layer_of(&tensors[i], hidden, inner, intermediate, rotated, dtype));
  }
  const Tensor qkv = empty(x, {tokens, 3, heads, dim}, scalar), context = empty(x, {tokens, heads, dim}, scalar);
  const Tensor lse = empty(x, {heads, tokens}, ScalarType::Float);
  const std::vector<int64_t> classes;
  const AttentionTensors attended(qkv, cu_seqlens, std::nullopt, std::nullopt, classes);
  const Attention attention = attended.inputs(scale, 0.0);
  const int64_t threads = torch::stable::get_num_threads(), most = most_rows(tokens, threads);
  const Layer& one = layers[0];
  const int64_t more = is_few(tokens, threads) ? 0 : Encoder::bytes(most, hidden, intermediate);
  const Workers workers({&one.qkv, &one.out, &one.first, &one.second}, most, more);
  Encoder encoder(floats(out), tokens, hidden, attention,
                  attention_shares(attention, attention_order(attended, attention), threads), context.data_ptr(),
                  floats(lse), intermediate, static_cast<float>(eps), is_tanh, workers);
  encoder.start(one);
  for (size_t i = 0; i < layers.size(); ++i) {
    encoder.run(layers[i], i + 1 < layers.size() ? &layers[i + 1] : nullptr);
  }
  return out;
}

}  // namespace
}  // namespace fastbert

STABLE_TORCH_LIBRARY_FRAGMENT(fastbert_native, m) {
  m.def("packed_linear(Tensor x, Tensor[] weight, int columns, Tensor? bias, int activation, int rotated) -> Tensor y");
  m.def(
      "packed_feed_forward(Tensor x, Tensor[] w1, int intermediate, Tensor? b1, Tensor[] w2, int columns, Tensor? b2,"
      " bool is_tanh) -> Tensor y");
  m.def(
      "encoder_forward(Tensor x, Tensor cu_seqlens, Tensor[] tensors, int heads, int dim, int intermediate,"
      " float scale, float eps, bool is_tanh, int rotated) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert_native, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&fastbert::linear_cpu));
  m.impl("packed_feed_forward", TORCH_BOX(&fastbert::feed_forward_cpu));
  m.impl("encoder_forward", TORCH_BOX(&fastbert::encoder_forward));
}

#endif
