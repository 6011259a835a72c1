// The sequence loop of an LSTM layer.
//
// Forward, for a block of units and a few sequences: pre-activations = b + x_t W_ih^T + h W_hh^T in
// one register tile (the gates of a unit side by side, so that the cell's maths follows at once).
// Weights are packed for that, once a call. Backward carries only dL/dh and dL/dc; all weight
// gradients are products over the whole sequence afterwards.
//
// Work is split among threads by sequences, which need nothing from each other, or, where there are
// few sequences or the weights outgrow a core's cache, by units with a meeting at every step.

template <class T>
FASTSEQ_INLINE T* at(const LstmRows<T>& r, const LstmShape& s, int64_t t, int64_t b) {
  const int64_t row = r.step == LstmRows<T>::kPacked ? s.first[t] * r.row : t * r.step;
  return r.base + row + b * r.row;
}

FASTSEQ_INLINE int64_t rows_at(const LstmShape& s, int64_t t) {
  return t >= 0 && t < s.T ? s.rows[t] : 0;
}

// How a loop over steps is shared out.
struct LstmPlan {
  bool by_units;
  int tasks;      // a direction
  int64_t chunk;  // sequences, or vectors of units, a task
};

template <class T>
LstmPlan plan_lstm(const LstmShape& s, int64_t weights, int threads) {
  const int64_t vectors = ceil_div(s.H, kLanes<T>);
  // Below this many multiply-adds in all, handing out work costs more than it saves.
  constexpr int64_t kWorthSharing = int64_t(1) << 18;
  if (threads <= 1 || weights * s.tokens * s.D < kWorthSharing) return {false, 1, s.B};
  const int64_t each = ceil_div(threads, s.D);
  // Half of a 1 MiB second-level cache: beyond, every step would stream the weights from memory
  // once a thread.
  constexpr int64_t kCache = int64_t(512) << 10;
  // A step smaller than this is over before two threads have met.
  constexpr int64_t kWorthMeeting = int64_t(1) << 16;
  const int64_t by_rows = min64(each, s.B);
  const bool fits = weights * int64_t(sizeof(T)) <= kCache;
  const bool balanced = by_rows == each && s.B >= 4 * by_rows;
  if ((!fits || !balanced) && weights * s.B >= kWorthMeeting && vectors > 1 &&
      each * s.D <= Steps::kMaxShares) {
    const int64_t chunk = ceil_div(vectors, min64(each, vectors));
    return {true, int(ceil_div(vectors, chunk)), chunk};
  }
  const int64_t chunk = ceil_div(s.B, max64(by_rows, 1));
  return {false, int(max64(1, ceil_div(s.B, max64(chunk, 1)))), max64(chunk, 1)};
}

// [4H, K] weights as panels, one a vector of units: [vectors of H][K][4][lanes], units beyond H
// zero.
template <class T>
void pack_gates(const T* w, int64_t H, int64_t K, int64_t vector, T* out) {
  const int64_t unit = vector * kLanes<T>;
  const int lanes = int(min64(kLanes<T>, H - unit));
  // Sixteen elements of K at a time: each source line is used whole while it is in cache.
  for (int64_t k0 = 0; k0 < K; k0 += 16) {
    const int64_t k1 = min64(k0 + 16, K);
    for (int gate = 0; gate < 4; ++gate) {
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        T* column = out + gate * kLanes<T> + lane;
        if (lane < lanes) {
          const T* row = w + (gate * H + unit + lane) * K;
          for (int64_t k = k0; k < k1; ++k) column[k * kPanel<T>] = row[k];
        } else {
          for (int64_t k = k0; k < k1; ++k) column[k * kPanel<T>] = 0;
        }
      }
    }
  }
}

template <class T>
struct LstmPacked {
  T* bias;  // [vectors][4][lanes], the sum of both biases
  T* x;     // [vectors][I][4][lanes]
  T* h;     // [vectors][H][4][lanes]
};

