// The arguments that decoder ops share that choose tokens by all logits of a step.
#pragma once

#include "decoder_call.h"

namespace fastseq {
namespace ops {

// Beside a Call: `start` [B], tokens of the `table` [V, E], and, or none, `ends` [B]; w_out
// [V, F or F + E] and b_out [V].
struct LogitsCall {
  Call c;
  Tensor start, table, w_out;
  OptionalTensor ends, b_out;
  bool reads_x;
};

// `in_table`: whether they have to be tokens of it.
inline void check_tokens(const Call& c, const char* name, bool in_table, Tensor& t) {
  const DecoderShape& s = c.shape;
  require(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == s.B,
          "fastseq.", c.op, ": expected ", name, " as int64 [B] on the CPU, B = ", s.B);
  contiguous(t);
  for (int64_t b = 0; b < s.B && in_table; ++b) {
    const int64_t token = read<int64_t>(t)[b];
    require(token >= 0 && token < s.V, "fastseq.", c.op, ": expected ", name, " in 0..", s.V - 1,
            ", got ", token);
  }
}

inline LogitsCall make_logits_call(Call call, Tensor start, OptionalTensor ends, Tensor table,
                                   Tensor w_out, OptionalTensor b_out, bool ends_in_table) {
  LogitsCall l{std::move(call),
               std::move(start),
               std::move(table),
               std::move(w_out),
               std::move(ends),
               std::move(b_out),
               false};
  Call& c = l.c;
  DecoderShape& s = c.shape;
  check_dims(c.op, "table", l.table, 2);
  s.V = l.table.size(0);
  check_tensor(c.op, "table", l.table, c.h0, {s.V, s.E});
  check_dims(c.op, "w_out", l.w_out, 2);
  l.reads_x = s.E > 0 && l.w_out.size(1) == s.features() + s.E;
  check_tensor(c.op, "w_out", l.w_out, c.h0, {s.V, s.features() + (l.reads_x ? s.E : 0)});
  if (l.b_out) check_tensor(c.op, "b_out", *l.b_out, c.h0, {s.V});
  check_tokens(c, "start", true, l.start);
  if (l.ends) check_tokens(c, "ends", ends_in_table, *l.ends);
  contiguous(l.table);
  contiguous(l.w_out);
  contiguous(l.b_out);
  return l;
}

template <class T>
void fill_rows(const LogitsCall& l, DecoderForward<T>& rows) {
  fill_inputs(l.c, rows);
  rows.table = read<T>(l.table);
  rows.tokens = read<int64_t>(l.start);
  rows.w_out = read<T>(l.w_out);
  rows.b_out = read<T>(l.b_out);
  rows.reads_x = l.reads_x;
  rows.end_token = -1;
}

inline Tensor zeros_int64(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const Tensor out = empty_int64(like, sizes);
  std::fill_n(write<int64_t>(out), out.numel(), int64_t(0));
  return out;
}

}  // namespace ops
}  // namespace fastseq
