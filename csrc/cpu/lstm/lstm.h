// One LSTM layer over a whole sequence, in one or both directions.
//
// T steps, B sequences, I inputs, H hidden units, D directions. Gate blocks i, f, g, o, as torch.
// Sequences are in order of falling length: `rows[t]` of them, the first ones, run at step t. A
// token is one (step, sequence) pair; tokens are numbered step by step, so that the ones of step t
// begin at `first[t]` (= t * B where every sequence runs to the end).
#pragma once

#include <cstdint>

#include "../support/threads.h"

namespace fastseq {

struct LstmShape {
  int64_t T, B, I, H, D;
  int64_t tokens;        // sum of rows
  const int64_t* rows;   // [T], never increasing, all in [1, B], rows[0] = B
  const int64_t* first;  // [T]
};

// A row a token: that of (t, b) lies at base + t * step + b * row, or, where step is kPacked, at
// base + (first[t] + b) * row. Rows are contiguous.
template <class T>
struct LstmRows {
  static constexpr int64_t kPacked = -1;
  T* base;
  int64_t step, row;
};

// Pointers of one direction. The caller owns everything; nothing aliases.
template <class T>
struct LstmWeights {
  const T* w_ih;  // [4H, I]
  const T* w_hh;  // [4H, H]
  const T* b_ih;  // [4H] or null
  const T* b_hh;  // [4H] or null
};

template <class T>
struct LstmForward {
  LstmShape shape;
  LstmRows<const T> x;  // I wide
  LstmRows<T> y;        // D * H wide, direction d in columns [d * H, d * H + H)
  LstmWeights<T> weights[2];
  const T* h0;  // [D, B, H] or null: zero
  const T* c0;  // [D, B, H] or null: zero
  T* h_n;       // [D, B, H]
  T* c_n;       // [D, B, H]
  T* gates;     // [D, tokens, 4H] activated gates for the backward pass, or null
  T* cells;     // [D, tokens, H] cell states for the backward pass, or null
};

template <class T>
struct LstmBackward {
  LstmShape shape;
  LstmRows<const T> x;
  LstmWeights<T> weights[2];
  const T* h0;  // [D, B, H] or null: zero
  const T* c0;  // [D, B, H] or null: zero
  const T* gates;
  const T* cells;
  LstmRows<const T> dy;  // base may be null: zero
  const T* dh_n;         // [D, B, H] or null: zero
  const T* dc_n;         // [D, B, H] or null: zero
  T* dh0;                // [D, B, H] or null: not wanted
  T* dc0;                // [D, B, H]
  T* dx;                 // [tokens, I] or null: not wanted
  // Per direction; null: not wanted. The gradients of both biases are the same.
  T* dw_ih[2];  // [4H, I]
  T* dw_hh[2];  // [4H, H]
  T* db[2];     // [4H]
};

}  // namespace fastseq