template <class T>
void pack_lstm(const LstmWeights<T>& w, const LstmShape& s, int64_t vector, LstmPacked<T>& p) {
  pack_gates(w.w_ih, s.H, s.I, vector, p.x + vector * s.I * kPanel<T>);
  pack_gates(w.w_hh, s.H, s.H, vector, p.h + vector * s.H * kPanel<T>);
  T* bias = p.bias + vector * kPanel<T>;
  for (int gate = 0; gate < 4; ++gate) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int64_t unit = vector * kLanes<T> + lane, row = gate * s.H + unit;
      T sum = 0;
      if (unit < s.H && w.b_ih) sum += w.b_ih[row];
      if (unit < s.H && w.b_hh) sum += w.b_hh[row];
      bias[gate * kLanes<T> + lane] = sum;
    }
  }
}

// Where a tile of Rows sequences finds its operands and leaves its results.
template <class T>
struct LstmTile {
  const T* start[2 * kRows];  // [Panels][Rows]: what the sums start from, 4 * lanes wide
  const T* x[kRows];
  const T* h[kRows];
  int64_t x_width;  // I, or 0 where `start` already holds the input product
};

// Pre-activations of Rows sequences and Panels vectors of units, to `out` [Panels][Rows][4][lanes].
template <class T, int Rows, int Panels>
FASTSEQ_INLINE void lstm_tile(const LstmTile<T>& tile, const T* panel_x, const T* panel_h,
                              int64_t h_width, T* out) {
  constexpr int kVectors = Panels * 4;
  Vec<T> acc[Rows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[m][v] = load(tile.start[(v / 4) * Rows + m] + (v % 4) * kLanes<T>);
    }
  }
  multiply<T, Rows, 4, Panels>(tile.x_width, RowsOfA<T>{tile.x}, panel_x, tile.x_width * kPanel<T>,
                               acc);
  multiply<T, Rows, 4, Panels>(h_width, RowsOfA<T>{tile.h}, panel_h, h_width * kPanel<T>, acc);
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(out + ((v / 4) * Rows + m) * kPanel<T> + (v % 4) * kLanes<T>, acc[m][v]);
    }
  }
}

template <class T>
struct LstmForwardLoop {
  const LstmForward<T>& a;
  LstmPacked<T> packed[2];
  // Input products computed ahead, where a step alone has too few rows to fill a tile: one buffer a
  // task, [vectors of the task][tokens ahead][4][lanes].
  int64_t ahead;  // steps; 0: not ahead
  T* buffer;
  int64_t buffer_size;  // elements a task

  // Input products of the steps [s0, s1), sequences [b0, b1), vectors of units [v0, v1).
  void project(int d, int64_t s0, int64_t s1, int64_t b0, int64_t b1, int64_t v0, int64_t v1,
               T* out) {
    const LstmShape& s = a.shape;
    const int64_t per_vector = (s1 - s0) * (b1 - b0);
    for (int64_t v = v0; v < v1; ++v) {
      const T* panel = packed[d].x + v * s.I * kPanel<T>;
      LstmTile<T> tile;
      T* target[kRows];
      int m = 0;
      auto flush = [&] {
        alignas(64) T sums[kRows * kPanel<T>];
        tile.x_width = s.I;
        with_const<kRows>(m, [&](auto rows) {
          lstm_tile<T, decltype(rows)::value, 1>(tile, panel, panel, 0, sums);
        });
        for (int i = 0; i < m; ++i) {
          for (int g = 0; g < 4; ++g) {
            store(target[i] + g * kLanes<T>, load(sums + i * kPanel<T> + g * kLanes<T>));
          }
        }
        m = 0;
      };
      for (int64_t step = s0; step < s1; ++step) {
        const int64_t t = d ? s.T - 1 - step : step;
        for (int64_t b = b0; b < min64(b1, s.rows[t]); ++b) {
          tile.start[m] = packed[d].bias + v * kPanel<T>;
          tile.x[m] = at(a.x, s, t, b);
          target[m] = out + ((v - v0) * per_vector + (step - s0) * (b1 - b0) + b - b0) * kPanel<T>;
          if (++m == kRows) flush();
        }
      }
      if (m) flush();
    }
  }

