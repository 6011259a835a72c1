// fastseq::recurrent_fwd and fastseq::recurrent_bwd: one recurrent layer of any cell, one or two
// directions, a whole sequence.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cpu/dispatch.h"
#include "functions.h"
#include "tensors.h"

namespace fastseq {
namespace ops {

namespace {

// Which sequences run at which step; see RecurrentShape.
struct Steps {
  std::vector<int64_t> rows, first, order;
  RecurrentShape shape;
};

// What an op is called with beside gradients, checked and with contiguous rows.
struct Call {
  const char* op;
  const CellInfo& cell;
  Tensor x;
  OptionalTensor h0, c0;
  Tensors weights;
  bool has_biases, projected;
  OptionalTensor batch_sizes, lengths, resets;
  Tensors masks;
  Steps steps;
  size_t per_direction = 0;

  const RecurrentShape& shape() const { return steps.shape; }
  bool packed() const { return batch_sizes.has_value(); }
  // A single step without a dimension for time, nor one for directions.
  bool one_step() const { return !packed() && x.dim() == 2; }
  int64_t saved_row() const { return cell.saved_row(shape(), projected); }
  // Room in `saved`: a size that is known without a look at the lengths.
  int64_t saved_tokens() const { return lengths ? shape().T * shape().B : shape().tokens; }

