// The gradients of deferred.inl where weights are small and sequences many: each task makes its own
// sequences' part of them, step by step, while the gradients of their sums are in a near cache. As
// products of their own, split among cores by columns, they would need every token's from the core
// that made it, at a price above that of the multiplications.
//
// Sums are over leaves, so many sequences each whatever the number of threads, and the leaves' sums
// are added up as a binary tree: results have the same bits for any number of threads.

constexpr int64_t kMostLeaves = 8;

// How many leaves, a power of two; 0 where the products are deferred.
template <class Cell, class T>
int64_t leaves_of(const RecurrentShape& s, bool projected) {
  constexpr int64_t kFewestRows = 32, kSmall = int64_t(64) << 10;
  const int64_t weights = Cell::kGates * s.H * (s.I + s.P);
  if (cell::kNormalised<Cell> || projected || s.D > 1 || weights * int64_t(sizeof(T)) > kSmall) {
    return 0;
  }
  int64_t leaves = 1;
  while (leaves < kMostLeaves && s.B >= 2 * leaves * kFewestRows) leaves *= 2;
  return leaves > 1 && weights * s.tokens >= leaves * kWorthATask ? leaves : 0;
}

// To out[m][n], `ld` apart, Rows from m and Vectors from n on: sums over k of a[k][m] * b[k][n].
template <class T, int Rows, int Vectors>
FASTSEQ_TILE void add_rows_by_rows(int64_t K, const T* const* a, const T* const* b, int64_t m,
                                   int64_t n, T* out, int64_t ld) {
  Vec<T> acc[Rows][Vectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    const T* a_k = a[k] + m;
    Vec<T> b_k[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) b_k[v] = load(b[k] + n + v * kLanes<T>);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> a_ik = broadcast(a_k[i]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) acc[i][v] = fma(a_ik, b_k[v], acc[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      T* to = out + (m + i) * ld + n + v * kLanes<T>;
      store(to, load(to) + acc[i][v]);
    }
  }
}

// The same for all m below M and, in whole vectors, all n below `ld`.
template <class T>
void add_rows_by_rows(int64_t K, const T* const* a, const T* const* b, int64_t M, T* out,
                      int64_t ld) {
  const int64_t tiles = ceil_div(M, kRows);
  for (int64_t n = 0; n < ld; n += kPanel<T>) {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t m = (M * i) / tiles;
      with_const<kRows>(int((M * (i + 1)) / tiles - m), [&](auto rows) {
        constexpr int kN = decltype(rows)::value;
        if (n + kPanel<T> <= ld) {
          add_rows_by_rows<T, kN, 2>(K, a, b, m, n, out, ld);
        } else {
          add_rows_by_rows<T, kN, 1>(K, a, b, m, n, out, ld);
        }
      });
    }
  }
}

// Vectors of the leaves, `size` apart, in two parts each, added up as a binary tree.
template <class T>
FASTSEQ_TILE Vec<T> leaf_sum(const T* total, const T* branch, int64_t size, int64_t leaves,
                             int lanes) {
  Vec<T> sum[kMostLeaves];
  for (int64_t i = 0; i < leaves; ++i) {
    sum[i] = load(total + i * size, lanes) + load(branch + i * size, lanes);
  }
  for (int64_t left = leaves / 2; left > 0; left /= 2) {
    for (int64_t i = 0; i < left; ++i) sum[i] = sum[2 * i] + sum[2 * i + 1];
  }
  return sum[0];
}

template <class Cell, class T>
struct DeferredByRows {
  using Row = GradientRow<Cell>;
  // Tokens of a step that are summed in one chain, and steps that are summed before they are added
  // to the steps before them.
  static constexpr int64_t kTokens = 64, kSteps = 32;

  const BackwardLoop<Cell, T>& loop;
  const RecurrentShape& s;
  int64_t leaves;
  int64_t gates, ld, sums_ld;  // of dL/dW transposed; of the sums over tokens
  int64_t size;                // of a leaf's gradients: of W_ih, of W_hh, of what is summed
  T* branch;                   // [leaves][size], steps so far
  T* total;                    // [leaves][size], those before them
  T* packed;                   // [tasks][panels][G*H][..]: W_ih in the order of the gradient row

  DeferredByRows(const BackwardLoop<Cell, T>& loop, int64_t leaves)
      : loop(loop), s(loop.a.shape), leaves(leaves) {
    gates = Cell::kGates * s.H;
    ld = ceil_div(gates, kLanes<T>) * kLanes<T>;
    sums_ld = ceil_div(Row::kBlocks * s.H, kLanes<T>) * kLanes<T>;
    size = (s.I + s.P) * ld + sums_ld;
  }
  template <class Memory>
  void lay_out(Memory& memory, int64_t tasks) {
    branch = memory.template take<T>(size_t(leaves * size));
    total = memory.template take<T>(size_t(leaves * size));
    packed = memory.template take<T>(size_t(tasks * packed_size()));
  }
  int64_t packed_size() const {
    return loop.a.dx.base ? gates * ceil_div(s.I, kLanes<T>) * kLanes<T> : 0;
  }
  bool sums_weights() const { return loop.a.dw_hh[0] || loop.a.db_ih[0]; }
  int64_t begin(int64_t leaf) const { return s.B * leaf / leaves; }

