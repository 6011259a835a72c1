// Gradients of weights, biases and inputs, from the gradients of the sums of all tokens.

inline int64_t deferred_pointers(const RecurrentShape& s, int64_t gates) {
  return s.tokens * (2 + 2 * s.D) + 3 * s.D * gates;
}

template <class Cell, class T>
struct Deferred {
  using Row = GradientRow<Cell>;
  static constexpr int kGates = Cell::kGates;

  const BackwardLoop<Cell, T>& loop;
  const RecurrentShape& s;
  const T** x_rows;     // [tokens]
  T** dx_rows;          // [tokens]
  const T** h_rows[2];  // [tokens]: the h that entered each token
  const T** w_rows[2];  // [G*H]: rows of W_ih in the order of the gradient row's blocks
  T** dw_rows[2];       // the same of dL/dW_ih
  T** dw_hh_rows[2];    // [G*H]
  T** dh0_rows[2];      // [tokens], where the loop leaves dL/dh0 to these products

  Deferred(const BackwardLoop<Cell, T>& loop, const T** memory) : loop(loop), s(loop.a.shape) {
    const RecurrentBackward<T>& a = loop.a;
    auto take = [&](int64_t n) {
      const T** p = memory;
      memory += n;
      return p;
    };
    x_rows = take(s.tokens);
    dx_rows = const_cast<T**>(take(s.tokens));
    for (int d = 0; d < s.D; ++d) {
      h_rows[d] = take(s.tokens);
      w_rows[d] = take(kGates * s.H);
      dw_rows[d] = const_cast<T**>(take(kGates * s.H));
      dw_hh_rows[d] = const_cast<T**>(take(kGates * s.H));
      dh0_rows[d] = const_cast<T**>(take(s.tokens));
      Row::each_row(s.H, 0, kGates * s.H, [&](int64_t i, int64_t row) {
        w_rows[d][i] = a.weights[d].w_ih + row * s.I;
        if (!a.dw_hh[d]) return;
        dw_rows[d][i] = a.dw_ih[d] + row * s.I;
        dw_hh_rows[d][i] = a.dw_hh[d] + i * s.P;
      });
    }
    for (int64_t t = 0; t < s.T; ++t) {
      for (int64_t b = 0; b < s.rows[t]; ++b) {
        const int64_t token = s.first[t] + b;
        x_rows[token] = a.x.at(s, t, b);
        if (a.dx.base) dx_rows[token] = a.dx.at(s, t, b);
        for (int d = 0; d < s.D && a.dw_hh[0]; ++d) h_rows[d][token] = loop.h_before(d, t, b);
        for (int d = 0; d < s.D && loop.defers_dh0; ++d) {
          dh0_rows[d][token] = a.dh0 + (d * s.B + s.sequence(b)) * s.P;
        }
      }
    }
  }

