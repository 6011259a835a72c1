// Gradients of weights, keys and values, from what the loop of the backward pass left behind.

template <class Cell, class T>
struct DecoderDeferred {
  using Loop = DecoderBackwardLoop<Cell, T>;
  using Row = GradientRow<Cell>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kMostProducts = kMostLayers * (kGates + 1) + 2;

  const Loop& loop;
  const DecoderBackward<T>& a;
  const DecoderShape& s;
  int64_t tokens;
  Gemm<T> products[kMostProducts];
  int count = 0;

  explicit DecoderDeferred(const Loop& loop)
      : loop(loop), a(loop.a), s(loop.s), tokens(loop.s.T * loop.s.B) {
    if (!a.need_weights) return;
    for (int64_t l = 0; l < s.L; ++l) {
      const T* dsums = loop.dsums[l].base;
      const int64_t row = loop.dsums_row(l), input = s.input(l);
      const T* from = l ? a.saved.out[l - 1].at(1, 0) : a.saved.input.base;
      for (int i = 0; i < kGates; ++i) {
        // Blocks in torch's order go together.
        int end = i + 1;
        while (end < kGates && Row::gate(end) == Row::gate(end - 1) + 1) ++end;
        add(dsums + i * s.H, row, (end - i) * s.H, from, input,
            a.dw_ih[l] + Row::gate(i) * s.H * input);
        i = end - 1;
      }
      add(dsums + Row::kRecurrent * s.H, row, kGates * s.H, a.saved.h[l].base, s.H, a.dw_hh[l]);
    }
    if (a.w_q) {
      const T* h = loop.after() ? a.saved.out[loop.top()].at(1, 0) : a.saved.h[loop.top()].base;
      add(loop.dquery.base, loop.dquery.row, s.K, h, s.H, a.dw_q);
    }
    if (loop.after()) {
      add(loop.dattended.base, s.A, s.A, a.saved.attended.base, s.C + s.H, a.dw_c);
    }
  }

  // c [M, N] = the sum over all tokens of the products of a's row, M wide, and b's, N wide.
  void add(const T* from, int64_t row, int64_t M, const T* b, int64_t N, T* c) {
    Gemm<T> g{};
    g.M = M;
    g.N = g.ldb = g.ldc = N;
    g.K = tokens;
    g.a = from;
    g.a_m = 1;
    g.a_k = row;
    g.b = b;
    g.c = c;
    g.chain = chain_over(tokens);
    products[count++] = g;
  }

  // Sums over tokens of a block of the vectors of units [u0, u1).
  void biases(int64_t part, int64_t parts) const {
    auto sums = [&](const T* from, int64_t row, int64_t n, T* out) {
      const int64_t each = ceil_div(ceil_div(n, kLanes<T>), parts) * kLanes<T>;
      const int64_t u0 = min64(part * each, n);
      column_sums(from, tokens, u0, min64(u0 + each, n), row, out);
    };
    for (int64_t l = 0; l < s.L; ++l) {
      if (!a.db_ih[l]) continue;
      const int64_t row = loop.dsums_row(l);
      for (int i = 0; i < kGates; ++i) {
        sums(loop.dsums[l].base + i * s.H, row, s.H, a.db_ih[l] + Row::gate(i) * s.H);
        sums(loop.dsums[l].base + (Row::kRecurrent + i) * s.H, row, s.H, a.db_hh[l] + i * s.H);
      }
    }
    if (a.db_c) sums(loop.dattended.base, s.A, s.A, a.db_c);
  }

