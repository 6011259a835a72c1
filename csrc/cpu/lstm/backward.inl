// The backward pass of an LSTM layer.
//
// The loop carries only dL/dh and dL/dc; all weight gradients are products over the whole sequence
// afterwards.

// Rows of A, K wide, by `Panels` panels of columns, to `out` [Panels][Rows][Vectors][lanes].
template <class T, int Rows, int Vectors, int Panels>
FASTSEQ_TILE void rows_times_panels(int64_t K, const T* const* rows, const T* panel,
                                    int64_t panel_stride, const T* soon, T* out) {
  Vec<T> acc[Rows][Panels * Vectors] = {};
  multiply<T, Rows, Vectors, Panels>(K, RowsOfA<T>{rows}, panel, panel_stride, acc, soon);
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < Panels * Vectors; ++v) {
      store(out + (((v / Vectors) * Rows + m) * Vectors + v % Vectors) * kLanes<T>, acc[m][v]);
    }
  }
}

template <class T>
struct LstmBackwardLoop {
  const LstmBackward<T>& a;
  T* packed[2];  // w_hh as panels of columns: [panels][4H][vectors of the panel][lanes]
  T* dgates[2];  // [tokens, dgates_row], 4H used: gradients of the pre-activations
  int64_t dgates_row;
  T* hidden[2];   // [tokens, H] the hidden states, made again from gates and cells; or null
  const T* zero;  // 4H zeros

  // The cell's maths for a vector of units of one row (V a vector) or of two (V is Two, the second
  // being the next row or, `across`, the next vector of units): from dL/dh by way of the later step
  // to all of it, and on to the pre-activations.
  template <class V>
  FASTSEQ_INLINE void finish(int d, int64_t t, int64_t b, int64_t unit, const T* sum,
                             int64_t sum_stride, bool last, bool across) {
    const LstmShape& s = a.shape;
    const int lanes = int(min64(kLanes<T>, s.H - unit));
    const int64_t state = (d * s.B + b) * s.H + unit, row = 4 * s.H;
    const int64_t next = across ? kLanes<T> : s.H, next_gates = across ? kLanes<T> : row;
    const int64_t next_dy = across ? kLanes<T> : a.dy.row;
    const int64_t next_dgates = across ? kLanes<T> : dgates_row;
    const int64_t token = s.first[t] + b, before = d ? t + 1 : t - 1;
    V dh, path, dc, c, c_before;
    load_rows(dh, sum, sum_stride, kLanes<T>);
    if (last && a.dh_n) {
      load_rows(path, a.dh_n + state, next, lanes);
      dh = dh + path;
    }
    if (a.dy.base) {
      load_rows(path, at(a.dy, s, t, b) + d * s.H + unit, next_dy, lanes);
      dh = dh + path;
    }
    const T* gates = a.gates + (d * s.tokens + token) * row + unit;
    cell::LstmGates<V> gate;
    load_rows(gate.i, gates, next_gates, lanes);
    load_rows(gate.f, gates + s.H, next_gates, lanes);
    load_rows(gate.g, gates + 2 * s.H, next_gates, lanes);
    load_rows(gate.o, gates + 3 * s.H, next_gates, lanes);
    load_rows(c, a.cells + (d * s.tokens + token) * s.H + unit, next, lanes);
    const T* previous = b < rows_at(s, before)
                            ? a.cells + (d * s.tokens + s.first[before] + b) * s.H + unit
                        : a.c0 ? a.c0 + state
                               : zero + unit;
    load_rows(c_before, previous, next, lanes);
    load_rows(dc, a.dc0 + state, next, lanes);
    V h;
    const auto dz = cell::lstm_backward(gate, c, c_before, dh, dc, h);
    store_rows(a.dc0 + state, dc, next, lanes);
    T* out = dgates[d] + token * dgates_row + unit;
    store_rows(out, dz.i, next_dgates, lanes);
    store_rows(out + s.H, dz.f, next_dgates, lanes);
    store_rows(out + 2 * s.H, dz.g, next_dgates, lanes);
    store_rows(out + 3 * s.H, dz.o, next_dgates, lanes);
    if (hidden[d]) store_rows(hidden[d] + token * s.H + unit, h, next, lanes);
  }

