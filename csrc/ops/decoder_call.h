// The arguments that the ops of a decoder with attention share.
#pragma once

#include <algorithm>
#include <vector>

#include "../cpu/dispatch.h"
#include "tensors.h"

namespace fastseq {
namespace ops {

// What the decoder's ops are called with, checked and contiguous.
struct Call {
  const char* op;
  const CellInfo& cell;
  Tensor h0, keys, values;
  OptionalTensor c0, mask, w_q, v, w_c, b_c;
  Tensors weights;
  bool has_biases;
  double scale;
  DecoderShape shape{};
  std::vector<int64_t> ends;

  size_t per_layer() const { return has_biases ? 4 : 2; }
  const Tensor& weight(int64_t layer, size_t which) const {
    return weights[size_t(layer) * per_layer() + which];
  }
};

inline void contiguous(Tensor& t) {
  if (!t.is_contiguous()) t = as_contiguous(t);
}
inline void contiguous(OptionalTensor& t) {
  if (t) contiguous(*t);
}

inline void check_dims(const char* op, const char* name, const Tensor& t, int64_t dims) {
  require(t.dim() == dims, "fastseq.", op, ": expected ", name, " of ", dims, " dimensions, got ",
          t.dim());
}

// One past the last position that each source lets be attended.
inline void find_ends(Call& c) {
  const DecoderShape& s = c.shape;
  c.ends.assign(size_t(s.B), s.S);
  if (!c.mask) return;
  require(c.mask->is_cpu() && c.mask->scalar_type() == ScalarType::Bool && c.mask->dim() == 2 &&
              c.mask->size(0) == s.B && c.mask->size(1) == s.S,
          "fastseq.", c.op, ": expected mask as bool [B, S] on the CPU");
  const bool* mask = read<bool>(*c.mask);
  for (int64_t b = 0; b < s.B; ++b) {
    int64_t& end = c.ends[size_t(b)];
    while (end > 0 && !mask[b * s.S + end - 1]) --end;
  }
}

inline Call make_call(const char* op, int64_t cell, int64_t T, Tensor h0, OptionalTensor c0,
                      Tensor keys, Tensor values, OptionalTensor mask, Tensors weights,
                      bool has_biases, OptionalTensor w_q, OptionalTensor v, OptionalTensor w_c,
                      OptionalTensor b_c, bool feeds, bool residual, double scale) {
  require(cell >= 0 && cell < cell_count() && kernels().decoder.f32[cell].forward, "fastseq.", op,
          ": expected a cell that has a decoder, got ", cell);
  Call c{op,
         cell_info(int(cell)),
         std::move(h0),
         std::move(keys),
         std::move(values),
         std::move(c0),
         std::move(mask),
         std::move(w_q),
         std::move(v),
         std::move(w_c),
         std::move(b_c),
         std::move(weights),
         has_biases,
         scale,
         {},
         {}};
  check_dims(op, "h0", c.h0, 3);
  check_dims(op, "keys", c.keys, 3);
  check_dims(op, "values", c.values, 3);
  require(c.h0.scalar_type() == ScalarType::Float || c.h0.scalar_type() == ScalarType::Double,
          "fastseq.", op, ": expected float32 or float64");
  DecoderShape& s = c.shape;
  s.T = T;
  s.L = c.h0.size(0);
  s.B = c.h0.size(1);
  s.H = c.h0.size(2);
  s.S = c.keys.size(1);
  s.K = c.keys.size(2);
  s.C = c.values.size(2);
  s.dot = !c.v;
  if (c.w_c) check_dims(op, "w_c", *c.w_c, 2);
  s.A = c.w_c ? c.w_c->size(0) : 0;
  require(!c.w_c || s.A > 0, "fastseq.", op, ": expected w_c of at least one row");
  require(!feeds || c.w_c, "fastseq.", op, ": expected input feeding with w_c only");
  s.feeds = feeds;
  s.residual = residual;
  s.width = 1;
  require(s.L >= 1 && s.L <= kMostLayers, "fastseq.", op, ": expected 1 to ", kMostLayers,
          " layers, got ", s.L);
  require(c.weights.size() == size_t(s.L) * c.per_layer(), "fastseq.", op, ": expected ",
          size_t(s.L) * c.per_layer(), " weights, got ", c.weights.size());
  check_dims(op, "w_ih", c.weight(0, 0), 2);
  s.E = c.weight(0, 0).size(1) - s.beside();
  require(s.E >= 0, "fastseq.", op, ": expected w_ih of at least ", s.beside(),
          " columns for what stands beside the input, got ", c.weight(0, 0).size(1));

  check_tensor(op, "h0", c.h0, c.h0, {s.L, s.B, s.H});
  require(c.c0.has_value() == (c.cell.states == 2), "fastseq.", op, ": expected ",
          c.cell.states == 2 ? "a c0" : "no c0", " for a ", c.cell.name);
  if (c.c0) check_tensor(op, "c0", *c.c0, c.h0, {s.L, s.B, s.H});
  check_tensor(op, "keys", c.keys, c.h0, {s.B, s.S, s.K});
  check_tensor(op, "values", c.values, c.h0, {s.B, s.S, s.C});
  if (c.w_q) check_tensor(op, "w_q", *c.w_q, c.h0, {s.K, s.H});
  require(c.w_q || s.K == s.H, "fastseq.", op, ": expected keys as wide as h, ", s.H,
          ", where there is no w_q, got ", s.K);
  if (c.v) check_tensor(op, "v", *c.v, c.h0, {s.K});
  if (c.w_c) check_tensor(op, "w_c", *c.w_c, c.h0, {s.A, s.C + s.H});
  if (c.b_c) check_tensor(op, "b_c", *c.b_c, c.h0, {s.A});
  const int64_t gates = c.cell.gates * s.H;
  for (int64_t l = 0; l < s.L; ++l) {
    check_tensor(op, "w_ih", c.weight(l, 0), c.h0, {gates, s.input(l)});
    check_tensor(op, "w_hh", c.weight(l, 1), c.h0, {gates, s.H});
    if (!has_biases) continue;
    check_tensor(op, "b_ih", c.weight(l, 2), c.h0, {gates});
    check_tensor(op, "b_hh", c.weight(l, 3), c.h0, {gates});
  }
  for (Tensor* t : {&c.h0, &c.keys, &c.values}) contiguous(*t);
  for (OptionalTensor* t : {&c.c0, &c.mask, &c.w_q, &c.v, &c.w_c, &c.b_c}) contiguous(*t);
  for (Tensor& t : c.weights) contiguous(t);
  find_ends(c);
  return c;
}

template <class T>
void fill_inputs(const Call& c, DecoderInputs<T>& a) {
  a.shape = c.shape;
  a.h0 = read<T>(c.h0);
  a.c0 = read<T>(c.c0);
  a.keys = read<T>(c.keys);
  a.values = read<T>(c.values);
  a.mask = reinterpret_cast<const uint8_t*>(read<bool>(c.mask));
  a.ends = c.ends.data();
  for (int64_t l = 0; l < c.shape.L; ++l) {
    a.layers[l] = {read<T>(c.weight(l, 0)), read<T>(c.weight(l, 1)),
                   c.has_biases ? read<T>(c.weight(l, 2)) : nullptr,
                   c.has_biases ? read<T>(c.weight(l, 3)) : nullptr};
  }
  a.w_q = read<T>(c.w_q);
  a.v = read<T>(c.v);
  a.w_c = read<T>(c.w_c);
  a.b_c = read<T>(c.b_c);
  a.scale = T(c.scale);
}

// [B, T, n].
template <class T>
StepRows<const T> step_rows(const Tensor& t) {
  return {read<T>(t), t.stride(1), t.stride(0)};
}
}  // namespace ops
}  // namespace fastseq
