// The forward pass of a recurrent layer.
//
// For a group of units and a few sequences, the sums b + x_t W_ih^T + h W_hh^T are register tiles
// (the gates of a unit side by side, so that the cell's maths follows at once).

// What a step needs to know of a row.
template <class T>
struct ForwardRow {
  const T* h;  // of the step before
  const T* c;
  T* c_out;
  T* out;  // h, or what is to be projected to it
  T* y;
  T* saved;  // or null
  const T* masks[kMostMasks];
  // Where zoneout follows a projection: the h kept from, and its mask.
  const T* kept_h;
  const T* keep;
};

// One task: its share of the work, and its memory.
template <class T>
struct ForwardTask {
  Share share;
  ForwardRow<T>* rows;
  const T** x;
  const T** h;
  const T** start;
  T* ahead;  // input products of several steps, [groups][tokens][kOut][lanes]
  PackedForward<T> packed;
  TiledRows tiled_x, tiled_h;
};

template <class Cell, class T>
struct ForwardLoop {
  using L = LayoutOf<Cell>;
  static constexpr int kRowOut = L::kOut * kLanes<T>;

  const RecurrentForward<T>& a;
  int64_t saved_row;
  const T* zero;   // max(H, P) zeros
  bool streams;    // `saved` goes past the caches
  T* unprojected;  // [D, B, H], or null: h is not projected
  int64_t ahead;   // steps; 0: input products are made step by step

  Walk walk(int d) const { return {a.shape, d == 1}; }
  const T* initial_h(int d, int64_t b) const {
    return a.h0 ? a.h0 + (d * a.shape.B + a.shape.sequence(b)) * a.shape.P : zero;
  }

  // Input products of the steps [s0, s1), for all groups of a share.
  void multiply_ahead(const Share& share, int64_t s0, int64_t s1, const PackedForward<T>& packed,
                      T* out) {
    const RecurrentShape& s = a.shape;
    const int64_t wide = share.b1 - share.b0, tokens = (s1 - s0) * wide;
    alignas(64) T sums[L::kRows * kRowOut];
    const T *x[L::kRows], *start[L::kRows];
    T* target[L::kRows];
    SumsTile<T> tile{start, x, x, 0, nullptr, nullptr, s.I, 0, 2, false};
    for (int64_t g = share.g0; g < share.g1; ++g) {
      tile.panel_x = tile.panel_h = packed.x + g * s.I * L::kColumns * kLanes<T>;
      const T* bias = packed.bias + g * kRowOut;
      int rows = 0;
      auto flush = [&] {
        const bool together = target[rows - 1] - target[0] == (rows - 1) * kRowOut;
        sums_tile<L>(tile, rows, 1, together ? target[0] : sums);
        for (int m = 0; m < rows && !together; ++m) {
          for (int i = 0; i < kRowOut; i += kLanes<T>) {
            store(target[m] + i, load(sums + m * kRowOut + i));
          }
        }
        rows = 0;
      };
      for (int64_t step = s0; step < s1; ++step) {
        const int64_t t = walk(share.d).time(step);
        for (int64_t b = share.b0; b < min64(share.b1, s.rows[t]); ++b) {
          start[rows] = bias;
          x[rows] = a.x.at(s, t, b);
          target[rows] =
              out + ((g - share.g0) * tokens + (step - s0) * wide + b - share.b0) * kRowOut;
          if (++rows == L::kRows) flush();
        }
      }
      if (rows) flush();
    }
  }

  // Fills in the rows of a step; returns how many there are.
  int64_t prepare(const Share& share, int64_t t, ForwardTask<T>& task) {
    const RecurrentShape& s = a.shape;
    const Walk w = walk(share.d);
    const int64_t before = w.before(t), count = max64(min64(share.b1, s.rows[t]) - share.b0, 0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = share.b0 + i, state = share.d * s.B + s.sequence(b);
      ForwardRow<T>& row = task.rows[i];
      const bool cut = w.cut(a.resets, t, b);
      row.h = cut               ? zero
              : w.follows(t, b) ? a.y.at(s, before, b) + share.d * s.P
                                : initial_h(share.d, b);
      row.y = a.y.at(s, t, b) + share.d * s.P;
      row.out = unprojected ? unprojected + state * s.H : row.y;
      if constexpr (Cell::kStates == 2) {
        row.c_out = a.c_n + state * s.H;
        row.c = cut ? zero : row.c_out;
      }
      row.saved = a.saved ? a.saved + (share.d * s.tokens + s.first[t] + b) * saved_row : nullptr;
      for (int i_mask = 0; i_mask < Cell::kMasks; ++i_mask) {
        row.masks[i_mask] = a.masks[share.d][i_mask].at(s, t, b);
      }
      task.h[i] = row.h;
      if constexpr (Cell::kMasks > 0) {
        // The cell itself keeps nothing of h then.
        if (unprojected) {
          row.kept_h = row.h;
          row.keep = row.masks[0];
          row.h = row.masks[0] = zero;
        }
      }
      if (!ahead) task.x[i] = a.x.at(s, t, b);
    }
    return count;
  }

