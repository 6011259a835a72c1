// Layers of a cell that normalises over all units of a row (cell/layer_norm_lstm.h): a step makes
// the products of a row, then takes statistics, then runs the cell. Work is split by sequences
// only. What both passes share, and the forward pass.

template <class T>
FASTSEQ_INLINE T sum_lanes(Vec<T> v) {
  alignas(64) T lane[kLanes<T>];
  store(lane, v);
  for (int wide = kLanes<T> / 2; wide > 0; wide /= 2) {
    for (int i = 0; i < wide; ++i) lane[i] += lane[i + wide];
  }
  return lane[0];
}

// What a row is normalised by: (v - mean) * scale.
template <class T>
struct Moments {
  Vec<T> mean, scale;
  FASTSEQ_INLINE Vec<T> normalise(Vec<T> v) const { return (v - mean) * scale; }
};

// f(vector) summed over a row of n elements. Lanes past the last hold `beyond`, of which f must
// make zero.
template <class T, class F>
FASTSEQ_INLINE T sum_row(const T* row, int64_t n, Vec<T> beyond, const F& f) {
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] += f(load(row + i + v * kLanes<T>));
  }
  for (; i < n; i += kLanes<T>) {
    alignas(64) T last[kLanes<T>];
    store(last, beyond);
    const int lanes = int(min64(kLanes<T>, n - i));
    store(last, load(row + i, lanes), lanes);
    sums[0] += f(load(last));
  }
  return sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class Cell, class T>
FASTSEQ_INLINE Moments<T> moments(const T* row, int64_t n) {
  const T mean = sum_row<T>(row, n, Vec<T>{}, [](Vec<T> v) { return v; }) / T(n);
  const Vec<T> means = broadcast(mean);
  const T squares = sum_row<T>(row, n, means, [&](Vec<T> v) { return (v - means) * (v - means); });
  if (__builtin_expect(__builtin_isinf(squares), 0)) {
    // Once more in smaller units, where epsilon is nothing.
    constexpr T kUnit = T(sizeof(T) == sizeof(float) ? 0x1p-80 : 0x1p-600);
    const T small = sum_row<T>(
        row, n, means, [&](Vec<T> v) { return (v - means) * kUnit * ((v - means) * kUnit); });
    return {means, broadcast(kUnit / T(__builtin_sqrt(small / T(n))))};
  }
  return {means, broadcast(T(1) / T(__builtin_sqrt(squares / T(n) + T(Cell::kEpsilon))))};
}

// Rows, each its own sequence's: more threads than sequences have nothing to do.
inline Plan plan_normalised(const RecurrentShape& s, int64_t all, int threads) {
  constexpr int64_t kWorthSharing = int64_t(1) << 16;
  const int64_t each = all * s.tokens * s.D < kWorthSharing ? 1 : ceil_div(threads, s.D);
  const int64_t chunk = max64(1, ceil_div(s.B, max64(1, min64(each, s.B))));
  return {false, int(max64(1, ceil_div(s.B, chunk))), chunk};
}

template <class T>
struct NormalisedTask {
  Share share;
  const T** from;  // [tokens ahead]
  T** to;          // [tokens ahead]
  T* x_sums;       // [tokens ahead][4H]; null: they go to `saved`
  T* h_sums;       // [rows][4H]; the same
  T* hidden;       // [rows][H] or null: h is not projected
};

template <class Cell, class T>
struct NormalisedForward {
  const RecurrentForward<T>& a;
  int64_t saved_row;
  int64_t ahead;  // steps whose input products are made together
  const T* zero;
  const T* bias[2];  // [4H]
  PanelProduct<T> by_x[2], by_h[2], by_hr[2];

  Walk walk(int d) const { return {a.shape, d == 1}; }
  int64_t rows_of(const Share& share, int64_t t) const {
    return max64(min64(share.b1, a.shape.rows[t]) - share.b0, 0);
  }
  T* saved(const Share& share, int64_t t, int64_t b) const {
    return a.saved + (share.d * a.shape.tokens + a.shape.first[t] + b) * saved_row;
  }

  static void multiply(const PanelProduct<T>& product, int64_t count,
                       const NormalisedTask<T>& task) {
    product.each(0, product.panels(), count, task.from,
                 [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
                   store(task.to[i] + column, sum, lanes);
                 });
  }

