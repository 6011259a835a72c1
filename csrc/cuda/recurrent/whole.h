// A whole sequence in one launch: what a block of threads does, in phases that end where all of its
// threads meet. `Block::each(f)` is one phase: f(thread) for every thread, then the meeting;
// nothing but shared memory outlives it. So the same text runs on a host, thread after thread.
//
// Weights lie in shared memory by quads along the sum, [quads][columns][4], so that neighbouring
// threads, which own neighbouring columns, read neighbouring quads.
#pragma once

#include <type_traits>

#include "units.h"

namespace fastseq {
namespace cuda {

constexpr FASTSEQ_BOTH int quads(int n) { return (n + 3) / 4; }

// Where in its shared memory a block keeps what: offsets in bytes.
struct WholeMemory {
  int weights, operand, parts, inputs, c, carry, bytes;

  FASTSEQ_BOTH int take(int size) {
    const int at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
  // The sums are `depth` long, and there are `columns` of them a row.
  FASTSEQ_BOTH WholeMemory(const WholeSize& s, int H, int R, int slices, bool backward) : bytes(0) {
    const int depth = backward ? s.gates * H : H, columns = backward ? H : s.gates * H;
    weights = take(quads(depth) * columns * 4 * s.bytes);
    operand = take(R * quads(depth) * 4 * s.wide_bytes);
    parts = take(slices * R * columns * s.wide_bytes);
    inputs = take(backward ? 0 : R * columns * s.wide_bytes);
    c = take(s.states == 2 ? R * H * s.wide_bytes : 0);
    carry = take(backward && s.carries_h ? R * H * s.wide_bytes : 0);
  }
};

template <class Cell, class T>
constexpr FASTSEQ_BOTH WholeSize whole_size() {
  return {Cell::kGates, Cell::kStates, Cell::kCarriesH, int(sizeof(T)), int(sizeof(Wide<T>))};
}

// Part `slice` of the sums over `depth` of R rows of the operand with the columns u, u + H, ...:
// the quads [q0, q1).
template <class T, int R, int Columns>
FASTSEQ_BOTH void sum_quads(const T* weights, const Wide<T>* operand, int depth_quads, int columns,
                            int H, int u, int q0, int q1, Wide<T> (&sums)[R][Columns]) {
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < Columns; ++g) sums[r][g] = 0;
  }
  for (int q = q0; q < q1; ++q) {
    Lanes<Wide<T>, 4> w[Columns];
    for (int g = 0; g < Columns; ++g) w[g] = load<4>(weights + (q * columns + g * H + u) * 4);
    for (int r = 0; r < R; ++r) {
      const Lanes<Wide<T>, 4> x = load<4>(operand + (r * depth_quads + q) * 4);
      for (int k = 0; k < 4; ++k) {
        for (int g = 0; g < Columns; ++g) sums[r][g] = fma_of(x.v[k], w[g].v[k], sums[r][g]);
      }
    }
  }
}

// What the two passes share: R rows from `row0` on, and how threads are placed.
template <class Cell, class T, int R>
struct WholeBlock {
  using A = Wide<T>;
  using V = Lanes<A, 1>;
  const WholePlan& plan;
  const Walk& walk;
  int64_t row0;
  int H, rows;

  T* weights;
  A* operand;
  A* parts;
  A* inputs;
  A* c;
  A* carry;

  FASTSEQ_BOTH WholeBlock(const WholePlan& plan, const Walk& walk, int64_t block, char* memory,
                          bool backward)
      : plan(plan), walk(walk), row0(block * R), H(int(walk.H)) {
    rows = walk.B - row0 < R ? int(walk.B - row0) : R;
    const WholeMemory at(whole_size<Cell, T>(), H, R, plan.slices, backward);
    weights = reinterpret_cast<T*>(memory + at.weights);
    operand = reinterpret_cast<A*>(memory + at.operand);
    parts = reinterpret_cast<A*>(memory + at.parts);
    inputs = reinterpret_cast<A*>(memory + at.inputs);
    c = reinterpret_cast<A*>(memory + at.c);
    carry = reinterpret_cast<A*>(memory + at.carry);
  }
  // f(row, unit) for this thread's share of all.
  template <class F>
  FASTSEQ_BOTH void for_units(int thread, const F& f) const {
    for (int i = thread; i < rows * H; i += plan.threads) f(i / H, i % H);
  }
  // The sum of all slices' parts of row r and column `column` of `columns`, in order.
  FASTSEQ_BOTH A sum_parts(int r, int column, int columns) const {
    A sum = 0;
    for (int s = 0; s < plan.slices; ++s) sum += parts[(s * R + r) * columns + column];
    return sum;
  }
};

template <class Cell, class T, int R>
struct WholeForward : WholeBlock<Cell, T, R> {
  using Base = WholeBlock<Cell, T, R>;
  using A = typename Base::A;
  using V = typename Base::V;
  static constexpr int G = Cell::kGates;
  const Forward<T>& a;