  // Panels taken together by a tile of so many rows: sums enough to hide an FMA's latency.
  static constexpr int panels_together(int rows) {
    return rows == 1 ? 4 : 2 * rows <= kRows ? 2 : 1;
  }

  // Step `step` back from the end, or at step T the gradient of h0, for the sequences [b0, b1) and
  // the panels of units [p0, p1).
  void step(int d, int64_t step, int64_t b0, int64_t b1, int64_t p0, int64_t p1) {
    const LstmShape& s = a.shape;
    const bool initial = step == s.T;
    const int64_t t = d ? step : s.T - 1 - step, after = d ? t - 1 : t + 1;
    const int64_t rows_before = rows_at(s, d ? t + 1 : t - 1);
    const int64_t rows_after = initial ? (s.T ? s.B : 0) : rows_at(s, after);
    const int64_t count = max64((initial ? b1 : min64(b1, s.rows[t])) - b0, 0);
    const int64_t tiles = ceil_div(count, kRows);
    alignas(64) T sums[kRows * 2 * kPanel<T>];
    const int most = count ? int(ceil_div(count, tiles)) : 1;
    for (int64_t p = p0; p < p1;) {
      const int64_t column = p * kPanel<T>, columns = s.H - column;
      const int vectors = int(ceil_div(min64(kPanel<T>, columns), kLanes<T>));
      int panels = panels_together(most);
      while (panels > 1 && (p + panels > p1 || columns < panels * kPanel<T>)) panels /= 2;
      int64_t b = b0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        const T* from[kRows];
        for (int m = 0; m < rows; ++m) {
          const int64_t row = b + m;
          const int64_t source = !initial ? after : d ? last_step(row) : 0;
          from[m] = row < rows_after ? dgates[d] + (s.first[source] + row) * dgates_row : zero;
        }
        multiply_rows(d, column, rows, vectors, panels, from, b < rows_after, int(i), sums);
        for (int j = 0; j < panels * vectors; ++j) {
          const int64_t unit = column + j * kLanes<T>;
          const T* sum = sums + ((j / vectors) * rows * vectors + j % vectors) * kLanes<T>;
          const int64_t stride = vectors * kLanes<T>;
          if (rows == 1 && !initial && j + 1 < panels * vectors && unit + 2 * kLanes<T> <= s.H) {
            finish<Two<T>>(d, t, b, unit, sum, kLanes<T>, b >= rows_after, true);
            ++j;
            continue;
          }
          for (int m = 0; m < rows;) {
            const bool last = b + m >= rows_after;
            // Two rows go together where they are alike: both at their last step or neither, and
            // both with an earlier one or neither.
            const bool two = m + 1 < rows && last == (b + m + 1 >= rows_after) &&
                             (b + m < rows_before) == (b + m + 1 < rows_before);
            const T* from_row = sum + m * stride;
            if (initial) {
              store_initial(d, b + m, unit, load(from_row), last);
            } else if (two) {
              finish<Two<T>>(d, t, b + m, unit, from_row, stride, last, false);
            } else {
              finish<Vec<T>>(d, t, b + m, unit, from_row, stride, last, false);
            }
            m += two && !initial ? 2 : 1;
          }
        }
        b += rows;
      }
      p += panels;
    }
  }

  // dL/dh by way of the later step, of rows whose pre-activation gradients are `from`.
  void multiply_rows(int d, int64_t column, int rows, int vectors, int panels, const T* const* from,
                     bool any, int order, T* sums) {
    const int64_t K = any ? 4 * a.shape.H : 0, stride = 4 * a.shape.H * kPanel<T>;
    const T* panel = packed[d] + column * 4 * a.shape.H;
    const T* soon = fetch_soon(panel, stride, order);
    with_const<kRows>(rows, [&](auto n) {
      constexpr int kN = decltype(n)::value;
      constexpr int kTwo = 2 * kN <= kRows ? 2 : 1, kFour = kN == 1 ? 4 : kTwo;
      if (panels == 4) {
        rows_times_panels<T, kN, kPanelVectors, kFour>(K, from, panel, stride, soon, sums);
      } else if (panels == 2) {
        rows_times_panels<T, kN, kPanelVectors, kTwo>(K, from, panel, stride, soon, sums);
      } else if (vectors == kPanelVectors) {
        rows_times_panels<T, kN, kPanelVectors, 1>(K, from, panel, stride, soon, sums);
      } else {
        rows_times_panels<T, kN, 1, 1>(K, from, panel, stride, soon, sums);
      }
    });
  }

  FASTSEQ_INLINE void store_initial(int d, int64_t b, int64_t unit, Vec<T> dh, bool last) {
    const LstmShape& s = a.shape;
    const int64_t state = (d * s.B + b) * s.H + unit;
    const int lanes = int(min64(kLanes<T>, s.H - unit));
    if (last && a.dh_n) dh += load(a.dh_n + state, lanes);
    store(a.dh0 + state, dh, lanes);
  }

  int64_t last_step(int64_t b) const {
    int64_t t = a.shape.T - 1;
    while (t >= 0 && a.shape.rows[t] <= b) --t;
    return t;
  }
};

