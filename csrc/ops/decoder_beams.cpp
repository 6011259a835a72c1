// fastseq::attention_decoder_beams: beam search with a recurrent decoder with attention.
#include "decoder_logits.h"
#include "functions.h"

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
  LogitsCall l = make_logits_call(
      make_call(op, cell, 1, std::move(h0), std::move(c0), std::move(keys), std::move(values),
                std::move(mask), std::move(weights), has_biases, std::move(w_q), std::move(v),
                std::move(w_c), std::move(b_c), feeds, residual, scale),
      std::move(start), std::move(ends), std::move(table), std::move(w_out), std::move(b_out),
      true);
  DecoderShape& s = l.c.shape;
  const int64_t sources = s.B;
  require(width >= 1 && width <= s.V, "fastseq.", op, ": expected width between 1 and V = ", s.V,
          ", got ", width);
  require(n_best >= 1 && n_best <= width, "fastseq.", op,
          ": expected n_best between 1 and width = ", width, ", got ", n_best);
  require(penalties.is_cpu() && penalties.scalar_type() == ScalarType::Double &&
              penalties.dim() == 1 && penalties.size(0) >= 1,
          "fastseq.", op, ": expected penalties as float64 [at least 1] on the CPU");
  contiguous(penalties);
  const int64_t most = penalties.size(0) - 1;

  s.B = sources * width;
  s.width = width;
  const Tensors out = {zeros_int64(l.c.h0, {sources, n_best, most}),
                       empty(penalties, {sources, n_best}), zeros_int64(l.c.h0, {sources, n_best})};
  std::fill_n(write<double>(out[1]), sources * n_best, -__builtin_huge_val());
  int not_numbers = 0;
  by_dtype(l.c.h0, [&](auto zero) {
    using F = decltype(zero);
    DecoderBeams<F> a{};
    fill_rows(l, a.rows);
    a.sources = sources;
    a.width = width;
    a.n_best = n_best;
    a.most = most;
    a.min_length = min_length;
    a.no_repeat = no_repeat;
    a.early_stop = early_stop;
    a.start = read<int64_t>(l.start);
    a.ends = read<int64_t>(l.ends);
    a.penalty = read<double>(penalties);
    a.tokens = write<int64_t>(out[0]);
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
