// A whole sequence in one launch whose weights are too many for one block: `blocks` blocks take
// `units` units each, keep the weights of their sums in shared memory from first step to last, and
// hand each other what a step's sums are over (h forward, the gradients of the sums backward)
// through device memory. As in whole.h a phase ends where the threads of a block meet;
// `Group::meet()` is where the blocks that share a tile of sequences do.
//
// One meeting a step is enough. Step i reads exchange i % 2 and writes the other one, which was
// read in step i - 1: by blocks that, all of them, have since arrived at the meeting before step i.
// Blocks of different tiles or directions share nothing that is written.
//
// A thread owns kGridColumns sums of kGridRows sequences over a slice of their depth, so that each
// weight is read by one thread alone, and weights lie in the order in which threads read them.
// Everything of the operand is moved in packs of 16 bytes.
#pragma once

#include "launch.h"
#include "units.h"

namespace fastseq {
namespace cuda {

constexpr int kGridRows = 8, kGridColumns = 4;

template <class T>
constexpr int kPack = 16 / int(sizeof(T));

// What a thread keeps from phase to phase.
template <class T>
struct GridSums {
  Wide<T> of[kGridRows][kGridColumns];
};

// 16 bytes, aligned, into shared memory; there when the phase ends. Not through the first-level
// cache, which other blocks' writes don't reach.
FASTSEQ_BOTH void copy_soon(void* shared, const void* global) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
#else
  std::memcpy(shared, global, 16);
#endif
}

// Where in its shared memory a block keeps what: offsets in bytes.
struct GridMemory {
  int weights, operand, parts, h, c, bytes;

  FASTSEQ_BOTH int take(int64_t size) {
    const int at = bytes;
    // Too much stays too much: 2^30 is more than any block has.
    const int64_t end = at + (size + 15) / 16 * 16;
    bytes = end < (1 << 30) ? int(end) : 1 << 30;
    return at;
  }
  FASTSEQ_BOTH GridMemory(const WholeSize& s, const GridPlan& p) : bytes(0) {
    const int64_t active = int64_t(p.groups) * p.slices, state = p.rows * p.units * s.wide_bytes;
    weights = take(16 * active * p.packs * kGridColumns);
    operand = take(int64_t(2) * kGridRows * p.part * p.slices * 16);
    parts = take(active * kGridRows * kGridColumns * s.wide_bytes);
    h = take(state);
    c = take(s.states == 2 ? state : 0);
  }
};

// What the two passes share. Sequences row0 to row0 + rows, units u0 to u0 + units.
template <class Cell, class T>
struct GridBlock {
  using Type = T;
  using A = Wide<T>;
  using V = Lanes<A, 1>;
  using Sums = GridSums<T>;
  static constexpr int R = kGridRows, C = kGridColumns, P = kPack<T>;
  const GridPlan& plan;
  const Walk& walk;
  int64_t row0;
  int H, rows, u0, units;

  T* exchange;  // [2][B][plan.row]
  T* weights;
  T* operand;
  A* parts;
  A* h;  // forward: h, not rounded; backward: what cells carry of dh
  A* c;  // c, or its gradient

  FASTSEQ_BOTH GridBlock(const GridPlan& plan, const Walk& walk, int block, int tile, T* exchange,
                         char* memory)
      : plan(plan),
        walk(walk),
        row0(int64_t(tile) * plan.rows),
        H(int(walk.H)),
        u0(block * plan.units),
        exchange(exchange) {
    rows = walk.B - row0 < plan.rows ? int(walk.B - row0) : plan.rows;
    units = H - u0 < plan.units ? H - u0 : plan.units;
    const WholeSize size{Cell::kGates, Cell::kStates, Cell::kCarriesH, int(sizeof(T)),
                         int(sizeof(A))};
    const GridMemory at(size, plan);
    weights = reinterpret_cast<T*>(memory + at.weights);
    operand = reinterpret_cast<T*>(memory + at.operand);
    parts = reinterpret_cast<A*>(memory + at.parts);
    h = reinterpret_cast<A*>(memory + at.h);
    c = reinterpret_cast<A*>(memory + at.c);
  }
  // The same for all blocks that meet.
  FASTSEQ_BOTH int64_t steps() const { return walk.longest(row0, rows); }
  FASTSEQ_BOTH int chunks() const { return (rows + R - 1) / R; }
  FASTSEQ_BOTH T* exchanged(int64_t buffer, int64_t b) const {
    return exchange + ((buffer & 1) * walk.B + b) * plan.row;
  }
  // f(row of the tile, unit of the block) for this thread's share of a chunk.
  template <class F>
  FASTSEQ_BOTH void for_units(int thread, int chunk, const F& f) const {
    const int first = chunk * R, count = rows - first < R ? rows - first : R;
    FASTSEQ_ROLLED
    for (int i = thread; i < count * units; i += kGridThreads) f(first + i / units, i % units);
  }

