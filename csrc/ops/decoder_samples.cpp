// fastseq::attention_decoder_samples: sampling with a recurrent decoder with attention.
#include "decoder_logits.h"
#include "functions.h"

namespace fastseq {
namespace ops {

Tensors attention_decoder_samples(int64_t cell, Tensor start, OptionalTensor ends, Tensor table,
                                  Tensor h0, OptionalTensor c0, Tensor keys, Tensor values,
                                  OptionalTensor mask, Tensors weights, bool has_biases,
                                  OptionalTensor w_q, OptionalTensor v, OptionalTensor w_c,
                                  OptionalTensor b_c, bool feeds, bool residual, double scale,
                                  Tensor w_out, OptionalTensor b_out, Tensor drawn,
                                  double temperature, int64_t top_k, double top_p) {
  const char* op = "attention_decoder_samples";
  const LogitsCall l = make_logits_call(
      make_call(op, cell, 1, std::move(h0), std::move(c0), std::move(keys), std::move(values),
                std::move(mask), std::move(weights), has_biases, std::move(w_q), std::move(v),
                std::move(w_c), std::move(b_c), feeds, residual, scale),
      std::move(start), std::move(ends), std::move(table), std::move(w_out), std::move(b_out),
      false);
  const DecoderShape& s = l.c.shape;
  require(s.V > 0, "fastseq.", op, ": expected a table of at least one token");
  require(temperature > 0 && temperature - temperature == 0, "fastseq.", op,
          ": expected a finite temperature above 0, got ", temperature);
  require(top_k >= 1, "fastseq.", op, ": expected top_k of at least 1, got ", top_k);
  require(top_p > 0 && top_p <= 1, "fastseq.", op, ": expected top_p above 0 and at most 1, got ",
          top_p);
  require(drawn.is_cpu() && drawn.scalar_type() == ScalarType::Double && drawn.dim() == 2 &&
              drawn.size(1) == s.B,
          "fastseq.", op, ": expected drawn as float64 [N, B] on the CPU, B = ", s.B);
  contiguous(drawn);
  const int64_t most = drawn.size(0);
  const Tensors out = {zeros_int64(l.c.h0, {s.B, most}), zeros_int64(l.c.h0, {s.B})};
  int not_numbers = 0;
  by_dtype(l.c.h0, [&](auto zero) {
    using F = decltype(zero);
    DecoderSamples<F> a{};
    fill_rows(l, a.rows);
    a.most = most;
    a.start = read<int64_t>(l.start);
    a.ends = read<int64_t>(l.ends);
    a.drawn = read<double>(drawn);
    a.temperature = temperature;
    a.top_k = top_k;
    a.top_p = top_p;
    a.tokens = write<int64_t>(out[0]);
    a.lengths = write<int64_t>(out[1]);
    a.not_numbers = &not_numbers;
    kernels().decoder.of<F>()[cell].samples(a, torch_threads());
  });
  require(!not_numbers, "fastseq.", op, ": expected finite logits, got NaN or all minus infinity");
  return out;
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "attention_decoder_samples(int cell, Tensor start, Tensor? ends, Tensor table, Tensor h0, "
      "Tensor? c0, Tensor keys, Tensor values, Tensor? mask, Tensor[] weights, bool has_biases, "
      "Tensor? w_q, Tensor? v, Tensor? w_c, Tensor? b_c, bool feeds, bool residual, float scale, "
      "Tensor w_out, Tensor? b_out, Tensor drawn, float temperature, int top_k, float top_p) -> "
      "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_decoder_samples", TORCH_BOX(&fastseq::ops::attention_decoder_samples));
}
