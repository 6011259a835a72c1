// The backward pass of such a cell: its part of BackwardLoop's step, from dL/dh of a row to the
// gradients of its two sums, which stand in the token's gradient row side by side.

// Sums over time of a row's gradients: those of the cell's parameters, then of the bias.
template <class Cell>
constexpr int kOverTime = cell::kNormalised<Cell> ? Cell::kParams + Cell::kGates : 0;

// A row in its stages. `dsums` holds dL/d(normalised sums) until the means are known.
template <class Cell, class T>
struct NormalisedRow {
  using V = Vec<T>;
  const BackwardRow<T>& row;
  const int64_t H;
  const T* params;
  T* over_time;  // [kOverTime][H] or null: nobody wants them

  V at(const T* base, int block, int64_t u, int lanes) const {
    return load(base + block * H + u, lanes);
  }
  void add(int block, int64_t u, V v, int lanes) const {
    T* sum = over_time + block * H + u;
    store(sum, load(sum, lanes) + v, lanes);
  }

  // dL/dv from d = dL/dn of normalised n: scale * (d - mean(d) - n * mean(d n)).
  void unnormalise(const Moments<T>& by, const T* values, T* d, int64_t n, V sum, V sum_n) const {
    const V mean = broadcast(sum_lanes<T>(sum) / T(n)),
            mean_n = broadcast(sum_lanes<T>(sum_n) / T(n));
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, n - i));
      const V normal = by.normalise(load(values + i, lanes));
      store(d + i, by.scale * (load(d + i, lanes) - fma(normal, mean_n, mean)), lanes);
    }
  }

  // dc: [2][H] scratch.
  void run(const T* dh, T* dc) const {
    T* dz_o = dc + H;
    const T* c = row.saved + Cell::kSavedC * H;
    const Moments<T> by_c = moments<Cell>(c, H);
    V sum{}, sum_n{};
    for (int64_t u = 0; u < H; u += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, H - u));
      const V nc = by_c.normalise(load(c + u, lanes));
      V dz, dgain, dbias, h;
      const V dn = Cell::output_backward(
          nc, at(row.saved, Cell::kSavedGates + 3, u, lanes), at(params, Cell::kGainC, u, lanes),
          at(params, Cell::kBiasC, u, lanes), load(dh + u, lanes), dz, dgain, dbias, h);
      store(dz_o + u, dz, lanes);
      store(dc + u, dn, lanes);
      if (row.hidden) store(row.hidden + u, h, lanes);
      if (over_time) {
        add(Cell::kGainC, u, dgain, lanes);
        add(Cell::kBiasC, u, dbias, lanes);
      }
      // Lanes beyond `lanes` add zero: there gains are zero, and so is what they multiply.
      sum += dn;
      sum_n += dn * nc;
    }
    unnormalise(by_c, c, dc, H, sum, sum_n);
    sums(dc, dz_o);
  }

  void sums(const T* dc, const T* dz_o) const {
    const T *x_sums = row.saved + Cell::kSavedX * H, *h_sums = row.saved + Cell::kSavedHidden * H;
    T *dx = row.dsums, *dh = row.dsums + Cell::kGates * H;
    const Moments<T> by_x = moments<Cell>(x_sums, 4 * H), by_h = moments<Cell>(h_sums, 4 * H);
    V sum_x{}, sum_xn{}, sum_h{}, sum_hn{};
    for (int64_t u = 0; u < H; u += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, H - u));
      V gate[3], dz[4], later = load(row.dc + u, lanes) + load(dc + u, lanes);
      for (int i = 0; i < 3; ++i) gate[i] = at(row.saved, Cell::kSavedGates + i, u, lanes);
      Cell::gates_backward(gate, load(row.c_prev + u, lanes), later, dz);
      store(row.dc_out + u, later, lanes);
      dz[3] = load(dz_o + u, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V nx = by_x.normalise(at(x_sums, i, u, lanes));
        const V nh = by_h.normalise(at(h_sums, i, u, lanes));
        const V d_nx = dz[i] * at(params, Cell::kGainX + i, u, lanes);
        const V d_nh = dz[i] * at(params, Cell::kGainH + i, u, lanes);
        store(dx + i * H + u, d_nx, lanes);
        store(dh + i * H + u, d_nh, lanes);
        sum_x += d_nx;
        sum_h += d_nh;
        sum_xn += d_nx * nx;
        sum_hn += d_nh * nh;
        if (!over_time) continue;
        add(Cell::kGainX + i, u, dz[i] * nx, lanes);
        add(Cell::kGainH + i, u, dz[i] * nh, lanes);
        add(Cell::kParams + i, u, dz[i], lanes);
      }
    }
    unnormalise(by_x, x_sums, dx, 4 * H, sum_x, sum_xn);
    unnormalise(by_h, h_sums, dh, 4 * H, sum_h, sum_hn);
  }
};

// The cells of step `step` back from the end, once dL/dh stands in loop.dh.
template <class Cell, class T>
void normalised_step(const BackwardLoop<Cell, T>& loop, int64_t step, const BackwardTask<T>& task) {
  const RecurrentShape& s = loop.a.shape;
  const Share& share = task.share;
  const int d = share.d;
  const int64_t t = loop.walk(d).time(s.T - 1 - step);
  const int64_t count = max64(min64(share.b1, s.rows[t]) - share.b0, 0);
  for (int64_t i = 0; i < count; ++i) {
    task.from[i] = loop.dh[d] + (s.first[t] + share.b0 + i) * s.P;
  }
  T *dc = task.row_scratch, *unprojected = dc + 2 * s.H;
  if (loop.projected()) {
    task.hr.each(0, task.hr.panels(), count, task.from,
                 [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
                   store(unprojected + i * s.H + column, sum, lanes);
                 });
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t state = d * s.B + s.sequence(share.b0 + i);
    T* over_time = loop.over_time ? loop.over_time + state * kOverTime<Cell> * s.H : nullptr;
    const NormalisedRow<Cell, T> row{task.rows[i], s.H, loop.a.weights[d].params, over_time};
    row.run(loop.projected() ? unprojected + i * s.H : task.from[i], dc);
  }
}