  // w_ih, w_hh, b_ih, b_hh, params, w_hr of a direction, by place; -1: there is none.
  int place(int which) const {
    const int biases = has_biases ? 2 : 0;
    switch (which) {
      case 2:
      case 3:
        return has_biases ? which : -1;
      case 4:
        return cell.params ? 2 + biases : -1;
      case 5:
        return projected ? 2 + biases + (cell.params ? 1 : 0) : -1;
      default:
        return which;
    }
  }
  const Tensor* weight(int64_t d, int which) const {
    const int at = place(which);
    return at < 0 ? nullptr : &weights[size_t(d) * per_direction + size_t(at)];
  }
};

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType type,
                  const char* type_name, int64_t size) {
  require(t.is_cpu() && t.dim() == 1 && t.scalar_type() == type && (size < 0 || t.size(0) == size),
          "fastseq.", op, ": expected ", name, " as ", type_name, " of one dimension",
          size < 0 ? "" : " and one entry a sequence", " on the CPU");
}

void rows_of_packed(Call& c, const Tensor& sizes) {
  RecurrentShape& s = c.steps.shape;
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t rows = read<int64_t>(sizes)[t];
    require(rows >= 1 && rows <= (t ? c.steps.rows[size_t(t) - 1] : s.B), "fastseq.", c.op,
            ": expected batch_sizes to start at B and never increase");
    c.steps.rows[size_t(t)] = rows;
  }
  require(s.T == 0 || c.steps.rows[0] == s.B, "fastseq.", c.op,
          ": expected batch_sizes to start at B and never increase");
}

void rows_of_lengths(Call& c, const Tensor& lengths) {
  RecurrentShape& s = c.steps.shape;
  const int64_t* length = read<int64_t>(lengths);
  std::fill(c.steps.rows.begin(), c.steps.rows.end(), 0);
  for (int64_t b = 0; b < s.B; ++b) {
    require(length[b] >= 0 && length[b] <= s.T, "fastseq.", c.op,
            ": expected lengths between 0 and T = ", s.T, ", got ", length[b]);
    if (length[b] > 0) ++c.steps.rows[size_t(length[b]) - 1];
  }
  for (int64_t t = s.T - 2; t >= 0; --t) c.steps.rows[size_t(t)] += c.steps.rows[size_t(t) + 1];
  c.steps.order.resize(size_t(s.B));
  std::iota(c.steps.order.begin(), c.steps.order.end(), int64_t(0));
  std::stable_sort(c.steps.order.begin(), c.steps.order.end(),
                   [&](int64_t i, int64_t j) { return length[i] > length[j]; });
  s.order = c.steps.order.data();
}

void count_tokens(Call& c) {
  RecurrentShape& s = c.steps.shape;
  s.tokens = 0;
  for (int64_t t = 0; t < s.T; ++t) {
    c.steps.first[size_t(t)] = s.tokens;
    s.tokens += c.steps.rows[size_t(t)];
  }
  s.rows = c.steps.rows.data();
  s.first = c.steps.first.data();
}

void find_steps(Call& c, int64_t directions) {
  const char* op = c.op;
  const bool packed = c.packed();
  const bool one_step = c.one_step();
  require(c.x.is_cpu() && c.x.dim() == (packed || one_step ? 2 : 3), "fastseq.", op,
          ": expected x of shape ", packed ? "[N, I]" : "[T, B, I] or [B, I]", ", got ", c.x.dim(),
          " dimensions");
  require(!one_step || (directions == 1 && !c.lengths && !c.resets && c.masks.empty()), "fastseq.",
          op,
          ": expected nothing but states and weights of one direction beside x of shape [B, I]");
  require(c.x.scalar_type() == ScalarType::Float || c.x.scalar_type() == ScalarType::Double,
          "fastseq.", op, ": expected float32 or float64");
  if (packed) check_vector(op, "batch_sizes", *c.batch_sizes, ScalarType::Long, "int64", -1);
  require(!packed || (c.h0 && c.h0->dim() == 3), "fastseq.", op,
          ": expected h0 of shape [D, B, P] beside batch_sizes");
  require(!packed || !c.lengths, "fastseq.", op, ": expected batch_sizes or lengths, got both");
  RecurrentShape& s = c.steps.shape;
  s.T = one_step ? 1 : packed ? c.batch_sizes->size(0) : c.x.size(0);
  s.B = packed ? c.h0->size(1) : c.x.size(one_step ? 0 : 1);
  s.I = c.x.size(c.x.dim() - 1);
  s.P = c.weight(0, 1)->size(1);
  s.H = c.projected ? c.weight(0, 5)->size(1) : s.P;
  s.D = directions;
  s.order = nullptr;
  c.steps.rows.assign(size_t(s.T), s.B);
  c.steps.first.resize(size_t(s.T));
  if (packed) rows_of_packed(c, as_contiguous(*c.batch_sizes));
  if (c.lengths) {
    check_vector(op, "lengths", *c.lengths, ScalarType::Long, "int64", s.B);
    rows_of_lengths(c, as_contiguous(*c.lengths));
  }
  count_tokens(c);
  require(!packed || s.tokens == c.x.size(0), "fastseq.", op,
          ": expected batch_sizes to sum to the rows of x");
}

void check_weights(Call& c) {
  const RecurrentShape& s = c.shape();
  const int64_t gates = c.cell.gates * s.H;
  for (int64_t d = 0; d < s.D; ++d) {
    check_tensor(c.op, "w_ih", *c.weight(d, 0), c.x, {gates, s.I});
    check_tensor(c.op, "w_hh", *c.weight(d, 1), c.x, {gates, s.P});
    if (c.has_biases) {
      check_tensor(c.op, "b_ih", *c.weight(d, 2), c.x, {gates});
      check_tensor(c.op, "b_hh", *c.weight(d, 3), c.x, {gates});
    }
    if (c.cell.params) check_tensor(c.op, "params", *c.weight(d, 4), c.x, {c.cell.params, s.H});
    if (c.projected) check_tensor(c.op, "w_hr", *c.weight(d, 5), c.x, {s.P, s.H});
  }
  for (Tensor& w : c.weights) {
    if (!w.is_contiguous()) w = as_contiguous(w);
  }
}

// A state or its gradient: [D, B, width], or of one step [B, width].
void check_state(const Call& c, const char* name, const Tensor& t, int64_t width) {
  const RecurrentShape& s = c.shape();
  if (c.one_step()) {
    check_tensor(c.op, name, t, c.x, {s.B, width});
  } else {
    check_tensor(c.op, name, t, c.x, {s.D, s.B, width});
  }
}
Tensor empty_state(const Call& c, int64_t width) {
  const RecurrentShape& s = c.shape();
  return c.one_step() ? empty(c.x, {s.B, width}) : empty(c.x, {s.D, s.B, width});
}

Call make_call(const char* op, int64_t cell, Tensor x, OptionalTensor h0, OptionalTensor c0,
               Tensors weights, bool has_biases, int64_t directions, OptionalTensor batch_sizes,
               OptionalTensor lengths, OptionalTensor resets, Tensors masks) {
  require(cell >= 0 && cell < cell_count(), "fastseq.", op, ": expected a cell below ",
          cell_count(), ", got ", cell);
  require(directions == 1 || directions == 2, "fastseq.", op,
          ": expected one or two directions, got ", directions);
  Call c{op,
         cell_info(int(cell)),
         std::move(x),
         std::move(h0),
         std::move(c0),
         std::move(weights),
         has_biases,
         false,
         std::move(batch_sizes),
         std::move(lengths),
         std::move(resets),
         std::move(masks),
         {}};
  const size_t least = size_t(2 + (has_biases ? 2 : 0) + (c.cell.params ? 1 : 0));
  c.per_direction = c.weights.size() / size_t(directions);
  c.projected = c.per_direction == least + 1;
  require(c.weights.size() == c.per_direction * size_t(directions) &&
              (c.per_direction == least || c.projected),
          "fastseq.", op, ": expected ", least, " weights a direction, or ", least + 1,
          " with a projection, got ", c.weights.size(), " for ", directions);
  require(!c.projected || c.cell.states == 2, "fastseq.", op, ": expected no projection of a ",
          c.cell.name);
  for (int which : {1, 5}) {
    const Tensor* w = c.weight(0, which);
    require(!w || w->dim() == 2, "fastseq.", op, ": expected w_hh and w_hr of two dimensions");
  }
  find_steps(c, directions);
  check_weights(c);
  const RecurrentShape& s = c.shape();
  if (c.h0) check_state(c, "h0", *c.h0, s.P);
  if (c.c0) check_state(c, "c0", *c.c0, s.H);
  require(!c.c0 || c.cell.states == 2, "fastseq.", op, ": expected no c0 for a ", c.cell.name);
  c.x = with_contiguous_rows(c.x);
  if (c.h0) c.h0 = as_contiguous(*c.h0);
  if (c.c0) c.c0 = as_contiguous(*c.c0);
  if (c.resets) {
    const Tensor& r = *c.resets;
    const bool fits = c.packed() ? r.dim() == 1 && r.size(0) == s.tokens
                                 : r.dim() == 2 && r.size(0) == s.T && r.size(1) == s.B;
    require(fits && r.is_cpu() && r.scalar_type() == ScalarType::Bool, "fastseq.", op,
            ": expected resets as bool ", c.packed() ? "[N]" : "[T, B]", " on the CPU");
  }
  require(int64_t(c.masks.size()) == c.cell.masks * s.D, "fastseq.", op, ": expected ",
          c.cell.masks * s.D, " masks, got ", c.masks.size());
  for (size_t i = 0; i < c.masks.size(); ++i) {
    Tensor& m = c.masks[i];
    const int64_t width = i % size_t(c.cell.masks) == 0 ? s.P : s.H;
    if (c.packed()) {
      check_tensor(op, "a mask", m, c.x, {s.tokens, width});
    } else {
      check_tensor(op, "a mask", m, c.x, {s.T, s.B, width});
    }
    m = with_contiguous_rows(m);
  }
  return c;
}

// [T, B, n] with any strides but the last, packed [N, n], or of one step [B, n].
template <class T>
TokenRows<const T> token_rows(const Call& c, const Tensor& t) {
  if (c.packed()) return {read<T>(t), TokenRows<const T>::kPacked, t.stride(0)};
  if (c.one_step()) return {read<T>(t), 0, t.stride(0)};
  return {read<T>(t), t.stride(0), t.stride(1)};
}
template <class T>
TokenRows<T> writable_rows(const Call& c, const Tensor& t) {
  const auto rows = token_rows<T>(c, t);
  return {write<T>(t), rows.step, rows.row};
}

// As the switches stand at this call: a backward pass goes by its own time, as torch's products do.
//
// Of few units many may be saturated, and what is left of them errs by far more than a product.
Tiles tiles_now(int64_t units) {
  constexpr int64_t kFewestUnits = 16;
  if (units < kFewestUnits) return {};
  const MultiplyTiles multiply = multiply_tiles();
  const int parts = multiply && allowed_parts ? allowed_parts() : 0;
  return parts ? Tiles{multiply, parts} : Tiles{};
}

template <class T>
void fill_inputs(const Call& c, RecurrentInputs<T>& a) {
  const RecurrentShape& s = c.shape();
  a.shape = s;
  if constexpr (std::is_same<T, float>::value) a.tiles = tiles_now(s.H);
  a.x = token_rows<T>(c, c.x);
  if (c.resets) {
    const auto rows = token_rows<bool>(c, *c.resets);
    a.resets = {reinterpret_cast<const uint8_t*>(rows.base), rows.step, rows.row};
  }
  for (int64_t d = 0; d < s.D; ++d) {
    const auto pointer = [&](int which) {
      const Tensor* w = c.weight(d, which);
      return w ? read<T>(*w) : nullptr;
    };
    a.weights[d] = {pointer(0), pointer(1), pointer(2), pointer(3), pointer(5), pointer(4)};
    for (int i = 0; i < c.cell.masks; ++i) {
      a.masks[d][i] = token_rows<T>(c, c.masks[size_t(d * c.cell.masks + i)]);
    }
  }
  a.h0 = read<T>(c.h0);
  a.c0 = read<T>(c.c0);
}

// Zero for what no sequence reaches: rows of y or dx past their sequence's length.
template <class T>
void clear_padding(const Call& c, const Tensor& t) {
  const RecurrentShape& s = c.shape();
  if (!c.lengths) return;
  const auto rows = writable_rows<T>(c, t);
  for (int64_t step = 0; step < s.T; ++step) {
    for (int64_t b = s.rows[step]; b < s.B; ++b) {
      std::fill_n(rows.at(s, step, b), t.size(2), T(0));
    }
  }
}

}  // namespace

