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

// [4H, K] weights as panels of two gates, two panels a vector of units: [vectors of H][2][K][2]
// [lanes], units beyond H zero.
template <class T>
void pack_gates(const T* w, int64_t H, int64_t K, int64_t vector, T* out) {
  const int64_t unit = vector * kLanes<T>;
  const int lanes = int(min64(kLanes<T>, H - unit));
  // Sixteen elements of K at a time: each source line is used whole while it is in cache.
  for (int64_t k0 = 0; k0 < K; k0 += 16) {
    const int64_t k1 = min64(k0 + 16, K);
    for (int gate = 0; gate < 4; ++gate) {
      T* panel = out + (gate / 2) * K * kPanel<T> + (gate % 2) * kLanes<T>;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const T* row = w + (gate * H + unit + lane) * K;
        for (int64_t k = k0; k < k1; ++k)
          panel[k * kPanel<T> + lane] = lane < lanes ? row[k] : T(0);
      }
    }
  }
}

// The four gates of a vector of units.
template <class T>
constexpr int kGates = 4 * kLanes<T>;

template <class T>
struct LstmPacked {
  T* bias;  // [vectors][4][lanes], the sum of both biases
  T* x;     // [vectors][2][I][2][lanes]
  T* h;     // [vectors][2][H][2][lanes]
};

template <class T>
void pack_lstm(const LstmWeights<T>& w, const LstmShape& s, int64_t vector, LstmPacked<T>& p) {
  pack_gates(w.w_ih, s.H, s.I, vector, p.x + vector * s.I * kGates<T>);
  pack_gates(w.w_hh, s.H, s.H, vector, p.h + vector * s.H * kGates<T>);
  T* bias = p.bias + vector * kGates<T>;
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

// Where a tile of rows finds its operands.
template <class T>
struct LstmTile {
  const T* start[kRows];  // what the sums start from, [4][lanes]
  const T* x[kRows];
  const T* h[kRows];
  int64_t start_stride;  // from one vector of units to the next
  const T* panel_x;      // of the first vector of units
  const T* panel_h;
  int64_t x_width;  // I, or 0 where `start` already holds the input product
  int64_t h_width;
};

// Pre-activations of Rows rows, in the panels [First, First + Panels) of a vector of units (two
// vectors where Panels is 4), to `out` [vectors][Rows][4][lanes].
template <class T, int Rows, int First, int Panels>
FASTSEQ_TILE void lstm_panels(const LstmTile<T>& tile, T* out) {
  constexpr int kVectors = Panels * kPanelVectors;
  auto place = [](int v) { return (First * kPanelVectors + v) % 4 * kLanes<T>; };
  Vec<T> acc[Rows][kVectors];
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      acc[m][v] = load(tile.start[m] + (v / 4) * tile.start_stride + place(v));
    }
  }
  const int64_t stride_x = tile.x_width * kPanel<T>, stride_h = tile.h_width * kPanel<T>;
  multiply<T, Rows, kPanelVectors, Panels>(tile.x_width, RowsOfA<T>{tile.x},
                                           tile.panel_x + First * stride_x, stride_x, acc);
  multiply<T, Rows, kPanelVectors, Panels>(tile.h_width, RowsOfA<T>{tile.h},
                                           tile.panel_h + First * stride_h, stride_h, acc);
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      store(out + ((v / 4) * Rows + m) * kGates<T> + place(v), acc[m][v]);
    }
  }
}

