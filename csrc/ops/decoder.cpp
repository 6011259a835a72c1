// fastseq::attention_decoder_fwd and fastseq::attention_decoder_bwd: a recurrent decoder with
// attention, a whole target sequence.
#include "decoder_call.h"
#include "functions.h"

namespace fastseq {
namespace ops {

namespace {

template <class T>
StepRows<T> writable_rows(const Tensor& t) {
  return {write<T>(t), t.stride(1), t.stride(0)};
}

// Where what the backward pass needs lies in one tensor, whose size is returned. Without a backward
// pass to come, room for one step does.
template <class T>
int64_t lay_out(const Call& c, bool save, T* base, DecoderSaved<T>& saved) {
  const DecoderShape& s = c.shape;
  int64_t used = 0;
  // `first` steps before step 0.
  auto take = [&](int64_t width, int64_t first) {
    const StepRows<T> rows{base + used, save ? s.B * width : 0, width};
    used += (save ? s.T + first : 1) * s.B * width;
    return rows;
  };
  saved.input = take(s.input(0), 0);
  for (int64_t l = 0; l < s.L; ++l) {
    saved.h[l] = take(s.H, 1);
    saved.out[l] = saved.h[l];
    if (l && s.residual) {
      saved.out[l] = take(s.H, 0);
      saved.out[l].base -= saved.out[l].step;
    }
    if (save) saved.cells[l] = take(c.cell.saved * s.H, 0);
  }
  if (save && c.w_q) saved.query = take(s.K, 0);
  if (s.A) saved.attended = take(s.C + s.H, 0);
  return used;
}

int64_t saved_size(const Call& c, bool save) {
  DecoderSaved<char> none{};
  return lay_out<char>(c, save, nullptr, none);
}

void check_bool_or_int(const char* op, const char* name, const Tensor& t, ScalarType type,
                       const char* type_name, int64_t dims) {
  require(t.is_cpu() && t.dim() == dims && t.scalar_type() == type, "fastseq.", op, ": expected ",
          name, " as ", type_name, " of ", dims, " dimensions on the CPU");
}

}  // namespace

Tensors attention_decoder_fwd(int64_t cell, OptionalTensor x, OptionalTensor tokens,
                              OptionalTensor table, OptionalTensor forced, Tensor h0,
                              OptionalTensor c0, Tensor keys, Tensor values, OptionalTensor mask,
                              Tensors weights, bool has_biases, OptionalTensor w_q,
                              OptionalTensor v, OptionalTensor w_c, OptionalTensor b_c,
                              OptionalTensor feed0, bool feeds, bool residual, double scale,
                              OptionalTensor w_out, OptionalTensor b_out, OptionalTensor x_factor,
                              OptionalTensor read_factor, int64_t end_token, bool save) {
  const char* op = "attention_decoder_fwd";
  require(x.has_value() != tokens.has_value(), "fastseq.", op,
          ": expected either inputs x or tokens and their table");
  if (x) check_dims(op, "x", *x, 3);
  if (tokens) check_bool_or_int(op, "tokens", *tokens, ScalarType::Long, "int64", 2);
  const int64_t T = x ? x->size(1) : tokens->size(1);
  Call c = make_call(op, cell, T, std::move(h0), std::move(c0), std::move(keys), std::move(values),
                     std::move(mask), std::move(weights), has_biases, std::move(w_q), std::move(v),
                     std::move(w_c), std::move(b_c), feeds, residual, scale);
  DecoderShape& s = c.shape;
  if (x) {
    check_tensor(op, "x", *x, c.h0, {s.B, T, s.E});
    x = with_contiguous_rows(*x);
  }
  if (feed0) check_tensor(op, "feed0", *feed0, c.h0, {s.B, s.A});
  contiguous(feed0);
  int64_t used_row = T;
  if (tokens) {
    require(table.has_value(), "fastseq.", op, ": expected a table beside tokens");
    check_dims(op, "table", *table, 2);
    s.V = table->size(0);
    check_tensor(op, "table", *table, c.h0, {s.V, s.E});
    require(tokens->size(0) == s.B, "fastseq.", op,
            ": expected tokens of shape [B, T] with B = ", s.B, ", got ", tokens->size(0), " rows");
    contiguous(table);
    contiguous(tokens);
  }
  if (x_factor) {
    require(tokens.has_value(), "fastseq.", op, ": expected tokens beside x_factor");
    check_tensor(op, "x_factor", *x_factor, c.h0, {s.B, T, s.E});
    x_factor = with_contiguous_rows(*x_factor);
  }
  bool reads_x = false;
  if (forced) {
    check_bool_or_int(op, "forced", *forced, ScalarType::Bool, "bool", 1);
    require(tokens && w_out, "fastseq.", op, ": expected tokens and w_out beside forced");
    require(forced->size(0) == T || forced->size(0) == T + 1, "fastseq.", op,
            ": expected forced of T or T + 1 entries, T = ", T, ", got ", forced->size(0));
    contiguous(forced);
    used_row = forced->size(0);
    require(T == 0 || read<bool>(*forced)[0], "fastseq.", op,
            ": expected the first token to be given");
    check_dims(op, "w_out", *w_out, 2);
    reads_x = s.E > 0 && w_out->size(1) == s.features() + s.E;
    const int64_t read = s.features() + (reads_x ? s.E : 0);
    check_tensor(op, "w_out", *w_out, c.h0, {s.V, read});
    if (read_factor) {
      check_tensor(op, "read_factor", *read_factor, c.h0, {s.B, T, read});
      read_factor = with_contiguous_rows(*read_factor);
    }
    if (b_out) check_tensor(op, "b_out", *b_out, c.h0, {s.V});
    contiguous(w_out);
    contiguous(b_out);
    require(s.V > 0, "fastseq.", op, ": expected a table of at least one token");
  }
  for (int64_t b = 0; tokens && b < s.B; ++b) {
    for (int64_t t = 0; t < T; ++t) {
      if (forced && !read<bool>(*forced)[t]) continue;
      const int64_t token = read<int64_t>(*tokens)[b * T + t];
      require(token >= 0 && token < s.V, "fastseq.", op, ": expected tokens in 0..", s.V - 1,
              ", got ", token);
    }
  }
  require(!save || end_token < 0, "fastseq.", op, ": expected no end token where gradients follow");

  Tensors out;
  out.push_back(empty(c.h0, {s.B, T, s.features()}));
  out.push_back(empty(c.h0, {s.B, T, s.S}));
  out.push_back(empty(c.h0, {s.L, s.B, s.H}));
  if (c.c0) out.push_back(empty(c.h0, {s.L, s.B, s.H}));
  if (tokens) out.push_back(empty_int64(c.h0, {s.B, used_row}));
  const size_t used_at = out.size() - 1;
  const Tensor saved = empty(c.h0, {saved_size(c, save)});
  if (save) out.push_back(saved);
  by_dtype(c.h0, [&](auto zero) {
    using F = decltype(zero);
    DecoderForward<F> a{};
    fill_inputs(c, a);
    if (x) a.x = step_rows<F>(*x);
    a.table = read<F>(table);
    a.tokens = read<int64_t>(tokens);
    a.forced = forced ? reinterpret_cast<const uint8_t*>(read<bool>(*forced)) : nullptr;
    a.used = tokens ? write<int64_t>(out[used_at]) : nullptr;
    a.used_row = used_row;
    a.feed0 = read<F>(feed0);
    a.w_out = read<F>(w_out);
    a.b_out = read<F>(b_out);
    a.reads_x = reads_x;
    if (x_factor) a.x_factor = step_rows<F>(*x_factor);
    if (read_factor && forced) a.read_factor = step_rows<F>(*read_factor);
    a.end_token = end_token < 0 ? -1 : end_token;
    a.save = save;
    lay_out(c, save, write<F>(saved), a.saved);
    a.features = writable_rows<F>(out[0]);
    a.weights = writable_rows<F>(out[1]);
    a.h_n = write<F>(out[2]);
    a.c_n = c.c0 ? write<F>(out[3]) : nullptr;
    kernels().decoder.of<F>()[cell].forward(a, torch_threads());
  });
  return out;
}

Tensors attention_decoder_bwd(int64_t cell, OptionalTensor dfeatures, OptionalTensor dweights,
                              OptionalTensor dh_n, OptionalTensor dc_n, Tensor features,
                              Tensor attended, Tensor saved, Tensor h0, OptionalTensor c0,
                              Tensor keys, Tensor values, OptionalTensor mask, Tensors weights,
                              bool has_biases, OptionalTensor w_q, OptionalTensor v,
                              OptionalTensor w_c, OptionalTensor b_c, bool feeds, bool residual,
                              double scale, bool need_dx, bool need_keys, bool need_values,
                              bool need_weights) {
  const char* op = "attention_decoder_bwd";
  check_dims(op, "features", features, 3);
  const int64_t T = features.size(1);
  const Call c =
      make_call(op, cell, T, std::move(h0), std::move(c0), std::move(keys), std::move(values),
                std::move(mask), std::move(weights), has_biases, std::move(w_q), std::move(v),
                std::move(w_c), std::move(b_c), feeds, residual, scale);
  const DecoderShape& s = c.shape;
  check_tensor(op, "features", features, c.h0, {s.B, T, s.features()});
  check_tensor(op, "attended", attended, c.h0, {s.B, T, s.S});
  check_tensor(op, "saved", saved, c.h0, {saved_size(c, true)});
  if (dfeatures) check_tensor(op, "dfeatures", *dfeatures, c.h0, {s.B, T, s.features()});
  if (dweights) check_tensor(op, "dweights", *dweights, c.h0, {s.B, T, s.S});
  if (dh_n) check_tensor(op, "dh_n", *dh_n, c.h0, {s.L, s.B, s.H});
  if (dc_n) check_tensor(op, "dc_n", *dc_n, c.h0, {s.L, s.B, s.H});
  for (Tensor* t : {&features, &attended}) *t = with_contiguous_rows(*t);
  for (OptionalTensor* t : {&dfeatures, &dweights}) {
    if (*t) *t = with_contiguous_rows(**t);
  }
  contiguous(saved);
  contiguous(dh_n);
  contiguous(dc_n);

  Tensors out;
  auto add = [&](bool want, std::initializer_list<int64_t> sizes) -> const Tensor* {
    if (!want) return nullptr;
    out.push_back(empty(c.h0, sizes));
    return &out.back();
  };
  // Pointers to the elements stay: no more than so many are added.
  out.reserve(10 + c.weights.size());
  const Tensor* dx = add(need_dx, {s.B, T, s.E});
  const Tensor* dh0 = add(true, {s.L, s.B, s.H});
  const Tensor* dc0 = add(c.c0.has_value(), {s.L, s.B, s.H});
  const Tensor* dfeed0 = add(s.feeds, {s.B, s.A});
  const Tensor* dkeys = add(need_keys, {s.B, s.S, s.K});
  const Tensor* dv = add(need_keys && c.v, {s.K});
  const Tensor* dvalues = add(need_values, {s.B, s.S, s.C});
  const int64_t gates = c.cell.gates * s.H;
  const Tensor* dlayer[kMostLayers][4] = {};
  for (int64_t l = 0; l < s.L; ++l) {
    dlayer[l][0] = add(need_weights, {gates, s.input(l)});
    dlayer[l][1] = add(need_weights, {gates, s.H});
    dlayer[l][2] = add(need_weights && has_biases, {gates});
    dlayer[l][3] = add(need_weights && has_biases, {gates});
  }
  const Tensor* dw_q = add(need_weights && c.w_q, {s.K, s.H});
  const Tensor* dw_c = add(need_weights && c.w_c, {s.A, s.C + s.H});
  const Tensor* db_c = add(need_weights && c.b_c, {s.A});

  by_dtype(c.h0, [&](auto zero) {
    using F = decltype(zero);
    auto pointer = [](const Tensor* t) { return t ? write<F>(*t) : nullptr; };
    DecoderBackward<F> a{};
    fill_inputs(c, a);
    lay_out(c, true, write<F>(saved), a.saved);
    a.features = step_rows<F>(features);
    a.weights = step_rows<F>(attended);
    if (dfeatures) a.dfeatures = step_rows<F>(*dfeatures);
    if (dweights) a.dweights = step_rows<F>(*dweights);
    a.dh_n = read<F>(dh_n);
    a.dc_n = read<F>(dc_n);
    if (dx) a.dx = writable_rows<F>(*dx);
    a.dh0 = pointer(dh0);
    a.dc0 = pointer(dc0);
    a.dfeed0 = pointer(dfeed0);
    a.dkeys = pointer(dkeys);
    a.dv = pointer(dv);
    a.dvalues = pointer(dvalues);
    a.need_weights = need_weights;
    for (int64_t l = 0; l < s.L; ++l) {
      a.dw_ih[l] = pointer(dlayer[l][0]);
      a.dw_hh[l] = pointer(dlayer[l][1]);
      a.db_ih[l] = pointer(dlayer[l][2]);
      a.db_hh[l] = pointer(dlayer[l][3]);
    }
    a.dw_q = pointer(dw_q);
    a.dw_c = pointer(dw_c);
    a.db_c = pointer(db_c);
    kernels().decoder.of<F>()[cell].backward(a, torch_threads());
  });
  return out;
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "attention_decoder_fwd(int cell, Tensor? x, Tensor? tokens, Tensor? table, Tensor? forced, "
      "Tensor h0, Tensor? c0, Tensor keys, Tensor values, Tensor? mask, Tensor[] weights, "
      "bool has_biases, Tensor? w_q, Tensor? v, Tensor? w_c, Tensor? b_c, Tensor? feed0, "
      "bool feeds, bool residual, float scale, Tensor? w_out, Tensor? b_out, Tensor? x_factor, "
      "Tensor? read_factor, int end_token, bool save) -> Tensor[]");
  m.def(
      "attention_decoder_bwd(int cell, Tensor? dfeatures, Tensor? dweights, Tensor? dh_n, "
      "Tensor? dc_n, Tensor features, Tensor attended, Tensor saved, Tensor h0, Tensor? c0, "
      "Tensor keys, Tensor values, Tensor? mask, Tensor[] weights, bool has_biases, Tensor? w_q, "
      "Tensor? v, Tensor? w_c, Tensor? b_c, bool feeds, bool residual, float scale, bool need_dx, "
      "bool need_keys, bool need_values, bool need_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_decoder_fwd", TORCH_BOX(&fastseq::ops::attention_decoder_fwd));
  m.impl("attention_decoder_bwd", TORCH_BOX(&fastseq::ops::attention_decoder_bwd));
}
