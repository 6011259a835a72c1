// fastseq::attention_seq2seq_fwd, _bwd and _greedy: the encoder-decoder with attention of
// fastseq/models/attention.py from tokens to logits, or to tokens. For small models, whose kernels
// take less time than what torch does between one op and the next.
#include <algorithm>
#include <vector>

#include "functions.h"
#include "linear.h"

namespace fastseq {
namespace ops {

namespace {

// Parameters, in the order of the model's state_dict but for the encoder, which comes first.
enum {
  kSourceTable,
  kEncoder,
  kTable = kEncoder + 4,
  kAttention,  // [H, 2H]: of the query, then of the value
  kAttentionBias,
  kV,
  kDecoder,
  kOut = kDecoder + 4,
  kOutBias,
  kParameters
};

// What the backward pass is given of the forward pass.
enum { kEmbedded, kEncoderSaved, kH, kC, kValues, kKeys, kFed, kFeatures, kWeights, kSaved, kKept };

constexpr char kOp[] = "attention_seq2seq";

struct Sizes {
  int64_t B, S, T, H;
};

Tensors some_of(const Tensors& all, size_t first, size_t count) {
  return Tensors(all.begin() + int64_t(first), all.begin() + int64_t(first + count));
}

void check_tokens(const char* name, const Tensor& t) {
  require(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::Long, "fastseq.", kOp,
          ": expected ", name, " as int64 of 2 dimensions on the CPU");
}

void check_parameters(const Tensors& p) {
  require(p.size() == kParameters, "fastseq.", kOp, ": expected ", int(kParameters),
          " parameters, got ", p.size());
  const Tensor& w_hh = p[kEncoder + 1];
  require(w_hh.dim() == 2, "fastseq.", kOp, ": expected w_hh of 2 dimensions");
  const int64_t H = w_hh.size(1);
  for (int table : {kSourceTable, kTable, kOut}) {
    require(p[size_t(table)].dim() == 2, "fastseq.", kOp, ": expected tables of 2 dimensions");
  }
  const int64_t V = p[kOut].size(0);
  check_tensor(kOp, "the source's table", p[kSourceTable], w_hh, {-1, -1});
  check_tensor(kOp, "the target's table", p[kTable], w_hh, {V, -1});
  check_tensor(kOp, "the attention's weight", p[kAttention], w_hh, {H, 2 * H});
  check_tensor(kOp, "the attention's bias", p[kAttentionBias], w_hh, {H});
  check_tensor(kOp, "v", p[kV], w_hh, {1, H});
  check_tensor(kOp, "w_out", p[kOut], w_hh, {V, 2 * H});
  check_tensor(kOp, "b_out", p[kOutBias], w_hh, {V});
}

// Rows of `table` for tokens [B, S], by step: [S, B, E].
template <class F>
void look_up(const Tensor& table, const Tensor& tokens, const Tensor& out) {
  const int64_t B = tokens.size(0), S = tokens.size(1), E = table.size(1), V = table.size(0);
  const int64_t* all = read<int64_t>(tokens);
  const F* rows = read<F>(table);
  F* to = write<F>(out);
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t token = all[b * S + s];
      require(token >= 0 && token < V, "fastseq.", kOp, ": expected tokens in 0..", V - 1, ", got ",
              token);
      std::copy_n(rows + token * E, E, to + (s * B + b) * E);
    }
  }
}

// The gradient of a table from those of its rows: that of token n is at d + n * E.
template <class F>
Tensor table_gradient(const Tensor& table, const std::vector<int64_t>& tokens, const F* d) {
  const int64_t E = table.size(1);
  const Tensor out = empty(table, {table.size(0), E});
  F* to = write<F>(out);
  std::fill_n(to, table.size(0) * E, F(0));
  for (const int64_t token : tokens) {
    F* row = to + token * E;
    for (int64_t i = 0; i < E; ++i) row[i] += d[i];
    d += E;
  }
  return out;
}

// [A, B, n] from [B, A, n].
template <class F>
Tensor swapped(const Tensor& t) {
  const int64_t B = t.size(0), A = t.size(1), n = t.size(2);
  const Tensor out = empty(t, {A, B, n});
  const F* from = read<F>(t);
  F* to = write<F>(out);
  for (int64_t a = 0; a < A; ++a) {
    for (int64_t b = 0; b < B; ++b) std::copy_n(from + (b * A + a) * n, n, to + (a * B + b) * n);
  }
  return out;
}

// The query's half of the attention's weight, [H, H].
template <class F>
Tensor query_half(const Tensor& weight) {
  const int64_t H = weight.size(0);
  const Tensor out = empty(weight, {H, H});
  const F* from = read<F>(weight);
  F* to = write<F>(out);
  for (int64_t k = 0; k < H; ++k) std::copy_n(from + k * 2 * H, H, to + k * H);
  return out;
}

template <class F>
Linear<F> key_layer(const Tensor& weight, int64_t rows) {
  const int64_t H = weight.size(0);
  return {rows, H, H, read<F>(weight) + H, 2 * H};
}

// Rows m of t, n wide.
template <class F>
std::vector<F*> rows_of(const Tensor& t, int64_t count, int64_t n) {
  std::vector<F*> rows(static_cast<size_t>(count));
  F* first = write<F>(t);
  for (int64_t m = 0; m < count; ++m) rows[size_t(m)] = first + m * n;
  return rows;
}

Tensor as_row(const Tensor& v) { return torch::stable::view(v, {v.size(1)}); }

// The source read: what the encoder returns, values [B, S, H] and keys [B, S, H].
struct Source {
  Tensors encoded;
  Tensor values, keys;
};

template <class F>
Source read_source(int64_t cell, const Tensor& src, const Tensor& embedded, const Tensors& p,
                   bool save) {
  look_up<F>(p[kSourceTable], src, embedded);
  Tensors encoded =
      recurrent_fwd(cell, embedded, {}, {}, some_of(p, kEncoder, 4), true, 1, {}, {}, {}, {}, save);
  const int64_t B = src.size(0), S = src.size(1), H = p[kAttention].size(0);
  Source found{encoded, swapped<F>(encoded[0]), empty(embedded, {B, S, H})};
  key_layer<F>(p[kAttention], B * S)
      .forward(read<F>(found.values), read<F>(p[kAttentionBias]), rows_of<F>(found.keys, B * S, H),
               torch_threads());
  return found;
}

// What attention_decoder_fwd returns; with `forced` it picks tokens by the output layer.
template <class F>
Tensors decode(int64_t cell, const Tensor& tokens, const OptionalTensor& forced,
               const Source& source, const Tensors& p, int64_t end_token, bool save) {
  OptionalTensor w_out, b_out;
  if (forced) {
    w_out = p[kOut];
    b_out = p[kOutBias];
  }
  return attention_decoder_fwd(
      cell, {}, tokens, p[kTable], forced, source.encoded[1], source.encoded[2], source.keys,
      source.values, {}, some_of(p, kDecoder, 4), true, query_half<F>(p[kAttention]), as_row(p[kV]),
      {}, {}, {}, false, false, 1.0, w_out, b_out, {}, {}, end_token, save);
}

}  // namespace