// The same for `rows` rows and one or two vectors of units; two only for a single row.
template <class T>
FASTSEQ_INLINE void lstm_tile(const LstmTile<T>& tile, int rows, int vectors, T* out) {
  if (vectors == 2) {
    lstm_panels<T, 1, 0, 4>(tile, out);
    return;
  }
  with_const<kRows>(rows, [&](auto n) {
    constexpr int kN = decltype(n)::value;
    if constexpr (2 * kN <= kRows) {
      lstm_panels<T, kN, 0, 2>(tile, out);
    } else {
      lstm_panels<T, kN, 0, 1>(tile, out);
      lstm_panels<T, kN, 1, 1>(tile, out);
    }
  });
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
    alignas(64) T sums[kRows * kGates<T>];
    LstmTile<T> tile{};
    tile.x_width = s.I;
    for (int64_t v = v0; v < v1; ++v) {
      tile.panel_x = tile.panel_h = packed[d].x + v * s.I * kGates<T>;
      T* target[kRows];
      int rows = 0;
      auto flush = [&] {
        lstm_tile(tile, rows, 1, sums);
        for (int m = 0; m < rows; ++m) {
          for (int i = 0; i < kGates<T>; i += kLanes<T>) {
            store(target[m] + i, load(sums + m * kGates<T> + i));
          }
        }
        rows = 0;
      };
      for (int64_t step = s0; step < s1; ++step) {
        const int64_t t = d ? s.T - 1 - step : step;
        for (int64_t b = b0; b < min64(b1, s.rows[t]); ++b) {
          tile.start[rows] = packed[d].bias + v * kGates<T>;
          tile.x[rows] = at(a.x, s, t, b);
          target[rows] =
              out + ((v - v0) * per_vector + (step - s0) * (b1 - b0) + b - b0) * kGates<T>;
          if (++rows == kRows) flush();
        }
      }
      if (rows) flush();
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
    alignas(64) T sums[kRows * kGates<T>];
    LstmTile<T> tile{};
    tile.x_width = ahead ? 0 : s.I;
    tile.h_width = s.H;
    tile.start_stride = (ahead ? per_vector : 1) * kGates<T>;
    // Tiles of even height: 32 rows are 11 + 11 + 10, not 12 + 12 + 8.
    const int64_t count = max64(end - b0, 0);
    const int64_t tiles = ceil_div(count, kRows);
    for (int64_t v = v0; v < v1;) {
      const int vectors = count == 1 && v + 1 < v1 ? 2 : 1;
      tile.panel_x = packed[d].x + v * s.I * kGates<T>;
      tile.panel_h = packed[d].h + v * s.H * kGates<T>;
      int64_t b = b0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        for (int m = 0; m < rows; ++m) {
          const int64_t row = b + m, token = in_chunk * (b1 - b0) + row - b0;
          tile.start[m] = ahead ? ahead_of_task + ((v - v0) * per_vector + token) * kGates<T>
                                : packed[d].bias + v * kGates<T>;
          if (!ahead) tile.x[m] = at(a.x, s, t, row);
          tile.h[m] =
              row < rows_before ? at(a.y, s, before, row) + d * s.H : a.h0 + (d * s.B + row) * s.H;
        }
        lstm_tile(tile, rows, vectors, sums);
        for (int u = 0; u < vectors; ++u) {
          for (int m = 0; m < rows; ++m) {
            finish(d, t, b + m, v + u, sums + (u * rows + m) * kGates<T>);
          }
        }
        b += rows;
      }
      v += vectors;
    }
  }
};