  // The cell's maths for a row of pre-activations.
  FASTSEQ_INLINE void finish(int d, int64_t t, int64_t b, int64_t v, const T* sums) {
    const LstmShape& s = a.shape;
    const int64_t unit = v * kLanes<T>;
    const int lanes = int(min64(kLanes<T>, s.H - unit));
    cell::LstmGates<Vec<T>> z{load(sums), load(sums + kLanes<T>), load(sums + 2 * kLanes<T>),
                              load(sums + 3 * kLanes<T>)};
    T* state = a.c_n + (d * s.B + b) * s.H + unit;
    Vec<T> c = load(state, lanes);
    const Vec<T> h = cell::lstm_forward(z, c);
    store(state, c, lanes);
    store(at(a.y, s, t, b) + d * s.H + unit, h, lanes);
    if (a.gates) {
      const int64_t token = d * s.tokens + s.first[t] + b;
      store(a.cells + token * s.H + unit, c, lanes);
      T* gates = a.gates + token * 4 * s.H + unit;
      store(gates, z.i, lanes);
      store(gates + s.H, z.f, lanes);
      store(gates + 2 * s.H, z.g, lanes);
      store(gates + 3 * s.H, z.o, lanes);
    }
  }

  // One step for the sequences [b0, b1) and the vectors of units [v0, v1).
  void step(int d, int64_t step, int64_t b0, int64_t b1, int64_t v0, int64_t v1, T* ahead_of_task) {
    const LstmShape& s = a.shape;
    const int64_t t = d ? s.T - 1 - step : step, before = d ? t + 1 : t - 1;
    const int64_t rows_before = rows_at(s, before);
    const int64_t end = min64(b1, s.rows[t]);
    int64_t in_chunk = 0;
    if (ahead) {
      in_chunk = step % ahead;
      if (in_chunk == 0) {
        project(d, step, min64(step + ahead, s.T), b0, b1, v0, v1, ahead_of_task);
      }
    }
    const int64_t chunk_steps = min64(ahead, s.T - (step - in_chunk));
    const int64_t per_vector = chunk_steps * (b1 - b0);
    alignas(64) T sums[2 * kRows * kPanel<T>];
    LstmTile<T> tile;
    tile.x_width = ahead ? 0 : s.I;
    auto start_of = [&](int64_t b, int64_t v) -> const T* {
      if (!ahead) return packed[d].bias + v * kPanel<T>;
      return ahead_of_task + ((v - v0) * per_vector + in_chunk * (b1 - b0) + b - b0) * kPanel<T>;
    };
    // Tiles of even height: 64 rows by 6 would end in a tile of 4.
    const int64_t count = max64(end - b0, 0);
    const int64_t tiles = ceil_div(count, kRows);
    for (int64_t v = v0; v < v1;) {
      // One row alone has four chains of sums, half of what hides the latency of an FMA: then two
      // vectors of units at once.
      const int panels = count == 1 && v + 1 < v1 ? 2 : 1;
      const T* panel_x = packed[d].x + v * tile.x_width * kPanel<T>;
      const T* panel_h = packed[d].h + v * s.H * kPanel<T>;
      int64_t b = b0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        for (int m = 0; m < rows; ++m) {
          tile.start[m] = start_of(b + m, v);
          if (!ahead) tile.x[m] = at(a.x, s, t, b + m);
          tile.h[m] = b + m < rows_before ? at(a.y, s, before, b + m) + d * s.H
                                          : a.h0 + (d * s.B + b + m) * s.H;
        }
        if (panels == 2) {
          tile.start[1] = start_of(b, v + 1);
          lstm_tile<T, 1, 2>(tile, panel_x, panel_h, s.H, sums);
          finish(d, t, b, v, sums);
          finish(d, t, b, v + 1, sums + kPanel<T>);
        } else {
          with_const<kRows>(rows, [&](auto n) {
            lstm_tile<T, decltype(n)::value, 1>(tile, panel_x, panel_h, s.H, sums);
          });
          for (int m = 0; m < rows; ++m) finish(d, t, b + m, v, sums + m * kPanel<T>);
        }
        b += rows;
      }
      v += panels;
    }
  }
};