  // weight(column, k): of the sum `column` of this block, at depth k; asked within both only.
  template <class F>
  FASTSEQ_BOTH void keep_weights(int thread, int columns, int depth, const F& weight) {
    const int active = plan.groups * plan.slices;
    FASTSEQ_ROLLED
    for (int i = thread; i < plan.packs * C * active; i += kGridThreads) {
      const int owner = i % active, j = i / active / C;
      const int column = owner % plan.groups + i / active % C * plan.groups;
      const int k0 = (j * plan.slices + owner / plan.groups) * P;
      for (int k = 0; k < P; ++k) {
        T value{};
        if (column < columns && k0 + k < depth) value = weight(column, k0 + k);
        weights[i * P + k] = value;
      }
    }
  }

  // The i-th piece of the operand: a part of the depth of a chunk of rows. Beyond the depth zeros,
  // as there are zeros beside them; rows beyond the last are nobody's.
  FASTSEQ_BOTH void stage(int thread, const T* from, int i, int pieces) const {
    const int wide = plan.part * plan.slices, first = i % pieces * wide;
    FASTSEQ_ROLLED
    for (int n = thread; n < R * wide; n += kGridThreads) {
      const int r = i / pieces * R + n / wide, pack = first + n % wide;
      T* to = operand + ((i & 1) * R * wide + n) * P;
      if (r >= rows) break;
      if (pack * P < plan.row) {
        copy_soon(to, from + r * plan.row + pack * P);
      } else {
        for (int k = 0; k < P; ++k) to[k] = T{};
      }
    }
  }
  FASTSEQ_BOTH void multiply(int thread, int i, int piece, Sums& sums) const {
    const int active = plan.groups * plan.slices, wide = plan.part * plan.slices;
    if (thread >= active) return;
    const int j0 = piece * plan.part;
    const int count = plan.packs - j0 < plan.part ? plan.packs - j0 : plan.part;
    const T* x = operand + ((i & 1) * R * wide + thread / plan.groups) * P;
    const T* w = weights + (int64_t(j0) * C * active + thread) * P;
    for (int j = 0; j < count; ++j) {
      Lanes<A, P> column[C];
      for (int g = 0; g < C; ++g) column[g] = load<P>(w + (j * C + g) * active * P);
      for (int r = 0; r < R; ++r) {
        const Lanes<A, P> row = load<P>(x + (r * wide + j * plan.slices) * P);
        for (int k = 0; k < P; ++k) {
          for (int g = 0; g < C; ++g) {
            sums.of[r][g] = fma_of(row.v[k], column[g].v[k], sums.of[r][g]);
          }
        }
      }
    }
  }
  FASTSEQ_BOTH void hand_in(int thread, const Sums& sums) const {
    if (thread >= plan.groups * plan.slices) return;
    const int columns = plan.groups * C, slice = thread / plan.groups;
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < C; ++g) {
        parts[(slice * R + r) * columns + thread % plan.groups + g * plan.groups] = sums.of[r][g];
      }
    }
  }
  // The sum of all slices' parts, in order.
  FASTSEQ_BOTH A sum_parts(int r, int column) const {
    A sum = 0;
    const int columns = plan.groups * C;
    for (int s = 0; s < plan.slices; ++s) sum += parts[(s * R + r % R) * columns + column];
    return sum;
  }

  // All sums over what lies in exchange `buffer`, chunk after chunk of rows: fetch(thread, chunk)
  // before a chunk's sums are made, cells(thread, chunk) when they are.
  template <class Group, class Fetch, class Cells>
  FASTSEQ_BOTH void step(Group& group, int64_t buffer, const Fetch& fetch, const Cells& cells) {
    const int pieces = (plan.packs + plan.part - 1) / plan.part, last = chunks() * pieces;
    const T* from = exchanged(buffer, row0);
    group.each([&](int thread, Sums&) { stage(thread, from, 0, pieces); });
    for (int i = 0; i < last; ++i) {
      const int chunk = i / pieces, piece = i % pieces;
      group.each([&](int thread, Sums& sums) {
        if (i + 1 < last) stage(thread, from, i + 1, pieces);
        if (piece == 0) {
          fetch(thread, chunk);
          sums = Sums{};
        }
        multiply(thread, i, piece, sums);
        if (piece == pieces - 1) hand_in(thread, sums);
      });
      if (piece == pieces - 1) group.each([&](int thread, Sums&) { cells(thread, chunk); });
    }
  }
};