template <class T>
void lstm_forward(const LstmForward<T>& a, const Threads& threads) {
  const LstmShape& s = a.shape;
  const int64_t vectors = ceil_div(s.H, kLanes<T>), width = kGates<T>;
  const LstmPlan plan = plan_lstm<T>(s, (s.I + s.H) * 4 * s.H, threads.count);
  const int64_t task_rows = plan.by_units ? s.B : min64(plan.chunk, s.B);
  const int64_t task_vectors = plan.by_units ? plan.chunk : vectors;
  // With rows for less than half a tile, input products are made for several steps together.
  constexpr int64_t kAhead = 4 * kRows;
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

// Rows of A, K wide, by `Panels` panels of columns, to `out` [Panels][Rows][Vectors][lanes].
template <class T, int Rows, int Vectors, int Panels>
FASTSEQ_TILE void rows_times_panels(int64_t K, const T* const* rows, const T* panel,
                                    int64_t panel_stride, T* out) {
  Vec<T> acc[Rows][Panels * Vectors] = {};
  multiply<T, Rows, Vectors, Panels>(K, RowsOfA<T>{rows}, panel, panel_stride, acc);
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
    const int64_t rows_after = initial ? (s.T ? s.B : 0) : rows_at(s, after);
    const int64_t count = max64((initial ? b1 : min64(b1, s.rows[t])) - b0, 0);
    const int64_t tiles = ceil_div(count, kRows);
    alignas(64) T sums[kRows * 2 * kPanel<T>];
    const int most = count ? int(ceil_div(count, tiles)) : 1;
    for (int64_t p = p0; p < p1;) {
      const int64_t column = p * kPanel<T>, columns = s.H - column;
      const int vectors = int(ceil_div(min64(kPanel<T>, columns), kLanes<T>));
      const int together = panels_together(most);
      const int panels = p + together <= p1 && columns >= together * kPanel<T> ? together : 1;
      int64_t b = b0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        const T* from[kRows];
        for (int m = 0; m < rows; ++m) {
          const int64_t row = b + m;
          const int64_t source = !initial ? after : d ? last_step(row) : 0;
          from[m] = row < rows_after ? dgates[d] + (s.first[source] + row) * 4 * s.H : zero;
        }
        multiply_rows(d, column, rows, vectors, panels, from, b < rows_after, sums);
        for (int j = 0; j < panels * vectors; ++j) {
          const int64_t unit = column + j * kLanes<T>;
          const T* sum = sums + ((j / vectors) * rows * vectors + j % vectors) * kLanes<T>;
          for (int m = 0; m < rows; ++m) {
            add_paths(d, t, b + m, unit, load(sum + m * vectors * kLanes<T>), initial,
                      b + m >= rows_after);
          }
        }
        b += rows;
      }
      p += panels;
    }
  }

  // dL/dh by way of the later step, of rows whose pre-activation gradients are `from`.
  void multiply_rows(int d, int64_t column, int rows, int vectors, int panels, const T* const* from,
                     bool any, T* sums) {
    const int64_t K = any ? 4 * a.shape.H : 0, stride = 4 * a.shape.H * kPanel<T>;
    const T* panel = packed[d] + column * 4 * a.shape.H;
    with_const<kRows>(rows, [&](auto n) {
      constexpr int kN = decltype(n)::value;
      constexpr int kTwo = 2 * kN <= kRows ? 2 : 1, kFour = kN == 1 ? 4 : kTwo;
      if (panels == 4) {
        rows_times_panels<T, kN, kPanelVectors, kFour>(K, from, panel, stride, sums);
      } else if (panels == 2) {
        rows_times_panels<T, kN, kPanelVectors, kTwo>(K, from, panel, stride, sums);
      } else if (vectors == kPanelVectors) {
        rows_times_panels<T, kN, kPanelVectors, 1>(K, from, panel, stride, sums);
      } else {
        rows_times_panels<T, kN, 1, 1>(K, from, panel, stride, sums);
      }
    });
  }

  // From dL/dh by way of the later step to all of it, and on to the cell, or to dh0 at the start.
  FASTSEQ_INLINE void add_paths(int d, int64_t t, int64_t b, int64_t unit, Vec<T> dh, bool initial,
                                bool last) {
    const LstmShape& s = a.shape;
    const int64_t state = (d * s.B + b) * s.H + unit;
    const int lanes = int(min64(kLanes<T>, s.H - unit));
    if (last && a.dh_n) dh += load(a.dh_n + state, lanes);
    if (initial) {
      store(a.dh0 + state, dh, lanes);
      return;
    }
    if (a.dy.base) dh += load(at(a.dy, s, t, b) + d * s.H + unit, lanes);
    finish(d, t, b, unit, dh);
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
