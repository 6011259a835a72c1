// A step of N units of one row, forward and backward: what all ways of running a layer share. The
// maths is the cell's (csrc/cell), the same source that the CPU runs.
#pragma once

#include "../../cell/cell.h"
#include "recurrent.h"

namespace fastseq {
namespace cuda {

// Where the gradients of a cell's sums lie in a token's row [blocks][H] of dsums: in order, but the
// recurrent half of a gate in two halves first, so that those of h and those of x are each side by
// side. (The input half first would do as well, but for rounding: the large terms of that gate
// stand best at the end of the sums for dL/dx.)
template <class Cell>
struct GradientRow {
  static constexpr int kSums = cell::kSums<Cell>, kApart = Cell::kApart;
  static constexpr int kBlocks = kSums + Cell::kParams;

  static constexpr FASTSEQ_BOTH int block(int sum) {
    return kApart < 0 ? sum : sum == Cell::kGates ? 0 : sum + 1;
  }
};

// Of the recurrent sum of gate g: its place among the sums z.
template <class Cell>
constexpr FASTSEQ_BOTH int recurrent_sum(int g) {
  return g == Cell::kApart ? Cell::kGates : g;
}

// Row b, which runs at step t. inputs: its sums over x, by gate; recurrent: those over h of the
// step before, ignored where a reset cuts; h, c: the state before, and on return the state after, a
// cut at the row's end not yet made.
template <class Cell, class T, int N, class V>
FASTSEQ_BOTH void forward_units(const Forward<T>& a, int64_t t, int64_t b, int64_t u,
                                const V* inputs, const V* recurrent, V& h, V& c) {
  const int64_t H = a.walk.H, token = a.walk.token(t, b);
  const bool cut = a.walk.cut(t, b);
  if (cut) h = c = V{};
  V z[cell::kSums<Cell>], saved[Cell::kSaved];
  V param[Cell::kParams + 1], mask[kMostMasks];
  for (int g = 0; g < Cell::kGates; ++g) {
    const V sum = cut ? V{} : recurrent[g];
    if (g == Cell::kApart) {
      z[g] = inputs[g];
      z[Cell::kGates] = a.b_hh ? sum + load<N>(a.b_hh + u) : sum;
    } else {
      z[g] = inputs[g] + sum;
    }
  }
  for (int i = 0; i < Cell::kParams; ++i) param[i] = load<N>(a.params + i * H + u);
  for (int i = 0; i < Cell::kMasks; ++i) mask[i] = load<N>(a.masks[i] + token * H + u);
  h = Cell::forward(z, h, c, param, mask, saved);
  store<N>(a.y + token * a.y_row + u, h);
  if (a.saved) {
    T* row = a.saved + token * (Cell::kSaved * H) + u;
    for (int i = 0; i < Cell::kSaved; ++i) store<N>(row + i * H, saved[i]);
  }
}

// What the backward pass carries from the later step to this one.
template <class V>
struct Flow {
  V dh;     // by W_hh; ignored where nothing flows
  V carry;  // other than by W_hh
  V dc;
};

// Row b at step t, on the walk back. Returns whether it runs there; then `flow` is what leads to
// the step before (dh apart), and dz the gradients of the recurrent sums by gate. Where it doesn't,
// and the later step was the row's first, dh0 and dc0 are what was flowing. `initial`: t is one
// beyond the last step, and whatever was left out is due.
template <class Cell, class T, int N, class V>
FASTSEQ_BOTH bool backward_units(const Backward<T>& a, int64_t t, bool initial, int64_t b,
                                 int64_t u, Flow<V>& flow, V* dz_h) {
  using Row = GradientRow<Cell>;
  const Walk& w = a.walk;
  const int64_t H = w.H, state = b * H + u, later = w.after(t);
  const bool follows = w.runs(later, b);
  const bool flows = follows && !w.cut(later, b);
  const bool ends = !follows && !w.cut_at_end(b);
  V dh{}, dc{};
  if (flows) dh = Cell::kCarriesH ? flow.dh + flow.carry : flow.dh;
  if (ends && a.dh_n) dh = load<N>(a.dh_n + state);
  if constexpr (Cell::kStates == 2) {
    if (flows) dc = flow.dc;
    if (ends && a.dc_n) dc = load<N>(a.dc_n + state);
  }
  if (initial || !w.runs(t, b)) {
    if (a.dh0 && (follows || (initial && w.length(b) == 0))) {
      store<N>(a.dh0 + state, dh);
      if constexpr (Cell::kStates == 2) store<N>(a.dc0 + state, dc);
    }
    return false;
  }

  const int64_t token = w.token(t, b), before = w.before(t), saved_row = Cell::kSaved * H;
  const bool cut = w.cut(t, b), begins = !w.runs(before, b);
  const T* row = a.saved + token * saved_row + u;
  V saved[Cell::kSaved], c_prev{}, h_prev{}, carry{}, h{};
  V param[Cell::kParams + 1], dparam[Cell::kParams + 1], mask[kMostMasks], dz[Row::kSums];
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = load<N>(row + i * H);
  const T* row_before = begins ? nullptr : a.saved + w.token(before, b) * saved_row + u;
  if constexpr (Cell::kStates == 2) {
    const T* from = begins ? (a.c0 ? a.c0 + state : nullptr) : row_before + Cell::kSavedC * H;
    if (from && !cut) c_prev = load<N>(from);
  }
  const T* initial_h = a.h0 ? a.h0 + state : nullptr;
  if constexpr (Cell::kReadsH) {
    const T* from = begins ? initial_h : row_before + Cell::kSavedH * H;
    if (from && !cut) h_prev = load<N>(from);
  }
  for (int i = 0; i < Cell::kParams; ++i) param[i] = load<N>(a.params + i * H + u);
  for (int i = 0; i < Cell::kMasks; ++i) mask[i] = load<N>(a.masks[i] + token * H + u);
  if (a.dy) dh = dh + load<N>(a.dy + token * a.dy_row + u);

  Cell::backward(saved, h_prev, c_prev, param, mask, dh, dc, carry, dz, dparam, h);

  T* out = a.dsums + token * a.dsums_row + u;
  for (int i = 0; i < Row::kSums; ++i) store<N>(out + Row::block(i) * H, dz[i]);
  for (int i = 0; i < Cell::kParams; ++i) store<N>(out + (Row::kSums + i) * H, dparam[i]);
  for (int g = 0; g < Cell::kGates; ++g) dz_h[g] = dz[recurrent_sum<Cell>(g)];
  flow.carry = carry;
  flow.dc = dc;
  if (a.hidden) {
    if (follows) {
      store<N>(a.hidden + w.token(later, b) * H + u, flows ? h : V{});
    }
    if (begins) {
      V entered{};
      if (initial_h && !cut) entered = load<N>(initial_h);
      store<N>(a.hidden + token * H + u, entered);
    }
  }
  return true;
}

}  // namespace cuda
}  // namespace fastseq
