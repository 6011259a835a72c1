// The two register tiles of a step: a cell's sums, and plain products of rows by panels.

// Where a tile of rows finds its operands.
template <class T>
struct SumsTile {
  const T* const* start;  // a row: what the sums start from, [kOut][lanes]
  const T* const* x;      // a row
  const T* const* h;      // a row
  int64_t start_stride;   // from one group to the next
  const T* panel_x;       // of the first group
  const T* panel_h;
  int64_t x_width;  // I, or 0 where `start` already holds the input product
  int64_t h_width;
  int order;  // of this tile among those that use the same panels
  bool back;  // whether the group before is next
};

// Sums of Rows rows, in the panels [First, First + Panels) of a group (of several groups where
// Panels is more than one has), to `out` [groups][Rows][kOut][lanes].
template <class L, class T, int Rows, int First, int Panels>
FASTSEQ_TILE void sums_of_panels(const SumsTile<T>& tile, T* out) {
  constexpr int kVectors = Panels * L::kWide;
  // Of a column: its group, and its place among the sums.
  auto group = [](int v) { return (First * L::kWide + v) / L::kColumns; };
  auto place = [](int v) { return (First * L::kWide + v) % L::kColumns * kLanes<T>; };
  auto apart = [](int v) {
    return L::kApart >= 0 && (First * L::kWide + v) % L::kColumns / L::kUnits == L::kApart;
  };
  constexpr int kSecondHalf = L::kColumns * kLanes<T>;
  auto to = [&](int m, int v) { return out + (group(v) * Rows + m) * L::kOut * kLanes<T>; };
  // (start + x product) + h product, each product summed alone: terms added to a large bias one by
  // one would each be rounded to its size.
  auto start = [&](int m, int v, int at) {
    return load(tile.start[m] + group(v) * tile.start_stride + at);
  };
  Vec<T> acc[Rows][kVectors] = {};
  const int64_t stride_x = tile.x_width * L::kWide * kLanes<T>;
  const int64_t stride_h = tile.h_width * L::kWide * kLanes<T>;
  const T* panel_x = tile.panel_x + First * stride_x;
  const T* panel_h = tile.panel_h + First * stride_h;
  const int next = tile.back && First + Panels == L::kPanels ? 1 - 2 * L::kPanels : 1;
  const bool with_x = tile.x_width > 0;
  if (with_x) {
    multiply<T, Rows, L::kWide, Panels>(tile.x_width, RowsOfA<T>{tile.x}, panel_x, stride_x, acc,
                                        fetch_soon(panel_x, stride_x, next, tile.order));
  }
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) {
      if (!with_x && !apart(v)) continue;
      store(to(m, v) + place(v), acc[m][v] + start(m, v, place(v)));
      acc[m][v] = Vec<T>{};
    }
  }
  if (tile.h_width) {
    multiply<T, Rows, L::kWide, Panels>(tile.h_width, RowsOfA<T>{tile.h}, panel_h, stride_h, acc,
                                        fetch_soon(panel_h, stride_h, next, tile.order));
  }
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 12
    for (int v = 0; v < kVectors; ++v) {
      const int at = apart(v) ? kSecondHalf : place(v);
      T* sum = to(m, v) + at;
      store(sum, acc[m][v] + (with_x && !apart(v) ? load(sum) : start(m, v, at)));
    }
  }
}

// All sums of `rows` rows and `groups` groups; several groups for few rows only (Layout::groups).
template <class L, class T>
FASTSEQ_INLINE void sums_tile(const SumsTile<T>& tile, int rows, int groups, T* out) {
  with_const<L::kRows>(rows, [&](auto n) {
    constexpr int kN = decltype(n)::value, kGroups = L::groups(kN);
    if constexpr (kGroups > 1) {
      if (groups == kGroups) {
        sums_of_panels<L, T, kN, 0, kGroups * L::kPanels>(tile, out);
        return;
      }
    }
    if constexpr (L::kPanels == 2 && 2 * kN <= L::kRows) {
      sums_of_panels<L, T, kN, 0, 2>(tile, out);
    } else {
      sums_of_panels<L, T, kN, 0, 1>(tile, out);
      if constexpr (L::kPanels == 2) sums_of_panels<L, T, kN, 1, 1>(tile, out);
    }
  });
}

