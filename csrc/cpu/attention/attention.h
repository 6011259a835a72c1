// Attention of many queries over their sources: scores, masked softmax and context, and all
// gradients.
//
// B rows, Q queries a row, S source positions, K width of the score, C width of the values. The
// caller owns everything; outputs alias nothing. Nothing of size B x Q x S x K is stored.
#pragma once

#include <cstdint>

#include "../support/threads.h"

namespace fastseq {

// Row i of batch row b at base + b * batch + i * row, contiguous from there.
template <class T>
struct BatchRows {
  T* base;
  int64_t batch, row;
  inline __attribute__((always_inline)) T* at(int64_t b, int64_t i) const {
    return base + b * batch + i * row;
  }
};

// What both passes read.
template <class T>
struct AttentionInputs {
  int64_t B, Q, S, K, C;
  BatchRows<const T> query;   // [B, Q, K]
  BatchRows<const T> keys;    // [B, S, K]
  BatchRows<const T> values;  // [B, S, C]
  bool additive;              // else the dot score
  const T* v;                 // [K], of the additive score
  BatchRows<const T> extra;   // [B, S, K] inside the tanh; base null: none
  const int64_t* lengths;     // [B], positions that count, taken as within 0 .. S; null: all
  T scale;
};

template <class T>
struct AttentionForward : AttentionInputs<T> {
  BatchRows<const uint8_t> mask;  // [B, Q, S], not 0 = attend; base null: all; rows may coincide
  T* context;                     // [B, Q, C]
  T* weights;                     // [B, Q, S]
};

template <class T>
struct AttentionBackward : AttentionInputs<T> {
  // What is wanted; pointers of tensors without elements may be null.
  bool need_scores, need_values;
  const T* weights;              // [B, Q, S], the forward pass's
  BatchRows<const T> d_context;  // [B, Q, C], base null: zero
  BatchRows<const T> d_weights;  // [B, Q, S], base null: zero
  T* d_query;                    // [B, Q, K]; with need_scores
  T* d_keys;                     // [B, S, K], of extra too; with need_scores
  T* d_v;                        // [K]; with need_scores, of the additive score
  T* d_values;                   // [B, S, C]; with need_values
};

}  // namespace fastseq