  // The cell's maths for N vectors of units; sums(i): of the i-th, [kSums][kUnits][lanes].
  template <int N, class Sums>
  FASTSEQ_INLINE void finish(const Together<ForwardRow<T>>& at, int lanes, const T* params,
                             const Sums& sums) {
    using V = Several<T, N>;
    const int64_t H = a.shape.H;
    V z[L::kSums], c{}, h{}, mask[kMostMasks], param[Cell::kParams + 1], saved[Cell::kSaved];
#pragma GCC unroll 4
    for (int i = 0; i < L::kSums; ++i) {
      load_each(z[i], kLanes<T>, [&](int j) { return sums(j) + i * L::kUnits * kLanes<T>; });
    }
    if constexpr (Cell::kReadsH) load_each(h, lanes, [&](int j) { return at.of(at.row(j).h, j); });
    if constexpr (Cell::kStates == 2) {
      load_each(c, lanes, [&](int j) { return at.of(at.row(j).c, j); });
    }
    for (int i = 0; i < Cell::kMasks; ++i) {
      load_each(mask[i], lanes, [&](int j) { return at.of(at.row(j).masks[i], j); });
    }
    for (int i = 0; i < Cell::kParams; ++i) {
      load_each(param[i], lanes, [&](int j) { return at.of(params + i * H, j); });
    }
    h = Cell::forward(z, h, c, param, mask, saved);
    if constexpr (Cell::kStates == 2) {
      store_each(c, lanes, [&](int j) { return at.of(at.row(j).c_out, j); });
    }
    store_each(h, lanes, [&](int j) { return at.of(at.row(j).out, j); });
    if (at.first->saved) {
#pragma GCC unroll 8
      for (int i = 0; i < Cell::kSaved; ++i) {
        const auto to = [&](int j) { return at.of(at.row(j).saved + i * H, j); };
        if (kStreams && streams) {
#pragma GCC unroll 8
          for (int j = 0; j < N; ++j) stream(to(j), saved[i].part[j]);
        } else {
          store_each(saved[i], lanes, to);
        }
      }
    }
  }

