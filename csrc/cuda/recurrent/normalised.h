// A step of a cell that normalises over all units of a row (csrc/cell/layer_norm_lstm.h): a block
// of threads takes a row, in phases as in whole.h. What the caller gives is as for `step`, but that
// zx has no biases in it: they stand behind the cell's parameters.
#pragma once

#include "launch.h"

namespace fastseq {
namespace cuda {

// A token's row [blocks][H] of dsums: gradients of the sums over h, of those over x, then this
// token's share of those of the parameters and of the bias.
template <class Cell>
struct NormalisedGradientRow {
  static constexpr int kOfX = Cell::kGates, kParams = 2 * Cell::kGates;
  static constexpr int kBias = kParams + Cell::kParams, kBlocks = kBias + Cell::kGates;
};

// Elements of a block's shared memory: two rounds of partial sums, and `rows` rows of H.
constexpr FASTSEQ_BOTH int64_t normalised_memory(int64_t rows, int64_t H) {
  return 2 * kRowThreads + rows * H;
}

template <class A>
struct Moments {
  A mean, scale;
  FASTSEQ_BOTH A normalise(A v) const { return (v - mean) * scale; }
};

FASTSEQ_BOTH float root(float x) { return sqrtf(x); }
FASTSEQ_BOTH double root(double x) { return ::sqrt(x); }

// What both passes share: sums over a row, in an order that depends on its length alone.
template <class Cell, class A, class Block>
struct NormalisedRow {
  const Block& block;
  A* partial;  // [2][kRowThreads]
  int round = 0;