  // Whether the products by x and by h are one, which reads the gradients of the sums once.
  bool joined() const {
    return !Row::kRecurrent && s.I > 0 && (s.I % kPanel<T> == 0 || s.P % kPanel<T> == 0);
  }
  Gemm<T> by_x_and_h(int d) const {
    Gemm<T> g = over_tokens(loop.dsums[d], loop.dsums_row, kGates * s.H);
    g.N = s.I + s.P;
    // First what is whole panels wide.
    const bool x_first = s.I % kPanel<T> == 0;
    g.split = x_first ? s.I : s.P;
    g.b_rows = x_first ? x_rows : h_rows[d];
    g.c_rows = x_first ? dw_rows[d] : dw_hh_rows[d];
    g.b_rows_2 = x_first ? h_rows[d] : x_rows;
    g.c_rows_2 = x_first ? dw_hh_rows[d] : dw_rows[d];
    return g;
  }
  Gemm<T> by_x(int d) const {
    Gemm<T> g = over_tokens(loop.dsums[d], loop.dsums_row, kGates * s.H);
    g.N = s.I;
    g.b_rows = x_rows;
    g.c_rows = dw_rows[d];
    return g;
  }
  Gemm<T> by_h(int d) const {
    Gemm<T> g = over_tokens(loop.dsums[d] + Row::kRecurrent * s.H, loop.dsums_row, kGates * s.H);
    g.N = g.ldc = s.P;
    g.b_rows = h_rows[d];
    g.c = loop.a.dw_hh[d];
    return g;
  }
  Gemm<T> by_unprojected(int d) const {
    Gemm<T> g = over_tokens(loop.dh[d], s.P, s.P);
    g.N = g.ldb = g.ldc = s.H;
    g.b = loop.hidden[d];
    g.c = loop.a.dw_hr[d];
    return g;
  }
  Gemm<T> to_x(int d) const {
    Gemm<T> g{};
    g.M = s.tokens;
    g.K = kGates * s.H;
    g.chain = chain_over_gates(g.K);
    g.N = s.I;
    g.a = loop.dsums[d];
    g.a_m = loop.dsums_row;
    g.a_k = 1;
    g.b_rows = w_rows[d];
    g.c_rows = dx_rows;
    g.accumulate = d == 1;
    return g;
  }
  // To what dL/dh0 holds of other paths.
  Gemm<T> to_h0(int d) const {
    Gemm<T> g{};
    g.M = s.tokens;
    g.K = kGates * s.H;
    g.chain = chain_over_gates(g.K);
    g.N = g.ldb = s.P;
    g.a = loop.dsums[d] + Row::kRecurrent * s.H;
    g.a_m = loop.dsums_row;
    g.a_k = 1;
    g.b = loop.a.weights[d].w_hh;
    g.c_rows = dh0_rows[d];
    g.accumulate = true;
    return g;
  }
  static Gemm<T> over_tokens(const T* a, int64_t row, int64_t M, int64_t K) {
    Gemm<T> g{};
    g.M = M;
    g.K = K;
    g.a = a;
    g.a_m = 1;
    g.a_k = row;
    g.chain = chain_over(K);
    return g;
  }
  Gemm<T> over_tokens(const T* a, int64_t row, int64_t M) const {
    return over_tokens(a, row, M, s.tokens);
  }

  // Sums over tokens: part `part` of the biases and the cell's parameters of direction d.
  void sums(int d, int64_t part, int64_t parts) const {
    const RecurrentBackward<T>& a = loop.a;
    const int64_t vectors = ceil_div(s.H, kLanes<T>), each = ceil_div(vectors, parts);
    const int64_t u0 = min64(part * each * kLanes<T>, s.H);
    const int64_t u1 = min64(u0 + each * kLanes<T>, s.H);
    if constexpr (cell::kNormalised<Cell>) {
      over_sequences(d, u0, u1);
      return;
    }
    auto sum = [&](int block, T* out) {
      column_sums(loop.dsums[d] + block * s.H, s.tokens, u0, u1, loop.dsums_row, out);
    };
    for (int i = 0; i < kGates && a.db_ih[d]; ++i) {
      sum(i, a.db_ih[d] + Row::gate(i) * s.H);
      T* other = a.db_hh[d] + i * s.H;
      if (Row::kRecurrent) {
        sum(Row::kRecurrent + i, other);
      } else {
        for (int64_t u = u0; u < u1; ++u) other[u] = a.db_ih[d][i * s.H + u];
      }
    }
    for (int i = 0; i < Cell::kParams && a.dparams[d]; ++i) {
      sum(cell::kSums<Cell> + i, a.dparams[d] + i * s.H);
    }
  }