Tensors attention_seq2seq_fwd(int64_t cell, Tensor src, Tensor trg, OptionalTensor forced,
                              Tensors parameters, bool save) {
  check_tokens("src", src);
  check_tokens("trg", trg);
  check_parameters(parameters);
  for (Tensor& p : parameters) p = as_contiguous(p);
  src = as_contiguous(src);
  trg = as_contiguous(trg);
  const Tensors& p = parameters;
  const Sizes s{src.size(0), src.size(1), trg.size(1), p[kAttention].size(0)};
  require(trg.size(0) == s.B && s.B > 0 && s.S > 0 && s.T > 1, "fastseq.", kOp,
          ": expected src [B, S] and trg [B, T] with B, S > 0 and T > 1");
  const int64_t steps = s.T - 1, V = p[kOut].size(0);
  const Tensor like = p[kOut], embedded = empty(like, {s.S, s.B, p[kSourceTable].size(1)});
  const Tensor tokens = empty_int64(like, {s.B, steps});
  for (int64_t b = 0; b < s.B; ++b) {
    std::copy_n(read<int64_t>(trg) + b * s.T, steps, write<int64_t>(tokens) + b * steps);
  }
  Tensors out;
  by_dtype(like, [&](auto zero) {
    using F = decltype(zero);
    const Threads threads = torch_threads();
    const Source source = read_source<F>(cell, src, embedded, p, save);
    Tensors decoded = decode<F>(cell, tokens, forced, source, p, -1, save);
    const Tensor logits = empty(like, {s.B, s.T, V});
    std::vector<F*> rows;
    rows.reserve(size_t(s.B * steps));
    F* first = write<F>(logits);
    for (int64_t b = 0; b < s.B; ++b) {
      F* row = first + b * s.T * V;
      std::fill_n(row, V, F(0));
      for (int64_t t = 1; t < s.T; ++t) rows.push_back(row + t * V);
    }
    const Linear<F> layer{s.B * steps, 2 * s.H, V, read<F>(p[kOut]), 2 * s.H};
    layer.forward(read<F>(decoded[0]), read<F>(p[kOutBias]), rows, threads);
    out.push_back(logits);
    if (!save) return;
    const Tensors& encoded = source.encoded;
    out.insert(out.end(), {embedded, encoded[3], encoded[1], encoded[2], source.values, source.keys,
                           decoded[4], decoded[0], decoded[1], decoded[5]});
  });
  return out;
}

