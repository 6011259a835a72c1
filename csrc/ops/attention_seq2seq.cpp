// fastseq::attention_seq2seq_fwd and _bwd: the encoder-decoder with attention of
// fastseq/models/attention.py from tokens to logits. For small models, whose kernels take less time
// than what torch does between one op and the next.
#include "attention_seq2seq.h"

namespace fastseq {
namespace ops {

using namespace seq2seq;

namespace {

// What the backward pass is given of the forward pass.
enum { kEmbedded, kEncoderSaved, kH, kC, kValues, kKeys, kFed, kFeatures, kWeights, kSaved, kKept };

struct Sizes {
  int64_t B, S, T, H;
};

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
      "attention_seq2seq_bwd(int cell, Tensor dlogits, Tensor src, Tensor[] kept, "
      "Tensor[] parameters) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_seq2seq_fwd", TORCH_BOX(&fastseq::ops::attention_seq2seq_fwd));
  m.impl("attention_seq2seq_bwd", TORCH_BOX(&fastseq::ops::attention_seq2seq_bwd));
}
