// A cell's maths on rows of sums, forward and backward.

template <class Cell, class T>
struct CellForwardRow {
  const T* from_x;  // sums of the input half, [G][H]
  const T* from_h;  // of the recurrent half, [G][H]
  const T* h_prev;
  const T* c_prev;
  T* h;
  T* c;
  T* saved;  // or null

  template <class V>
  static FASTSEQ_INLINE void step(const CellForwardRow& r, const CellForwardRow& q, int64_t H,
                                  int64_t unit, int64_t across, const T* bias) {
    using L = LayoutOf<Cell>;
    const int64_t unit_q = unit + across;
    const int lanes = int(min64(kLanes<T>, H - unit));
    V z[L::kSums], h{}, c{}, saved[Cell::kSaved];
#pragma GCC unroll 4
    for (int g = 0; g < Cell::kGates; ++g) {
      V x, y, b;
      load_pair(x, r.from_x + g * H + unit, q.from_x + g * H + unit_q, lanes);
      load_pair(y, r.from_h + g * H + unit, q.from_h + g * H + unit_q, lanes);
      load_pair(b, bias + g * H + unit, bias + g * H + unit_q, lanes);
      if (g == Cell::kApart) {
        V own;
        load_pair(own, bias + Cell::kGates * H + unit, bias + Cell::kGates * H + unit_q, lanes);
        z[g] = x + b;
        z[L::kSums - 1] = y + own;
      } else {
        z[g] = x + b + y;
      }
    }
    if constexpr (Cell::kReadsH) load_pair(h, r.h_prev + unit, q.h_prev + unit_q, lanes);
    if constexpr (Cell::kStates == 2) load_pair(c, r.c_prev + unit, q.c_prev + unit_q, lanes);
    h = Cell::forward(z, h, c, static_cast<const V*>(nullptr), static_cast<const V*>(nullptr),
                      saved);
    if constexpr (Cell::kStates == 2) store_pair(r.c + unit, q.c + unit_q, c, lanes);
    store_pair(r.h + unit, q.h + unit_q, h, lanes);
    if (r.saved) {
#pragma GCC unroll 8
      for (int i = 0; i < Cell::kSaved; ++i) {
        store_pair(r.saved + i * H + unit, q.saved + i * H + unit_q, saved[i], lanes);
      }
    }
  }
};

template <class Cell, class T>
struct CellBackwardRow {
  const T* saved;
  const T* h_prev;
  const T* c_prev;
  const T* dh;  // of every path
  T* dc;        // in: from the later step; out: to the earlier
  T* carried;   // dL/dh to the earlier step other than by W_hh, where the cell has any
  T* dsums;     // blocks in the order of GradientRow

  template <class V>
  static FASTSEQ_INLINE void step(const CellBackwardRow& r, const CellBackwardRow& q, int64_t H,
                                  int64_t unit, int64_t across, const T*) {
    using L = LayoutOf<Cell>;
    const int64_t unit_q = unit + across;
    const int lanes = int(min64(kLanes<T>, H - unit));
    V saved[Cell::kSaved], c_prev{}, h_prev{}, dh{}, dc{}, carried{}, h{}, dz[L::kSums];
#pragma GCC unroll 8
    for (int i = 0; i < Cell::kSaved; ++i) {
      load_pair(saved[i], r.saved + i * H + unit, q.saved + i * H + unit_q, lanes);
    }
    load_pair(dh, r.dh + unit, q.dh + unit_q, lanes);
    if constexpr (Cell::kReadsH) load_pair(h_prev, r.h_prev + unit, q.h_prev + unit_q, lanes);
    if constexpr (Cell::kStates == 2) {
      load_pair(c_prev, r.c_prev + unit, q.c_prev + unit_q, lanes);
      load_pair(dc, r.dc + unit, q.dc + unit_q, lanes);
    }
    Cell::backward(saved, h_prev, c_prev, static_cast<const V*>(nullptr),
                   static_cast<const V*>(nullptr), dh, dc, carried, dz, static_cast<V*>(nullptr),
                   h);
    if constexpr (Cell::kStates == 2) store_pair(r.dc + unit, q.dc + unit_q, dc, lanes);
    if constexpr (Cell::kCarriesH) {
      store_pair(r.carried + unit, q.carried + unit_q, carried, lanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < L::kSums; ++i) {
      const int64_t at = GradientRow<Cell>::block(i) * H;
      store_pair(r.dsums + at + unit, q.dsums + at + unit_q, dz[i], lanes);
    }
  }
};

// The cells of `count` rows, two vectors at a time: of two rows, or of one.
template <class T, class Row>
void cell_rows(const Row* row, int64_t count, int64_t H, const T* bias) {
  int64_t m = 0;
  for (; m + 1 < count; m += 2) {
    for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
      Row::template step<Two<T>>(row[m], row[m + 1], H, unit, 0, bias);
    }
  }
  for (; m < count; ++m) {
    int64_t unit = 0;
    for (; unit + 2 * kLanes<T> <= H; unit += 2 * kLanes<T>) {
      Row::template step<Two<T>>(row[m], row[m], H, unit, kLanes<T>, bias);
    }
    for (; unit < H; unit += kLanes<T>) {
      Row::template step<Vec<T>>(row[m], row[m], H, unit, 0, bias);
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
