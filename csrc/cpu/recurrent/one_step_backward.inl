// The backward pass of a single step: the cells' maths alone; dL/dh0 is a product like
// that of dL/dx, and W_hh is read where it lies.

template <class Cell, class T>
void one_step_backward(const RecurrentBackward<T>& a, const Threads& threads) {
  using L = LayoutOf<Cell>;
  using Row = GradientRow<Cell>;
  const RecurrentShape& s = a.shape;
  const int64_t gates = L::kGates * s.H, states = s.D * s.B * s.H;
  BackwardLoop<Cell, T> loop{a,
                             Cell::kSaved * s.H,
                             ceil_div(Row::kBlocks * s.H, kLanes<T>) * kLanes<T> + kLanes<T>,
                             {},
                             {},
                             {},
                             nullptr,
                             nullptr,
                             nullptr,
                             a.dh0 != nullptr};
  constexpr int64_t kWorthSharing = int64_t(1) << 12;
  const int64_t each = states < kWorthSharing ? 1 : ceil_div(threads.count, s.D);
  const int64_t chunk = ceil_div(s.B, each);
  const Plan plan{false, int(ceil_div(s.B, chunk)), chunk};
  const int64_t tasks = plan.tasks * s.D;
  BackwardTask<T>* task = nullptr;
  T* zero = nullptr;
  const T** pointers = nullptr;
  auto lay_out = [&](auto& memory) {
    task = memory.template take<BackwardTask<T>>(size_t(tasks));
    zero = memory.template take<T>(size_t(max64(s.H, kLanes<T>)));
    loop.carry = Cell::kCarriesH ? memory.template take<T>(size_t(states)) : nullptr;
    for (int d = 0; d < s.D; ++d) {
      loop.dsums[d] = memory.template take<T>(size_t(s.tokens * loop.dsums_row));
    }
    for (int64_t i = 0; i < tasks; ++i) {
      BackwardTask<T> one{};
      one.share = share_of(plan, s, i, 0, 0);
      one.rows = memory.template take<BackwardRow<T>>(size_t(chunk));
      one.from = memory.template take<const T*>(size_t(chunk));
      if (task) task[i] = one;
    }
    pointers = memory.template take<const T*>(size_t(deferred_pointers(s, gates)));
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  for (int64_t i = 0; i < max64(s.H, kLanes<T>); ++i) zero[i] = 0;
  loop.zero = zero;
  for (int64_t i = 0; Cell::kStates == 2 && i < states; ++i) a.dc0[i] = a.dc_n ? a.dc_n[i] : T(0);

  const int vectors = int(ceil_div(s.H, kLanes<T>));
  run_tasks(threads, tasks, [&](int64_t i) {
    BackwardTask<T>& mine = task[i];
    const int d = mine.share.d;
    const T* params = a.weights[d].params;
    int64_t count = loop.prepare(mine.share, 0, false, mine);
    loop.finish_tile(mine.rows, int(count), 0, vectors, params, true,
                     [&](int, int) { return zero; });
    if (!a.dh0) return;
    // What reaches h0 by other paths than W_hh.
    count = loop.prepare(mine.share, d ? s.T : -1, true, mine);
    for (int64_t m = 0; m < count; ++m) {
      for (int v = 0; v < vectors; ++v) {
        const int lanes = int(min64(kLanes<T>, s.H - v * kLanes<T>));
        loop.store_initial(mine.rows[m], d, mine.share.b0 + m, v * kLanes<T>, lanes, Vec<T>{});
      }
    }
  });
  recurrent_deferred(loop, pointers, threads);

  // Where a reset stands, nothing reaches h0.
  for (int d = 0; a.dh0 && d < s.D; ++d) {
    for (int64_t b = 0; b < s.rows[0]; ++b) {
      if (!loop.walk(d).cut(a.resets, 0, b)) continue;
      T* dh0 = a.dh0 + (d * s.B + s.sequence(b)) * s.P;
      for (int64_t u = 0; u < s.P; ++u) dh0[u] = 0;
    }
  }
}
