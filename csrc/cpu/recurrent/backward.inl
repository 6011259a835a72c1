// The backward pass of a recurrent layer: memory, packing, the loop over steps, the deferred
// products.

template <class Cell, class T>
void recurrent_backward(const RecurrentBackward<T>& a, const Threads& threads) {
  using L = LayoutOf<Cell>;
  using Row = GradientRow<Cell>;
  const RecurrentShape& s = a.shape;
  const bool projected = a.weights[0].w_hr != nullptr, want_weights = a.dw_hh[0] != nullptr;
  const int64_t gates = L::kGates * s.H;
  BackwardLoop<Cell, T> loop{a,
                             Cell::kSaved * s.H + (projected ? s.P : 0),
                             // Rows a power of two apart would share the few lines of one set of
                             // the first-level cache.
                             ceil_div(Row::kBlocks * s.H, kLanes<T>) * kLanes<T> + kLanes<T>,
                             {},
                             {},
                             {},
                             nullptr,
                             nullptr,
                             nullptr,
                             false};
  const PanelProduct<T> by_hh{gates, s.P, nullptr, chain_over_gates(gates)};
  const PanelProduct<T> by_hr{s.P, s.H, nullptr};
  const int64_t panels = by_hh.panels(), hr_panels = projected ? by_hr.panels() : 0;
  constexpr bool kByRow = cell::kNormalised<Cell>;
  const int64_t leaves = leaves_of<Cell, T>(s, projected);
  const bool chunks = by_chunks<Cell, T>(s, projected);
  const Plan plan = kByRow   ? plan_normalised(s, gates * s.P, threads.count)
                    : chunks ? Plan{false, 1, s.B}
                    : leaves
                        ? plan_leaves(leaves, threads.count)
                        : plan_steps(s, gates * s.P, gates * s.P, panels, sizeof(T), threads.count);
  const int64_t tasks = plan.tasks * s.D;
  const int64_t task_rows = plan.by_units ? s.B
                            : plan.chunk  ? min64(plan.chunk, s.B)
                                          : ceil_div(s.B, plan.tasks);
  const bool own =
      !plan.by_units && tasks > s.D && !projected && gates * s.P * int64_t(sizeof(T)) <= kOwnCopy;

  DeferredByRows<Cell, T> by_rows(loop, leaves);
  BackwardTask<T>* task = nullptr;
  T* packed_hh = nullptr;
  T* packed_hr = nullptr;
  T* zero = nullptr;
  const T** pointers = nullptr;
  const int64_t zeros = max64(gates, max64(s.H, s.P));
  const int64_t over_time = s.D * s.B * kOverTime<Cell> * s.H;
  const int64_t hh_size = ceil_div(s.P, kLanes<T>) * kLanes<T> * gates;
  const Tiles by_tiles_hh = kByRow ? Tiles{} : tiles_of(a, min64(gates, s.P));
  const int64_t hr_size = projected ? ceil_div(s.H, kLanes<T>) * kLanes<T> * s.P : 0;
  auto lay_out = [&](auto& memory) {
    task = memory.template take<BackwardTask<T>>(size_t(tasks));
    packed_hh = memory.template take<T>(size_t((own ? tasks : s.D) * hh_size));
    packed_hr = memory.template take<T>(size_t(s.D * hr_size));
    zero = memory.template take<T>(size_t(zeros));
    loop.carry = Cell::kCarriesH ? memory.template take<T>(size_t(s.D * s.B * s.P)) : nullptr;
    for (int d = 0; d < s.D; ++d) {
      const bool hidden = projected || (Cell::kSavedH < 0 && want_weights);
      loop.dsums[d] = memory.template take<T>(size_t(s.tokens * loop.dsums_row));
      loop.hidden[d] = hidden ? memory.template take<T>(size_t(s.tokens * s.H)) : nullptr;
      loop.dh[d] = loop.in_two_phases() ? memory.template take<T>(size_t(s.tokens * s.P)) : nullptr;
    }
    const bool sums = kByRow && (want_weights || a.db_ih[0]);
    loop.over_time = sums ? memory.template take<T>(size_t(over_time)) : nullptr;
    TiledColumns tiled_w_hh[2] = {};
    for (int64_t i = 0; i < tasks; ++i) {
      BackwardTask<T> one{};
      one.share = share_of(plan, s, i, panels, hr_panels);
      one.hh = by_hh;
      one.hh.packed = packed_hh + (own ? i : i % s.D) * hh_size;
      one.hr = by_hr;
      one.hr.packed = packed_hr + (i % s.D) * hr_size;
      one.rows = memory.template take<BackwardRow<T>>(size_t(task_rows));
      one.from = memory.template take<const T*>(size_t(task_rows));
      if constexpr (kTiled<T>) {
        TiledColumns& columns = tiled_w_hh[i % s.D];
        if (own || i < s.D) {
          columns = TiledColumns::take(memory, by_tiles_hh, gates, kPanelVectors, panels);
        }
        one.tiled_w_hh = columns;
        one.tiled_from = TiledRows::take(memory, by_tiles_hh, gates, task_rows);
      }
      const int64_t scratch_rows = kByRow ? 2 + (projected ? task_rows : 0) : 0;
      one.row_scratch = memory.template take<T>(size_t(scratch_rows * s.H));
      if (task) task[i] = one;
    }
    if (leaves) {
      by_rows.lay_out(memory, tasks);
    } else {
      pointers = memory.template take<const T*>(size_t(deferred_pointers(s, gates)));
    }
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  for (int64_t i = 0; i < zeros; ++i) zero[i] = 0;
  loop.zero = zero;
  for (int64_t i = 0; loop.over_time && i < over_time; ++i) loop.over_time[i] = 0;

  const int64_t pieces = panels + hr_panels;
  auto pack = [&](int64_t copy, int64_t piece) {
    const RecurrentWeights<T>& w = a.weights[copy % s.D];
    if (piece < panels) {
      const int64_t column = piece * kPanel<T>;
      T* panel = packed_hh + copy * hh_size + column * gates;
      pack_columns(w.w_hh, gates, s.P, column, panel);
      if constexpr (kTiled<T>) {
        const int wide = by_hh.vectors(piece);
        task[copy].tiled_w_hh.fill(piece, panel, wide, wide);
      }
    } else {
      const int64_t column = (piece - panels) * kPanel<T>;
      pack_columns(w.w_hr, s.P, s.H, column, packed_hr + copy * hr_size + column * s.P);
    }
  };
  if (!own) {
    const bool worth = tasks > 1 && gates * s.P > (1 << 16);
    run_tasks(worth ? threads : Threads{1, nullptr}, s.D * pieces,
              [&](int64_t i) { pack(i / pieces, i % pieces); });
  }
  // By whoever goes on with it: what one core has written costs another as much as a step to fetch.
  auto start = [&](const Share& share) {
    for (int64_t b = share.b0; Cell::kStates == 2 && b < share.b1; ++b) {
      const int64_t state = (share.d * s.B + s.sequence(b)) * s.H;
      for (int64_t u = 0; u < s.H; ++u) a.dc0[state + u] = a.dc_n ? a.dc_n[state + u] : T(0);
    }
  };
  for (int64_t d = 0; plan.by_units && d < s.D; ++d) start({int(d), 0, s.B, 0, 0, 0, 0});

  const int phases = loop.in_two_phases() ? 2 : 1;
  // The step before the first, for dL/dh0, has no cells.
  const int64_t steps = s.T * phases + (a.dh0 ? 1 : 0);
  if (chunks) {
    for (int64_t d = 0; d < s.D; ++d) start(task[d].share);
    backward_by_chunks(loop, pointers, threads,
                       [&](int64_t d, int64_t step) { loop.by_hh(step, task[d]); });
    return;
  }
  run_steps(plan, tasks, steps, phases, threads, [&](int64_t i, int64_t step, int phase) {
    for (int64_t piece = 0; own && step == 0 && piece < pieces; ++piece) pack(i, piece);
    if (!plan.by_units && step == 0 && phase == 0) start(task[i].share);
    if (leaves) {
      const int64_t from = i * leaves / tasks, to = (i + 1) * leaves / tasks;
      if (step == 0) by_rows.prepare(i, from, to);
      loop.by_hh(step, task[i]);
      if (step > 0) by_rows.step(i, from, to, step - 1);
      if (step == s.T - 1 && !a.dh0) by_rows.step(i, from, to, step);
    } else if (phase == 0) {
      loop.by_hh(step, task[i]);
    } else if constexpr (kByRow) {
      normalised_step(loop, step, task[i]);
    } else {
      loop.by_hr(step, task[i]);
    }
  });
  if (!leaves) {
    recurrent_deferred(loop, pointers, threads);
    return;
  }
  run_tasks(threads, tasks, [&](int64_t i) {
    const int64_t vectors = by_rows.ld / kLanes<T>;
    by_rows.finish(i * vectors / tasks * kLanes<T>, (i + 1) * vectors / tasks * kLanes<T>);
    if (i == 0) by_rows.finish_sums();
  });
}
