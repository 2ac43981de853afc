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
constexpr int64_t kPanelTasks = 4;  // of a thread, where panels are shared out
constexpr int64_t kHeadProducts = 1 << 13;  // of attention are worth a task of a team

// The tensors of a packed weight, as torch hands them over.
struct WeightTensors {
  const Tensor& words;  // [panels, words, kPanel, numbers in a word]
  // of int8: what a step of each row is and the sum of each row [columns]; the columns in bfloat16 [C] and their panels
  const Tensor *scales, *sums, *outlier_columns, *outliers;
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
  weight.outlier_count = tensors.outlier_columns->numel();
  check(is_dense(*tensors.outlier_columns, ScalarType::Long, weight.outlier_count) &&
            is_dense(*tensors.outliers, ScalarType::BFloat16, panels * cpu::outlier_words(weight) * cpu::kPanel * 2),
        "linear: a weight's columns of outliers are not [C] int64 and [panels, C / 2, 32, 2] bfloat16");
  weight.outlier_columns = static_cast<const int64_t*>(tensors.outlier_columns->data_ptr());
  const int64_t* const last = weight.outlier_columns + weight.outlier_count;
  check(std::all_of(weight.outlier_columns, last, [=](int64_t i) { return i >= 0 && i < inner; }),
        "linear: a column of outliers is none of the weight's");
  weight.outliers = static_cast<const uint32_t*>(tensors.outliers->data_ptr());
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

// How many tasks so many rows are shared out in, all about equally many.
int64_t row_tasks(int64_t rows, int64_t threads) {
  return threads * ((rows + threads * kTaskRows - 1) / (threads * kTaskRows));
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// How a call's products are shared out among its threads, and the memory for it.
class Workers {
 public:
  // rows: of the call; more: bytes of each thread for other things
  Workers(std::initializer_list<const cpu::PackedWeight*> weights, int64_t rows, int64_t more = 0)
      : threads_(torch::stable::get_num_threads()), is_few_(is_few(rows, threads_)), packed_(0), products_(0),
        more_(whole_lines(more)) {
    for (const auto* weight : weights) {
      const int64_t bytes = is_few_ ? cpu::room_bytes(*weight) : cpu::linear_memory(*weight, kTaskRows);
      products_ = std::max(products_, whole_lines(bytes));
      if (is_few_) packed_ = std::max(packed_, whole_lines(cpu::packed_bytes(*weight, rows)));
    }
    memory_ = allocate(packed_ + (products_ + more_) * threads_);
  }

  // Whether a call has so few rows that threads share out a weight's panels instead.
  static bool is_few(int64_t rows, int64_t threads) { return threads > 1 && rows < threads * kFewRows; }

  bool is_few() const { return is_few_; }
  int64_t threads() const { return threads_; }
  char* packed() const { return static_cast<char*>(memory_.get()); }  // of all threads, for few rows
  char* products(int64_t slot) const { return packed() + packed_ + slot * (products_ + more_); }
  char* more(int64_t slot) const { return products(slot) + products_; }

  // f(inputs) for the rows of one task, by one thread
  void multiply_here(const Linear& inputs, int64_t slot) const { linear_(inputs, 0, inputs.rows, products(slot)); }

  // A whole product, by all threads.
  void multiply(const Linear& inputs, Team::Member& member) const {
    if (!is_few_) {
      const int64_t tasks = row_tasks(inputs.rows, threads_);
      member.step(tasks, [&](int64_t task, int64_t slot) {
        linear_(inputs, inputs.rows * task / tasks, inputs.rows * (task + 1) / tasks, products(slot));
      });
      return;
    }
    member.step(threads_, [&](int64_t part, int64_t slot) { rows_(inputs, part, threads_, packed(), products(slot)); });
    const int64_t panels = cpu::panels_of(inputs.weight.columns), tasks = std::min(panels, threads_ * kPanelTasks);
    member.step(tasks, [&](int64_t task, int64_t slot) {
      panels_(inputs, panels * task / tasks, panels * (task + 1) / tasks, packed(), products(slot));
    });
  }

  static constexpr size_t kSteps = 2;  // of `multiply` at most

 private:
  int64_t threads_;
  bool is_few_;
  int64_t packed_, products_, more_;
  Memory memory_;
  decltype(cpu::linear()) linear_ = cpu::linear();  // asked once, so that all tasks take the same
  decltype(cpu::linear_rows()) rows_ = cpu::linear_rows();
  decltype(cpu::linear_panels()) panels_ = cpu::linear_panels();
};

// x [T, K] -> activation(x · weightᵀ + bias) [T, columns] in x's dtype; activation: 0 none, 1 GELU by erf, 2 by tanh
Tensor linear_cpu(const Tensor& x, const std::vector<Tensor>& parts, int64_t columns, const std::optional<Tensor>& bias,
                  int64_t activation, int64_t rotated) {
  check(x.dim() == 2, "linear: x is not [T, K]");
  const Tensor rows = torch::stable::contiguous(x);
  const std::optional<Tensor> shift = contiguous(bias);
  const Dtype dtype = dtype_of(x);
  const cpu::PackedWeight weight = packed_weight(parts, columns, x.size(1), rotated);
  const Tensor out = empty(x, {x.size(0), columns}, x.scalar_type());
  const Workers workers({&weight}, x.size(0));
  const Linear inputs = {rows.data_ptr(), dtype, x.size(0), x.size(1), weight, bias_of(shift, columns, dtype), dtype,
                         static_cast<Activation>(activation), out.data_ptr(), dtype, columns};
  Team team(workers.threads(), Workers::kSteps);
  team.run([&](Team::Member& member) { workers.multiply(inputs, member); });
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
  const bool few = Workers::is_few(tokens, threads);
  const int64_t inner_bytes = whole_lines((few ? tokens : kTaskRows) * intermediate * bytes_of(dtype));
  const Workers workers({&first, &second}, tokens, few ? 0 : inner_bytes);
  const void* const from = rows.data_ptr();
  void* const to = out.data_ptr();
  if (few) {
    const Memory inner = allocate(inner_bytes);
    Team team(threads, 2 * Workers::kSteps);
    team.run([&](Team::Member& member) {
      workers.multiply(first_of(from, dtype, tokens, first, bias1, is_tanh, inner.get(), dtype), member);
      workers.multiply(second_of(inner.get(), dtype, tokens, second, bias2, to, dtype), member);
    });
    return out;
  }
  const int64_t tasks = row_tasks(tokens, threads);
  run_tasks(tasks, threads, [&](int64_t task, int64_t slot) {
    const int64_t row = tokens * task / tasks, count = tokens * (task + 1) / tasks - row;
    char* const inner = workers.more(slot);
    workers.multiply_here(first_of(row_of(from, row, hidden, dtype), dtype, count, first, bias1, is_tanh, inner, dtype),
                          slot);
    workers.multiply_here(second_of(inner, dtype, count, second, bias2, row_of(to, row, columns, dtype), dtype), slot);
  });
  return out;
}

// A layer's parameters: of each product the packed weight and its bias of the dtype, of each LayerNorm gamma and beta.
struct Layer {
  cpu::PackedWeight qkv, out, first, second;
  const void *qkv_bias, *out_bias, *first_bias, *second_bias;
  const float *gamma1, *beta1, *gamma2, *beta2;
};

// of each product: packed weight, scales, sums, columns of outliers, outliers, bias; of each LayerNorm two
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
        intermediate_(intermediate), attention_(attention), shares_(std::move(shares)),
        tasks_(attention_tasks(attention, shares_, kHeadProducts, cpu::attention_memory)), context_(context), lse_(lse),
        eps_(eps), is_tanh_(is_tanh), workers_(workers), attention_memory_(allocate(tasks_.bytes * workers.threads())),
        few_memory_(allocate(workers.is_few() ? rows_bytes(tokens, hidden, intermediate) : 0)) {}

  // Bytes of each thread for the rest of a layer, in so many rows.
  static int64_t bytes(int64_t tokens, int64_t threads, int64_t hidden, int64_t intermediate) {
    const int64_t row = 4 * (hidden + cpu::kRowPadding);
    return row + (Workers::is_few(tokens, threads) ? 0 : rows_bytes(kTaskRows, hidden, intermediate));
  }

  // x behind all layers
  void run(const std::vector<Layer>& layers) {
    Team team(workers_.threads(), Workers::kSteps + kSteps * layers.size());
    team.run([&](Team::Member& member) {
      workers_.multiply(qkv_of(layers[0], 0, tokens_), member);
      for (size_t i = 0; i < layers.size(); ++i) {
        attend(member);
        const Layer* const next = i + 1 < layers.size() ? &layers[i + 1] : nullptr;
        if (workers_.is_few()) {
          finish_few(layers[i], next, member);
        } else {
          finish(layers[i], next, member);
        }
      }
    });
  }

 private:
  static constexpr size_t kSteps = 4 * Workers::kSteps + 3;  // of a layer at most

  // What some rows are computed in: [rows, H] twice, [rows, I] of the dtype at most float32, means, rstds.
  struct Places {
    float *sum, *middle, *inner, *mean, *rstd;
  };

  static int64_t rows_bytes(int64_t rows, int64_t hidden, int64_t intermediate) {
    return 4 * rows * (2 * hidden + intermediate + 2);
  }

  Places places_in(char* memory, int64_t rows) const {
    float* const sum = reinterpret_cast<float*>(memory);
    float* const middle = sum + rows * hidden_;
    float* const inner = middle + rows * hidden_;
    float* const mean = inner + rows * intermediate_;
    return {sum, middle, inner, mean, mean + rows};
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

  Linear first_in(const Layer& layer, const Places& places, int64_t rows) const {
    return first_of(places.middle, Dtype::float32, rows, layer.first, layer.first_bias, is_tanh_, places.inner,
                    attention_.dtype);
  }

  Linear second_in(const Layer& layer, const Places& places, int64_t rows) const {
    return second_of(places.inner, attention_.dtype, rows, layer.second, layer.second_bias, places.sum, Dtype::float32);
  }

  void attend(Team::Member& member) const {
    const cpu::Strides strides = {3 * inner_, inner_, attention_.dim};
    member.step(tasks_.count(), [&](int64_t task, int64_t slot) {
      char* const memory = static_cast<char*>(attention_memory_.get()) + slot * tasks_.bytes;
      for (size_t i = tasks_.starts[task]; i < tasks_.starts[task + 1]; ++i) {
        attend_(attention_, strides, shares_[i], context_, lse_, memory);
      }
    });
  }

  // The rows first..last-1 of places.sum + residual, normalized.
  void norm(const Places& places, int64_t rows, const float* gamma, const float* beta, const float* residual, float* to,
            int64_t first, int64_t last, int64_t slot) const {
    const AddLayerNorm inputs = {places.sum,         nullptr, residual,
                                 gamma,              Dtype::float32, Dtype::float32,
                                 rows,               static_cast<int>(hidden_), {nullptr, 0, 0, 1.0f}};
    const cpu::RowMemory row = {reinterpret_cast<float*>(workers_.more(slot)), nullptr};
    norm_(inputs, beta, eps_, to, places.mean, places.rstd, row, first, last);
  }

  // The rest of a layer, from its attention's output on; next: whose q, k and v are made of its output, nullptr: it is
  // the last.
  void finish(const Layer& layer, const Layer* next, Team::Member& member) const {
    const int64_t tasks = row_tasks(tokens_, workers_.threads());
    member.step(tasks, [&](int64_t task, int64_t slot) {
      const int64_t first = tokens_ * task / tasks, rows = tokens_ * (task + 1) / tasks - first;
      const Places places = places_in(workers_.more(slot) + 4 * (hidden_ + cpu::kRowPadding), rows);
      float* const x = x_ + first * hidden_;
      workers_.multiply_here(out_of(layer, first, rows, places.sum), slot);
      norm(places, rows, layer.gamma1, layer.beta1, x, places.middle, 0, rows, slot);
      workers_.multiply_here(first_in(layer, places, rows), slot);
      workers_.multiply_here(second_in(layer, places, rows), slot);
      norm(places, rows, layer.gamma2, layer.beta2, places.middle, x, 0, rows, slot);
      if (next != nullptr) workers_.multiply_here(qkv_of(*next, first, rows), slot);
    });
  }

  // The same for few rows: the threads share out each product's panels.
  void finish_few(const Layer& layer, const Layer* next, Team::Member& member) const {
    const Places places = places_in(static_cast<char*>(few_memory_.get()), tokens_);
    const int64_t parts = workers_.threads();
    const auto norm_all = [&](const float* gamma, const float* beta, const float* residual, float* to) {
      member.step(parts, [&](int64_t part, int64_t slot) {
        norm(places, tokens_, gamma, beta, residual, to, tokens_ * part / parts, tokens_ * (part + 1) / parts, slot);
      });
    };
    workers_.multiply(out_of(layer, 0, tokens_, places.sum), member);
    norm_all(layer.gamma1, layer.beta1, x_, places.middle);
    workers_.multiply(first_in(layer, places, tokens_), member);
    workers_.multiply(second_in(layer, places, tokens_), member);
    norm_all(layer.gamma2, layer.beta2, places.middle, x_);
    if (next != nullptr) workers_.multiply(qkv_of(*next, 0, tokens_), member);
  }

  float* x_;
  int64_t tokens_, hidden_, inner_, intermediate_;
  Attention attention_;
  std::vector<cpu::Share> shares_;
  AttentionTasks tasks_;
  void* context_;
  float* lse_;
  float eps_;
  bool is_tanh_;
  const Workers& workers_;
  Memory attention_memory_, few_memory_;
  decltype(cpu::attention()) attend_ = cpu::attention();
  decltype(cpu::add_layer_norm()) norm_ = cpu::add_layer_norm();
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
  const int64_t threads = torch::stable::get_num_threads();
  const Layer& one = layers[0];
  const Workers workers({&one.qkv, &one.out, &one.first, &one.second}, tokens,
                        Encoder::bytes(tokens, threads, hidden, intermediate));
  Encoder encoder(floats(out), tokens, hidden, attention,
                  attention_shares(attention, attention_order(attended, attention), threads), context.data_ptr(),
                  floats(lse), intermediate, static_cast<float>(eps), is_tanh, workers);
  encoder.run(layers);
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
