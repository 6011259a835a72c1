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
// a NaN counts as the largest. Straight from [N, K] weights, which are read once.
template <class T>
struct Likeliest {
  // Outcomes looked at together: their weights stay in the second-level cache while the rows pass.
  static constexpr int64_t kTogether = 128;

  int64_t K, N;
  const T* w;
  const T* b;

  // Of the outcomes [n0, n0 + count), whose products are `sums`.
  void update(T* sums, int64_t n0, int64_t count, T& best, int64_t& index) const {
    for (int64_t j = 0; j < count; j += kLanes<T>) {
      const int lanes = int(min64(kLanes<T>, count - j));
      Vec<T> some = load(sums + j, lanes);
      if (b) some += load(b + n0 + j, lanes);
      const Vec<T> most = broadcast(best);
      const Vec<T> better = some <= most ? Vec<T>{} : Vec<T>{} + 1;
      if (index >= 0 && largest_lane<T>(better) == T(0)) continue;
      for (int lane = 0; lane < lanes; ++lane) {
        const T sum = some[lane];
        if (index < 0 || sum > best || (sum != sum && best == best)) {
          best = sum;
          index = n0 + j + lane;
        }
      }
    }
  }

  // Of the outcomes [n0, n1), to `index` [count], from rows `a` [count][K]. `sums`: room(count)
  // elements, of which the first `count` are the largest then.
  void find(int64_t n0, int64_t n1, int64_t count, const T* a, T* sums, int64_t* index) const {
    for (int64_t i = 0; i < count; ++i) index[i] = -1;
    T *best = sums, *some_sums = sums + count;
    for (int64_t n = n0; n < n1; n += kTogether) {
      const int64_t some = min64(kTogether, n1 - n);
      dot_products(a, K, count, w + n * K, K, some, K, T(1), some_sums, kTogether);
      for (int64_t i = 0; i < count; ++i) {
        update(some_sums + i * kTogether, n, some, best[i], index[i]);
      }
    }
  }
  // Of all outcomes, shared out. `index` [kMostParts][count]: the result comes first.
  void find(int64_t count, const T* a, T* sums, int64_t* index, const Threads& threads) const {
    const int64_t blocks = ceil_div(N, kTogether);
    const int64_t parts =
        count * K * N < kWorthSharing ? 1 : min64(min64(threads.count, kMostParts), blocks);
    run_tasks(threads, parts, [&](int64_t part) {
      const int64_t n0 = part * blocks / parts * kTogether;
      const int64_t n1 = min64((part + 1) * blocks / parts * kTogether, N);
      find(n0, n1, count, a, sums + part * room(count), index + part * count);
    });
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t i = 0; i < count; ++i) {
        T& best = sums[i];
        const T other = sums[part * room(count) + i];
        if (other > best || (other != other && best == best)) {
          best = other;
          index[i] = index[part * count + i];
        }
      }
    }
  }
  // Elements of `sums` a part.
  static int64_t room(int64_t count) { return count * (kTogether + 1); }
};