// Rows of A, K wide, by `Panels` panels of columns, to `out` [Panels][Rows][Vectors][lanes].
template <class T, int Rows, int Vectors, int Panels>
FASTSEQ_TILE void rows_times_panels(int64_t K, const T* const* rows, const T* panel,
                                    int64_t panel_stride, const T* soon, int64_t chain, bool back,
                                    T* out) {
  Vec<T> acc[Rows][Panels * Vectors] = {};
  multiply<T, Rows, Vectors, Panels>(K, RowsOfA<T>{rows}, panel, panel_stride, acc, soon, chain,
                                     back);
#pragma GCC unroll 12
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 12
    for (int v = 0; v < Panels * Vectors; ++v) {
      store(out + (((v / Vectors) * Rows + m) * Vectors + v % Vectors) * kLanes<T>, acc[m][v]);
    }
  }
}

// Products of `rows` rows of A by columns in panels (pack_columns), a few panels at a time.
template <class T>
struct PanelProduct {
  int64_t K, N;
  const T* packed;
  int64_t chain = kChain;

  int64_t panels() const { return ceil_div(N, kPanel<T>); }

  // Panels taken together from panel p on: sums enough to hide an FMA's latency.
  int together(int rows, int64_t p, int64_t end) const {
    int n = rows == 1 ? 4 : 2 * rows <= kRows ? 2 : 1;
    while (n > 1 && (p + n > end || N - p * kPanel<T> < n * kPanel<T>)) n /= 2;
    return n;
  }
  // Vectors in each of those panels.
  int vectors(int64_t p) const {
    return int(ceil_div(min64(kPanel<T>, N - p * kPanel<T>), kLanes<T>));
  }

  // To `sums` [n][rows][vectors(p)][lanes]. Zero where `any` is false; `back`: panel p - 1 is next,
  // if panels are taken one by one, or a row begins with what it read last.
  void sums(int64_t p, int n, int rows, const T* const* from, bool any, int order, bool back,
            T* out) const {
    const int64_t depth = any ? K : 0, stride = K * kPanel<T>;
    const T* panel = packed + p * stride;
    const T* soon = fetch_soon(panel, stride, back && n == 1 ? -1 : 1, order);
    const int wide = vectors(p);
    with_const<kRows>(rows, [&](auto r) {
      constexpr int kN = decltype(r)::value;
      constexpr int kTwo = 2 * kN <= kRows ? 2 : 1, kFour = kN == 1 ? 4 : kTwo;
      const auto multiply = [&](auto vectors, auto panels) {
        rows_times_panels<T, kN, decltype(vectors)::value, decltype(panels)::value>(
            depth, from, panel, stride, soon, chain, back, out);
      };
      if (n == 4) {
        multiply(Const<kPanelVectors>{}, Const<kFour>{});
      } else if (n == 2) {
        multiply(Const<kPanelVectors>{}, Const<kTwo>{});
      } else if (wide == kPanelVectors) {
        multiply(Const<kPanelVectors>{}, Const<1>{});
      } else {
        multiply(Const<1>{}, Const<1>{});
      }
    });
  }

  // f(row, column, vector, lanes) for all products of rows [0, count) and the panels [p0, p1).
  template <class F>
  FASTSEQ_INLINE void each(int64_t p0, int64_t p1, int64_t count, const T* const* from,
                           const F& f) const {
    alignas(64) T out[kRows * 2 * kPanel<T>];
    const int64_t tiles = ceil_div(count, kRows);
    const int most = count ? int(ceil_div(count, tiles)) : 1;
    for (int64_t p = p0; p < p1;) {
      const int n = together(most, p, p1), wide = vectors(p);
      int64_t b = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int rows = int((count * (i + 1)) / tiles - (count * i) / tiles);
        sums(p, n, rows, from + b, true, int(i), false, out);
        for (int j = 0; j < n * wide; ++j) {
          const int64_t column = p * kPanel<T> + j * kLanes<T>;
          const int lanes = int(min64(kLanes<T>, N - column));
          for (int m = 0; m < rows; ++m) {
            f(b + m, column, load(out + (((j / wide) * rows + m) * wide + j % wide) * kLanes<T>),
              lanes);
          }
        }
        b += rows;
      }
      p += n;
    }
  }
};
