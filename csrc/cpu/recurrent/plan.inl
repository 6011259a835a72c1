// What the two passes over a recurrent layer share: how a cell's sums lie in registers, where rows
// are, and how work is split.
//
// Work is split among threads by sequences, which need nothing from each other, or, where there are
// few sequences or the weights outgrow a core's cache, by units with a meeting at every step.

// How the sums of a cell with so many gates lie in register tiles. A group is the vectors of units
// worked on at once, with all their gates; its columns (one a gate and vector of units) are cut
// into panels.
template <int Gates, int Apart>
struct Layout {
  static constexpr int kGates = Gates, kApart = Apart;
  static constexpr int kSums = Gates + (Apart >= 0 ? 1 : 0);
  static constexpr int kUnits = Gates == 1 ? 2 : 1;  // vectors of units a group
  static constexpr int kColumns = Gates * kUnits;
  static constexpr int kWide = Gates == 3 ? 3 : 2;  // columns a panel
  static constexpr int kPanels = kColumns / kWide;
  static constexpr int kRows = tile_rows(kWide);
  // Groups that so many rows take together: sums enough (eight) to hide the latency of an FMA.
  static constexpr int groups(int rows) {
    int n = 1;
    while (rows * n * kColumns < 8 && n < 4) ++n;
    return n;
  }
  static constexpr int kOut = kSums * kUnits;  // vectors a row and group that a tile leaves
};
template <class Cell>
using LayoutOf = Layout<Cell::kGates, Cell::kApart>;

// A direction's walk over the sequence.
struct Walk {
  const RecurrentShape& s;
  bool reverse;

  int64_t time(int64_t step) const { return reverse ? s.T - 1 - step : step; }
  int64_t before(int64_t t) const { return reverse ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return reverse ? t - 1 : t + 1; }
  // Whether row b has a step before t.
  bool follows(int64_t t, int64_t b) const { return b < s.rows_at(before(t)); }
  // The first and the last step of row b on this walk, -1 if it has none.
  int64_t first(int64_t b) const { return reverse ? end(b) : begin(b); }
  int64_t last(int64_t b) const { return reverse ? begin(b) : end(b); }
  int64_t begin(int64_t b) const { return b < s.rows_at(0) ? 0 : -1; }
  int64_t end(int64_t b) const {
    int64_t t = s.T - 1;
    while (t >= 0 && s.rows[t] <= b) --t;
    return t;
  }
  // Whether the state that enters step t of row b is zero, whatever came before. A reset stands at
  // the later of two steps, in time, for both directions.
  bool cut(const TokenRows<const uint8_t>& resets, int64_t t, int64_t b) const {
    if (!resets.base) return false;
    if (!reverse) return *resets.at(s, t, b);
    return follows(t, b) && *resets.at(s, t + 1, b);
  }
  // Whether the final state of row b is zero: in reverse it is handed on across a reset at step 0.
  bool cut_at_end(const TokenRows<const uint8_t>& resets, int64_t b) const {
    return resets.base && reverse && begin(b) == 0 && *resets.at(s, 0, b);
  }
};

// How a loop over steps is shared out.
struct Plan {
  bool by_units;
  int tasks;      // a direction
  int64_t chunk;  // sequences, or groups of units, a task; 0: sequences in equal parts
};

// A share of a step of fewer multiply-adds is over before two threads have met.
constexpr int64_t kWorthMeeting = int64_t(1) << 14;

// `weights`: what a step multiplies each row by; `all`: multiply-adds a token, those made ahead
// included; `groups`: what units are split into.
inline Plan plan_steps(const RecurrentShape& s, int64_t weights, int64_t all, int64_t groups,
                       int bytes, int threads) {
  // Below this many multiply-adds in all, handing out work costs more than it saves.
  constexpr int64_t kWorthSharing = int64_t(1) << 18;
  if (threads <= 1 || all * s.tokens * s.D < kWorthSharing) return {false, 1, s.B};
  const int64_t each = ceil_div(threads, s.D);
  // Several shares a thread, where they are large: whoever is done early takes another's.
  constexpr int64_t kWorthTaking = int64_t(1) << 20;
  const auto shares = [&](int64_t work, int64_t most) {
    return max64(1, min64(min64(4, most / each), work / each / kWorthTaking));
  };
  // Half of a 1 MiB second-level cache: beyond, every step would stream the weights from memory
  // once a thread.
  constexpr int64_t kCache = int64_t(512) << 10;
  const int64_t by_rows = min64(each, s.B);
  const bool fits = weights * bytes <= kCache;
  const bool balanced = by_rows == each && s.B >= 4 * by_rows;
  if ((!fits || !balanced) && weights * s.B >= kWorthMeeting * each && groups > 1 &&
      each * s.D <= Steps::kMaxShares) {
    const int64_t most = min64(groups, Steps::kMaxShares / s.D);
    const int64_t chunk = ceil_div(groups, min64(each * shares(weights * s.B, most), groups));
    return {true, int(ceil_div(groups, chunk)), chunk};
  }
  // Fewer than eight rows a tile would wait for the weights.
  const int64_t parts = by_rows * shares(all * s.tokens / 4, s.B / 8);
  const int64_t chunk = ceil_div(s.B, max64(parts, 1));
  return {false, int(max64(1, ceil_div(s.B, max64(chunk, 1)))), max64(chunk, 1)};
}

