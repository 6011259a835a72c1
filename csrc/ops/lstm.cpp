// fastseq::lstm_fwd and fastseq::lstm_bwd: one LSTM layer, one or two directions, a whole sequence.
#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "tensors.h"

namespace fastseq {
namespace ops {

namespace {

using OptionalTensor = std::optional<Tensor>;

// The weights of one direction as the schema passes them.
struct Weights {
  Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh;
};

// Which sequences run at which step; see LstmShape.
struct Steps {
  std::vector<int64_t> rows, first;
  LstmShape shape;
};

Steps steps_of(const char* op, const Tensor& x, const OptionalTensor& h0, const Tensor& w_hh,
               int64_t directions, const OptionalTensor& batch_sizes) {
  Steps s;
  const bool packed = batch_sizes.has_value();
  require(x.is_cpu() && x.dim() == (packed ? 2 : 3), "fastseq.", op, ": expected x of shape ",
          packed ? "[N, I]" : "[T, B, I]", ", got ", x.dim(), " dimensions");
  require(x.scalar_type() == torch::headeronly::ScalarType::Float ||
              x.scalar_type() == torch::headeronly::ScalarType::Double,
          "fastseq.", op, ": expected float32 or float64");
  require(w_hh.dim() == 2, "fastseq.", op, ": expected w_hh of shape [4*H, H]");
  if (packed) {
    require(batch_sizes->is_cpu() && batch_sizes->dim() == 1 &&
                batch_sizes->scalar_type() == torch::headeronly::ScalarType::Long,
            "fastseq.", op, ": expected batch_sizes as int64 [T] on the CPU");
  }
  require(!packed || (h0 && h0->dim() == 3), "fastseq.", op,
          ": expected h0 of shape [D, B, H] beside batch_sizes");
  const Tensor sizes = packed ? as_contiguous(*batch_sizes) : x;
  LstmShape& shape = s.shape;
  shape.T = packed ? batch_sizes->size(0) : x.size(0);
  shape.B = packed ? h0->size(1) : x.size(1);
  shape.I = x.size(packed ? 1 : 2);
  shape.H = w_hh.size(1);
  shape.D = directions;
  s.rows.resize(size_t(shape.T));
  s.first.resize(size_t(shape.T));
  int64_t tokens = 0;
  for (int64_t t = 0; t < shape.T; ++t) {
    const int64_t rows = packed ? read<int64_t>(sizes)[t] : shape.B;
    require(!packed || (rows >= 1 && rows <= (t ? s.rows[size_t(t) - 1] : shape.B)), "fastseq.", op,
            ": expected batch_sizes to start at B and never increase");
    s.rows[size_t(t)] = rows;
    s.first[size_t(t)] = tokens;
    tokens += rows;
  }
  require(!packed || (tokens == x.size(0) && (shape.T == 0 || s.rows[0] == shape.B)), "fastseq.",
          op, ": expected batch_sizes to sum to the rows of x");
  shape.tokens = tokens;
  shape.rows = s.rows.data();
  shape.first = s.first.data();
  return s;
}

void check_weights(const char* op, const Weights& w, const Tensor& x, const LstmShape& s) {
  check_tensor(op, "w_ih", w.w_ih, x, {4 * s.H, s.I});
  check_tensor(op, "w_hh", w.w_hh, x, {4 * s.H, s.H});
  if (w.b_ih) check_tensor(op, "b_ih", *w.b_ih, x, {4 * s.H});
  if (w.b_hh) check_tensor(op, "b_hh", *w.b_hh, x, {4 * s.H});
}

std::vector<Weights> weights_of(const char* op, const Tensor& x, const LstmShape& s, Weights one,
                                const OptionalTensor& w_ih_r, const OptionalTensor& w_hh_r,
                                const OptionalTensor& b_ih_r, const OptionalTensor& b_hh_r) {
  std::vector<Weights> all{std::move(one)};
  if (s.D == 2) {
    require(w_ih_r && w_hh_r, "fastseq.", op, ": expected reverse weights, got none");
    all.push_back({*w_ih_r, *w_hh_r, b_ih_r, b_hh_r});
  }
  for (Weights& w : all) {
    check_weights(op, w, x, s);
    w.w_ih = as_contiguous(w.w_ih);
    w.w_hh = as_contiguous(w.w_hh);
    if (w.b_ih) w.b_ih = as_contiguous(*w.b_ih);
    if (w.b_hh) w.b_hh = as_contiguous(*w.b_hh);
  }
  return all;
}

template <class T>
LstmWeights<T> pointers(const Weights& w) {
  return {read<T>(w.w_ih), read<T>(w.w_hh), read<T>(w.b_ih), read<T>(w.b_hh)};
}

// [T, B, n] with any strides but the last, or packed [N, n].
template <class T>
LstmRows<const T> rows_of(const Tensor& t) {
  if (t.dim() == 2) return {read<T>(t), LstmRows<const T>::kPacked, t.stride(0)};
  return {read<T>(t), t.stride(0), t.stride(1)};
}

bool is_double(const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Double; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_fwd(
    Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
    OptionalTensor b_hh, OptionalTensor w_ih_r, OptionalTensor w_hh_r, OptionalTensor b_ih_r,
    OptionalTensor b_hh_r, OptionalTensor batch_sizes, bool save) {
  const char* op = "lstm_fwd";
  const Steps steps = steps_of(op, x, h0, w_hh, w_ih_r ? 2 : 1, batch_sizes);
  const LstmShape& s = steps.shape;
  const auto weights =
      weights_of(op, x, s, {w_ih, w_hh, b_ih, b_hh}, w_ih_r, w_hh_r, b_ih_r, b_hh_r);
  if (h0) check_tensor(op, "h0", *h0, x, {s.D, s.B, s.H});
  if (c0) check_tensor(op, "c0", *c0, x, {s.D, s.B, s.H});
  x = with_contiguous_rows(x);
  if (h0) h0 = as_contiguous(*h0);
  if (c0) c0 = as_contiguous(*c0);

  Tensor y = batch_sizes ? empty(x, {s.tokens, s.D * s.H}) : empty(x, {s.T, s.B, s.D * s.H});
  Tensor h_n = empty(x, {s.D, s.B, s.H}), c_n = empty(x, {s.D, s.B, s.H});
  Tensor gates = empty(x, {save ? s.D : 0, s.tokens, 4 * s.H});
  Tensor cells = empty(x, {save ? s.D : 0, s.tokens, s.H});

  auto run = [&](auto zero) {
    using T = decltype(zero);
    LstmForward<T> a{};
    a.shape = s;
    a.x = rows_of<T>(x);
    const auto y_rows = rows_of<T>(y);
    a.y = {write<T>(y), y_rows.step, y_rows.row};
    for (size_t d = 0; d < weights.size(); ++d) a.weights[d] = pointers<T>(weights[d]);
    a.h0 = read<T>(h0);
    a.c0 = read<T>(c0);
    a.h_n = write<T>(h_n);
    a.c_n = write<T>(c_n);
    a.gates = save ? write<T>(gates) : nullptr;
    a.cells = save ? write<T>(cells) : nullptr;
    kernels().of<T>().lstm_forward(a, torch_threads());
  };
  if (is_double(x)) {
    run(double{});
  } else {
    run(float{});
  }
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_bwd(
    OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x, OptionalTensor h0,
    OptionalTensor c0, Tensor w_ih, Tensor w_hh, OptionalTensor w_ih_r, OptionalTensor w_hh_r,
    OptionalTensor batch_sizes, Tensor gates, Tensor cells, bool need_dx, bool need_dw,
    bool need_db, bool need_dh0) {
  const char* op = "lstm_bwd";
  const OptionalTensor none;
  const Steps steps = steps_of(op, x, h0, w_hh, w_ih_r ? 2 : 1, batch_sizes);
  const LstmShape& s = steps.shape;
  const auto weights = weights_of(op, x, s, {w_ih, w_hh, none, none}, w_ih_r, w_hh_r, none, none);
  if (h0) check_tensor(op, "h0", *h0, x, {s.D, s.B, s.H});
  if (c0) check_tensor(op, "c0", *c0, x, {s.D, s.B, s.H});
  check_tensor(op, "gates", gates, x, {s.D, s.tokens, 4 * s.H});
  check_tensor(op, "cells", cells, x, {s.D, s.tokens, s.H});
  if (dy && batch_sizes) check_tensor(op, "dy", *dy, x, {s.tokens, s.D * s.H});
  if (dy && !batch_sizes) check_tensor(op, "dy", *dy, x, {s.T, s.B, s.D * s.H});
  if (dh_n) check_tensor(op, "dh_n", *dh_n, x, {s.D, s.B, s.H});
  if (dc_n) check_tensor(op, "dc_n", *dc_n, x, {s.D, s.B, s.H});
  x = with_contiguous_rows(x);
  if (h0) h0 = as_contiguous(*h0);
  if (c0) c0 = as_contiguous(*c0);
  gates = as_contiguous(gates);
  cells = as_contiguous(cells);
  if (dy) dy = with_contiguous_rows(*dy);
  if (dh_n) dh_n = as_contiguous(*dh_n);
  if (dc_n) dc_n = as_contiguous(*dc_n);

  const auto wanted = [&](bool want, std::initializer_list<int64_t> sizes) {
    return want ? empty(x, sizes) : empty(x, {0});
  };
  Tensor dx = !need_dx      ? empty(x, {0})
              : batch_sizes ? empty(x, {s.tokens, s.I})
                            : empty(x, {s.T, s.B, s.I});
  // Of use to the loop even where nobody wants it.
  Tensor dh0 = wanted(need_dh0, {s.D, s.B, s.H}), dc = empty(x, {s.D, s.B, s.H});
  Tensor dw_ih[2], dw_hh[2], db[2];
  for (int d = 0; d < 2; ++d) {
    dw_ih[d] = wanted(need_dw && d < s.D, {4 * s.H, s.I});
    dw_hh[d] = wanted(need_dw && d < s.D, {4 * s.H, s.H});
    db[d] = wanted(need_db && d < s.D, {4 * s.H});
  }

  auto run = [&](auto zero) {
    using T = decltype(zero);
    LstmBackward<T> a{};
    a.shape = s;
    a.x = rows_of<T>(x);
    a.h0 = read<T>(h0);
    a.c0 = read<T>(c0);
    a.gates = read<T>(gates);
    a.cells = read<T>(cells);
    if (dy) a.dy = rows_of<T>(*dy);
    a.dh_n = read<T>(dh_n);
    a.dc_n = read<T>(dc_n);
    a.dh0 = need_dh0 ? write<T>(dh0) : nullptr;
    a.dc0 = write<T>(dc);
    a.dx = need_dx ? write<T>(dx) : nullptr;
    for (int d = 0; d < s.D; ++d) {
      a.weights[d] = pointers<T>(weights[size_t(d)]);
      a.dw_ih[d] = need_dw ? write<T>(dw_ih[d]) : nullptr;
      a.dw_hh[d] = need_dw ? write<T>(dw_hh[d]) : nullptr;
      a.db[d] = need_db ? write<T>(db[d]) : nullptr;
    }
    kernels().of<T>().lstm_backward(a, torch_threads());
  };
  if (is_double(x)) {
    run(double{});
  } else {
    run(float{});
  }
  return {dx,       dh0,  need_dh0 ? dc : empty(x, {0}), dw_ih[0], dw_hh[0], db[0], dw_ih[1],
          dw_hh[1], db[1]};
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "lstm_fwd(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_ih_r, Tensor? w_hh_r, Tensor? b_ih_r, Tensor? b_hh_r, "
      "Tensor? batch_sizes, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, "
      "Tensor cells)");
  m.def(
      "lstm_bwd(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? w_ih_r, Tensor? w_hh_r, Tensor? batch_sizes, "
      "Tensor gates, Tensor cells, bool need_dx, bool need_dw, bool need_db, bool need_dh0) -> "
      "(Tensor dx, "
      "Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor dw_ih_r, "
      "Tensor dw_hh_r, Tensor db_r)");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("lstm_fwd", TORCH_BOX(&fastseq::ops::lstm_fwd));
  m.impl("lstm_bwd", TORCH_BOX(&fastseq::ops::lstm_bwd));
}