template <class Cell, class T>
struct GridForward : GridBlock<Cell, T> {
  using Base = GridBlock<Cell, T>;
  using A = typename Base::A;
  using V = typename Base::V;
  using Sums = typename Base::Sums;
  static constexpr int G = Cell::kGates;
  const Forward<T>& a;

  FASTSEQ_BOTH GridForward(const Forward<T>& a, const GridPlan& plan, int block, int tile,
                           T* exchange, char* memory)
      : Base(plan, a.walk, block, tile, exchange, memory), a(a) {}

  template <class Group>
  FASTSEQ_BOTH void run(Group& group) {
    const int64_t steps = this->steps();
    group.each([&](int thread, Sums&) { begin(thread); });
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t t = this->walk.reverse ? steps - 1 - i : i;
      group.meet();
      this->step(
          group, i, [&](int thread, int chunk) { fetch(thread, chunk, t); },
          [&](int thread, int chunk) { cells(thread, chunk, t, i + 1); });
    }
    group.each([&](int thread, Sums&) { end(thread); });
  }

  FASTSEQ_BOTH void begin(int thread) {
    const int H = this->H;
    this->keep_weights(thread, G * this->units, H, [&](int column, int k) {
      return a.w_hh[int64_t(column / this->units * H + this->u0 + column % this->units) * H + k];
    });
    for (int chunk = 0; chunk < this->chunks(); ++chunk) {
      this->for_units(thread, chunk, [&](int r, int v) {
        const int64_t b = this->row0 + r, state = b * H + this->u0 + v;
        this->h[r * this->units + v] = wide(a.h[state]);
        if constexpr (Cell::kStates == 2) this->c[r * this->units + v] = a.c[state];
        this->exchanged(0, b)[this->u0 + v] = a.h[state];
      });
    }
  }

  // The first and the last line of each gate's inputs.
  FASTSEQ_BOTH void fetch(int thread, int chunk, int64_t t) const {
    const int r = chunk * Base::R + thread / G;
    if (thread >= Base::R * G || r >= this->rows || !a.walk.runs(t, this->row0 + r)) return;
    const T* from =
        a.zx + a.walk.token(t, this->row0 + r) * a.zx_row + thread % G * this->H + this->u0;
    fetch_soon(from);
    fetch_soon(from + this->units - 1);
  }

  FASTSEQ_BOTH void cells(int thread, int chunk, int64_t t, int64_t buffer) {
    const int H = this->H;
    this->for_units(thread, chunk, [&](int r, int v) {
      const int64_t b = this->row0 + r;
      const int at = r * this->units + v, u = this->u0 + v;
      V h{}, c{};
      h.v[0] = this->h[at];
      if (a.walk.runs(t, b)) {
        V inputs[G], recurrent[G];
        const T* zx = a.zx + a.walk.token(t, b) * a.zx_row + u;
        for (int g = 0; g < G; ++g) {
          inputs[g].v[0] = wide(zx[g * H]);
          recurrent[g].v[0] = this->sum_parts(r, g * this->units + v);
        }
        if constexpr (Cell::kStates == 2) c.v[0] = this->c[at];
        forward_units<Cell, T, 1>(a, t, b, u, inputs, recurrent, h, c);
        this->h[at] = h.v[0];
        if constexpr (Cell::kStates == 2) this->c[at] = c.v[0];
      }
      // A row that has ended or not begun keeps its state.
      round_to(this->exchanged(buffer, b)[u], h.v[0]);
    });
  }

  FASTSEQ_BOTH void end(int thread) {
    for (int chunk = 0; chunk < this->chunks(); ++chunk) {
      this->for_units(thread, chunk, [&](int r, int v) {
        const int64_t b = this->row0 + r, state = b * this->H + this->u0 + v;
        const bool cut = a.walk.cut_at_end(b);
        round_to(a.h[state], cut ? A(0) : this->h[r * this->units + v]);
        if constexpr (Cell::kStates == 2) a.c[state] = cut ? A(0) : this->c[r * this->units + v];
      });
    }
  }
};