  // x W_ih^T of the steps [step, step + ahead).
  void multiply_x(int64_t step, const NormalisedTask<T>& task) const {
    const RecurrentShape& s = a.shape;
    const Share& share = task.share;
    int64_t count = 0;
    for (int64_t i = step; i < min64(step + ahead, s.T); ++i) {
      const int64_t t = walk(share.d).time(i), rows = rows_of(share, t);
      for (int64_t b = share.b0; b < share.b0 + rows; ++b, ++count) {
        task.from[count] = a.x.at(s, t, b);
        task.to[count] = x_sums(share, t, b, i - step, task);
      }
    }
    multiply(by_x[share.d], count, task);
  }
  T* x_sums(const Share& share, int64_t t, int64_t b, int64_t in_chunk,
            const NormalisedTask<T>& task) const {
    const int64_t H = a.shape.H;
    if (a.saved) return saved(share, t, b) + Cell::kSavedX * H;
    return task.x_sums + (in_chunk * (share.b1 - share.b0) + b - share.b0) * Cell::kGates * H;
  }

  void run(int64_t step, const NormalisedTask<T>& task) const {
    const RecurrentShape& s = a.shape;
    const Share& share = task.share;
    const int d = share.d;
    const Walk w = walk(d);
    const int64_t t = w.time(step), count = rows_of(share, t), gates = Cell::kGates * s.H;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = share.b0 + i;
      task.from[i] = w.cut(a.resets, t, b) ? zero
                     : w.follows(t, b)     ? a.y.at(s, w.before(t), b) + d * s.P
                     : a.h0                ? a.h0 + (d * s.B + s.sequence(b)) * s.P
                                           : zero;
      task.to[i] =
          a.saved ? saved(share, t, b) + Cell::kSavedHidden * s.H : task.h_sums + i * gates;
    }
    multiply(by_h[d], count, task);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = share.b0 + i;
      T* out = task.hidden ? task.hidden + i * s.H : a.y.at(s, t, b) + d * s.P;
      cell(task, t, b, x_sums(share, t, b, step % ahead, task), task.to[i], out);
    }
    if (!task.hidden) return;
    for (int64_t i = 0; i < count; ++i) {
      task.from[i] = task.hidden + i * s.H;
      task.to[i] = a.y.at(s, t, share.b0 + i) + d * s.P;
    }
    multiply(by_hr[d], count, task);
    for (int64_t i = 0; i < count && a.saved; ++i) {
      T* copy = saved(share, t, share.b0 + i) + Cell::kSaved * s.H;
      for (int64_t u = 0; u < s.P; ++u) copy[u] = task.to[i][u];
    }
  }

  void cell(const NormalisedTask<T>& task, int64_t t, int64_t b, const T* x_sums, const T* h_sums,
            T* out) const {
    using V = Vec<T>;
    const RecurrentShape& s = a.shape;
    const int64_t H = s.H;
    const int d = task.share.d;
    const T* params = a.weights[d].params;
    T* c = a.c_n + (d * s.B + s.sequence(b)) * H;
    const T* c_prev = walk(d).cut(a.resets, t, b) ? zero : c;
    T* kept = a.saved ? saved(task.share, t, b) : nullptr;
    const Moments<T> by_x = moments<Cell>(x_sums, 4 * H), by_h = moments<Cell>(h_sums, 4 * H);
    for (int64_t u = 0; u < H; u += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, H - u));
      V nx[4], nh[4], z[4], gate[4], param[8], cell = load(c_prev + u, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        nx[i] = by_x.normalise(load(x_sums + i * H + u, lanes));
        nh[i] = by_h.normalise(load(h_sums + i * H + u, lanes));
        z[i] = load(bias[d] + i * H + u, lanes);
        param[Cell::kGainX + i] = load(params + (Cell::kGainX + i) * H + u, lanes);
        param[Cell::kGainH + i] = load(params + (Cell::kGainH + i) * H + u, lanes);
      }
      Cell::gates(nx, nh, z, param, gate, cell);
      store(c + u, cell, lanes);
      // Where h will be: the output gate, until c is normalised.
      store(out + u, gate[3], lanes);
      if (!kept) continue;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(kept + (Cell::kSavedGates + i) * H + u, gate[i], lanes);
      store(kept + Cell::kSavedC * H + u, cell, lanes);
    }
    const Moments<T> by_c = moments<Cell>(c, H);
    for (int64_t u = 0; u < H; u += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, H - u));
      const V gain = load(params + Cell::kGainC * H + u, lanes);
      const V shift = load(params + Cell::kBiasC * H + u, lanes);
      const V nc = by_c.normalise(load(c + u, lanes));
      store(out + u, Cell::output(nc, load(out + u, lanes), gain, shift), lanes);
    }
  }
};

