// fastseq::attention_seq2seq_greedy, _beams and _samples: the encoder-decoder with attention of
// fastseq/models/attention.py from tokens to tokens.
#include "attention_seq2seq.h"

namespace fastseq {
namespace ops {

using namespace seq2seq;

namespace {

// Sources and parameters, checked and contiguous.
struct Given {
  Tensor src, embedded;
  Tensors p;
};

Given check(Tensor src, const Tensor& start, Tensors parameters) {
  check_tokens("src", src);
  check_parameters(parameters);
  require(start.is_cpu() && start.dim() == 1 && start.scalar_type() == ScalarType::Long &&
              start.size(0) == src.size(0) && src.size(0) > 0 && src.size(1) > 0,
          "fastseq.", kOp, ": expected src [B, S] and start [B], int64, none of them empty");
  for (Tensor& p : parameters) p = as_contiguous(p);
  const Tensor embedded =
      empty(parameters[kOut], {src.size(1), src.size(0), parameters[kSourceTable].size(1)});
  return {as_contiguous(src), embedded, std::move(parameters)};
}

}  // namespace

Tensors attention_seq2seq_greedy(int64_t cell, Tensor src, Tensor start, Tensor forced,
                                 int64_t end_token, Tensors parameters) {
  const int64_t B = src.size(0), steps = forced.numel() - 1;
  require(steps > 0, "fastseq.", kOp, ": expected forced of at least two entries");
  const Given given = check(std::move(src), start, std::move(parameters));
  start = as_contiguous(start);
  const Tensors& p = given.p;
  // The first is given to all steps, though only one takes it.
  const Tensor tokens = empty_int64(given.src, {B, steps});
  for (int64_t b = 0; b < B; ++b) {
    std::fill_n(write<int64_t>(tokens) + b * steps, steps, read<int64_t>(start)[b]);
  }
  Tensors out;
  by_dtype(p[kOut], [&](auto zero) {
    using F = decltype(zero);
    const Source source = read_source<F>(cell, given.src, given.embedded, p, false);
    Tensors decoded = decode<F>(cell, tokens, forced, source, p, end_token, false);
    out = {decoded[4], decoded[1]};
  });
  return out;
}

Tensors attention_seq2seq_beams(int64_t cell, Tensor src, Tensor start, OptionalTensor ends,
                                Tensor penalties, int64_t width, int64_t n_best, int64_t min_length,
                                int64_t no_repeat, bool early_stop, Tensors parameters) {
  const Given given = check(std::move(src), start, std::move(parameters));
  const Tensors& p = given.p;
  Tensors out;
  by_dtype(p[kOut], [&](auto zero) {
    using F = decltype(zero);
    const Source source = read_source<F>(cell, given.src, given.embedded, p, false);
    out = attention_decoder_beams(cell, start, ends, p[kTable], source.encoded[1],
                                  source.encoded[2], source.keys, source.values, {},
                                  some_of(p, kDecoder, 4), true, query_half<F>(p[kAttention]),
                                  as_row(p[kV]), {}, {}, false, false, 1.0, p[kOut], p[kOutBias],
                                  penalties, width, n_best, min_length, no_repeat, early_stop);
  });
  return out;
}

Tensors attention_seq2seq_samples(int64_t cell, Tensor src, Tensor start, OptionalTensor ends,
                                  Tensor drawn, double temperature, int64_t top_k, double top_p,
                                  Tensors parameters) {
  const Given given = check(std::move(src), start, std::move(parameters));
  const Tensors& p = given.p;
  Tensors out;
  by_dtype(p[kOut], [&](auto zero) {
    using F = decltype(zero);
    const Source source = read_source<F>(cell, given.src, given.embedded, p, false);
    out = attention_decoder_samples(cell, start, ends, p[kTable], source.encoded[1],
                                    source.encoded[2], source.keys, source.values, {},
                                    some_of(p, kDecoder, 4), true, query_half<F>(p[kAttention]),
                                    as_row(p[kV]), {}, {}, false, false, 1.0, p[kOut], p[kOutBias],
                                    drawn, temperature, top_k, top_p);
  });
  return out;
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) {
  m.def(
      "attention_seq2seq_greedy(int cell, Tensor src, Tensor start, Tensor forced, int end_token, "
      "Tensor[] parameters) -> Tensor[]");
  m.def(
      "attention_seq2seq_beams(int cell, Tensor src, Tensor start, Tensor? ends, Tensor penalties, "
      "int width, int n_best, int min_length, int no_repeat, bool early_stop, Tensor[] parameters) "
      "-> Tensor[]");
  m.def(
      "attention_seq2seq_samples(int cell, Tensor src, Tensor start, Tensor? ends, Tensor drawn, "
      "float temperature, int top_k, float top_p, Tensor[] parameters) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("attention_seq2seq_greedy", TORCH_BOX(&fastseq::ops::attention_seq2seq_greedy));
  m.impl("attention_seq2seq_beams", TORCH_BOX(&fastseq::ops::attention_seq2seq_beams));
  m.impl("attention_seq2seq_samples", TORCH_BOX(&fastseq::ops::attention_seq2seq_samples));
}