// [4H, H] as it stands, in panels of columns.
template <class T>
void pack_columns(const T* w, int64_t H, int64_t column, T* out) {
  const int cols = int(min64(kPanel<T>, H - column));
  const int vectors = int(ceil_div(cols, kLanes<T>));
  for (int64_t k = 0; k < 4 * H; ++k) {
    for (int v = 0; v < vectors; ++v, out += kLanes<T>) {
      store(out, load(w + k * H + column + v * kLanes<T>, cols - v * kLanes<T>));
    }
  }
}

// Weight, bias and input gradients, from the pre-activation gradients of all steps.
template <class T>
void lstm_deferred(const LstmBackward<T>& a, const LstmBackwardLoop<T>& loop, const T** x_rows,
                   const T** h_rows, const Threads& threads) {
  const LstmShape& s = a.shape;
  for (int64_t t = 0; t < s.T; ++t) {
    for (int64_t b = 0; b < s.rows[t]; ++b) x_rows[s.first[t] + b] = at(a.x, s, t, b);
  }
  for (int d = 0; d < s.D; ++d) {
    Gemm<T> g{};
    g.a = loop.dgates[d];
    if (a.dw_ih[d]) {
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t before = d ? t + 1 : t - 1;
        for (int64_t b = 0; b < s.rows[t]; ++b) {
          h_rows[s.first[t] + b] = b < rows_at(s, before)
                                       ? loop.hidden[d] + (s.first[before] + b) * s.H
                                   : a.h0 ? a.h0 + (d * s.B + b) * s.H
                                          : loop.zero;
        }
      }
      g.M = 4 * s.H;
      g.K = s.tokens;
      g.a_m = 1;
      g.a_k = loop.dgates_row;
      g.N = g.ldc = s.I;
      g.b_rows = x_rows;
      g.c = a.dw_ih[d];
      gemm(g, threads);
      g.N = g.ldc = s.H;
      g.b_rows = h_rows;
      g.c = a.dw_hh[d];
      gemm(g, threads);
    }
    if (a.db[d]) column_sums(loop.dgates[d], s.tokens, 4 * s.H, loop.dgates_row, a.db[d], threads);
    if (a.dx) {
      g.M = s.tokens;
      g.K = 4 * s.H;
      g.a_m = loop.dgates_row;
      g.a_k = 1;
      g.N = g.ldb = g.ldc = s.I;
      g.b_rows = nullptr;
      g.b = a.weights[d].w_ih;
      g.c = a.dx;
      g.accumulate = d == 1;
      gemm(g, threads);
    }
  }
}