template <class Cell, class T>
void normalised_forward(const RecurrentForward<T>& a, const Threads& threads) {
  const RecurrentShape& s = a.shape;
  const bool projected = a.weights[0].w_hr != nullptr;
  const int64_t gates = Cell::kGates * s.H, gate_panels = ceil_div(gates, kPanel<T>);
  const int64_t hr_panels = projected ? ceil_div(s.P, kPanel<T>) : 0;
  const Plan plan = plan_normalised(s, gates * (s.I + s.P), threads.count);
  const int64_t tasks = plan.tasks * s.D, rows = min64(plan.chunk, s.B);
  // Input products of so many tokens read each panel of weights once.
  constexpr int64_t kAhead = 16 * kRows;
  NormalisedForward<Cell, T> loop{
      a, Cell::kSaved * s.H + (projected ? s.P : 0), 0, nullptr, {}, {}, {}, {}};
  loop.ahead = max64(1, min64(s.T, kAhead / max64(rows, 1)));
  NormalisedTask<T>* task = nullptr;
  T *zero = nullptr, *packed[2][3] = {}, *bias[2] = {};
  auto lay_out = [&](auto& memory) {
    task = memory.template take<NormalisedTask<T>>(size_t(tasks));
    zero = memory.template take<T>(size_t(max64(s.H, s.P)));
    for (int d = 0; d < s.D; ++d) {
      bias[d] = memory.template take<T>(size_t(gates));
      packed[d][0] = memory.template take<T>(size_t(gate_panels * kPanel<T> * s.I));
      packed[d][1] = memory.template take<T>(size_t(gate_panels * kPanel<T> * s.P));
      packed[d][2] = memory.template take<T>(size_t(hr_panels * kPanel<T> * s.H));
    }
    for (int64_t i = 0; i < tasks; ++i) {
      NormalisedTask<T> one{};
      one.share = share_of(plan, s, i, 0, 0);
      one.from = memory.template take<const T*>(size_t(loop.ahead * rows));
      one.to = memory.template take<T*>(size_t(loop.ahead * rows));
      one.x_sums = memory.template take<T>(size_t(a.saved ? 0 : loop.ahead * rows * gates));
      one.h_sums = memory.template take<T>(size_t(a.saved ? 0 : rows * gates));
      one.hidden = projected ? memory.template take<T>(size_t(rows * s.H)) : nullptr;
      if (task) task[i] = one;
    }
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  for (int64_t u = 0; u < max64(s.H, s.P); ++u) zero[u] = 0;
  loop.zero = zero;
  for (int d = 0; d < s.D; ++d) {
    const RecurrentWeights<T>& w = a.weights[d];
    for (int64_t i = 0; i < gates; ++i) {
      bias[d][i] = (w.b_ih ? w.b_ih[i] : T(0)) + (w.b_hh ? w.b_hh[i] : T(0));
    }
    loop.bias[d] = bias[d];
    // Normalising magnifies the errors of sums that are small or nearly equal.
    constexpr int64_t kShort = 32;
    loop.by_x[d] = {s.I, gates, packed[d][0], kShort};
    loop.by_h[d] = {s.P, gates, packed[d][1], kShort};
    loop.by_hr[d] = {s.H, s.P, packed[d][2]};
  }
  run_tasks(tasks > 1 ? threads : Threads{1, nullptr}, s.D * (gate_panels + hr_panels),
            [&](int64_t i) {
              const int d = int(i % s.D);
              const int64_t panel = i / s.D, hr_panel = panel - gate_panels;
              const RecurrentWeights<T>& w = a.weights[d];
              if (hr_panel >= 0) {
                pack_rows(w.w_hr, s.P, s.H, hr_panel, packed[d][2] + hr_panel * kPanel<T> * s.H);
                return;
              }
              pack_rows(w.w_ih, gates, s.I, panel, packed[d][0] + panel * kPanel<T> * s.I);
              pack_rows(w.w_hh, gates, s.P, panel, packed[d][1] + panel * kPanel<T> * s.P);
            });
  for (int64_t i = 0; i < s.D * s.B * s.H; ++i) a.c_n[i] = a.c0 ? a.c0[i] : T(0);
  run_tasks(threads, tasks, [&](int64_t i) {
    for (int64_t step = 0; step < s.T; ++step) {
      if (step % loop.ahead == 0) loop.multiply_x(step, task[i]);
      loop.run(step, task[i]);
    }
  });
  final_states(a, zero);
}
