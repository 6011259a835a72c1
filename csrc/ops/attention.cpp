// fastseq::additive_attention_* and dot_attention_* on the CPU. Their schemas are fastseq/ops/
// attention.py's, for every device has implementations of them.
#include <tuple>

#include "../cpu/dispatch.h"
#include "tensors.h"

namespace fastseq {
namespace ops {

namespace {

// What both passes are called with, checked, in the dtype that is computed in.
struct Call {
  const char* op;
  ScalarType dtype;  // the caller's
  Tensor query, keys, values;
  OptionalTensor v, extra, lengths;
  double scale;

  int64_t B() const { return query.size(0); }
  int64_t Q() const { return query.size(1); }
  int64_t S() const { return keys.size(1); }
  int64_t K() const { return query.size(2); }
  int64_t C() const { return values.size(2); }
};

bool is_half(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

// Half dtypes as float32, rows contiguous.
Tensor wide(const Tensor& t) {
  return with_contiguous_rows(is_half(t.scalar_type()) ? torch::stable::to(t, ScalarType::Float)
                                                       : t);
}
OptionalTensor wide(const OptionalTensor& t) { return t ? OptionalTensor(wide(*t)) : t; }

// Back in the caller's dtype.
Tensor narrow(const Call& c, const Tensor& t) {
  return is_half(c.dtype) ? torch::stable::to(t, c.dtype) : t;
}

Call make_call(const char* op, const Tensor& query, const Tensor& keys, const Tensor& values,
               const OptionalTensor& v, const OptionalTensor& extra, const OptionalTensor& lengths,
               double scale) {
  const ScalarType dtype = query.scalar_type();
  require(query.is_cpu() && query.dim() == 3, "fastseq.", op,
          ": expected query of shape [B, Q, K] on the CPU, got ", query.dim(), " dimensions");
  require(dtype == ScalarType::Float || dtype == ScalarType::Double || is_half(dtype), "fastseq.",
          op, ": expected float32, float64, bfloat16 or float16");
  const int64_t B = query.size(0), K = query.size(2);
  check_tensor(op, "keys", keys, query, {B, -1, K});
  const int64_t S = keys.size(1);
  check_tensor(op, "values", values, query, {B, S, -1});
  if (v) check_tensor(op, "v", *v, query, {K});
  if (extra) check_tensor(op, "extra", *extra, query, {B, S, K});
  Call c{op,      dtype,       wide(query), wide(keys),   wide(values),
         wide(v), wide(extra), lengths,     double(scale)};
  if (!lengths) return c;
  require(
      lengths->is_cpu() && lengths->dim() == 1 && lengths->size(0) == B &&
          (lengths->scalar_type() == ScalarType::Long || lengths->scalar_type() == ScalarType::Int),
      "fastseq.", op, ": expected lengths as int64 [B] = [", B, "] on the CPU");
  c.lengths = as_contiguous(lengths->scalar_type() == ScalarType::Long
                                ? *lengths
                                : torch::stable::to(*lengths, ScalarType::Long));
  return c;
}

template <class T>
BatchRows<const T> rows_of(const OptionalTensor& t) {
  if (!t) return {nullptr, 0, 0};
  return {read<T>(*t), t->stride(0), t->stride(1)};
}

template <class T>
void fill_inputs(const Call& c, AttentionInputs<T>& a) {
  a.B = c.B();
  a.Q = c.Q();
  a.S = c.S();
  a.K = c.K();
  a.C = c.C();
  a.query = rows_of<T>(c.query);
  a.keys = rows_of<T>(c.keys);
  a.values = rows_of<T>(c.values);
  a.additive = c.v.has_value();
  a.v = read<T>(c.v);
  a.extra = rows_of<T>(c.extra);
  a.lengths = read<int64_t>(c.lengths);
  a.scale = T(c.scale);
}

std::tuple<Tensor, Tensor> forward(const Call& c, const OptionalTensor& mask) {
  OptionalTensor rows;
  if (mask) {
    require(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 3 &&
                mask->size(0) == c.B() && (mask->size(1) == 1 || mask->size(1) == c.Q()) &&
                mask->size(2) == c.S(),
            "fastseq.", c.op, ": expected mask as bool [B, 1 or Q, S] on the CPU");
    rows = with_contiguous_rows(*mask);
  }
  const Tensor context = empty(c.query, {c.B(), c.Q(), c.C()});
  const Tensor weights = empty(c.query, {c.B(), c.Q(), c.S()});
  by_dtype(c.query, [&](auto zero) {
    using T = decltype(zero);
    AttentionForward<T> a{};
    fill_inputs(c, a);
    a.mask = rows_of<uint8_t>(rows);
    if (rows && rows->size(1) == 1) a.mask.row = 0;
    a.context = write<T>(context);
    a.weights = write<T>(weights);
    kernels().attention.of<T>()->forward(a, torch_threads());
  });
  return {narrow(c, context), narrow(c, weights)};
}

// query, keys, values, v: the gradients of those wanted, the others empty.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Call& c, const OptionalTensor& d_context, const OptionalTensor& d_weights,
                   const Tensor& weights, bool need_scores, bool need_values) {
  if (d_context) check_tensor(c.op, "d_context", *d_context, c.query, {c.B(), c.Q(), c.C()});
  if (d_weights) check_tensor(c.op, "d_weights", *d_weights, c.query, {c.B(), c.Q(), c.S()});
  check_tensor(c.op, "weights", weights, c.query, {c.B(), c.Q(), c.S()});
  const auto gradient = [&](bool want, std::initializer_list<int64_t> sizes) {
    return want ? empty(c.query, sizes) : empty(c.query, {0});
  };
  const Tensor d_query = gradient(need_scores, {c.B(), c.Q(), c.K()});
  const Tensor d_keys = gradient(need_scores, {c.B(), c.S(), c.K()});
  const Tensor d_values = gradient(need_values, {c.B(), c.S(), c.C()});
  const Tensor d_v = gradient(need_scores && c.v, {c.K()});
  by_dtype(c.query, [&](auto zero) {
    using T = decltype(zero);
    AttentionBackward<T> a{};
    fill_inputs(c, a);
    a.weights = read<T>(weights);
    a.d_context = rows_of<T>(d_context);
    a.d_weights = rows_of<T>(d_weights);
    a.need_scores = need_scores;
    a.need_values = need_values;
    a.d_query = write<T>(d_query);
    a.d_keys = write<T>(d_keys);
    a.d_values = write<T>(d_values);
    a.d_v = write<T>(d_v);
    kernels().attention.of<T>()->backward(a, torch_threads());
  });
  return {narrow(c, d_query), narrow(c, d_keys), narrow(c, d_values), narrow(c, d_v)};
}

}  // namespace

std::tuple<Tensor, Tensor> additive_attention_fwd(Tensor query, Tensor keys, Tensor values,
                                                  Tensor v, OptionalTensor extra,
                                                  OptionalTensor mask, OptionalTensor lengths,
                                                  double scale) {
  return forward(make_call("additive_attention_fwd", query, keys, values, v, extra, lengths, scale),
                 mask);
}

std::tuple<Tensor, Tensor> dot_attention_fwd(Tensor query, Tensor keys, Tensor values,
                                             OptionalTensor mask, OptionalTensor lengths,
                                             double scale) {
  return forward(make_call("dot_attention_fwd", query, keys, values, {}, {}, lengths, scale), mask);
}

Gradients additive_attention_bwd(OptionalTensor d_context, OptionalTensor d_weights, Tensor query,
                                 Tensor keys, Tensor values, Tensor v, OptionalTensor extra,
                                 OptionalTensor lengths, Tensor weights, double scale,
                                 bool need_scores, bool need_values) {
  const Call c = make_call("additive_attention_bwd", query, keys, values, v, extra, lengths, scale);
  return backward(c, wide(d_context), wide(d_weights), as_contiguous(wide(weights)), need_scores,
                  need_values);
}

std::tuple<Tensor, Tensor, Tensor> dot_attention_bwd(
    OptionalTensor d_context, OptionalTensor d_weights, Tensor query, Tensor keys, Tensor values,
    OptionalTensor lengths, Tensor weights, double scale, bool need_scores, bool need_values) {
  const Call c = make_call("dot_attention_bwd", query, keys, values, {}, {}, lengths, scale);
  const Gradients all = backward(c, wide(d_context), wide(d_weights), as_contiguous(wide(weights)),
                                 need_scores, need_values);
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all)};
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("additive_attention_fwd", TORCH_BOX(&fastseq::ops::additive_attention_fwd));
  m.impl("additive_attention_bwd", TORCH_BOX(&fastseq::ops::additive_attention_bwd));
  m.impl("dot_attention_fwd", TORCH_BOX(&fastseq::ops::dot_attention_fwd));
  m.impl("dot_attention_bwd", TORCH_BOX(&fastseq::ops::dot_attention_bwd));
}
