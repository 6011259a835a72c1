// A recurrent decoder with attention over a whole target sequence.
//
// T steps, B sequences, S source positions, E the width of an input, H hidden units, L layers, K
// the width of queries and keys, C of values and contexts, A of the attentional vector, V tokens.
//
// Attention before the cell (Bahdanau): the query is the top layer's h of the step before, the
// context stands beside the input of the first layer, features are [h | context]. After it (Luong):
// the query is the top layer's h of this step, features are a = tanh(W_c [context | h] + b_c), and
// with input feeding the a of the step before stands beside the input.
#pragma once

#include <cstdint>

#include "../support/threads.h"

namespace fastseq {

constexpr int kMostLayers = 8;

struct DecoderShape {
  int64_t T, B, S, E, H, L, K, C;
  int64_t A;      // 0: attention before the cell
  int64_t V;      // rows of the embedding table
  bool dot;       // the score is q . k, else v . tanh(q + k)
  bool feeds;     // input feeding
  bool residual;  // from the second layer on, a layer's input is added to its output
  int64_t width;  // sequences that share a source, in turn: B / width sources

  // What stands beside an input of the first layer.
  int64_t beside() const { return A == 0 ? C : feeds ? A : 0; }
  int64_t input(int64_t layer) const { return layer ? H : E + beside(); }
  int64_t features() const { return A ? A : H + C; }
};

// Rows by step and sequence: that of step t and sequence b is at base + t * step + b * row.
template <class T>
struct StepRows {
  T* base;
  int64_t step, row;
  T* at(int64_t t, int64_t b) const { return base + t * step + b * row; }
};

template <class T>
struct DecoderLayer {
  const T* w_ih;  // [G*H, input]
  const T* w_hh;  // [G*H, H]
  const T* b_ih;  // [G*H] or null
  const T* b_hh;
};

// What both passes read. The caller owns everything; nothing aliases.
template <class T>
struct DecoderInputs {
  DecoderShape shape;
  StepRows<const T> x;  // E wide; not looked at where there are tokens
  const T* table;       // [V, E] or null
  const T* h0;          // [L, B, H]
  const T* c0;          // [L, B, H], or null: the cell has no such state
  const T* feed0;       // [B, A], what is fed at the first step, or null: zero
  const T* keys;        // [B, S, K]
  const T* values;      // [B, S, C]
  const uint8_t* mask;  // [B, S], not 0 = attend; or null
  const int64_t* ends;  // [B]: nothing is attended from there on
  DecoderLayer<T> layers[kMostLayers];
  const T* w_q;  // [K, H], or null: the query is h itself, K = H
  const T* v;    // [K], or null for the dot score
  const T* w_c;  // [A, C + H] or null
  const T* b_c;  // [A] or null
  T scale;       // of the scores
};

// What the backward pass needs of the forward pass; without one to come, step strides are zero.
template <class T>
struct DecoderSaved {
  StepRows<T> input;               // of the first layer, [x | beside]
  StepRows<T> h[kMostLayers];      // of steps -1 to T - 1: at(t + 1) is that of step t
  StepRows<T> out[kMostLayers];    // h, or h and the layer's input
  StepRows<T> cells[kMostLayers];  // [the cell's kSaved][H]
  StepRows<T> query;               // K wide; base null: h itself
  StepRows<T> attended;            // [context | out], where attention comes after the cell
};

template <class T>
struct DecoderForward : DecoderInputs<T> {
  const int64_t* tokens;  // [B, T] or null
  const uint8_t*
      forced;        // [T]: whether a step's token is given, else the likeliest is fed; or null
  int64_t* used;     // [B, used_row]: the tokens that were fed; or null
  int64_t used_row;  // T, or T + 1: and the likeliest after the last step
  const T* w_out;    // [V, read()], to find the likeliest by; or null
  const T* b_out;    // [V] or null
  bool reads_x;      // w_out reads [features | x], else the features alone
  StepRows<const T> x_factor;     // E wide: what a token's row of the table is multiplied by
  StepRows<const T> read_factor;  // read() wide: the same of what w_out reads; bases may be null
  int64_t end_token;              // a sequence that has brought it forth stops; -1: none does
  DecoderSaved<T> saved;
  bool save;
  StepRows<T> features;
  StepRows<T> weights;  // S wide
  T* h_n;               // [L, B, H]
  T* c_n;               // [L, B, H] or null

  int64_t read() const { return this->shape.features() + (reads_x ? this->shape.E : 0); }
};

// Beam search; see fastseq/decoding/beam.py for what becomes of a hypothesis.
template <class T>
struct DecoderBeams {
  // Of sources * width sequences. h0, c0, keys, values, mask and ends are those of the sources;
  // what is saved, features, weights, h_n and c_n are not looked at.
  DecoderForward<T> rows;
  int64_t sources, width, n_best;
  int64_t most;           // steps
  int64_t min_length;     // tokens before the end
  int64_t no_repeat;      // no so many tokens in a row twice; 0: any
  bool early_stop;        // at `width` that have ended; else when none can get among the n_best
  const int64_t* start;   // [sources]
  const int64_t* ends;    // [sources] or null: none
  const double* penalty;  // [most + 1]: what a log-probability of so many tokens is divided by
  int64_t* tokens;        // [sources, n_best, most]
  double* scores;         // [sources, n_best], minus infinity at first
  int64_t* lengths;       // [sources, n_best], zero at first; so are the tokens
  int* not_numbers;       // set to 1 where logits are NaN or infinite
};

// Sampling; see fastseq/decoding/sampling.py for the distribution.
template <class T>
struct DecoderSamples {
  // Of B sequences. What is saved, features, weights, h_n and c_n are not looked at.
  DecoderForward<T> rows;
  int64_t most;          // steps
  const int64_t* start;  // [B]
  const int64_t* ends;   // [B] or null: none
  const double* drawn;   // [most, B], from [0, 1)
  double temperature;    // finite, above 0
  int64_t top_k;         // at least 1
  double top_p;          // above 0, at most 1
  int64_t* tokens;       // [B, most], zero at first
  int64_t* lengths;      // [B], zero at first: tokens of each, its end included
  int* not_numbers;      // set to 1 where logits are NaN, all minus infinity or infinite above
};

template <class T>
struct DecoderBackward : DecoderInputs<T> {
  const int64_t* tokens;  // [B, T]: those that were fed; or null
  DecoderSaved<T> saved;
  StepRows<const T> features, weights;
  StepRows<const T> dfeatures;  // base may be null: zero
  StepRows<const T> dweights;   // base may be null: zero
  const T* dh_n;                // or null: zero
  const T* dc_n;
  StepRows<T> dx;  // base null: not wanted
  T* dh0;          // [L, B, H]
  T* dc0;          // [L, B, H] or null
  T* dfeed0;       // [B, A] or null
  T* dkeys;        // [B, S, K] or null: not wanted
  T* dvalues;      // [B, S, C] or null: not wanted
  bool need_weights;
  // The shapes of what they are the gradients of; not looked at unless need_weights.
  T* dw_ih[kMostLayers];
  T* dw_hh[kMostLayers];
  T* db_ih[kMostLayers];  // or null
  T* db_hh[kMostLayers];
  T* dw_q;  // or null
  T* dv;    // or null
  T* dw_c;  // or null
  T* db_c;  // or null
};

}  // namespace fastseq