  FASTSEQ_BOTH WholeForward(const Forward<T>& a, const WholePlan& plan, int64_t block, char* memory)
      : Base(plan, a.walk, block, memory, false), a(a) {}

  template <class Block>
  FASTSEQ_BOTH void run(const Block& block) {
    const int64_t steps = this->walk.longest(this->row0, this->rows);
    block.each([&](int thread) { begin(thread); });
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t t = this->walk.reverse ? steps - 1 - i : i;
      block.each([&](int thread) { product(thread, t); });
      block.each([&](int thread) { cells(thread, t); });
    }
    block.each([&](int thread) { end(thread); });
  }

  FASTSEQ_BOTH void begin(int thread) {
    const int H = this->H, Q = quads(H), columns = G * H;
    for (int i = thread; i < columns * Q * 4; i += this->plan.threads) {
      // Neighbouring threads read along a row of W_hh.
      const int column = i / (Q * 4), k = i % (Q * 4);
      T value{};
      if (k < H) value = a.w_hh[column * H + k];
      this->weights[((k / 4) * columns + column) * 4 + k % 4] = value;
    }
    for (int i = thread; i < R * Q * 4; i += this->plan.threads) {
      const int r = i / (Q * 4), k = i % (Q * 4);
      const bool there = r < this->rows && k < H;
      this->operand[i] = there ? wide(a.h[(this->row0 + r) * H + k]) : A(0);
    }
    if constexpr (Cell::kStates == 2) {
      this->for_units(thread,
                      [&](int r, int u) { this->c[r * H + u] = a.c[(this->row0 + r) * H + u]; });
    }
  }

  // Also brings the step's inputs: asked for before the sums, put down after them.
  FASTSEQ_BOTH void product(int thread, int64_t t) {
    const int H = this->H, Q = quads(H), columns = G * H;
    const int slice = thread / this->plan.unit_threads, u = thread % this->plan.unit_threads;
    if (u >= H) return;
    A sums[R][G], inputs[R][G]{};
    const auto for_inputs = [&](const auto& f) {
      for (int r = 0; r < R; ++r) {
        if (r >= this->rows || !a.walk.runs(t, this->row0 + r)) continue;
        for (int g = 0; g < G; ++g) {
          if (g % this->plan.slices == slice) f(r, g);
        }
      }
    };
    for_inputs([&](int r, int g) {
      inputs[r][g] = wide(a.zx[a.walk.token(t, this->row0 + r) * a.zx_row + g * H + u]);
    });
    sum_quads<T, R, G>(this->weights, this->operand, Q, columns, H, u,
                       Q * slice / this->plan.slices, Q * (slice + 1) / this->plan.slices, sums);
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < G; ++g) this->parts[(slice * R + r) * columns + g * H + u] = sums[r][g];
    }
    for_inputs([&](int r, int g) { this->inputs[r * columns + g * H + u] = inputs[r][g]; });
  }

  FASTSEQ_BOTH void cells(int thread, int64_t t) {
    const int H = this->H, Q = quads(H);
    this->for_units(thread, [&](int r, int u) {
      const int64_t b = this->row0 + r;
      if (!a.walk.runs(t, b)) return;
      V inputs[G], recurrent[G], h{}, c{};
      for (int g = 0; g < G; ++g) {
        inputs[g].v[0] = this->inputs[(r * G + g) * H + u];
        recurrent[g].v[0] = this->sum_parts(r, g * H + u, G * H);
      }
      h.v[0] = this->operand[r * Q * 4 + u];
      if constexpr (Cell::kStates == 2) c.v[0] = this->c[r * H + u];
      forward_units<Cell, T, 1>(a, t, b, u, inputs, recurrent, h, c);
      this->operand[r * Q * 4 + u] = h.v[0];
      if constexpr (Cell::kStates == 2) this->c[r * H + u] = c.v[0];
    });
  }

  FASTSEQ_BOTH void end(int thread) {
    const int H = this->H, Q = quads(H);
    this->for_units(thread, [&](int r, int u) {
      const int64_t b = this->row0 + r, state = b * H + u;
      const bool cut = a.walk.cut_at_end(b);
      round_to(a.h[state], cut ? A(0) : this->operand[r * Q * 4 + u]);
      if constexpr (Cell::kStates == 2) a.c[state] = cut ? A(0) : this->c[r * H + u];
    });
  }
};

