// A single step, its weights read where they lie: packing them into panels (pack.inl) would cost
// more than the step, unless rows are many.
//
// Sums are dot products, vectors along k of a few rows of x and h by a few rows of weights. Each
// ends as a vector whose lanes are to be added up; folding those of a vector's worth of units
// together leaves their sums side by side, as the cell's maths wants them.

// Rows and units of a tile. Few rows take more units, for sums enough (eight) to hide the latency
// of an FMA.
constexpr int kDotRows = FASTSEQ_VECTOR_BYTES == 64 ? 6 : 2;
template <class T>
constexpr int dot_units(int rows) {
  const int units = rows <= 2 && FASTSEQ_VECTOR_BYTES == 64 ? 8 : 4;
  return units < kLanes<T> ? units : kLanes<T>;
}

// Element j of the sum of both halves of a and, in turn with it, of b.
template <class T>
FASTSEQ_INLINE Vec<T> fold_pair(Vec<T> a, Vec<T> b) {
  constexpr int N = kLanes<T>;
#if defined(FASTSEQ_SHUFFLE)
  using All = typename Square<T>::template Upto<N>::type;
  return Square<T>::template interleave<0>(a, b, All{}) +
         Square<T>::template interleave<N / 2>(a, b, All{});
#else
  Vec<T> sum;
  for (int j = 0; j < N / 2; ++j) {
    sum[2 * j] = a[j] + a[j + N / 2];
    sum[2 * j + 1] = b[j] + b[j + N / 2];
  }
  return sum;
#endif
}
// Of each of `Count` vectors N / Count partial sums of its lanes: element j belongs to vector j %
// Count. With as many vectors as lanes, their sums. Folding in two goes (every n-th vector, then
// the results in order) gives what one does.
template <class T, int Count>
FASTSEQ_INLINE Vec<T> fold(const Vec<T> (&v)[Count]) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    Vec<T> next[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) next[i] = fold_pair<T>(v[i], v[i + Count / 2]);
    return fold<T>(next);
  }
}

// What a tile multiplies: rows of x by rows of W_ih, and rows of h by rows of W_hh.
template <class T>
struct DotTile {
  const T* const* x;
  const T* const* h;
  const T* w_ih[8];
  const T* w_hh[8];
  int64_t I, P;  // 0: not this product
};

// acc[m][j] += rows[m] . w[j] over [k0, k1), lane by lane.
template <class T, int Rows, int Units>
FASTSEQ_INLINE void dot_chain(int64_t k0, int64_t k1, const T* const* rows, const T* const* w,
                              Vec<T> (&acc)[Rows][Units]) {
  const T* a[Rows];
  const T* b[Units];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) a[m] = rows[m];
#pragma GCC unroll 8
  for (int j = 0; j < Units; ++j) b[j] = w[j];
  auto step = [&](const auto& read) {
    Vec<T> weight[Units];
#pragma GCC unroll 8
    for (int j = 0; j < Units; ++j) weight[j] = read(b[j]);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const Vec<T> value = read(a[m]);
#pragma GCC unroll 8
      for (int j = 0; j < Units; ++j) acc[m][j] = fma(value, weight[j], acc[m][j]);
    }
  };
  int64_t k = k0;
  for (; k + kLanes<T> <= k1; k += kLanes<T>) step([k](const T* p) { return load(p + k); });
  const int rest = int(k1 - k);
  if (rest > 0) step([k, rest](const T* p) { return load_part(p + k, rest); });
}

// To out[m * row], for each row one vector: of its `Units` sums, kLanes / Units parts each.
template <class T, int Rows, int Units>
FASTSEQ_TILE void dot_tile(const DotTile<T>& tile, T* out, int64_t row) {
  // Chains end, and are added up, every so many k.
  constexpr int64_t kLong = kChain * kLanes<T>;
  const int64_t most = max64(tile.I, tile.P);
  for (int64_t k = 0; k == 0 || k < most; k += kLong) {
    Vec<T> acc[Rows][Units] = {};
    dot_chain<T>(k, min64(k + kLong, tile.I), tile.x, tile.w_ih, acc);
    dot_chain<T>(k, min64(k + kLong, tile.P), tile.h, tile.w_hh, acc);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const Vec<T> parts = fold<T>(acc[m]);
      store(out + m * row, k ? parts + load(out + m * row) : parts);
    }
  }
}

