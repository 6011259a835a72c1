// fastseq::attention_decoder_beams: beam search with a recurrent decoder with attention.
#include "decoder_call.h"

namespace fastseq {
namespace ops {

Tensors attention_decoder_beams(int64_t cell, Tensor start, OptionalTensor ends, Tensor table,
                                Tensor h0, OptionalTensor c0, Tensor keys, Tensor values,
                                OptionalTensor mask, Tensors weights, bool has_biases,
                                OptionalTensor w_q, OptionalTensor v, OptionalTensor w_c,
                                OptionalTensor b_c, bool feeds, bool residual, double scale,
                                Tensor w_out, OptionalTensor b_out, Tensor penalties, int64_t width,
                                int64_t n_best, int64_t min_length, int64_t no_repeat,
                                bool early_stop) {
  const char* op = "attention_decoder_beams";
  Call c = make_call(op, cell, 1, std::move(h0), std::move(c0), std::move(keys), std::move(values),
                     std::move(mask), std::move(weights), has_biases, std::move(w_q), std::move(v),
                     std::move(w_c), std::move(b_c), feeds, residual, scale);
  DecoderShape& s = c.shape;
  const int64_t sources = s.B;
  check_dims(op, "table", table, 2);
  s.V = table.size(0);
  check_tensor(op, "table", table, c.h0, {s.V, s.E});
  check_dims(op, "w_out", w_out, 2);
  const bool reads_x = s.E > 0 && w_out.size(1) == s.features() + s.E;
  check_tensor(op, "w_out", w_out, c.h0, {s.V, s.features() + (reads_x ? s.E : 0)});
  if (b_out) check_tensor(op, "b_out", *b_out, c.h0, {s.V});
  require(width >= 1 && width <= s.V, "fastseq.", op, ": expected width between 1 and V = ", s.V,
          ", got ", width);
  require(n_best >= 1 && n_best <= width, "fastseq.", op,
          ": expected n_best between 1 and width = ", width, ", got ", n_best);
  const auto check_tokens = [&](const char* name, Tensor& t) {
    require(
        t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == sources,
        "fastseq.", op, ": expected ", name, " as int64 [B] on the CPU, B = ", sources);
    contiguous(t);
    for (int64_t b = 0; b < sources; ++b) {
      const int64_t token = read<int64_t>(t)[b];
      require(token >= 0 && token < s.V, "fastseq.", op, ": expected ", name, " in 0..", s.V - 1,
              ", got ", token);
    }
  };
  check_tokens("start", start);
  if (ends) check_tokens("ends", *ends);
  require(penalties.is_cpu() && penalties.scalar_type() == ScalarType::Double &&
              penalties.dim() == 1 && penalties.size(0) >= 1,
          "fastseq.", op, ": expected penalties as float64 [at least 1] on the CPU");
  contiguous(penalties);
  const int64_t most = penalties.size(0) - 1;
  for (Tensor* t : {&table, &w_out}) contiguous(*t);
  contiguous(b_out);

  s.B = sources * width;
  s.width = width;
  Tensors out = {empty_int64(c.h0, {sources, n_best, most}), empty(penalties, {sources, n_best}),
                 empty_int64(c.h0, {sources, n_best})};
  int64_t* tokens = write<int64_t>(out[0]);
  std::fill(tokens, tokens + sources * n_best * most, 0);
  for (int64_t i = 0; i < sources * n_best; ++i) {
    write<double>(out[1])[i] = -__builtin_huge_val();
    write<int64_t>(out[2])[i] = 0;
  }
  int not_numbers = 0;
  by_dtype(c.h0, [&](auto zero) {
    using F = decltype(zero);
    DecoderBeams<F> a{};
    fill_inputs(c, a.rows);
    a.rows.table = read<F>(table);
    a.rows.tokens = read<int64_t>(start);
    a.rows.w_out = read<F>(w_out);
    a.rows.b_out = read<F>(b_out);
    a.rows.reads_x = reads_x;
    a.rows.end_token = -1;
    a.sources = sources;
    a.width = width;
    a.n_best = n_best;
    a.most = most;
    a.min_length = min_length;
    a.no_repeat = no_repeat;
    a.early_stop = early_stop;
    a.start = read<int64_t>(start);
    a.ends = read<int64_t>(ends);
    a.penalty = read<double>(penalties);
    a.tokens = tokens;
    a.scores = write<double>(out[1]);
    a.lengths = write<int64_t>(out[2]);
    a.not_numbers = &not_numbers;
    kernels().decoder.of<F>()[cell].beams(a, torch_threads());
  });
  require(!not_numbers, "fastseq.", op, ": expected logits without NaN, got some");
  return out;
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "attention_decoder_beams(int cell, Tensor start, Tensor? ends, Tensor table, Tensor h0, "
      "Tensor? c0, Tensor keys, Tensor values, Tensor? mask, Tensor[] weights, bool has_biases, "
      "Tensor? w_q, Tensor? v, Tensor? w_c, Tensor? b_c, bool feeds, bool residual, float scale, "
      "Tensor w_out, Tensor? b_out, Tensor penalties, int width, int n_best, int min_length, "
      "int no_repeat, bool early_stop) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_decoder_beams", TORCH_BOX(&fastseq::ops::attention_decoder_beams));
}