int (*allowed_parts)() = nullptr;

Tensors recurrent_fwd(int64_t cell, Tensor x, OptionalTensor h0, OptionalTensor c0, Tensors weights,
                      bool has_biases, int64_t directions, OptionalTensor batch_sizes,
                      OptionalTensor lengths, OptionalTensor resets, Tensors masks, bool save) {
  const Call c = make_call("recurrent_fwd", cell, std::move(x), std::move(h0), std::move(c0),
                           std::move(weights), has_biases, directions, std::move(batch_sizes),
                           std::move(lengths), std::move(resets), std::move(masks));
  const RecurrentShape& s = c.shape();
  Tensors out;
  out.reserve(4);
  const size_t states_at = c.one_step() ? 0 : 1;
  if (c.packed()) out.push_back(empty(c.x, {s.tokens, s.D * s.P}));
  if (!c.packed() && !c.one_step()) out.push_back(empty(c.x, {s.T, s.B, s.D * s.P}));
  out.push_back(empty_state(c, s.P));
  if (c.cell.states == 2) out.push_back(empty_state(c, s.H));
  if (save) out.push_back(empty(c.x, {s.D, c.saved_tokens(), c.saved_row()}));
  by_dtype(c.x, [&](auto zero) {
    using T = decltype(zero);
    RecurrentForward<T> a{};
    fill_inputs(c, a);
    clear_padding<T>(c, out[0]);
    a.y = writable_rows<T>(c, out[0]);
    a.h_n = write<T>(out[states_at]);
    a.c_n = c.cell.states == 2 ? write<T>(out[states_at + 1]) : nullptr;
    a.saved = save ? write<T>(out.back()) : nullptr;
    kernels().recurrent.of<T>()[cell].forward(a, torch_threads());
  });
  return out;
}