  // f(i), for all i below n, summed. A round's sums are overwritten two rounds later, when every
  // thread has read them.
  template <class F>
  FASTSEQ_BOTH A sum(int64_t n, const F& f) {
    A* to = partial + round * kRowThreads;
    round = 1 - round;
    block.each([&](int thread) {
      A own = 0;
      FASTSEQ_ROLLED
      for (int64_t i = thread; i < n; i += kRowThreads) own += f(i);
      to[thread] = own;
    });
    FASTSEQ_ROLLED
    for (int wide = kRowThreads / 2; wide > 0; wide /= 2) {
      block.each([&](int thread) {
        if (thread < wide) to[thread] += to[thread + wide];
      });
    }
    return to[0];
  }
  template <class F>
  FASTSEQ_BOTH Moments<A> moments(int64_t n, const F& f) {
    const A mean = sum(n, f) / A(n);
    const A squares = sum(n, [&](int64_t i) { return (f(i) - mean) * (f(i) - mean); });
    if (squares - squares == A(0)) return {mean, A(1) / root(squares / A(n) + A(Cell::kEpsilon))};
    // Beyond the largest number: once more in smaller units, where epsilon is nothing.
    constexpr A kUnit = sizeof(A) == sizeof(float) ? A(0x1p-80) : A(0x1p-600);
    const A small = sum(n, [&](int64_t i) {
      const A v = (f(i) - mean) * kUnit;
      return v * v;
    });
    return {mean, kUnit / root(small / A(n))};
  }
  // f(unit) for every unit, the threads sharing them.
  template <class F>
  FASTSEQ_BOTH void each_unit(int64_t H, const F& f) {
    block.each([&](int thread) {
      FASTSEQ_ROLLED
      for (int64_t u = thread; u < H; u += kRowThreads) f(u);
    });
  }
};

// memory: normalised_memory(2, H).
template <class Cell, class T, class Block>
FASTSEQ_BOTH void normalised_forward_row(const Forward<T>& a, int64_t t, int64_t b,
                                         const Block& block, Wide<T>* memory) {
  using A = Wide<T>;
  using V = Lanes<A, 1>;
  constexpr int G = Cell::kGates;
  const Walk& w = a.walk;
  if (!w.runs(t, b)) return;
  const int64_t H = w.H, token = w.token(t, b);
  const bool cut = w.cut(t, b), zero = !w.runs(w.after(t), b) && w.cut_at_end(b);
  NormalisedRow<Cell, A, Block> row{block, memory};
  A* gate_o = memory + 2 * kRowThreads;
  A* cells = gate_o + H;
  const T* zx = a.zx + token * a.zx_row;
  const T* zh = a.zh + b * G * H;
  const auto x_sum = [&](int64_t i) { return A(wide(zx[i])); };
  const auto h_sum = [&](int64_t i) { return cut ? A(0) : A(wide(zh[i])); };
  const auto param = [&](int i, int64_t u) { return V{{wide(a.params[i * H + u])}}; };
  T* saved = a.saved ? a.saved + token * Cell::kSaved * H : nullptr;

  const Moments<A> by_x = row.moments(G * H, x_sum), by_h = row.moments(G * H, h_sum);
  row.each_unit(H, [&](int64_t u) {
    V nx[G], nh[G], bias[G], params[Cell::kParams], gate[G], c{};
    for (int i = 0; i < Cell::kParams; ++i) params[i] = param(i, u);
    for (int g = 0; g < G; ++g) {
      nx[g].v[0] = by_x.normalise(x_sum(g * H + u));
      nh[g].v[0] = by_h.normalise(h_sum(g * H + u));
      bias[g] = param(Cell::kParams + g, u);
    }
    if (!cut) c.v[0] = a.c[b * H + u];
    Cell::gates(nx, nh, bias, params, gate, c);
    gate_o[u] = gate[3].v[0];
    cells[u] = c.v[0];
    a.c[b * H + u] = zero ? A(0) : c.v[0];
    if (!saved) return;
    for (int g = 0; g < G; ++g) {
      round_to(saved[(Cell::kSavedX + g) * H + u], x_sum(g * H + u));
      round_to(saved[(Cell::kSavedHidden + g) * H + u], h_sum(g * H + u));
      round_to(saved[(Cell::kSavedGates + g) * H + u], gate[g].v[0]);
    }
    round_to(saved[Cell::kSavedC * H + u], c.v[0]);
  });
  const Moments<A> by_c = row.moments(H, [&](int64_t u) { return cells[u]; });
  row.each_unit(H, [&](int64_t u) {
    const V nc{{by_c.normalise(cells[u])}}, o{{gate_o[u]}};
    const A h = Cell::output(nc, o, param(Cell::kGainC, u), param(Cell::kBiasC, u)).v[0];
    round_to(a.y[token * a.y_row + u], h);
    round_to(a.h[b * H + u], zero ? A(0) : h);
  });
}

// memory: normalised_memory(2 + 2 * gates, H). As backward_units of units.h.
template <class Cell, class T, class Block>
FASTSEQ_BOTH void normalised_backward_row(const Backward<T>& a, int64_t t, bool initial, int64_t b,
                                          const Block& block, Wide<T>* memory) {
  using A = Wide<T>;
  using V = Lanes<A, 1>;
  using Row = NormalisedGradientRow<Cell>;
  constexpr int G = Cell::kGates;
  const Walk& w = a.walk;
  const int64_t H = w.H, later = w.after(t);
  const bool follows = w.runs(later, b), flows = follows && !w.cut(later, b);
  const bool ends = !follows && !w.cut_at_end(b);
  NormalisedRow<Cell, A, Block> row{block, memory};
  const auto flowing = [&](const auto* kept, const T* last, int64_t u) {
    A d = flows ? A(wide(kept[b * H + u])) : A(0);
    if (ends && last) d = wide(last[b * H + u]);
    return d;
  };
  if (initial || !w.runs(t, b)) {
    if (a.dh0 && (follows || (initial && w.length(b) == 0))) {
      row.each_unit(H, [&](int64_t u) {
        round_to(a.dh0[b * H + u], flowing(a.dh, a.dh_n, u));
        round_to(a.dc0[b * H + u], flowing(a.dc, a.dc_n, u));
      });
    }
    return;
  }
  const int64_t token = w.token(t, b), before = w.before(t);
  const bool cut = w.cut(t, b), begins = !w.runs(before, b);
  const T* saved = a.saved + token * Cell::kSaved * H;
  const T* c_before = a.c0 ? a.c0 + b * H : nullptr;
  if (!begins) c_before = a.saved + (w.token(before, b) * Cell::kSaved + Cell::kSavedC) * H;
  if (cut) c_before = nullptr;
  const auto kept = [&](int i, int64_t u) { return A(wide(saved[i * H + u])); };
  const auto param = [&](int i, int64_t u) { return V{{wide(a.params[i * H + u])}}; };
  T* out = a.dsums + token * a.dsums_row;
  A* dz_o = memory + 2 * kRowThreads;
  A* dn = dz_o + H;  // of the normalised c
  A* d_nx = dn + H;  // [G][H]: of the normalised sums
  A* d_nh = d_nx + G * H;

  const Moments<A> by_c = row.moments(H, [&](int64_t u) { return kept(Cell::kSavedC, u); });
  row.each_unit(H, [&](int64_t u) {
    const V nc{{by_c.normalise(kept(Cell::kSavedC, u))}}, o{{kept(Cell::kSavedGates + 3, u)}};
    V dh{{flowing(a.dh, a.dh_n, u)}}, dz, dgain, dbias, h;
    if (a.dy) dh.v[0] += wide(a.dy[token * a.dy_row + u]);
    dn[u] = Cell::output_backward(nc, o, param(Cell::kGainC, u), param(Cell::kBiasC, u), dh, dz,
                                  dgain, dbias, h)
                .v[0];
    dz_o[u] = dz.v[0];
    round_to(out[(Row::kParams + Cell::kGainC) * H + u], dgain.v[0]);
    round_to(out[(Row::kParams + Cell::kBiasC) * H + u], dbias.v[0]);
    if (a.hidden && follows) {
      round_to(a.hidden[w.token(later, b) * H + u], flows ? h.v[0] : A(0));
    }
    if (a.hidden && begins) {
      round_to(a.hidden[token * H + u], a.h0 && !cut ? A(wide(a.h0[b * H + u])) : A(0));
    }
  });
  // dL/dv from d = dL/dn of normalised n: scale * (d - mean(d) - n * mean(d n)).
  const auto mean = [&](int64_t n, const auto& f) { return row.sum(n, f) / A(n); };
  const auto nc = [&](int64_t u) { return by_c.normalise(kept(Cell::kSavedC, u)); };
  const A mean_c = mean(H, [&](int64_t u) { return dn[u]; });
  const A mean_nc = mean(H, [&](int64_t u) { return dn[u] * nc(u); });

  const auto x_sum = [&](int64_t i) { return kept(Cell::kSavedX, i); };
  const auto h_sum = [&](int64_t i) { return kept(Cell::kSavedHidden, i); };
  const Moments<A> by_x = row.moments(G * H, x_sum), by_h = row.moments(G * H, h_sum);
  row.each_unit(H, [&](int64_t u) {
    V gate[3], dz[G], c_prev{};
    V dc{{flowing(a.dc, a.dc_n, u) + by_c.scale * (dn[u] - mean_c - nc(u) * mean_nc)}};
    for (int g = 0; g < 3; ++g) gate[g].v[0] = kept(Cell::kSavedGates + g, u);
    if (c_before) c_prev.v[0] = wide(c_before[u]);
    Cell::gates_backward(gate, c_prev, dc, dz);
    dz[3].v[0] = dz_o[u];
    a.dc[b * H + u] = dc.v[0];
    for (int g = 0; g < G; ++g) {
      const A d = dz[g].v[0];
      const A nx = by_x.normalise(x_sum(g * H + u)), nh = by_h.normalise(h_sum(g * H + u));
      d_nx[g * H + u] = d * param(Cell::kGainX + g, u).v[0];
      d_nh[g * H + u] = d * param(Cell::kGainH + g, u).v[0];
      round_to(out[(Row::kParams + Cell::kGainX + g) * H + u], d * nx);
      round_to(out[(Row::kParams + Cell::kGainH + g) * H + u], d * nh);
      round_to(out[(Row::kBias + g) * H + u], d);
    }
  });
  const auto leave = [&](const Moments<A>& by, const auto& sum, const A* d, T* to, T* again) {
    const auto normal = [&](int64_t i) { return by.normalise(sum(i)); };
    const A mean_d = mean(G * H, [&](int64_t i) { return d[i]; });
    const A mean_n = mean(G * H, [&](int64_t i) { return d[i] * normal(i); });
    row.each_unit(G * H, [&](int64_t i) {
      const A of_sum = by.scale * (d[i] - mean_d - normal(i) * mean_n);
      round_to(to[i], of_sum);
      if (again) round_to(again[i], of_sum);
    });
  };
  leave(by_x, x_sum, d_nx, out + Row::kOfX * H, static_cast<T*>(nullptr));
  leave(by_h, h_sum, d_nh, out, a.dz + b * G * H);
}

}  // namespace cuda
}  // namespace fastseq