template <class T>
void lstm_forward(const LstmForward<T>& a, const Threads& threads) {
  const LstmShape& s = a.shape;
  const int64_t vectors = ceil_div(s.H, kLanes<T>), width = kPanel<T>;
  const LstmPlan plan = plan_lstm<T>(s, (s.I + s.H) * 4 * s.H, threads.count);
  const int64_t task_rows = plan.by_units ? s.B : min64(plan.chunk, s.B);
  const int64_t task_vectors = plan.by_units ? plan.chunk : vectors;
  // With fewer rows than a tile holds, input products are made for several steps together.
  constexpr int64_t kAhead = 8 * kRows;
  const int64_t ahead =
      task_rows > 0 && task_rows < kRows && s.T > 1 ? min64(s.T, ceil_div(kAhead, task_rows)) : 0;
  const int64_t buffer_size = ahead * task_rows * task_vectors * width;
  auto bytes = [](int64_t elements) { return Scratch::padded(size_t(elements) * sizeof(T)); };
  Scratch scratch(size_t(s.D) * (bytes(vectors * width) + bytes(vectors * s.I * width) +
                                 bytes(vectors * s.H * width) + plan.tasks * bytes(buffer_size)));
  LstmForwardLoop<T> loop{a, {}, ahead, nullptr, int64_t(bytes(buffer_size) / sizeof(T))};
  for (int d = 0; d < s.D; ++d) {
    loop.packed[d].bias = scratch.take<T>(vectors * width);
    loop.packed[d].x = scratch.take<T>(vectors * s.I * width);
    loop.packed[d].h = scratch.take<T>(vectors * s.H * width);
  }
  loop.buffer = scratch.take<T>(size_t(s.D * plan.tasks * loop.buffer_size));
  auto pack = [&](int64_t task) {
    const int d = int(task / vectors);
    pack_lstm(a.weights[d], s, task % vectors, loop.packed[d]);
  };
  if (plan.tasks * s.D > 1 && s.H * (s.I + s.H) > (1 << 14)) {
    run_tasks(threads, s.D * vectors, pack);
  } else {
    for (int64_t task = 0; task < s.D * vectors; ++task) pack(task);
  }
  for (int64_t i = 0; i < s.D * s.B * s.H; ++i) a.c_n[i] = a.c0[i];

  const int64_t tasks = plan.tasks * s.D;
  if (plan.by_units) {
    Steps steps(s.T, int(tasks));
    run_tasks(threads, tasks, [&](int64_t first) {
      steps.work(int(first), [&](int64_t step, int share) {
        const int64_t v0 = (share / s.D) * plan.chunk;
        loop.step(int(share % s.D), step, 0, s.B, v0, min64(v0 + plan.chunk, vectors),
                  loop.buffer + share * loop.buffer_size);
      });
    });
  } else {
    run_tasks(threads, tasks, [&](int64_t task) {
      const int64_t b0 = (task / s.D) * plan.chunk, b1 = min64(b0 + plan.chunk, s.B);
      for (int64_t step = 0; step < s.T; ++step) {
        loop.step(int(task % s.D), step, b0, b1, 0, vectors, loop.buffer + task * loop.buffer_size);
      }
    });
  }

  for (int d = 0; d < s.D; ++d) {
    for (int64_t b = 0, t = s.T - 1; b < s.B; ++b) {
      while (t >= 0 && s.rows[t] <= b) --t;
      const int64_t last = d && t >= 0 ? 0 : t;
      const T* from = last >= 0 ? at(a.y, s, last, b) + d * s.H : a.h0 + (d * s.B + b) * s.H;
      T* to = a.h_n + (d * s.B + b) * s.H;
      for (int64_t u = 0; u < s.H; ++u) to[u] = from[u];
    }
  }
}