Tensors recurrent_bwd(int64_t cell, OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                      Tensor x, OptionalTensor h0, OptionalTensor c0, Tensors weights,
                      bool has_biases, int64_t directions, OptionalTensor batch_sizes,
                      OptionalTensor lengths, OptionalTensor resets, Tensors masks, Tensor saved,
                      bool need_dx, bool need_dw, bool need_db, bool need_dh0) {
  const char* op = "recurrent_bwd";
  const Call c = make_call(op, cell, std::move(x), std::move(h0), std::move(c0), std::move(weights),
                           has_biases, directions, std::move(batch_sizes), std::move(lengths),
                           std::move(resets), std::move(masks));
  const RecurrentShape& s = c.shape();
  check_tensor(op, "saved", saved, c.x, {s.D, c.saved_tokens(), c.saved_row()});
  if (dy && c.packed()) check_tensor(op, "dy", *dy, c.x, {s.tokens, s.D * s.P});
  if (dy && !c.packed()) check_tensor(op, "dy", *dy, c.x, {s.T, s.B, s.D * s.P});
  require(!dy || !c.one_step(), "fastseq.", op, ": expected no dy beside x of shape [B, I]");
  if (dh_n) check_state(c, "dh_n", *dh_n, s.P);
  if (dc_n) check_state(c, "dc_n", *dc_n, s.H);
  saved = as_contiguous(saved);
  if (dy) dy = with_contiguous_rows(*dy);
  if (dh_n) dh_n = as_contiguous(*dh_n);
  if (dc_n) dc_n = as_contiguous(*dc_n);

  Tensors out;
  out.reserve(2 + size_t(need_dx) + c.weights.size());
  if (need_dx) {
    const bool rows = c.packed() || c.one_step();
    out.push_back(rows ? empty(c.x, {s.tokens, s.I}) : empty(c.x, {s.T, s.B, s.I}));
  }
  const size_t dh0_at = out.size();
  if (need_dh0) out.push_back(empty_state(c, s.P));
  // Of use to the loop even where nobody wants it.
  OptionalTensor dc0;
  if (c.cell.states == 2) dc0 = empty_state(c, s.H);
  if (need_dh0 && dc0) out.push_back(*dc0);
  const size_t weights_at = out.size();
  const int64_t gates = c.cell.gates * s.H;
  size_t place[6] = {};
  size_t per_direction = 0;
  for (int64_t d = 0; d < s.D; ++d) {
    const size_t begin = out.size();
    auto add = [&](int which, bool want, std::initializer_list<int64_t> sizes) {
      if (!want) return;
      place[which] = out.size() - begin;
      out.push_back(empty(c.x, sizes));
    };
    add(0, need_dw, {gates, s.I});
    add(1, need_dw, {gates, s.P});
    add(2, need_db && has_biases, {gates});
    add(3, need_db && has_biases, {gates});
    add(4, need_dw && c.cell.params > 0, {c.cell.params, s.H});
    add(5, need_dw && c.projected, {s.P, s.H});
    per_direction = out.size() - begin;
  }

  by_dtype(c.x, [&](auto zero) {
    using T = decltype(zero);
    RecurrentBackward<T> a{};
    fill_inputs(c, a);
    a.saved = read<T>(saved);
    if (dy) a.dy = token_rows<T>(c, *dy);
    a.dh_n = read<T>(dh_n);
    a.dc_n = read<T>(dc_n);
    a.dh0 = need_dh0 ? write<T>(out[dh0_at]) : nullptr;
    a.dc0 = dc0 ? write<T>(*dc0) : nullptr;
    if (need_dx) {
      clear_padding<T>(c, out[0]);
      a.dx = writable_rows<T>(c, out[0]);
    }
    for (int64_t d = 0; d < s.D; ++d) {
      auto gradient = [&](int which, bool want) {
        return want ? write<T>(out[weights_at + size_t(d) * per_direction + place[which]])
                    : nullptr;
      };
      a.dw_ih[d] = gradient(0, need_dw);
      a.dw_hh[d] = gradient(1, need_dw);
      a.db_ih[d] = gradient(2, need_db && has_biases);
      a.db_hh[d] = gradient(3, need_db && has_biases);
      a.dparams[d] = gradient(4, need_dw && c.cell.params > 0);
      a.dw_hr[d] = gradient(5, need_dw && c.projected);
    }
    kernels().recurrent.of<T>()[cell].backward(a, torch_threads());
  });
  return out;
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "recurrent_fwd(int cell, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "bool has_biases, int directions, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "
      "Tensor[] masks, bool save) -> Tensor[]");
  m.def(
      "recurrent_bwd(int cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, "
      "Tensor? c0, Tensor[] weights, bool has_biases, int directions, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? resets, Tensor[] masks, Tensor saved, bool need_dx, bool need_dw, "
      "bool need_db, bool need_dh0) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("recurrent_fwd", TORCH_BOX(&fastseq::ops::recurrent_fwd));
  m.impl("recurrent_bwd", TORCH_BOX(&fastseq::ops::recurrent_bwd));
}
