// One recurrent layer over a whole sequence, in one or both directions.
//
// T steps, B sequences, I inputs, H hidden units, P the width of h (H, or the projection's), D
// directions, G gates of the cell. Gate blocks stand in torch's order. The rows of a step are the
// sequences in order of falling length: `rows[t]` of them, the first ones, run at step t. A token
// is one (step, row) pair; tokens are numbered step by step, so that those of step t begin at
// `first[t]` (= t * B where every sequence runs to the end).
#pragma once

#include <cstdint>

#include "../support/threads.h"
#include "../support/tiles.h"

#define FASTSEQ_MEMBER inline __attribute__((always_inline))

namespace fastseq {

struct RecurrentShape {
  int64_t T, B, I, H, P, D;
  int64_t tokens;        // sum of rows
  const int64_t* rows;   // [T], never increasing, all in [0, B]
  const int64_t* first;  // [T]
  const int64_t* order;  // [B]: which sequence a row is; null: the row's own number

  // Inlined always: a copy of its own, compiled for a wide machine, could be linked for all.
  FASTSEQ_MEMBER int64_t sequence(int64_t row) const { return order ? order[row] : row; }
  FASTSEQ_MEMBER int64_t rows_at(int64_t t) const { return t >= 0 && t < T ? rows[t] : 0; }
};

// Something of every token: that of step t and row b lies at base + t * step + sequence(b) * row,
// or, where step is kPacked, at base + (first[t] + b) * row. Contiguous from there.
template <class T>
struct TokenRows {
  static constexpr int64_t kPacked = -1;
  T* base;
  int64_t step, row;

  FASTSEQ_MEMBER T* at(const RecurrentShape& s, int64_t t, int64_t b) const {
    return step == kPacked ? base + (s.first[t] + b) * row : base + t * step + s.sequence(b) * row;
  }
};

// Pointers of one direction. The caller owns everything; nothing aliases.
template <class T>
struct RecurrentWeights {
  const T* w_ih;    // [G*H, I]
  const T* w_hh;    // [G*H, P]
  const T* b_ih;    // [G*H] or null
  const T* b_hh;    // [G*H] or null
  const T* w_hr;    // [P, H] or null: h is not projected, P = H
  const T* params;  // [the cell's kParams, H] or null
};

constexpr int kMostMasks = 2;

// What both passes read.
template <class T>
struct RecurrentInputs {
  RecurrentShape shape;
  TokenRows<const T> x;             // I wide
  TokenRows<const uint8_t> resets;  // where not 0, the state that enters the step is zero; or null
  TokenRows<const T> masks[2][kMostMasks];  // [direction][the cell's kMasks]: P, H wide
  RecurrentWeights<T> weights[2];
  const T* h0;  // [D, B, P] by sequence, or null: zero
  const T* c0;  // [D, B, H] or null: zero, or no such state
  Tiles tiles;  // of products that are large enough
};

template <class T>
struct RecurrentForward : RecurrentInputs<T> {
  TokenRows<T> y;  // D * P wide, direction d in columns [d * P, d * P + P); of one step, h_n itself
  T* h_n;          // [D, B, P]
  T* c_n;          // [D, B, H] or null: no such state
  T* saved;        // [D, tokens, saved_row] for the backward pass, or null
};

template <class T>
struct RecurrentBackward : RecurrentInputs<T> {
  const T* saved;
  TokenRows<const T> dy;  // base may be null: zero
  const T* dh_n;          // [D, B, P] or null: zero
  const T* dc_n;          // [D, B, H] or null: zero
  T* dh0;                 // [D, B, P] or null: not wanted
  T* dc0;                 // [D, B, H]; null: no such state
  TokenRows<T> dx;        // I wide; base may be null: not wanted
  // Per direction; null: not wanted.
  T* dw_ih[2];    // [G*H, I]; with dw_hh
  T* dw_hh[2];    // [G*H, P]
  T* db_ih[2];    // [G*H]
  T* db_hh[2];    // [G*H]; with db_ih
  T* dw_hr[2];    // [P, H]; with dw_hh
  T* dparams[2];  // [kParams, H]; with dw_hh
};

// What a caller needs to know of a cell to allocate for it.
struct CellInfo {
  const char* name;
  int gates, states, saved, params, masks;

  // Elements a token of `saved`: the cell's values [saved][H], then h where it is projected.
  int64_t saved_row(const RecurrentShape& s, bool projected) const {
    return saved * s.H + (projected ? s.P : 0);
  }
};

}  // namespace fastseq