  // The cells of one step.
  void cells(int64_t step, int64_t in_chunk, ForwardTask<T>& task) {
    const RecurrentShape& s = a.shape;
    const Share& share = task.share;
    const int64_t t = walk(share.d).time(step), wide = share.b1 - share.b0;
    const int64_t count = prepare(share, t, task);
    const int64_t tokens = min64(ahead, s.T - (step - in_chunk)) * wide;
    const T* params = a.weights[share.d].params;
    // Few rows take several groups, up to eight rows' worth in all.
    alignas(64) T sums[(L::kRows + 8) * kRowOut];
    SumsTile<T> tile{task.start, task.x,       task.h,          (ahead ? tokens : 1) * kRowOut,
                     nullptr,    nullptr,      ahead ? 0 : s.I, s.P,
                     0,          step % 2 == 1};
    static_assert(!kTiled<T> || L::kRows + 8 >= kTileRows, "sums of a tile of rows");
    const bool tiled = kTiled<T> && (task.tiled_x.by.multiply || task.tiled_h.by.multiply);
    // Tiles of even height: 32 rows are 11 + 11 + 10, not 12 + 12 + 8.
    const int64_t tiles = ceil_div(count, tiled ? kTileRows : L::kRows);
    const int64_t quads = ceil_div(count, kTogether);
    const auto end_of = [&](int64_t i) {
      return min64(count, quads * (i + 1) / tiles * kTogether);
    };
    if constexpr (kTiled<T>) {
      for (int64_t i = 0, b = 0; tiled && i < tiles; b = end_of(i++)) {
        task.tiled_x.fill(i, task.x + b, int(end_of(i) - b));
        task.tiled_h.fill(i, task.h + b, int(end_of(i) - b));
      }
    }
    const int most = tiles == 1 && !tiled ? L::groups(int(count)) : 1;
    const int64_t whole = (share.g1 - share.g0) / most;
    const int64_t pieces = whole + (share.g1 - share.g0) % most;
    for (int64_t i_piece = 0; i_piece < pieces; ++i_piece) {
      // To and fro: what the last step read last may still be in a near cache.
      const int64_t piece = tile.back ? pieces - 1 - i_piece : i_piece;
      const int groups = piece < whole ? most : 1;
      const int64_t g = share.g0 + (piece < whole ? piece * most : whole * most + piece - whole);
      tile.panel_x = task.packed.x + g * s.I * L::kColumns * kLanes<T>;
      tile.panel_h = task.packed.h + g * s.P * L::kColumns * kLanes<T>;
      const T* start = ahead ? task.ahead + ((g - share.g0) * tokens + in_chunk * wide) * kRowOut
                             : task.packed.bias + g * kRowOut;
      for (int64_t i = 0; i < count; ++i) task.start[i] = start + (ahead ? i * kRowOut : 0);
      // Another core may have made those of the step after next: too far to wait for them then.
      for (int i = 0; ahead && i < groups; ++i) {
        const T* soon = start + (i * tokens + 2 * wide) * kRowOut;
        for (int64_t j = 0; j < wide * kRowOut; j += kLanes<T>) __builtin_prefetch(soon + j);
      }
      int64_t b = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int(end_of(i) - b);
        tile.start = task.start + b;
        tile.x = task.x + b;
        tile.h = task.h + b;
        tile.order = int(i);
        if (!tiled) sums_tile<L>(tile, rows, groups, sums);
        if constexpr (kTiled<T>) {
          if (tiled) {
            sums_by_tiles<L>(tile, i, rows, task.tiled_x, task.packed.tiled_x.group(g),
                             task.tiled_h, task.packed.tiled_h.group(g), sums);
          }
        }
        finish_tile(g, groups, rows, params, task.rows + b, sums);
        b += rows;
      }
    }
    if (streams) end_streams();
  }

  // The cells of one tile: `rows` rows by `groups` groups from g on.
  FASTSEQ_INLINE void finish_tile(int64_t g, int groups, int rows, const T* params,
                                  const ForwardRow<T>* row, const T* sums) {
    const int64_t H = a.shape.H;
    auto sums_of = [&](int m, int j) {
      return sums + ((j / L::kUnits) * rows + m) * kRowOut + (j % L::kUnits) * kLanes<T>;
    };
    const int64_t unit = g * L::kUnits * kLanes<T>;
    if (rows == 1) {
      const int whole = int(min64(groups * L::kUnits, (H - unit) / kLanes<T>));
      several_at_a_time<kTogether>(whole, [&](auto n, int j) {
        const Together<ForwardRow<T>> at{row, unit + j * kLanes<T>, true};
        finish<decltype(n)::value>(at, kLanes<T>, params, [&](int i) { return sums_of(0, j + i); });
      });
      if (whole < groups * L::kUnits && unit + whole * kLanes<T> < H) {
        const Together<ForwardRow<T>> at{row, unit + whole * kLanes<T>, true};
        finish<1>(at, int(H - at.unit), params, [&](int) { return sums_of(0, whole); });
      }
      return;
    }
    for (int j = 0; j < groups * L::kUnits && unit + j * kLanes<T> < H; ++j) {
      const int lanes = int(min64(kLanes<T>, H - unit - j * kLanes<T>));
      several_at_a_time<kTogether>(rows, [&](auto n, int m) {
        const Together<ForwardRow<T>> at{row + m, unit + j * kLanes<T>, false};
        finish<decltype(n)::value>(at, lanes, params, [&](int i) { return sums_of(m + i, j); });
      });
    }
  }

  // h from what cells() left, for columns of a share of the projection's panels.
  void project(int64_t step, ForwardTask<T>& task) {
    const RecurrentShape& s = a.shape;
    const Share& share = task.share;
    const int64_t t = walk(share.d).time(step);
    const int64_t count = max64(min64(share.b1, s.rows[t]) - share.b0, 0);
    for (int64_t i = 0; i < count; ++i) task.h[i] = task.rows[i].out;
    const PanelProduct<T> product{s.H, s.P, task.packed.hr};
    product.each(
        share.p0, share.p1, count, task.h, [&](int64_t i, int64_t column, Vec<T> h, int lanes) {
          const ForwardRow<T>& row = task.rows[i];
          if constexpr (Cell::kMasks > 0) {
            h = Cell::mix(load(row.keep + column, lanes), load(row.kept_h + column, lanes), h);
          }
          store(row.y + column, h, lanes);
          if (row.saved) store(row.saved + Cell::kSaved * s.H + column, h, lanes);
        });
  }
};

