// What the ops share that take the encoder-decoder with attention of fastseq/models/attention.py
// whole: its parameters, and its source read.
#pragma once

#include <algorithm>
#include <vector>

#include "functions.h"
#include "linear.h"

namespace fastseq {
namespace ops {
namespace seq2seq {

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

constexpr char kOp[] = "attention_seq2seq";

inline Tensors some_of(const Tensors& all, size_t first, size_t count) {
  return Tensors(all.begin() + int64_t(first), all.begin() + int64_t(first + count));
}

inline void check_tokens(const char* name, const Tensor& t) {
  require(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::Long, "fastseq.", kOp,
          ": expected ", name, " as int64 of 2 dimensions on the CPU");
}

inline void check_parameters(const Tensors& p) {
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

inline Tensor as_row(const Tensor& v) { return torch::stable::view(v, {v.size(1)}); }

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

}  // namespace seq2seq
}  // namespace ops
}  // namespace fastseq
