// A cell's maths on rows of sums, forward and backward.

template <class Cell, class T>
struct CellForwardRow {
  static constexpr int kMany = kTogether;
  const T* from_x;  // sums of the input half, [G][H]
  const T* from_h;  // of the recurrent half, [G][H]
  const T* h_prev;
  const T* c_prev;
  T* h;
  T* c;
  T* saved;  // or null

  template <int N>
  static FASTSEQ_INLINE void step(const Together<CellForwardRow>& at, int64_t H, int lanes,
                                  const T* bias) {
    using L = LayoutOf<Cell>;
    using V = Several<T, N>;
    V z[L::kSums], h{}, c{}, saved[Cell::kSaved];
#pragma GCC unroll 4
    for (int g = 0; g < Cell::kGates; ++g) {
      V x, y, b;
      load_each(x, lanes, [&](int j) { return at.of(at.row(j).from_x + g * H, j); });
      load_each(y, lanes, [&](int j) { return at.of(at.row(j).from_h + g * H, j); });
      load_each(b, lanes, [&](int j) { return at.of(bias + g * H, j); });
      if (g == Cell::kApart) {
        V own;
        load_each(own, lanes, [&](int j) { return at.of(bias + Cell::kGates * H, j); });
        z[g] = x + b;
        z[L::kSums - 1] = y + own;
      } else {
        z[g] = x + b + y;
      }
    }
    if constexpr (Cell::kReadsH) {
      load_each(h, lanes, [&](int j) { return at.of(at.row(j).h_prev, j); });
    }
    if constexpr (Cell::kStates == 2) {
      load_each(c, lanes, [&](int j) { return at.of(at.row(j).c_prev, j); });
    }
    h = Cell::forward(z, h, c, static_cast<const V*>(nullptr), static_cast<const V*>(nullptr),
                      saved);
    if constexpr (Cell::kStates == 2) {
      store_each(c, lanes, [&](int j) { return at.of(at.row(j).c, j); });
    }
    store_each(h, lanes, [&](int j) { return at.of(at.row(j).h, j); });
    if (at.first->saved) {
#pragma GCC unroll 8
      for (int i = 0; i < Cell::kSaved; ++i) {
        store_each(saved[i], lanes, [&](int j) { return at.of(at.row(j).saved + i * H, j); });
      }
    }
  }
};

template <class Cell, class T>
struct CellBackwardRow {
  static constexpr int kMany = kTogetherBack;
  const T* saved;
  const T* h_prev;
  const T* c_prev;
  const T* dh;  // of every path
  T* dc;        // in: from the later step; out: to the earlier
  T* carried;   // dL/dh to the earlier step other than by W_hh, where the cell has any
  T* dsums;     // blocks in the order of GradientRow

  template <int N>
  static FASTSEQ_INLINE void step(const Together<CellBackwardRow>& at, int64_t H, int lanes,
                                  const T*) {
    using L = LayoutOf<Cell>;
    using V = Several<T, N>;
    V saved[Cell::kSaved], c_prev{}, h_prev{}, dh{}, dc{}, carried{}, h{}, dz[L::kSums];
#pragma GCC unroll 8
    for (int i = 0; i < Cell::kSaved; ++i) {
      load_each(saved[i], lanes, [&](int j) { return at.of(at.row(j).saved + i * H, j); });
    }
    load_each(dh, lanes, [&](int j) { return at.of(at.row(j).dh, j); });
    if constexpr (Cell::kReadsH) {
      load_each(h_prev, lanes, [&](int j) { return at.of(at.row(j).h_prev, j); });
    }
    if constexpr (Cell::kStates == 2) {
      load_each(c_prev, lanes, [&](int j) { return at.of(at.row(j).c_prev, j); });
      load_each(dc, lanes, [&](int j) { return at.of(at.row(j).dc, j); });
    }
    Cell::backward(saved, h_prev, c_prev, static_cast<const V*>(nullptr),
                   static_cast<const V*>(nullptr), dh, dc, carried, dz, static_cast<V*>(nullptr),
                   h);
    if constexpr (Cell::kStates == 2) {
      store_each(dc, lanes, [&](int j) { return at.of(at.row(j).dc, j); });
    }
    if constexpr (Cell::kCarriesH) {
      store_each(carried, lanes, [&](int j) { return at.of(at.row(j).carried, j); });
    }
#pragma GCC unroll 4
    for (int i = 0; i < L::kSums; ++i) {
      const int64_t block = GradientRow<Cell>::block(i) * H;
      store_each(dz[i], lanes, [&](int j) { return at.of(at.row(j).dsums + block, j); });
    }
  }
};

// The cells of `count` rows, several vectors at a time: of rows, or of one row.
template <class T, class Row>
void cell_rows(const Row* row, int64_t count, int64_t H, const T* bias) {
  constexpr int kMany = Row::kMany;
  int64_t m = 0;
  for (; m + kMany <= count; m += kMany) {
    for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, H - unit));
      Row::template step<kMany>({row + m, unit, false}, H, lanes, bias);
    }
  }
  for (; m < count; ++m) {
    int64_t unit = 0;
    for (; unit + kMany * kLanes<T> <= H; unit += kMany * kLanes<T>) {
      Row::template step<kMany>({row + m, unit, true}, H, kLanes<T>, bias);
    }
    for (; unit < H; unit += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, H - unit));
      Row::template step<1>({row + m, unit, true}, H, lanes, bias);
    }
  }
}

// out = a + b, or a where b is null; b may be out.
template <class T>
FASTSEQ_INLINE void add_rows(T* out, const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int lanes = int(min64(kLanes<T>, n - i));
    const Vec<T> sum = b ? load(a + i, lanes) + load(b + i, lanes) : load(a + i, lanes);
    store(out + i, sum, lanes);
  }
}
template <class T>
FASTSEQ_INLINE void copy_row(T* out, const T* a, int64_t n) {
  add_rows<T>(out, a, nullptr, n);
}