// All sums of `Rows` rows and group g of units, to `out` [Rows][kOut][lanes].
template <class L, class T, int Rows>
FASTSEQ_INLINE void dot_sums(const RecurrentWeights<T>& w, const RecurrentShape& s, int64_t g,
                             const T* const* x, const T* const* h, T* out) {
  constexpr int kUnits = dot_units<T>(Rows), kParts = kLanes<T> / kUnits;
  alignas(64) T parts[Rows * kParts * kLanes<T>];
  for (int u = 0; u < L::kUnits; ++u) {
    const int64_t unit = (g * L::kUnits + u) * kLanes<T>;
    if (unit >= s.H) break;
    const int lanes = int(min64(kLanes<T>, s.H - unit));
    for (int sum = 0; sum < L::kSums; ++sum) {
      const bool halves = sum == L::kApart || sum == L::kGates;
      const bool from_x = sum < L::kGates, from_h = !halves || !from_x;
      const int64_t first = (from_x ? sum : L::kApart) * s.H;
      for (int part = 0; part < kParts; ++part) {
        DotTile<T> tile{x, h, {}, {}, from_x ? s.I : 0, from_h ? s.P : 0};
        for (int j = 0; j < kUnits; ++j) {
          // Of units past the last one the last is read: nobody looks at their sums.
          const int64_t at = first + min64(unit + part + j * kParts, s.H - 1);
          tile.w_ih[j] = w.w_ih + at * s.I;
          tile.w_hh[j] = w.w_hh + at * s.P;
        }
        dot_tile<T, Rows, kUnits>(tile, parts + part * kLanes<T>, kParts * kLanes<T>);
      }
      Vec<T> bias{};
      if (w.b_ih && from_x) bias += load(w.b_ih + first + unit, lanes);
      if (w.b_hh && from_h) bias += load(w.b_hh + first + unit, lanes);
      for (int m = 0; m < Rows; ++m) {
        Vec<T> all[kParts];
        for (int part = 0; part < kParts; ++part) {
          all[part] = load(parts + (m * kParts + part) * kLanes<T>);
        }
        store(out + (m * L::kOut + sum * L::kUnits + u) * kLanes<T>, fold<T>(all) + bias);
      }
    }
  }
}

// Whether this file is for a call: one step, and sums long enough to repay their folding. (The
// number of rows has no say: the bits of a row depend on no other.)
inline bool in_place(const RecurrentShape& s, bool projected) {
  constexpr int64_t kWorthFolding = 64;
  return s.T == 1 && s.B > 0 && s.I + s.P >= kWorthFolding && !projected;
}

// How one step is shared out, units first: each thread then reads weights of its own.
inline Plan plan_in_place(const RecurrentShape& s, int64_t work, int64_t groups, int threads) {
  constexpr int64_t kWorthSharing = int64_t(1) << 18;
  const int64_t each = ceil_div(threads, s.D);
  if (each == 1 || work < kWorthSharing) return {false, 1, s.B};
  if (groups >= each) {
    const int64_t chunk = ceil_div(groups, each);
    return {true, int(ceil_div(groups, chunk)), chunk};
  }
  const int64_t chunk = ceil_div(ceil_div(s.B, kDotRows), each) * kDotRows;
  return {false, int(ceil_div(s.B, chunk)), chunk};
}

template <class Cell, class T>
void one_step_forward(const RecurrentForward<T>& a, const Threads& threads) {
  using L = LayoutOf<Cell>;
  const RecurrentShape& s = a.shape;
  const int64_t groups = ceil_div(s.H, L::kUnits * kLanes<T>);
  const int64_t work = s.B * L::kGates * s.H * (s.I + s.P);
  const Plan plan = plan_in_place(s, work, groups, threads.count);
  const int64_t tasks = plan.tasks * s.D;
  ForwardLoop<Cell, T> loop{a, Cell::kSaved * s.H, nullptr, false, nullptr, 0};
  ForwardTask<T>* task = nullptr;
  T* zero = nullptr;
  auto lay_out = [&](auto& memory) {
    task = memory.template take<ForwardTask<T>>(size_t(tasks));
    zero = memory.template take<T>(size_t(s.H));
    for (int64_t i = 0; i < tasks; ++i) {
      ForwardTask<T> one{};
      one.share = share_of(plan, s, i, groups, 0);
      one.rows = memory.template take<ForwardRow<T>>(size_t(s.B));
      one.x = memory.template take<const T*>(size_t(s.B));
      one.h = memory.template take<const T*>(size_t(s.B));
      if (task) task[i] = one;
    }
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  for (int64_t u = 0; u < s.H; ++u) zero[u] = 0;
  loop.zero = zero;
  for (int64_t i = 0; a.c_n && i < s.D * s.B * s.H; ++i) a.c_n[i] = a.c0 ? a.c0[i] : T(0);

  run_tasks(threads, tasks, [&](int64_t i) {
    ForwardTask<T>& mine = task[i];
    const Share& share = mine.share;
    const RecurrentWeights<T>& weights = a.weights[share.d];
    const int64_t count = loop.prepare(share, 0, mine), tiles = ceil_div(count, kDotRows);
    alignas(64) T sums[kDotRows * L::kOut * kLanes<T>];
    for (int64_t g = share.g0; g < share.g1; ++g) {
      int64_t b = 0;
      for (int64_t j = 0; j < tiles; ++j) {
        const int rows = int((count * (j + 1)) / tiles - (count * j) / tiles);
        with_const<kDotRows>(rows, [&](auto n) {
          dot_sums<L, T, decltype(n)::value>(weights, s, g, mine.x + b, mine.h + b, sums);
        });
        loop.finish_tile(g, 1, rows, weights.params, mine.rows + b, sums);
        b += rows;
      }
    }
  });
  final_states(a, zero);
}