template <class Cell, class T>
struct GridBackward : GridBlock<Cell, T> {
  using Base = GridBlock<Cell, T>;
  using A = typename Base::A;
  using V = typename Base::V;
  using Sums = typename Base::Sums;
  static constexpr int G = Cell::kGates;
  const Backward<T>& a;

  FASTSEQ_BOTH GridBackward(const Backward<T>& a, const GridPlan& plan, int block, int tile,
                            T* exchange, char* memory)
      : Base(plan, a.walk, block, tile, exchange, memory), a(a) {}

  template <class Group>
  FASTSEQ_BOTH void run(Group& group) {
    const int64_t steps = this->steps();
    group.each([&](int thread, Sums&) { begin(thread); });
    // Beyond the last step lie h0 and c0.
    for (int64_t i = 0; i < steps + (a.dh0 ? 1 : 0); ++i) {
      const bool initial = i == steps;
      const int64_t t = this->walk.reverse ? i : steps - 1 - i;
      const auto last = [&](int thread, int chunk) { cells(thread, chunk, t, initial, i + 1); };
      if (i == 0) {
        for (int chunk = 0; chunk < this->chunks(); ++chunk) {
          group.each([&](int thread, Sums&) { last(thread, chunk); });
        }
      } else {
        group.meet();
        this->step(group, i, [&](int thread, int chunk) { fetch(thread, chunk, t); }, last);
      }
    }
  }

  FASTSEQ_BOTH void begin(int thread) {
    const int H = this->H;
    this->keep_weights(thread, this->units, G * H, [&](int column, int k) {
      return a.w_hh[int64_t(k) * H + this->u0 + column];
    });
  }

  FASTSEQ_BOTH void fetch(int thread, int chunk, int64_t t) const {
    constexpr int kRows = Cell::kSaved + 1;
    const int r = chunk * Base::R + thread / kRows, i = thread % kRows;
    if (thread >= Base::R * kRows || r >= this->rows || !a.walk.runs(t, this->row0 + r)) return;
    const int64_t token = a.walk.token(t, this->row0 + r);
    const T* from = i < Cell::kSaved ? a.saved + (token * Cell::kSaved + i) * this->H
                    : a.dy           ? a.dy + token * a.dy_row
                                     : nullptr;
    if (!from) return;
    fetch_soon(from + this->u0);
    fetch_soon(from + this->u0 + this->units - 1);
  }

  FASTSEQ_BOTH void cells(int thread, int chunk, int64_t t, bool initial, int64_t buffer) {
    this->for_units(thread, chunk, [&](int r, int v) {
      const int64_t b = this->row0 + r;
      const int at = r * this->units + v, u = this->u0 + v;
      Flow<V> flow{};
      // Of a row that has not begun on the walk back there are no sums, and none are looked at.
      if (a.walk.runs(a.walk.after(t), b)) {
        flow.dh.v[0] = this->sum_parts(r, v);
        if constexpr (Cell::kCarriesH) flow.carry.v[0] = this->h[at];
        if constexpr (Cell::kStates == 2) flow.dc.v[0] = this->c[at];
      }
      V dz[G];
      if (!backward_units<Cell, T, 1>(a, t, initial, b, u, flow, dz)) return;
      for (int g = 0; g < G; ++g) {
        round_to(this->exchanged(buffer, b)[g * this->H + u], dz[g].v[0]);
      }
      if constexpr (Cell::kCarriesH) this->h[at] = flow.carry.v[0];
      if constexpr (Cell::kStates == 2) this->c[at] = flow.dc.v[0];
    });
  }
};

}  // namespace cuda
}  // namespace fastseq