template <class T>
struct LstmBackwardLoop {
  const LstmBackward<T>& a;
  T* packed[2];   // w_hh as panels of columns: [panels][4H][vectors of the panel][lanes]
  T* dgates[2];   // [tokens, 4H] gradients of the pre-activations
  T* hidden[2];   // [tokens, H] the hidden states, made again from gates and cells; or null
  const T* zero;  // 4H zeros

  // The cell's maths for one row and vector of units, dh given.
  FASTSEQ_INLINE void finish(int d, int64_t t, int64_t b, int64_t unit, Vec<T> dh) {
    const LstmShape& s = a.shape;
    const int lanes = int(min64(kLanes<T>, s.H - unit));
    const int64_t before = d ? t + 1 : t - 1;
    const int64_t state = (d * s.B + b) * s.H + unit, token = d * s.tokens + s.first[t] + b;
    const T* gates = a.gates + token * 4 * s.H + unit;
    const cell::LstmGates<Vec<T>> gate{load(gates, lanes), load(gates + s.H, lanes),
                                       load(gates + 2 * s.H, lanes), load(gates + 3 * s.H, lanes)};
    const Vec<T> c = load(a.cells + token * s.H + unit, lanes);
    const T* previous = b < rows_at(s, before)
                            ? a.cells + (d * s.tokens + s.first[before] + b) * s.H + unit
                            : a.c0 + state;
    Vec<T> dc = load(a.dc0 + state, lanes);
    const auto dz = cell::lstm_backward(gate, c, load(previous, lanes), dh, dc);
    store(a.dc0 + state, dc, lanes);
    T* out = dgates[d] + (s.first[t] + b) * 4 * s.H + unit;
    store(out, dz.i, lanes);
    store(out + s.H, dz.f, lanes);
    store(out + 2 * s.H, dz.g, lanes);
    store(out + 3 * s.H, dz.o, lanes);
    if (hidden[d]) store(hidden[d] + (s.first[t] + b) * s.H + unit, gate.o * tanh(c), lanes);
  }