// By sequences, where what they contribute is summed over so many leaves of them (a power of two,
// as the number of tasks then is); see deferred_by_rows.inl.
inline Plan plan_leaves(int64_t leaves, int threads) {
  int64_t tasks = 1;
  while (2 * tasks <= min64(leaves, threads)) tasks *= 2;
  return {false, int(tasks), 0};
}

// A part of the work of a step: a direction, its rows [b0, b1), its groups of units [g0, g1), and
// of the panels of a projection [p0, p1).
struct Share {
  int d;
  int64_t b0, b1, g0, g1, p0, p1;
};

inline Share share_of(const Plan& plan, const RecurrentShape& s, int64_t task, int64_t groups,
                      int64_t panels) {
  const int64_t part = task / s.D;
  Share share{int(task % s.D), 0, s.B, 0, groups, 0, panels};
  if (plan.by_units) {
    const int64_t each = ceil_div(panels, plan.tasks);
    share.g0 = part * plan.chunk;
    share.g1 = min64(share.g0 + plan.chunk, groups);
    share.p0 = min64(part * each, panels);
    share.p1 = min64(share.p0 + each, panels);
  } else if (plan.chunk) {
    share.b0 = part * plan.chunk;
    share.b1 = min64(share.b0 + plan.chunk, s.B);
  } else {
    share.b0 = s.B * part / plan.tasks;
    share.b1 = s.B * (part + 1) / plan.tasks;
  }
  return share;
}

// Runs f(task, step, phase) for all tasks; `steps` counts the phases of all steps.
template <class F>
FASTSEQ_INLINE void run_steps(const Plan& plan, int64_t tasks, int64_t steps, int phases,
                              const Threads& threads, const F& f) {
  if (plan.by_units) {
    Steps all(steps, int(tasks));
    const int64_t workers = min64(threads.count, tasks);
    run_tasks(threads, workers, [&](int64_t worker) {
      const int64_t own = worker * tasks / workers, end = (worker + 1) * tasks / workers;
      all.work(int(own), int(end - own), [&](int64_t step, int task) {
        if (phases == 1) {
          f(task, step, 0);
        } else {
          f(task, step / 2, int(step % 2));
        }
      });
    });
    return;
  }
  run_queue(threads, tasks, [&](int64_t task, int64_t) {
    for (int64_t step = 0; step < steps; ++step) {
      if (phases == 1) {
        f(task, step, 0);
      } else {
        f(task, step / 2, int(step % 2));
      }
    }
  });
}

// Weights smaller than this are packed by every task for itself: the copy is made sooner than the
// lines another core has just written are fetched from it.
constexpr int64_t kOwnCopy = int64_t(64) << 10;

// The chains of a sum over all gates: of no more than a few chains, shorter ones.
inline int64_t chain_over_gates(int64_t K) { return K <= 4 * kChain ? kChain / 2 : kChain; }

// What the tile of this order should fetch: half of the panel `ahead` panels from `panel`, or
// nothing new. Small panels stay in the first-level cache as it is.
template <class T>
FASTSEQ_INLINE const T* fetch_soon(const T* panel, int64_t panel_size, int ahead, int order) {
  constexpr int64_t kStays = int64_t(8) << 10;
  return order < 2 && panel_size * int64_t(sizeof(T)) > kStays
             ? panel + ahead * panel_size + order * (panel_size / 2)
             : nullptr;
}

// Vectors at at(0), at(1), ...
template <class T, int N, class At>
FASTSEQ_INLINE void load_each(Several<T, N>& v, int lanes, const At& at) {
  v = Several<T, N>::each([&](int i) { return load(at(i), lanes); });
}
template <class T, int N, class At>
FASTSEQ_INLINE void store_each(const Several<T, N>& v, int lanes, const At& at) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(at(i), v.part[i], lanes);
}

// Which vectors of units go through the cell together: those of one row after another, or of one
// row those beside each other.
template <class Row>
struct Together {
  const Row* first;
  int64_t unit;
  bool across;

  FASTSEQ_INLINE const Row& row(int i) const { return across ? *first : first[i]; }
  // Of `values`, [..][H] of that row.
  template <class T>
  FASTSEQ_INLINE T* of(T* values, int i) const {
    return values + unit + (across ? i * kLanes<std::remove_const_t<T>> : 0);
  }
};

// f(Const<n>, i): all i in [0, count), Most at a time while there are so many.
template <int Most, class F>
FASTSEQ_INLINE void several_at_a_time(int count, const F& f) {
  int i = 0;
  for (; i + Most <= count; i += Most) f(Const<Most>{}, i);
  if constexpr (Most > 2) {
    for (; i + 2 <= count; i += 2) f(Const<2>{}, i);
  }
  if (i < count) f(Const<1>{}, i);
}
