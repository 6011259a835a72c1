// One step of N units of one row, with the states and products in the device's memory: what a
// thread of the `step` kernels does.
#pragma once

#include <initializer_list>

#include "launch.h"
#include "units.h"

namespace fastseq {
namespace cuda {

template <class Cell, class T, int N>
FASTSEQ_BOTH void forward_step(const Forward<T>& a, int64_t t, int64_t b, int64_t u) {
  using V = Lanes<Wide<T>, N>;
  const Walk& w = a.walk;
  if (!w.runs(t, b)) return;
  const int64_t state = b * w.H + u;
  V inputs[Cell::kGates], recurrent[Cell::kGates], h{}, c{};
  const T* zx = a.zx + w.token(t, b) * a.zx_row + u;
  for (int g = 0; g < Cell::kGates; ++g) {
    inputs[g] = load<N>(zx + g * w.H);
    recurrent[g] = load<N>(a.zh + (b * Cell::kGates + g) * w.H + u);
  }
  if constexpr (Cell::kReadsH) h = load<N>(a.h_wide + state);
  if constexpr (Cell::kStates == 2) c = load<N>(a.c + state);
  forward_units<Cell, T, N>(a, t, b, u, inputs, recurrent, h, c);
  if (!w.runs(w.after(t), b) && w.cut_at_end(b)) h = c = V{};
  store<N>(a.h + state, h);
  if constexpr (Cell::kReadsH) store<N>(a.h_wide + state, h);
  if constexpr (Cell::kStates == 2) store<N>(a.c + state, c);
}

template <class Cell, class T, int N>
FASTSEQ_BOTH void backward_step(const Backward<T>& a, int64_t t, bool initial, int64_t b,
                                int64_t u) {
  using V = Lanes<Wide<T>, N>;
  const Walk& w = a.walk;
  const int64_t state = b * w.H + u;
  Flow<V> flow{};
  // Of a row that has not begun on the walk back these hold nothing, and are not looked at.
  if (w.runs(w.after(t), b)) {
    flow.dh = load<N>(a.dh + state);
    if constexpr (Cell::kCarriesH) flow.carry = load<N>(a.carry + state);
    if constexpr (Cell::kStates == 2) flow.dc = load<N>(a.dc + state);
  }
  V dz[Cell::kGates];
  if (!backward_units<Cell, T, N>(a, t, initial, b, u, flow, dz)) return;
  for (int g = 0; g < Cell::kGates; ++g) {
    store<N>(a.dz + (b * Cell::kGates + g) * w.H + u, dz[g]);
  }
  if constexpr (Cell::kCarriesH) store<N>(a.carry + state, flow.carry);
  if constexpr (Cell::kStates == 2) store<N>(a.dc + state, flow.dc);
}

// A grid with a thread a row and group of units.
struct StepGrid {
  unsigned blocks_x, blocks_y, threads_x, threads_y;
};
inline StepGrid step_grid(int64_t groups, int64_t B) {
  StepGrid g{1, 1, 1, 1};
  while (g.threads_x < unsigned(kStepThreads) && g.threads_x < groups) g.threads_x *= 2;
  g.threads_y = unsigned(kStepThreads) / g.threads_x;
  g.blocks_x = unsigned((groups + g.threads_x - 1) / g.threads_x);
  // The most a grid has in y; a thread goes on to further rows.
  const int64_t rows = (B + g.threads_y - 1) / g.threads_y;
  g.blocks_y = unsigned(rows < 65535 ? rows : 65535);
  return g;
}

// Whether rows of H elements at such pointers can be moved by four.
template <class T>
bool aligned_by_four(std::initializer_list<const void*> pointers,
                     std::initializer_list<int64_t> rows) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) != 0) return false;
  }
  for (int64_t row : rows) {
    if (row % 4 != 0) return false;
  }
  return true;
}
template <class T>
bool by_four(const Forward<T>& a) {
  return aligned_by_four<T>(
             {a.zx, a.b_hh, a.zh, a.h, a.y, a.saved, a.params, a.masks[0], a.masks[1]},
             {a.walk.H, a.zx_row, a.y_row}) &&
         aligned_by_four<Wide<T>>({a.h_wide, a.c}, {});
}
template <class T>
bool by_four(const Backward<T>& a) {
  return aligned_by_four<T>({a.saved, a.dy, a.dh_n, a.dc_n, a.h0, a.c0, a.dh, a.dz, a.dsums,
                             a.hidden, a.dh0, a.dc0, a.params, a.masks[0], a.masks[1]},
                            {a.walk.H, a.dy_row, a.dsums_row}) &&
         aligned_by_four<Wide<T>>({a.dc, a.carry}, {});
}

}  // namespace cuda
}  // namespace fastseq