Tensors attention_seq2seq_greedy(int64_t cell, Tensor src, Tensor start, Tensor forced,
                                 int64_t end_token, Tensors parameters) {
  check_tokens("src", src);
  check_parameters(parameters);
  const int64_t B = src.size(0), steps = forced.numel() - 1;
  require(start.is_cpu() && start.dim() == 1 && start.scalar_type() == ScalarType::Long &&
              start.size(0) == B && B > 0 && src.size(1) > 0 && steps > 0,
          "fastseq.", kOp, ": expected src [B, S], start [B] and forced, none of them empty");
  for (Tensor& p : parameters) p = as_contiguous(p);
  src = as_contiguous(src);
  start = as_contiguous(start);
  const Tensors& p = parameters;
  const Tensor embedded = empty(p[kOut], {src.size(1), B, p[kSourceTable].size(1)});
  // The first is given to all steps, though only one takes it.
  const Tensor tokens = empty_int64(src, {B, steps});
  for (int64_t b = 0; b < B; ++b) {
    std::fill_n(write<int64_t>(tokens) + b * steps, steps, read<int64_t>(start)[b]);
  }
  Tensors out;
  by_dtype(p[kOut], [&](auto zero) {
    using F = decltype(zero);
    const Source source = read_source<F>(cell, src, embedded, p, false);
    Tensors decoded = decode<F>(cell, tokens, forced, source, p, end_token, false);
    out = {decoded[4], decoded[1]};
  });
  return out;
}