// h_n, and zeros for the states that a reset cuts off.
template <class T>
void final_states(const RecurrentForward<T>& a, const T* zero) {
  const RecurrentShape& s = a.shape;
  for (int d = 0; d < s.D; ++d) {
    const Walk walk{s, d == 1};
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t last = walk.last(b), state = d * s.B + s.sequence(b);
      const bool cut = walk.cut_at_end(a.resets, b);
      const T* initial = a.h0 ? a.h0 + state * s.P : zero;
      const T* from = cut ? zero : last >= 0 ? a.y.at(s, last, b) + d * s.P : initial;
      for (int64_t u = 0; u < s.P && from != a.h_n + state * s.P; ++u) {
        a.h_n[state * s.P + u] = from[u];
      }
      for (int64_t u = 0; u < s.H && cut && a.c_n; ++u) a.c_n[state * s.H + u] = 0;
    }
  }
}

// What a call saves goes past the caches where they would not hold it until the backward pass:
// beyond 4 MiB, two second-level caches' worth.
template <class T>
bool streams_saved(const T* saved, const RecurrentShape& s, int64_t row) {
  constexpr int64_t kMuch = int64_t(4) << 20;
  constexpr uintptr_t kWhole = kLanes<T> * sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(saved) % kWhole == 0 && s.H % kLanes<T> == 0 &&
                       row % kLanes<T> == 0;
  return kStreams && saved && aligned && s.D * s.tokens * row * int64_t(sizeof(T)) >= kMuch;
}

