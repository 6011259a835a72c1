// Products of a step: weights packed once a call, rows wherever they are.

// [K, N] given by its rows, one panel of columns: [K][vectors of the panel][lanes].
template <class T>
void pack_panel(const T* const* rows, int64_t K, int64_t N, int64_t panel, T* out) {
  const int64_t column = panel * kPanel<T>;
  const int cols = int(min64(kPanel<T>, N - column));
  const int vectors = int(ceil_div(cols, kLanes<T>));
  for (int64_t k = 0; k < K; ++k) {
    for (int v = 0; v < vectors; ++v, out += kLanes<T>) {
      store(out, load(rows[k] + column + v * kLanes<T>, cols - v * kLanes<T>));
    }
  }
}

// The same of the transpose of [N, K] given by its rows.
template <class T>
void pack_panel_transposed(const T* const* rows, int64_t K, int64_t N, int64_t panel, T* out) {
  const int64_t column = panel * kPanel<T>;
  const int cols = int(min64(kPanel<T>, N - column));
  const int vectors = int(ceil_div(cols, kLanes<T>));
  for (int v = 0; v < vectors; ++v) {
    const T* const* row = rows + column + v * kLanes<T>;
    const int lanes = cols - v * kLanes<T>;
    for (int64_t k = 0; k < K; k += kLanes<T>) {
      const int wide = int(min64(kLanes<T>, K - k));
      Square<T> square;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) {
        square.row[i] = i < lanes ? load(row[i] + k, wide) : Vec<T>{};
      }
      square.transpose();
      for (int j = 0; j < wide; ++j) {
        store(out + ((k + j) * vectors + v) * kLanes<T>, square.row[j]);
      }
    }
  }
}

// A matrix to multiply rows by, of up to two parts stacked on one another.
template <class T>
struct Packed {
  PanelProduct<T> product;
  T* memory;
  const T** rows;
  bool transposed;

  // `M` rows of weights, K wide. Transposed: from K wide rows to M; else from M wide rows to K.
  template <class Memory>
  void lay_out(Memory& from, int64_t M, int64_t K, bool transpose) {
    transposed = transpose;
    product = transpose ? PanelProduct<T>{K, M, nullptr} : PanelProduct<T>{M, K, nullptr};
    rows = from.template take<const T*>(size_t(M));
    product.packed = memory =
        from.template take<T>(size_t(ceil_div(product.N, kLanes<T>) * kLanes<T> * product.K));
  }
  void set_rows(int64_t first, const T* weights, int64_t M, int64_t K) {
    for (int64_t i = 0; i < M; ++i) rows[first + i] = weights + i * K;
  }
  int64_t panels() const { return memory ? product.panels() : 0; }
  void pack(int64_t panel) const {
    T* out = memory + panel * kPanel<T> * product.K;
    if (transposed) {
      pack_panel_transposed(rows, product.K, product.N, panel, out);
    } else {
      pack_panel(rows, product.K, product.N, panel, out);
    }
  }
  // f(row, column, vector, lanes) for all products of the rows `from`.
  template <class F>
  FASTSEQ_INLINE void multiply(int64_t count, const T* const* from, const F& f) const {
    product.each(0, product.panels(), count, from, f);
  }
};

// Packs all of `count` matrices, their panels shared out.
template <class T>
void pack_all(Packed<T>* const* packed, int count, const Threads& threads) {
  int64_t panels = 0, elements = 0;
  for (int i = 0; i < count; ++i) {
    panels += packed[i]->panels();
    elements += packed[i]->product.K * packed[i]->product.N;
  }
  constexpr int64_t kWorthSharing = int64_t(1) << 15;
  const bool worth = elements > kWorthSharing;
  run_tasks(worth ? threads : Threads{1, nullptr}, panels, [&](int64_t panel) {
    int i = 0;
    while (panel >= packed[i]->panels()) panel -= packed[i++]->panels();
    packed[i]->pack(panel);
  });
}

// The likeliest of N outcomes of each of a few rows: largest a . w[n] + b[n], the first of equals;
// a NaN counts as the largest. Straight from [N, K] weights, which are read once.
template <class T>
struct Likeliest {
  static constexpr int kMostRows = 4, kMostOutcomes = FASTSEQ_VECTOR_BYTES == 64 ? 6 : 3;

  int64_t K, N;
  const T* w;
  const T* b;

  template <int Rows, int Outcomes>
  FASTSEQ_INLINE void tile(const T* const* a, int64_t n, T* best, int64_t* index) const {
    Vec<T> sums[Rows][Outcomes] = {};
    for (int64_t k = 0; k < K; k += kLanes<T>) {
      const int wide = int(min64(kLanes<T>, K - k));
      Vec<T> row[Rows];
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) row[m] = load(a[m] + k, wide);
#pragma GCC unroll 6
      for (int j = 0; j < Outcomes; ++j) {
        const Vec<T> weight = load(w + (n + j) * K + k, wide);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) sums[m][j] = fma(row[m], weight, sums[m][j]);
      }
    }
    for (int j = 0; j < Outcomes; ++j) {
      for (int m = 0; m < Rows; ++m) {
        T sum = 0;
        for (int lane = 0; lane < kLanes<T>; ++lane) sum += sums[m][j][lane];
        if (b) sum += b[n + j];
        if (index[m] < 0 || sum > best[m] || (sum != sum && best[m] == best[m])) {
          best[m] = sum;
          index[m] = n + j;
        }
      }
    }
  }

  // To `index` [count].
  void find(int64_t count, const T* const* a, T* best, int64_t* index) const {
    for (int64_t i = 0; i < count; ++i) index[i] = -1;
    for (int64_t n = 0; n < N;) {
      const int outcomes = int(min64(kMostOutcomes, N - n));
      for (int64_t m = 0; m < count;) {
        const int rows = int(min64(kMostRows, count - m));
        with_const<kMostRows>(rows, [&](auto r) {
          constexpr int kR = decltype(r)::value;
          with_const<kMostOutcomes>(outcomes, [&](auto o) {
            tile<kR, decltype(o)::value>(a + m, n, best + m, index + m);
          });
        });
        m += rows;
      }
      n += outcomes;
    }
  }
};