  // Before the first step of a task, of the leaves [from, to).
  void prepare(int64_t task, int64_t from, int64_t to) const {
    for (int64_t i = from * size; i < to * size; ++i) branch[i] = total[i] = 0;
    T* out = packed + task * packed_size();
    for (int64_t n = 0; loop.a.dx.base && n < s.I; n += kPanel<T>) {
      const int cols = int(min64(kPanel<T>, s.I - n));
      Row::each_row(s.H, 0, gates, [&](int64_t, int64_t row) {
        const T* w = loop.a.weights[0].w_ih + row * s.I + n;
        for (int v = 0; v * kLanes<T> < cols; ++v, out += kLanes<T>) {
          store(out, load(w + v * kLanes<T>, cols - v * kLanes<T>));
        }
      });
    }
  }

  // After the cells of the loop's step before `step`, which h at `step` may be made by.
  void step(int64_t task, int64_t from, int64_t to, int64_t step) const {
    const int64_t t = loop.walk(0).time(s.T - 1 - step);
    for (int64_t leaf = from; leaf < to; ++leaf) {
      const int64_t end = min64(begin(leaf + 1), s.rows[t]);
      for (int64_t b = begin(leaf); b < end; b += kTokens) {
        tokens(task, leaf, t, b, min64(b + kTokens, end));
      }
      if ((step + 1) % kSteps == 0 && sums_weights()) add_branch(leaf);
    }
  }

  // Leaf by leaf, columns [n0, n1) of dL/dW transposed, in whole vectors: their sums, where they
  // go.
  void finish(int64_t n0, int64_t n1) const {
    const RecurrentBackward<T>& a = loop.a;
    if (!a.dw_hh[0]) return;
    for (int64_t n = n0; n < n1; n += kLanes<T>) {
      const int64_t end = min64(n + kLanes<T>, gates);
      T* to[kLanes<T>];
      Row::each_row(s.H, n, end,
                    [&](int64_t i, int64_t row) { to[i - n] = a.dw_ih[0] + row * s.I; });
      transposed(0, n, end, s.I, to);
      for (int64_t i = n; i < end; ++i) to[i - n] = a.dw_hh[0] + i * s.P;
      transposed(s.I * ld, n, end, s.P, to);
    }
  }
  void finish_sums() const {
    const RecurrentBackward<T>& a = loop.a;
    const int64_t at = (s.I + s.P) * ld;
    auto sum = [&](int block, T* out) {
      for (int64_t u = 0; u < s.H; u += kLanes<T>) {
        const int lanes = int(min64(kLanes<T>, s.H - u));
        store(out + u, of_leaves(at + block * s.H + u, lanes), lanes);
      }
    };
    for (int i = 0; i < Cell::kGates && a.db_ih[0]; ++i) {
      sum(i, a.db_ih[0] + Row::gate(i) * s.H);
      sum(Row::kRecurrent + i, a.db_hh[0] + i * s.H);
    }
    for (int i = 0; i < Cell::kParams && a.dparams[0]; ++i) {
      sum(cell::kSums<Cell> + i, a.dparams[0] + i * s.H);
    }
  }

 private:
  // What the rows [b, end) of step t, of one leaf, contribute.
  __attribute__((noinline)) void tokens(int64_t task, int64_t leaf, int64_t t, int64_t b,
                                        int64_t end) const {
    const RecurrentBackward<T>& a = loop.a;
    const T *x[kTokens], *h[kTokens], *dsums[kTokens], *of_h[kTokens];
    const int64_t count = end - b;
    for (int64_t i = 0; i < count; ++i) {
      dsums[i] = loop.dsums[0] + (s.first[t] + b + i) * loop.dsums_row;
      of_h[i] = dsums[i] + Row::kRecurrent * s.H;
      x[i] = a.x.at(s, t, b + i);
      if (a.dw_hh[0]) h[i] = loop.h_before(0, t, b + i);
    }
    T* out = branch + leaf * size;
    if (a.dw_hh[0]) {
      add_rows_by_rows(count, x, dsums, s.I, out, ld);
      add_rows_by_rows(count, h, of_h, s.P, out + s.I * ld, ld);
    }
    T* sums = out + (s.I + s.P) * ld;
    for (int64_t n = 0; sums_weights() && n < sums_ld; n += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t i = 0; i < count; ++i) sum += load(dsums[i] + n);
      store(sums + n, load(sums + n) + sum);
    }
    if (!a.dx.base) return;
    const PanelProduct<T> product{gates, s.I, packed + task * packed_size(),
                                  chain_over_gates(gates)};
    product.each(0, product.panels(), count, dsums,
                 [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
                   store(a.dx.at(s, t, b + i) + column, sum, lanes);
                 });
  }

  void add_branch(int64_t leaf) const {
    for (int64_t i = leaf * size; i < (leaf + 1) * size; i += kLanes<T>) {
      store(total + i, load(total + i) + load(branch + i));
      store(branch + i, Vec<T>{});
    }
  }

  // The sum over the leaves of the vector at `at` of each.
  Vec<T> of_leaves(int64_t at, int lanes = kLanes<T>) const {
    return leaf_sum(total + at, branch + at, size, leaves, lanes);
  }

  // M rows of the matrix at `at`, of the columns [n, end): column n + j to to[j].
  __attribute__((noinline)) void transposed(int64_t at, int64_t n, int64_t end, int64_t M,
                                            T* const* to) const {
    for (int64_t m = 0; m < M; m += kLanes<T>) {
      const int rows = int(min64(kLanes<T>, M - m));
      Square<T> square;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) {
        square.row[i] = i < rows ? of_leaves(at + (m + i) * ld + n) : Vec<T>{};
      }
      square.transpose();
      for (int64_t j = 0; j < end - n; ++j) store(to[j] + m, square.row[j], rows);
    }
  }
};
