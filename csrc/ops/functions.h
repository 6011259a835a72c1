// Ops that other ops, or calls from eager Python (eager/), are made of.
#pragma once

#include "tensors.h"

namespace fastseq {
namespace ops {

// Seen from outside the library: eager/ is a module of its own.
#define FASTSEQ_SEEN __attribute__((visibility("default")))

// Of how many bfloat16 torch's switches let a float32 factor be the sum; 0: float32. They are seen
// by eager/ alone, which puts a function here; null where that module is not loaded: float32.
FASTSEQ_SEEN extern int (*allowed_parts)();

FASTSEQ_SEEN
Tensors recurrent_fwd(int64_t cell, Tensor x, OptionalTensor h0, OptionalTensor c0, Tensors weights,
                      bool has_biases, int64_t directions, OptionalTensor batch_sizes,
                      OptionalTensor lengths, OptionalTensor resets, Tensors masks, bool save);
FASTSEQ_SEEN
Tensors recurrent_bwd(int64_t cell, OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                      Tensor x, OptionalTensor h0, OptionalTensor c0, Tensors weights,
                      bool has_biases, int64_t directions, OptionalTensor batch_sizes,
                      OptionalTensor lengths, OptionalTensor resets, Tensors masks, Tensor saved,
                      bool need_dx, bool need_dw, bool need_db, bool need_dh0);

Tensors attention_decoder_fwd(int64_t cell, OptionalTensor x, OptionalTensor tokens,
                              OptionalTensor table, OptionalTensor forced, Tensor h0,
                              OptionalTensor c0, Tensor keys, Tensor values, OptionalTensor mask,
                              Tensors weights, bool has_biases, OptionalTensor w_q,
                              OptionalTensor v, OptionalTensor w_c, OptionalTensor b_c,
                              OptionalTensor feed0, bool feeds, bool residual, double scale,
                              OptionalTensor w_out, OptionalTensor b_out, OptionalTensor x_factor,
                              OptionalTensor read_factor, int64_t end_token, bool save);
Tensors attention_decoder_bwd(int64_t cell, OptionalTensor dfeatures, OptionalTensor dweights,
                              OptionalTensor dh_n, OptionalTensor dc_n, Tensor features,
                              Tensor attended, Tensor saved, Tensor h0, OptionalTensor c0,
                              Tensor keys, Tensor values, OptionalTensor mask, Tensors weights,
                              bool has_biases, OptionalTensor w_q, OptionalTensor v,
                              OptionalTensor w_c, OptionalTensor b_c, bool feeds, bool residual,
                              double scale, bool need_dx, bool need_keys, bool need_values,
                              bool need_weights);
Tensors attention_decoder_beams(int64_t cell, Tensor start, OptionalTensor ends, Tensor table,
                                Tensor h0, OptionalTensor c0, Tensor keys, Tensor values,
                                OptionalTensor mask, Tensors weights, bool has_biases,
                                OptionalTensor w_q, OptionalTensor v, OptionalTensor w_c,
                                OptionalTensor b_c, bool feeds, bool residual, double scale,
                                Tensor w_out, OptionalTensor b_out, Tensor penalties, int64_t width,
                                int64_t n_best, int64_t min_length, int64_t no_repeat,
                                bool early_stop);
Tensors attention_decoder_samples(int64_t cell, Tensor start, OptionalTensor ends, Tensor table,
                                  Tensor h0, OptionalTensor c0, Tensor keys, Tensor values,
                                  OptionalTensor mask, Tensors weights, bool has_biases,
                                  OptionalTensor w_q, OptionalTensor v, OptionalTensor w_c,
                                  OptionalTensor b_c, bool feeds, bool residual, double scale,
                                  Tensor w_out, OptionalTensor b_out, Tensor drawn,
                                  double temperature, int64_t top_k, double top_p);

}  // namespace ops
}  // namespace fastseq