template <class T>
void lstm_backward(const LstmBackward<T>& a, const Threads& threads) {
  const LstmShape& s = a.shape;
  const int64_t panels = ceil_div(s.H, kPanel<T>), vectors = ceil_div(s.H, kLanes<T>);
  const bool want_weights = a.dw_ih[0] != nullptr;
  LstmPlan plan = plan_lstm<T>(s, 4 * s.H * s.H, threads.count);
  if (plan.by_units) {
    plan.chunk = ceil_div(panels, plan.tasks);
    plan.tasks = int(ceil_div(panels, plan.chunk));
  }
  // Rows a power of two apart would share the few lines of one set of the first-level cache.
  const int64_t dgates_row = ceil_div(4 * s.H, kLanes<T>) * kLanes<T> + kLanes<T>;
  auto bytes = [](int64_t elements, size_t size) {
    return Scratch::padded(size_t(elements) * size);
  };
  Scratch scratch(size_t(s.D) * (bytes(vectors * kLanes<T> * 4 * s.H, sizeof(T)) +
                                 bytes(s.tokens * dgates_row, sizeof(T)) +
                                 (want_weights ? bytes(s.tokens * s.H, sizeof(T)) : 0)) +
                  bytes(4 * s.H, sizeof(T)) + 2 * bytes(s.tokens, sizeof(T*)));
  LstmBackwardLoop<T> loop{a, {}, {}, dgates_row, {}, nullptr};
  for (int d = 0; d < s.D; ++d) {
    loop.packed[d] = scratch.take<T>(vectors * kLanes<T> * 4 * s.H);
    loop.dgates[d] = scratch.take<T>(s.tokens * dgates_row);
    loop.hidden[d] = want_weights ? scratch.take<T>(s.tokens * s.H) : nullptr;
  }
  T* zero = scratch.take<T>(4 * s.H);
  for (int64_t i = 0; i < 4 * s.H; ++i) zero[i] = 0;
  loop.zero = zero;
  const T** x_rows = scratch.take<const T*>(s.tokens);
  const T** h_rows = scratch.take<const T*>(s.tokens);

  auto pack = [&](int64_t task) {
    const int d = int(task / panels);
    const int64_t column = (task % panels) * kPanel<T>;
    pack_columns(a.weights[d].w_hh, s.H, column, loop.packed[d] + column * 4 * s.H);
  };
  if (plan.tasks * s.D > 1 && s.H * s.H > (1 << 14)) {
    run_tasks(threads, s.D * panels, pack);
  } else {
    for (int64_t task = 0; task < s.D * panels; ++task) pack(task);
  }
  for (int64_t i = 0; i < s.D * s.B * s.H; ++i) a.dc0[i] = a.dc_n ? a.dc_n[i] : T(0);

  const int64_t tasks = plan.tasks * s.D, all_steps = s.T + (a.dh0 ? 1 : 0);
  if (plan.by_units) {
    Steps steps(all_steps, int(tasks));
    run_tasks(threads, tasks, [&](int64_t first) {
      steps.work(int(first), [&](int64_t step, int share) {
        const int64_t p0 = (share / s.D) * plan.chunk;
        loop.step(int(share % s.D), step, 0, s.B, p0, min64(p0 + plan.chunk, panels));
      });
    });
  } else {
    run_tasks(threads, tasks, [&](int64_t task) {
      const int64_t b0 = (task / s.D) * plan.chunk, b1 = min64(b0 + plan.chunk, s.B);
      for (int64_t step = 0; step < all_steps; ++step) {
        loop.step(int(task % s.D), step, b0, b1, 0, panels);
      }
    });
  }
  lstm_deferred(a, loop, x_rows, h_rows, threads);
}