template <class Cell, class T>
void recurrent_forward(const RecurrentForward<T>& a, const Threads& threads) {
  using L = LayoutOf<Cell>;
  const RecurrentShape& s = a.shape;
  const bool projected = a.weights[0].w_hr != nullptr;
  const PackedSizes<L, T> size(s, projected);
  const int64_t hr_panels = ceil_div(s.P, kPanel<T>);
  const int64_t by_h = s.P * L::kGates * s.H, by_x = s.I * L::kGates * s.H;
  const Plan plan = plan_steps(s, 2 * s.B <= L::kRows ? by_h : by_x + by_h, by_x + by_h,
                               size.groups, sizeof(T), threads.count);
  const int64_t tasks = plan.tasks * s.D;
  const int64_t task_rows = plan.by_units ? s.B : min64(plan.chunk, s.B);
  const int64_t task_groups = plan.by_units ? plan.chunk : size.groups;
  // With rows for less than half a tile, input products are made for several steps together; where
  // the loop has use for one thread only, by others, some such chunks ahead.
  const Tiles by_tiles_x = tiles_of(a, s.I), by_tiles_h = tiles_of(a, s.P);
  const bool tiled = by_tiles_x.multiply || by_tiles_h.multiply;
  const bool few = task_rows > 0 && 2 * task_rows <= L::kRows && s.T > 1 && !tiled;
  const bool others =
      few && tasks == 1 && threads.count > 1 && s.tokens * by_x >= (int64_t(1) << 18);
  const int64_t ahead = few ? min64(s.T, ceil_div(4 * L::kRows, task_rows)) : 0;
  const int64_t chunks = others ? 4 : 1, ahead_size = ahead * task_rows * task_groups * L::kOut;
  const bool own =
      !plan.by_units && tasks > s.D && (size.x + size.h + size.hr) * int64_t(sizeof(T)) <= kOwnCopy;

  const int64_t saved_row = Cell::kSaved * s.H + (projected ? s.P : 0);
  ForwardLoop<Cell, T> loop{a,       saved_row, nullptr, streams_saved(a.saved, s, saved_row),
                            nullptr, ahead};
  KeptPack kept[2];
  PackedForward<T> kept_packed[2] = {};
  for (int d = 0; d < s.D && !own && !tiled && !a.saved && worth_keeping<T>(s, L::kGates); ++d) {
    keep_packed<Cell>(a.weights[d], s, threads, kept[d], kept_packed[d]);
  }

  ForwardTask<T>* task = nullptr;
  T* zero = nullptr;
  auto lay_out = [&](auto& memory) {
    task = memory.template take<ForwardTask<T>>(size_t(tasks));
    zero = memory.template take<T>(size_t(max64(s.H, s.P)));
    loop.unprojected = projected ? memory.template take<T>(size_t(s.D * s.B * s.H)) : nullptr;
    PackedForward<T> packed[2] = {kept_packed[0], kept_packed[1]};
    for (int64_t i = 0; i < tasks; ++i) {
      ForwardTask<T> one{};
      one.share = share_of(plan, s, i, size.groups, hr_panels);
      one.rows = memory.template take<ForwardRow<T>>(size_t(task_rows));
      one.x = memory.template take<const T*>(size_t(task_rows));
      one.h = memory.template take<const T*>(size_t(task_rows));
      one.start = memory.template take<const T*>(size_t(task_rows));
      one.ahead = memory.template take<T>(size_t(chunks * ahead_size * kLanes<T>));
      PackedForward<T>& p = packed[i % s.D];
      if (own || (i < s.D && !p.x)) {
        lay_out_packed(size, memory, p);
        if constexpr (kTiled<T>) {
          p.tiled_x = TiledColumns::take(memory, by_tiles_x, s.I, L::kColumns, size.groups);
          p.tiled_h = TiledColumns::take(memory, by_tiles_h, s.P, L::kColumns, size.groups);
        }
      }
      one.packed = p;
      if constexpr (kTiled<T>) {
        one.tiled_x = TiledRows::take(memory, by_tiles_x, s.I, task_rows);
        one.tiled_h = TiledRows::take(memory, by_tiles_h, s.P, task_rows);
      }
      if (task) task[i] = one;
    }
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  for (int64_t u = 0; u < max64(s.H, s.P); ++u) zero[u] = 0;
  loop.zero = zero;

  // Group `unit` of task i's direction; panels of the projection come after the groups.
  const int64_t pieces = size.groups + (projected ? hr_panels : 0);
  auto pack = [&](int64_t i, int64_t piece) {
    PackedForward<T>& p = task[i].packed;
    const RecurrentWeights<T>& w = a.weights[i % s.D];
    if (piece < size.groups) {
      pack_forward<L>(w, s, piece, p);
    } else {
      const int64_t panel = piece - size.groups;
      pack_rows(w.w_hr, s.P, s.H, panel, p.hr + panel * kPanel<T> * s.H);
    }
  };
  if (!own) {
    const bool worth = tasks > 1 && s.H * (s.I + s.P) > (1 << 14);
    run_tasks(worth ? threads : Threads{1, nullptr}, s.D * pieces, [&](int64_t i) {
      if (!kept[i / pieces].filled()) pack(i / pieces, i % pieces);
    });
    for (KeptPack& one : kept) one.publish();
  }
  if (a.c_n) {
    for (int64_t i = 0; i < s.D * s.B * s.H; ++i) a.c_n[i] = a.c0 ? a.c0[i] : T(0);
  }

  auto multiply_ahead = [&](int64_t step, const ForwardTask<T>& mine, T* out) {
    loop.multiply_ahead(mine.share, step, min64(step + ahead, s.T), mine.packed, out);
  };
  const int phases = projected ? 2 : 1;
  auto advance = [&](int64_t i, int64_t step, int phase) {
    if (phase == 1) {
      loop.project(step, task[i]);
    } else {
      loop.cells(step, ahead ? step % ahead : 0, task[i]);
    }
  };
  if (others) {
    Lanes lanes(2, ceil_div(s.T, ahead));
    T* const first = task->ahead;
    auto chunk = [&](int64_t i) { return first + i % chunks * ahead_size * kLanes<T>; };
    auto ready = [&](int lane, int64_t i) {
      return lane == 0 ? lanes.done(1) > i : i < lanes.done(0) + chunks;
    };
    run_tasks(threads, 2, [&](int64_t) {
      lanes.work(ready, [&](int lane, int64_t i) {
        if (lane == 1) return multiply_ahead(i * ahead, *task, chunk(i));
        task->ahead = chunk(i);
        for (int64_t step = i * ahead; step < min64((i + 1) * ahead, s.T); ++step) {
          for (int phase = 0; phase < phases; ++phase) advance(0, step, phase);
        }
      });
    });
  } else {
    run_steps(plan, tasks, s.T * phases, phases, threads, [&](int64_t i, int64_t step, int phase) {
      for (int64_t piece = 0; own && step == 0 && phase == 0 && piece < pieces; ++piece) {
        pack(i, piece);
      }
      if (ahead && phase == 0 && step % ahead == 0) multiply_ahead(step, task[i], task[i].ahead);
      advance(i, step, phase);
    });
  }

  final_states(a, zero);
}