  // dL/dh of `rows` rows from the pre-activation gradients in `from`, columns of one panel, to
  // `out` [rows][vectors][lanes].
  template <int Rows, int Vectors>
  FASTSEQ_INLINE void tile(int d, int64_t column, const T* const* from, bool none, T* out) {
    const int64_t K = none ? 0 : 4 * a.shape.H;
    Vec<T> acc[Rows][Vectors] = {};
    multiply<T, Rows, Vectors, 1>(K, RowsOfA<T>{from}, packed[d] + column * 4 * a.shape.H, 0, acc);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) store(out + (m * Vectors + v) * kLanes<T>, acc[m][v]);
    }
  }

  // Step `step` back from the end, or at step T the gradient of h0, for the sequences [b0, b1) and
  // the panels of units [p0, p1).
  void step(int d, int64_t step, int64_t b0, int64_t b1, int64_t p0, int64_t p1) {
    const LstmShape& s = a.shape;
    const bool initial = step == s.T;
    const int64_t t = d ? step : s.T - 1 - step, after = d ? t - 1 : t + 1;
    const int64_t rows_after = initial ? (s.T ? s.B : 0) : rows_at(s, after);
    const int64_t count = max64((initial ? b1 : min64(b1, s.rows[t])) - b0, 0);
    const int64_t tiles = ceil_div(count, kRows);
    alignas(64) T sums[kRows * kPanel<T>];
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t column = p * kPanel<T>;
      const int vectors = int(ceil_div(min64(kPanel<T>, s.H - column), kLanes<T>));
      int64_t b = b0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        const T* from[kRows];
        for (int m = 0; m < rows; ++m) {
          const int64_t row = b + m;
          int64_t source = after;
          if (initial) source = d ? last_step(row) : 0;
          from[m] = row < rows_after ? dgates[d] + (s.first[source] + row) * 4 * s.H : zero;
        }
        with_const<kRows>(rows, [&](auto n) {
          with_const<kPanelVectors>(vectors, [&](auto v) {
            tile<decltype(n)::value, decltype(v)::value>(d, column, from, b >= rows_after, sums);
          });
        });
        for (int m = 0; m < rows; ++m, ++b) {
          for (int v = 0; v < vectors; ++v) {
            const int64_t unit = column + v * kLanes<T>, state = (d * s.B + b) * s.H + unit;
            const int lanes = int(min64(kLanes<T>, s.H - unit));
            Vec<T> dh = load(sums + (m * vectors + v) * kLanes<T>);
            if (b >= rows_after && a.dh_n) dh += load(a.dh_n + state, lanes);
            if (initial) {
              store(a.dh0 + state, dh, lanes);
              continue;
            }
            if (a.dy.base) dh += load(at(a.dy, s, t, b) + d * s.H + unit, lanes);
            finish(d, t, b, unit, dh);
          }
        }
      }
    }
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
                                       : a.h0 + (d * s.B + b) * s.H;
        }
      }
      g.M = 4 * s.H;
      g.K = s.tokens;
      g.a_m = 1;
      g.a_k = 4 * s.H;
      g.N = g.ldc = s.I;
      g.b_rows = x_rows;
      g.c = a.dw_ih[d];
      gemm(g, threads);
      g.N = g.ldc = s.H;
      g.b_rows = h_rows;
      g.c = a.dw_hh[d];
      gemm(g, threads);
    }
    if (a.db[d]) column_sums(loop.dgates[d], s.tokens, 4 * s.H, 4 * s.H, a.db[d], threads);
    if (a.dx) {
      g.M = s.tokens;
      g.K = 4 * s.H;
      g.a_m = 4 * s.H;
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
  auto bytes = [](int64_t elements, size_t size) {
    return Scratch::padded(size_t(elements) * size);
  };
  Scratch scratch(size_t(s.D) * (bytes(vectors * kLanes<T> * 4 * s.H, sizeof(T)) +
                                 bytes(s.tokens * 4 * s.H, sizeof(T)) +
                                 (want_weights ? bytes(s.tokens * s.H, sizeof(T)) : 0)) +
                  bytes(4 * s.H, sizeof(T)) + 2 * bytes(s.tokens, sizeof(T*)));
  LstmBackwardLoop<T> loop{a, {}, {}, {}, nullptr};
  for (int d = 0; d < s.D; ++d) {
    loop.packed[d] = scratch.take<T>(vectors * kLanes<T> * 4 * s.H);
    loop.dgates[d] = scratch.take<T>(s.tokens * 4 * s.H);
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

  const int64_t tasks = plan.tasks * s.D;
  if (plan.by_units) {
    Steps steps(s.T + 1, int(tasks));
    run_tasks(threads, tasks, [&](int64_t first) {
      steps.work(int(first), [&](int64_t step, int share) {
        const int64_t p0 = (share / s.D) * plan.chunk;
        loop.step(int(share % s.D), step, 0, s.B, p0, min64(p0 + plan.chunk, panels));
      });
    });
  } else {
    run_tasks(threads, tasks, [&](int64_t task) {
      const int64_t b0 = (task / s.D) * plan.chunk, b1 = min64(b0 + plan.chunk, s.B);
      for (int64_t step = 0; step <= s.T; ++step) {
        loop.step(int(task % s.D), step, b0, b1, 0, panels);
      }
    });
  }
  lstm_deferred(a, loop, x_rows, h_rows, threads);
}