template <class Cell, class T, int R>
struct WholeBackward : WholeBlock<Cell, T, R> {
  using Base = WholeBlock<Cell, T, R>;
  using A = typename Base::A;
  using V = typename Base::V;
  static constexpr int G = Cell::kGates;
  const Backward<T>& a;

  FASTSEQ_BOTH WholeBackward(const Backward<T>& a, const WholePlan& plan, int64_t block,
                             char* memory)
      : Base(plan, a.walk, block, memory, true), a(a) {}

  template <class Block>
  FASTSEQ_BOTH void run(const Block& block) {
    const int64_t steps = this->walk.longest(this->row0, this->rows);
    block.each([&](int thread) { begin(thread); });
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t t = this->walk.reverse ? i : steps - 1 - i;
      block.each([&](int thread) { cells(thread, t, false); });
      block.each([&](int thread) { product(thread, this->walk.before(t)); });
    }
    const int64_t beyond = this->walk.reverse ? steps : -1;
    block.each([&](int thread) { cells(thread, beyond, true); });
  }

  FASTSEQ_BOTH void begin(int thread) {
    const int H = this->H, depth = G * H, Q = quads(depth);
    for (int i = thread; i < Q * 4 * H; i += this->plan.threads) {
      const int k = i / H, u = i % H;
      T value{};
      if (k < depth) value = a.w_hh[i];
      this->weights[((k / 4) * H + u) * 4 + k % 4] = value;
    }
    // Rows that have not begun on the walk back add zeros to nobody's sum; only what is read must
    // be a number: the quads beyond the depth and the rows beyond the last.
    for (int i = thread; i < R * Q * 4; i += this->plan.threads) this->operand[i] = 0;
  }

  FASTSEQ_BOTH void cells(int thread, int64_t t, bool initial) {
    const int H = this->H, Q = quads(G * H);
    this->for_units(thread, [&](int r, int u) {
      const int64_t b = this->row0 + r;
      Flow<V> flow{};
      if (a.walk.runs(a.walk.after(t), b)) {
        flow.dh.v[0] = this->sum_parts(r, u, H);
        if constexpr (Cell::kCarriesH) flow.carry.v[0] = this->carry[r * H + u];
        if constexpr (Cell::kStates == 2) flow.dc.v[0] = this->c[r * H + u];
      }
      V dz[G];
      if (!backward_units<Cell, T, 1>(a, t, initial, b, u, flow, dz)) return;
      for (int g = 0; g < G; ++g) this->operand[r * Q * 4 + g * H + u] = dz[g].v[0];
      if constexpr (Cell::kCarriesH) this->carry[r * H + u] = flow.carry.v[0];
      if constexpr (Cell::kStates == 2) this->c[r * H + u] = flow.dc.v[0];
    });
  }

  // next: the step whose cells come next; what they read is on its way meanwhile.
  FASTSEQ_BOTH void product(int thread, int64_t next) {
    const int H = this->H, Q = quads(G * H);
    this->for_units(thread, [&](int r, int u) {
      const int64_t b = this->row0 + r;
      if (!a.walk.runs(next, b)) return;
      const int64_t token = a.walk.token(next, b);
      for (int i = 0; i < Cell::kSaved; ++i) {
        fetch_soon(a.saved + (token * Cell::kSaved + i) * H + u);
      }
      if (a.dy) fetch_soon(a.dy + token * a.dy_row + u);
    });
    const int slice = thread / this->plan.unit_threads, u = thread % this->plan.unit_threads;
    if (u >= H) return;
    A sums[R][1];
    sum_quads<T, R, 1>(this->weights, this->operand, Q, H, H, u, Q * slice / this->plan.slices,
                       Q * (slice + 1) / this->plan.slices, sums);
    for (int r = 0; r < R; ++r) this->parts[(slice * R + r) * H + u] = sums[r][0];
  }
};

// Runs f<R> for the R of a plan: 1 or 4.
template <class F>
auto with_rows(int rows, const F& f) {
  return rows == 1 ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, 4>{});
}

}  // namespace cuda
}  // namespace fastseq