Tensors attention_seq2seq_bwd(int64_t cell, Tensor dlogits, Tensor src, Tensors kept,
                              Tensors parameters) {
  check_tokens("src", src);
  check_parameters(parameters);
  for (Tensor& p : parameters) p = as_contiguous(p);
  src = as_contiguous(src);
  dlogits = as_contiguous(dlogits);
  const Tensors& p = parameters;
  const Sizes s{src.size(0), src.size(1), dlogits.size(1), p[kAttention].size(0)};
  const int64_t steps = s.T - 1, V = p[kOut].size(0), tokens = s.B * steps;
  require(kept.size() == kKept, "fastseq.", kOp, ": expected ", int(kKept), " kept tensors, got ",
          kept.size());
  check_tensor(kOp, "dlogits", dlogits, p[kOut], {s.B, -1, V});
  check_tensor(kOp, "features", kept[kFeatures], p[kOut], {s.B, steps, 2 * s.H});
  check_tensor(kOp, "values", kept[kValues], p[kOut], {s.B, s.S, s.H});
  check_tensor(kOp, "keys", kept[kKeys], p[kOut], {s.B, s.S, s.H});
  check_tokens("fed tokens", kept[kFed]);
  Tensors out(kParameters, dlogits);
  by_dtype(p[kOut], [&](auto zero) {
    using F = decltype(zero);
    const Threads threads = torch_threads();
    const Linear<F> layer{tokens, 2 * s.H, V, read<F>(p[kOut]), 2 * s.H};
    const Tensor dfeatures = empty(p[kOut], {s.B, steps, 2 * s.H});
    {
      // Without the first position, which is given and has no gradient, so that rows are even.
      const Tensor after_start = empty(p[kOut], {s.B, steps, V});
      F* dy = write<F>(after_start);
      const F* from = read<F>(dlogits) + V;
      const bool large = tokens * V > int64_t(1) << 18;
      run_tasks(large ? threads : Threads{1, nullptr}, s.B,
                [&](int64_t b) { std::copy_n(from + b * s.T * V, steps * V, dy + b * steps * V); });
      layer.input_gradient(dy, write<F>(dfeatures), false, threads);
      out[kOut] = empty(p[kOut], {V, 2 * s.H});
      out[kOutBias] = empty(p[kOut], {V});
      layer.weight_gradients(dy, read<F>(kept[kFeatures]), write<F>(out[kOut]),
                             write<F>(out[kOutBias]), threads);
    }
    // dx, dh0, dc0, dkeys, dv, dvalues, the layer's four, dw_q.
    Tensors decoder =
        attention_decoder_bwd(cell, dfeatures, {}, {}, {}, kept[kFeatures], kept[kWeights],
                              kept[kSaved], kept[kH], kept[kC], kept[kKeys], kept[kValues], {},
                              some_of(p, kDecoder, 4), true, query_half<F>(p[kAttention]),
                              as_row(p[kV]), {}, {}, false, false, 1.0, true, true, true, true);
    std::copy_n(decoder.begin() + 6, 4, out.begin() + kDecoder);
    std::vector<int64_t> fed(read<int64_t>(kept[kFed]), read<int64_t>(kept[kFed]) + tokens);
    out[kTable] = table_gradient<F>(p[kTable], fed, read<F>(decoder[0]));
    out[kV] = torch::stable::view(decoder[4], {1, s.H});
    const Linear<F> keys = key_layer<F>(p[kAttention], s.B * s.S);
    keys.input_gradient(read<F>(decoder[3]), write<F>(decoder[5]), true, threads);
    out[kAttention] = empty(p[kOut], {s.H, 2 * s.H});
    out[kAttentionBias] = empty(p[kOut], {s.H});
    keys.weight_gradients(read<F>(decoder[3]), read<F>(kept[kValues]),
                          write<F>(out[kAttention]) + s.H, write<F>(out[kAttentionBias]), threads);
    const F* of_query = read<F>(decoder[10]);
    F* of_both = write<F>(out[kAttention]);
    for (int64_t k = 0; k < s.H; ++k) std::copy_n(of_query + k * s.H, s.H, of_both + k * 2 * s.H);
    Tensors encoder =
        recurrent_bwd(cell, torch::stable::transpose(decoder[5], 0, 1), decoder[1], decoder[2],
                      kept[kEmbedded], {}, {}, some_of(p, kEncoder, 4), true, 1, {}, {}, {}, {},
                      kept[kEncoderSaved], true, true, true, false);
    std::copy_n(encoder.begin() + 1, 4, out.begin() + kEncoder);
    std::vector<int64_t> by_step(size_t(s.B * s.S));
    const int64_t* token = read<int64_t>(src);
    for (int64_t b = 0; b < s.B; ++b) {
      for (int64_t i = 0; i < s.S; ++i) by_step[size_t(i * s.B + b)] = *token++;
    }
    out[kSourceTable] = table_gradient<F>(p[kSourceTable], by_step, read<F>(encoder[0]));
  });
  return out;
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "attention_seq2seq_fwd(int cell, Tensor src, Tensor trg, Tensor? forced, "
      "Tensor[] parameters, bool save) -> Tensor[]");
  m.def(
      "attention_seq2seq_greedy(int cell, Tensor src, Tensor start, Tensor forced, int end_token, "
      "Tensor[] parameters) -> Tensor[]");
  m.def(
      "attention_seq2seq_bwd(int cell, Tensor dlogits, Tensor src, Tensor[] kept, "
      "Tensor[] parameters) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_seq2seq_fwd", TORCH_BOX(&fastseq::ops::attention_seq2seq_fwd));
  m.impl("attention_seq2seq_greedy", TORCH_BOX(&fastseq::ops::attention_seq2seq_greedy));
  m.impl("attention_seq2seq_bwd", TORCH_BOX(&fastseq::ops::attention_seq2seq_bwd));
}