  // What source b and its keys get of all steps. `dv`: of this source, [K]; `forms`: [T, K].
  void source(int64_t b, const GemmBlocks<T>& blocks, T* dv, T* forms) const {
    const int64_t end = a.ends[b];
    if (a.dvalues) {
      T* out = a.dvalues + b * s.S * s.C;
      for (int64_t i = end * s.C; i < s.S * s.C; ++i) out[i] = 0;
      const Gemm<T> g = of_source(b, a.weights.at(0, b), a.weights.step, loop.dcontext.at(0, b),
                                  loop.dcontext.step, s.C, out);
      gemm_part(g, 0, 1, blocks);
    }
    if (!a.dkeys && !a.dv) return;
    T* out = a.dkeys + b * s.S * s.K;
    for (int64_t i = end * s.K; i < s.S * s.K; ++i) out[i] = 0;
    const T* query = loop.query_of(0, b);
    const int64_t query_step = loop.query_step();
    if (s.dot) {
      const Gemm<T> g =
          of_source(b, loop.dscores.at(0, b), loop.dscores.step, query, query_step, s.K, out);
      gemm_part(g, 0, 1, blocks);
      return;
    }
    for (int64_t k = 0; k < s.K; ++k) dv[k] = 0;
    const ScoredQueries<T> queries{
        s.T, query, query_step, loop.dscores.at(0, b), loop.dscores.step, nullptr, 0};
    attend_backward_source<T>(a, loop.forms, b, queries, forms, out, dv);
  }
  Gemm<T> of_source(int64_t b, const T* from, int64_t from_step, const T* by, int64_t by_step,
                    int64_t width, T* out) const {
    Gemm<T> g{};
    g.M = a.ends[b];
    g.N = g.ldc = width;
    g.K = s.T;
    g.a = from;
    g.a_m = 1;
    g.a_k = from_step;
    g.b = by;
    g.ldb = by_step;
    g.c = out;
    return g;
  }

  void run(const Threads& threads) {
    int64_t work = s.B * s.S * (s.C + s.K) * s.T;
    int64_t a_size = 0, b_size = 0;
    auto measure = [&](const Gemm<T>& g) {
      a_size = max64(a_size, GemmBlocks<T>::a_size(g));
      b_size = max64(b_size, GemmBlocks<T>::b_size(g));
    };
    for (int i = 0; i < count; ++i) {
      work += products[i].M * products[i].N * products[i].K;
      measure(products[i]);
    }
    // The larger of a source's products.
    Gemm<T> of_values{};
    of_values.M = s.S;
    of_values.N = max64(s.C, s.K);
    of_values.K = s.T;
    of_values.a_m = 1;
    of_values.a_k = s.S;
    measure(of_values);
    const int64_t parts = max64(1, min64(min64(threads.count, kMostParts), work / kWorthATask));
    GemmBlocks<T> blocks[kMostParts];
    T *dv = nullptr, *forms[kMostParts];
    auto lay_out = [&](auto& memory) {
      for (int64_t part = 0; part < parts; ++part) {
        blocks[part].a = memory.template take<T>(size_t(a_size));
        blocks[part].b = memory.template take<T>(size_t(b_size));
        forms[part] = memory.template take<T>(size_t(loop.by_forms ? s.T * s.K : 0));
      }
      dv = memory.template take<T>(size_t(s.dot ? 0 : s.B * s.K));
    };
    ScratchSize needed;
    lay_out(needed);
    Scratch scratch(needed.bytes());
    lay_out(scratch);
    run_tasks(threads, parts, [&](int64_t part) {
      const int64_t each = ceil_div(s.B, parts), end = min64((part + 1) * each, s.B);
      for (int64_t b = part * each; b < end; ++b) {
        source(b, blocks[part], dv + b * s.K, forms[part]);
      }
      for (int i = 0; i < count; ++i) gemm_part(products[i], part, parts, blocks[part]);
      if (a.need_weights) biases(part, parts);
    });
    if (a.dv) column_sums(dv, s.B, 0, s.K, s.K, a.dv);
  }
};

template <class Cell, class T>
void decoder_backward(const DecoderBackward<T>& a, const Threads& threads) {
  using Loop = DecoderBackwardLoop<Cell, T>;
  Loop loop{a, a.shape, KeyForms<T>::wanted(a)};
  const DecoderShape& s = a.shape;
  const int64_t rows = rows_a_task(s, decoder_work(s, Cell::kGates), s.T, s.B, threads);
  const int64_t count = ceil_div(s.B, rows);
  typename Loop::Task* tasks = nullptr;
  auto lay_out = [&](auto& memory) {
    tasks = memory.template take<typename Loop::Task>(size_t(count));
    loop.lay_out(memory, tasks, count, rows);
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  loop.pack(threads);
  run_tasks(threads, count, [&](int64_t i) { loop.run(tasks[i]); });
  DecoderDeferred<Cell, T>(loop).run(threads);
}
