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

// Multiply-adds from which a product of a step is shared out, where sequences are too few to be.
constexpr int64_t kWorthSharing = int64_t(1) << 17;

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
  void set_rows(int64_t first, const T* weights, int64_t M, int64_t stride) {
    for (int64_t i = 0; i < M; ++i) rows[first + i] = weights + i * stride;
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
  // f(row, column, vector, lanes) for all products of the rows `from`. Columns are shared out.
  template <class F>
  FASTSEQ_INLINE void multiply(int64_t count, const T* const* from, const F& f,
                               const Threads& threads = {1, nullptr}) const {
    const int64_t all = product.panels(), work = count * product.K * product.N;
    const int64_t parts = work < kWorthSharing ? 1 : min64(threads.count, all);
    run_tasks(threads, parts, [&](int64_t part) {
      product.each(part * all / parts, (part + 1) * all / parts, count, from, f);
    });
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
  const bool worth = elements > int64_t(1) << 15;
  run_tasks(worth ? threads : Threads{1, nullptr}, panels, [&](int64_t panel) {
    int i = 0;
    while (panel >= packed[i]->panels()) panel -= packed[i++]->panels();
    packed[i]->pack(panel);
  });
}

// The likeliest of N outcomes of each of a few rows: largest a . w[n] + b[n], the first of equals;
// a NaN counts as the largest. Sums are looked at as they come, and not kept.
template <class T>
struct Likeliest {
  Packed<T> weights;  // from [N, K]
  const T* b;         // [N] or null

  // Takes note of the outcomes [n, n + lanes).
  FASTSEQ_INLINE void update(Vec<T> some, int64_t n, int lanes, T& best, int64_t& index) const {
    if (b) some += load(b + n, lanes);
    const Vec<T> most = broadcast(best);
    const Vec<T> better = some <= most ? Vec<T>{} : Vec<T>{} + 1;
    if (index >= 0 && largest_lane<T>(better) == T(0)) return;
    for (int lane = 0; lane < lanes; ++lane) {
      const T sum = some[lane];
      if (index < 0 || sum > best || (sum != sum && best == best)) {
        best = sum;
        index = n + lane;
      }
    }
  }

  // Of the rows `from` [count], shared out; `best` and `index` [kMostParts][count]: the result
  // comes first.
  void find(int64_t count, const T* const* from, T* best, int64_t* index,
            const Threads& threads) const {
    const PanelProduct<T>& product = weights.product;
    const int64_t all = product.panels(), work = count * product.K * product.N;
    const int64_t parts = work < kWorthSharing ? 1 : min64(min64(threads.count, kMostParts), all);
    run_tasks(threads, parts, [&](int64_t part) {
      T* largest = best + part * count;
      int64_t* at = index + part * count;
      for (int64_t i = 0; i < count; ++i) at[i] = -1;
      product.each(part * all / parts, (part + 1) * all / parts, count, from,
                   [&](int64_t i, int64_t n, Vec<T> sums, int lanes) {
                     update(sums, n, lanes, largest[i], at[i]);
                   });
    });
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < count; ++i) {
        const T other = best[part * count + i];
        if (other > best[i] || (other != other && best[i] == best[i])) {
          best[i] = other;
          index[i] = index[part * count + i];
        }
      }
    }
  }
};