  // The same where the loop has summed over time already.
  void over_sequences(int d, int64_t u0, int64_t u1) const {
    const RecurrentBackward<T>& a = loop.a;
    const int64_t row = kOverTime<Cell> * s.H;
    if (!loop.over_time) return;
    for (int i = 0; i < kOverTime<Cell>; ++i) {
      const T* sums = loop.over_time + d * s.B * row + i * s.H;
      T* dparams = a.dparams[d] ? a.dparams[d] + i * s.H : nullptr;
      T* db = a.db_ih[d] ? a.db_ih[d] + (i - Cell::kParams) * s.H : nullptr;
      T* out = i < Cell::kParams ? dparams : db;
      if (!out) continue;
      column_sums(sums, s.B, u0, u1, row, out);
      for (int64_t u = u0; out == db && u < u1; ++u)
        a.db_hh[d][(i - Cell::kParams) * s.H + u] = db[u];
    }
  }
};

template <class Cell, class T>
void recurrent_deferred(const BackwardLoop<Cell, T>& loop, const T** memory,
                        const Threads& threads) {
  const RecurrentBackward<T>& a = loop.a;
  const RecurrentShape& s = a.shape;
  const Deferred<Cell, T> deferred(loop, memory);
  Gemm<T> products[10];
  int count = 0;
  for (int d = 0; d < s.D; ++d) {
    if (a.dw_hh[d] && deferred.joined()) {
      products[count++] = deferred.by_x_and_h(d);
    } else if (a.dw_hh[d]) {
      products[count++] = deferred.by_x(d);
      products[count++] = deferred.by_h(d);
    }
    if (a.dw_hr[d]) products[count++] = deferred.by_unprojected(d);
    if (loop.defers_dh0) products[count++] = deferred.to_h0(d);
  }
  const int alone = count;
  for (int d = 0; d < s.D && a.dx.base; ++d) products[count++] = deferred.to_x(d);

  int64_t work = 0, a_size = 0, b_size = 0, tiled_a = 0, tiled_b = 0;
  for (int i = 0; i < count; ++i) {
    products[i].tiles = a.tiles;
    work += products[i].M * products[i].N * products[i].K;
    if (in_place(products[i]) || is_outer(products[i])) continue;
    a_size = max64(a_size, GemmBlocks<T>::a_size(products[i]));
    b_size = max64(b_size, GemmBlocks<T>::b_size(products[i]));
    if (!by_tiles(products[i])) continue;
    const int64_t K = min64(products[i].K, kBlockK), wide = min64(products[i].N, kBlockN);
    tiled_a = max64(tiled_a, tiled_size(a.tiles, K));
    tiled_b = max64(tiled_b, tiled_size(a.tiles, K, ceil_div(wide, kPanel<T>) * kPanelVectors));
  }
  // Large products in more parts than there are threads, for whoever is free.
  constexpr int64_t kWorthTaking = int64_t(1) << 24;
  const int64_t workers = max64(1, min64(min64(threads.count, kMostParts), work / kWorthATask));
  const int64_t parts = work / workers >= kWorthTaking ? 2 * workers : workers;
  GemmBlocks<T> blocks[kMostParts];
  auto lay_out = [&](auto& memory) {
    for (int64_t i = 0; i < workers; ++i) {
      blocks[i].a = memory.template take<T>(size_t(a_size));
      blocks[i].b = memory.template take<T>(size_t(b_size));
      blocks[i].a_tiles = memory.template take<uint16_t>(size_t(tiled_a));
      blocks[i].b_tiles = memory.template take<uint16_t>(size_t(tiled_b));
    }
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  // Of each product its parts; then parts of dL/dx, where that of the second direction adds to what
  // that of the first has made; with them the sums.
  run_queue(Threads{int(workers), threads.parallel_for}, (alone + 1) * parts,
            [&](int64_t task, int64_t worker) {
              const int64_t part = task % parts;
              const int first = int(task / parts), last = first < alone ? first + 1 : count;
              for (int i = first; i < last; ++i)
                multiply_part(products[i], part, parts, blocks[worker]);
              for (int d = 0; d < s.D && first == alone; ++d) deferred.sums(d, part, parts);
            });
}
