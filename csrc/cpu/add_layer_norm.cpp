#include "add_layer_norm.h"

#include "layer_norm.h"
#include "philox.h"
#include "vectors.h"

namespace fastbert::cpu::FASTBERT_ISA {
namespace {

// residual + dropout(x + bias), a vector of a row
template <typename X, typename R, typename Count>
FASTBERT_INLINE Float sum_at(const AddLayerNorm& inputs, int64_t row, int64_t column, const uint16_t* draws,
                             Count count) {
  const int64_t place = row * inputs.hidden + column;
  Float x = load(static_cast<const X*>(inputs.x) + place, count);
  if (inputs.bias != nullptr) x += load(static_cast<const X*>(inputs.bias) + column, count);
  if (draws != nullptr) x = drop(x, inputs.dropout, draws + column);
  return x + load(static_cast<const R*>(inputs.residual) + place, count);
}

template <typename X, typename R>
void forward(const AddLayerNorm inputs, const R* beta, float eps, R* y, float* means, float* rstds, RowMemory memory,
             int64_t first, int64_t last) {
  const auto* gamma = static_cast<const R*>(inputs.gamma);
  const int64_t hidden = inputs.hidden;
  uint16_t* draws = inputs.dropout.seed != nullptr ? memory.draws : nullptr;
  float* sums = memory.sums;
  for (int64_t row = first; row < last; ++row) {
    if (draws != nullptr) draw_row(inputs.dropout, row, hidden, draws);
    Moments moments{sum_at<X, R>(inputs, row, 0, draws, Part{1})[0]};
    for_columns(hidden, [&](int64_t column, auto count) {
      const Float sum = sum_at<X, R>(inputs, row, column, draws, count);
      store(sums + column, sum, count);
      moments.add(sum, count);
    });
    moments.finish(hidden, eps, means[row], rstds[row]);
    const float mean = means[row], rstd = rstds[row];
    R* out = y + row * hidden;
    for_columns(hidden, [&](int64_t column, auto count) {
      const Float normalized = (load(sums + column, count) - mean) * rstd;
      store(out + column, fused(normalized, load(gamma + column, count), load(beta + column, count)), count);
    });
  }
}

// The rows of a block; parts [3, blocks, hidden]
template <typename X, typename R>
void backward(const AddLayerNorm inputs, const R* grads, const float* means, const float* rstds, float* parts,
              X* dx, R* dresidual, RowMemory memory, int64_t block) {
  const auto* gamma = static_cast<const R*>(inputs.gamma);
  const int64_t hidden = inputs.hidden, blocks = block_count(inputs.rows);
  float *dgamma = parts + block * hidden, *dbeta = dgamma + blocks * hidden, *dbias = dbeta + blocks * hidden;
  uint16_t* draws = inputs.dropout.seed != nullptr ? memory.draws : nullptr;
  float* normals = memory.sums;
  clear(dgamma, hidden);
  clear(dbeta, hidden);
  clear(dbias, hidden);
  for (int64_t row = block * kBlockRows; row < (block + 1) * kBlockRows && row < inputs.rows; ++row) {
    const R* grad_row = grads + row * hidden;
    const float mean = means[row], rstd = rstds[row];
    if (draws != nullptr) draw_row(inputs.dropout, row, hidden, draws);
    Slope slope;
    for_columns(hidden, [&](int64_t column, auto count) {
      const Float grad = load(grad_row + column, count);
      const Float normalized = (sum_at<X, R>(inputs, row, column, draws, count) - mean) * rstd;
      store(normals + column, normalized, count);
      slope.add(grad, load(gamma + column, count), normalized);
      add_to(dgamma + column, grad * normalized, count);
      add_to(dbeta + column, grad, count);
    });
    slope.finish(hidden, rstd);
    for_columns(hidden, [&](int64_t column, auto count) {
      const int64_t place = row * hidden + column;
      Float grad = slope.of(load(grad_row + column, count), load(gamma + column, count), load(normals + column, count));
      if (dresidual != nullptr) store(dresidual + place, grad, count);
      if (draws != nullptr) {
        if (sizeof(X) == sizeof(R)) grad = rounded_to<X>(grad);  // as autograd: the sum's gradient is of its dtype
        grad = drop(grad, inputs.dropout, draws + column);
      }
      if (dx != nullptr) store(dx + place, grad, count);
      add_to(dbias + column, grad, count);
    });
  }
}

// Calls f with Is<X>, Is<R> of the two dtypes: the same, or 16 bits beside float32.
template <typename F>
void with_types(const AddLayerNorm& inputs, F f) {
  with_type(inputs.x_dtype, [&](auto x) {
    if (inputs.residual_dtype == Dtype::float32) {
      f(x, Is<float>{});
    } else {
      f(x, x);
    }
  });
}

}  // namespace

void add_layer_norm(const AddLayerNorm& inputs, const void* beta, float eps, void* y, float* mean, float* rstd,
                    RowMemory memory, int64_t first, int64_t last) {
  with_types(inputs, [&](auto x, auto r) {
    using X = typename decltype(x)::Type;
    using R = typename decltype(r)::Type;
    forward<X, R>(inputs, static_cast<const R*>(beta), eps, static_cast<R*>(y), mean, rstd, memory, first, last);
  });
}

void add_layer_norm_backward(const AddLayerNorm& inputs, const void* grad, const float* mean, const float* rstd,
                             float* parts, void* dx, void* dresidual, RowMemory memory, int64_t block) {
  with_types(inputs, [&](auto x, auto r) {
    using X = typename decltype(x)::Type;
    using R = typename decltype(r)::Type;
    backward<X, R>(inputs, static_cast<const R*>(grad), mean, rstd, parts, static_cast<X*>(dx),
                   static_cast<R*>(dresidual), memory, block);
  });
}

void add_layer_norm_sum(const float* parts, int64_t count, int64_t hidden, Dtype dtype, void* out) {
  with_type(dtype, [&](auto type) { add_parts(parts, count, hidden, static_cast<typename decltype(type)::Type*>(out)); });
}

}  // namespace fastbert::cpu::FASTBERT_ISA
