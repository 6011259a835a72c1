// The forward pass of an LSTM layer.
//
// For a vector of units and a few sequences, pre-activations = b + x_t W_ih^T + h W_hh^T are
// register tiles (the gates of a unit side by side, so that the cell's maths follows at once).
// Weights are packed for that, once a call.

// [4H, K] weights as panels of two gates, two panels a vector of units: [vectors of H][2][K][2]
// [lanes], units beyond H zero.
template <class T>
void pack_gates(const T* w, int64_t H, int64_t K, int64_t vector, T* out) {
  const int64_t unit = vector * kLanes<T>;
  const int lanes = int(min64(kLanes<T>, H - unit));
  for (int gate = 0; gate < 4; ++gate) {
    T* panel = out + (gate / 2) * K * kPanel<T> + (gate % 2) * kLanes<T>;
    const T* rows = w + (gate * H + unit) * K;
    for (int64_t k = 0; k < K; k += kLanes<T>) {
      const int wide = int(min64(kLanes<T>, K - k));
      Square<T> square;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) {
        square.row[i] = i < lanes ? load(rows + i * K + k, wide) : Vec<T>{};
      }
      square.transpose();
      for (int j = 0; j < wide; ++j) store(panel + (k + j) * kPanel<T>, square.row[j]);
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
  int order;  // of this tile among those that use the same panels
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
  const T* panel_x = tile.panel_x + First * stride_x;
  const T* panel_h = tile.panel_h + First * stride_h;
  multiply<T, Rows, kPanelVectors, Panels>(tile.x_width, RowsOfA<T>{tile.x}, panel_x, stride_x, acc,
                                           fetch_soon(panel_x, stride_x, tile.order));
  multiply<T, Rows, kPanelVectors, Panels>(tile.h_width, RowsOfA<T>{tile.h}, panel_h, stride_h, acc,
                                           fetch_soon(panel_h, stride_h, tile.order));
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
  const T* zero;  // H zeros
  // Input products computed ahead, where a step alone has too few rows to fill a tile: one buffer a
  // task, [vectors of the task][tokens ahead][4][lanes].
  int64_t ahead;  // steps; 0: not ahead
  T* buffer;
  int64_t buffer_size;  // elements a task

  const T* initial_h(int d, int64_t b) const {
    return a.h0 ? a.h0 + (d * a.shape.B + b) * a.shape.H : zero;
  }

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

  // The cell's maths for the pre-activations of one row (V a vector) or of two: V is Two, the
  // second being the next row or, `across`, the next vector of units.
  template <class V>
  FASTSEQ_INLINE void finish(int d, int64_t t, int64_t b, int64_t v, const T* sums, bool across) {
    const LstmShape& s = a.shape;
    const int64_t unit = v * kLanes<T>;
    const int lanes = int(min64(kLanes<T>, s.H - unit));
    cell::LstmGates<V> z;
    load_rows(z.i, sums, kGates<T>, kLanes<T>);
    load_rows(z.f, sums + kLanes<T>, kGates<T>, kLanes<T>);
    load_rows(z.g, sums + 2 * kLanes<T>, kGates<T>, kLanes<T>);
    load_rows(z.o, sums + 3 * kLanes<T>, kGates<T>, kLanes<T>);
    const int64_t next = across ? kLanes<T> : s.H, next_y = across ? kLanes<T> : a.y.row;
    T* state = a.c_n + (d * s.B + b) * s.H + unit;
    V c;
    load_rows(c, state, next, lanes);
    const V h = cell::lstm_forward(z, c);
    store_rows(state, c, next, lanes);
    store_rows(at(a.y, s, t, b) + d * s.H + unit, h, next_y, lanes);
    if (a.gates) {
      const int64_t token = d * s.tokens + s.first[t] + b, next_gates = across ? next : 4 * s.H;
      store_rows(a.cells + token * s.H + unit, c, next, lanes);
      T* gates = a.gates + token * 4 * s.H + unit;
      store_rows(gates, z.i, next_gates, lanes);
      store_rows(gates + s.H, z.f, next_gates, lanes);
      store_rows(gates + 2 * s.H, z.g, next_gates, lanes);
      store_rows(gates + 3 * s.H, z.o, next_gates, lanes);
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
          tile.h[m] = row < rows_before ? at(a.y, s, before, row) + d * s.H : initial_h(d, row);
        }
        tile.order = int(i);
        lstm_tile(tile, rows, vectors, sums);
        if (vectors == 2 && (v + 2) * kLanes<T> <= s.H) {
          finish<Two<T>>(d, t, b, v, sums, true);
        } else if (vectors == 2) {
          finish<Vec<T>>(d, t, b, v, sums, false);
          finish<Vec<T>>(d, t, b, v + 1, sums + kGates<T>, false);
        } else {
          int m = 0;
          for (; m + 1 < rows; m += 2) finish<Two<T>>(d, t, b + m, v, sums + m * kGates<T>, false);
          if (m < rows) finish<Vec<T>>(d, t, b + m, v, sums + m * kGates<T>, false);
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
  Scratch scratch(bytes(s.H) +
                  size_t(s.D) * (bytes(vectors * width) + bytes(vectors * s.I * width) +
                                 bytes(vectors * s.H * width) + plan.tasks * bytes(buffer_size)));
  T* zero = scratch.take<T>(s.H);
  for (int64_t u = 0; u < s.H; ++u) zero[u] = 0;
  LstmForwardLoop<T> loop{a, {}, zero, ahead, nullptr, int64_t(bytes(buffer_size) / sizeof(T))};
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
  for (int64_t i = 0; i < s.D * s.B * s.H; ++i) a.c_n[i] = a.c0 ? a.c0[i] : T(0);

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
      const T* from = last >= 0 ? at(a.y, s, last, b) + d * s.H : loop.initial_h(d, b);
      T* to = a.h_n + (d * s.B + b) * s.H;
      for (int64_t u = 0; u < s.H; ++u) to[u] = from[u];
    }
  }
}
