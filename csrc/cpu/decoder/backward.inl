// The loop of a decoder's backward pass. It carries the gradients of states only; those of weights,
// keys and values are made of what it leaves behind (deferred.inl).

template <class Cell, class T>
struct DecoderBackwardLoop {
  static constexpr int64_t kGates = Cell::kGates;
  using Row = GradientRow<Cell>;

  const DecoderBackward<T>& a;
  const DecoderShape& s;
  bool by_forms;
  // From gradients of the input sums to the layer's input, of the first layer to x.
  Packed<T> by_x[kMostLayers] = {};
  Packed<T> by_beside = {};          // to what stands beside x
  Packed<T> by_h[kMostLayers] = {};  // from those of the recurrent sums (and of the query) to h
  Packed<T> by_query = {}, by_attended = {};  // W_q and W_c, where attention comes after the cell
  KeyForms<T> forms = {};
  // [Row blocks][H], then of the top layer the query's gradient.
  StepRows<T> dsums[kMostLayers] = {};
  StepRows<T> dquery = {};     // K wide
  StepRows<T> dscores = {};    // S wide
  StepRows<T> dcontext = {};   // C wide
  StepRows<T> dattended = {};  // A wide: dL/d(W_c [context | out] + b_c)

  struct Task {
    int64_t b0, b1;
    int64_t together;  // steps whose gradients of x are made at once
    const T** from;
    T** dx;  // of the same rows
    CellBackwardRow<Cell, T>* cells;
    T* dh;       // [L, rows, H]: into step t, of every path
    T* dout;     // [rows, H]
    T* carried;  // [rows, H]
    T* dbeside;  // [rows, beside]: of what stood beside the input
    T* form;     // [K]
  };

  bool after() const { return s.A > 0; }
  int64_t top() const { return s.L - 1; }
  int64_t gates() const { return kGates * s.H; }
  bool query_beside() const { return !after() && a.w_q; }
  int64_t dsums_row(int64_t l) const {
    return cell::kSums<Cell> * s.H + (l == top() && query_beside() ? s.K : 0);
  }

  template <class Memory>
  void lay_out(Memory& memory, Task* tasks, int64_t count, int64_t rows) {
    auto by_step = [&](int64_t width) {
      return StepRows<T>{memory.template take<T>(size_t(s.T * s.B * width)), s.B * width, width};
    };
    for (int64_t l = 0; l < s.L; ++l) {
      by_x[l].lay_out(memory, gates(), l ? s.H : a.dx.base ? s.E : 0, false);
      by_h[l].lay_out(memory, gates() + (l == top() && query_beside() ? s.K : 0), s.H, false);
      dsums[l] = by_step(dsums_row(l));
    }
    by_beside.lay_out(memory, gates(), s.beside(), false);
    by_query.lay_out(memory, after() && a.w_q ? s.K : 0, s.H, false);
    by_attended.lay_out(memory, s.A, s.A ? s.C + s.H : 0, false);
    if (query_beside()) {
      dquery = dsums[top()];
      dquery.base += cell::kSums<Cell> * s.H;
    } else {
      dquery = by_step(s.K);
    }
    dscores = by_step(s.S);
    dcontext = by_step(s.C);
    dattended = by_step(s.A);
    forms.lay_out(memory, s, s.B, by_forms);
    for (int64_t i = 0; i < count; ++i) {
      Task task{};
      task.b0 = min64(i * rows, s.B);
      task.b1 = min64(task.b0 + rows, s.B);
      task.together = together(rows);
      task.from = memory.template take<const T*>(size_t(task.together * rows));
      task.dx = memory.template take<T*>(size_t(task.together * rows));
      task.cells = memory.template take<CellBackwardRow<Cell, T>>(size_t(rows));
      task.dh = memory.template take<T>(size_t(s.L * rows * s.H));
      task.dout = memory.template take<T>(size_t(rows * s.H));
      task.carried = memory.template take<T>(size_t(rows * s.H));
      task.dbeside = memory.template take<T>(size_t(rows * s.beside()));
      task.form = memory.template take<T>(size_t(by_forms ? s.K : 0));
      if (tasks) tasks[i] = task;
    }
  }

  void pack(const Threads& threads) {
    Packed<T>* all[2 * kMostLayers + 3];
    int count = 0;
    all[count++] = &by_beside;
    for (int64_t l = 0; l < s.L; ++l) {
      const DecoderLayer<T>& layer = a.layers[l];
      for (int i = 0; i < kGates; ++i) {
        const T* block = layer.w_ih + Row::gate(i) * s.H * s.input(l);
        by_x[l].set_rows(i * s.H, block, s.H, s.input(l));
        if (!l) by_beside.set_rows(i * s.H, block + s.E, s.H, s.input(l));
      }
      by_h[l].set_rows(0, layer.w_hh, gates(), s.H);
      all[count++] = &by_x[l];
      all[count++] = &by_h[l];
    }
    if (query_beside()) {
      by_h[top()].set_rows(gates(), a.w_q, s.K, s.H);
    } else if (a.w_q) {
      by_query.set_rows(0, a.w_q, s.K, s.H);
      all[count++] = &by_query;
    }
    if (after()) {
      by_attended.set_rows(0, a.w_c, s.A, s.C + s.H);
      all[count++] = &by_attended;
    }
    pack_all(all, count, threads);
  }

  T* dh_of(Task& task, int64_t l, int64_t i) const {
    return task.dh + (l * (task.b1 - task.b0) + i) * s.H;
  }
  T* dc_of(int64_t l, int64_t b) const { return a.dc0 ? a.dc0 + (l * s.B + b) * s.H : nullptr; }
  const T* query_of(int64_t t, int64_t b) const {
    if (a.saved.query.base) return a.saved.query.at(t, b);
    return after() ? a.saved.out[top()].at(t + 1, b) : a.saved.h[top()].at(t, b);
  }
  int64_t query_step() const {
    if (a.saved.query.base) return a.saved.query.step;
    return after() ? a.saved.out[top()].step : a.saved.h[top()].step;
  }

  void begin(Task& task) {
    const int64_t rows = task.b1 - task.b0;
    for (int64_t i = 0; i < rows; ++i) {
      forms.prepare(a, task.b0 + i);
      for (int64_t l = 0; l < s.L; ++l) {
        const int64_t state = (l * s.B + task.b0 + i) * s.H;
        set_row(dh_of(task, l, i), a.dh_n ? a.dh_n + state : nullptr, s.H);
        if (Cell::kStates == 2) set_row(a.dc0 + state, a.dc_n ? a.dc_n + state : nullptr, s.H);
      }
    }
    for (int64_t i = 0; i < rows * s.beside(); ++i) task.dbeside[i] = 0;
  }
  // out = from, or zero.
  static void set_row(T* out, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = from ? from[i] : T(0);
  }

  // Steps whose gradients of x are made at once, as for the inputs of the forward pass.
  int64_t together(int64_t rows) const {
    return max64(1, min64(s.T, DecoderForwardLoop<Cell, T>::kInputRows / max64(1, rows)));
  }

  // From dL/dcontext to the scores and the query. Returns dL/dquery.
  const T* attend(Task& task, int64_t t, int64_t b) {
    const int64_t end = a.ends[b];
    T *scores = dscores.at(t, b), *query = dquery.at(t, b);
    score_gradients<T>(a.weights.at(t, b), dcontext.at(t, b),
                       a.dweights.base ? a.dweights.at(t, b) : nullptr, a.values + b * s.S * s.C,
                       s.C, end, s.C, a.scale, scores);
    for (int64_t i = end; i < s.S; ++i) scores[i] = 0;
    attend_backward<T>(a, forms, b, query_of(t, b), task.form, scores, query);
    return query;
  }

  // Luong: from the features to the context, the query and the output of the top layer.
  void attend_after(Task& task, int64_t t, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = task.b0 + i;
      const T* y = a.features.at(t, b);
      const T* dy = a.dfeatures.base ? a.dfeatures.at(t, b) : nullptr;
      T* d = dattended.at(t, b);
      for (int64_t u = 0; u < s.A; u += kLanes<T>) {
        const int lanes = int(min64(kLanes<T>, s.A - u));
        Vec<T> sum{};
        if (dy) sum = load(dy + u, lanes);
        if (s.feeds) sum += load(task.dbeside + i * s.A + u, lanes);
        const Vec<T> value = load(y + u, lanes), one = Vec<T>{} + 1;
        store(d + u, sum * (one - value * value), lanes);
      }
      task.from[i] = d;
    }
    by_attended.multiply(rows, task.from, [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
      // A vector may lie across the border of context and output.
      T part[kLanes<T>];
      store(part, sum);
      T* context = dcontext.at(t, task.b0 + i);
      for (int j = 0; j < lanes; ++j) {
        const int64_t u = column + j;
        (u < s.C ? context[u] : task.dout[i * s.H + u - s.C]) = part[j];
      }
    });
    for (int64_t i = 0; i < rows; ++i) task.from[i] = attend(task, t, task.b0 + i);
    if (!a.w_q) {
      for (int64_t i = 0; i < rows; ++i) {
        add_rows<T>(task.dout + i * s.H, task.dout + i * s.H, task.from[i], s.H);
      }
      return;
    }
    by_query.multiply(rows, task.from, [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
      T* out = task.dout + i * s.H + column;
      store(out, load(out, lanes) + sum, lanes);
    });
  }

  void features_before(Task& task, int64_t t, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* dy = a.dfeatures.base ? a.dfeatures.at(t, task.b0 + i) : nullptr;
      set_row(task.dout + i * s.H, dy, s.H);
      set_row(dcontext.at(t, task.b0 + i), dy ? dy + s.H : nullptr, s.C);
    }
  }

  // A layer's cells and what stood in front of them: task.dout goes from its output to its input,
  // task.dh from h of this step to what of h before is not by W_hh.
  void layer(Task& task, int64_t l, int64_t t, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = task.b0 + i;
      T* dh = dh_of(task, l, i);
      add_rows<T>(dh, dh, task.dout + i * s.H, s.H);
      const T* c_prev = nullptr;
      if constexpr (Cell::kStates == 2) {
        c_prev =
            t ? a.saved.cells[l].at(t - 1, b) + Cell::kSavedC * s.H : a.c0 + (l * s.B + b) * s.H;
      }
      task.cells[i] = {a.saved.cells[l].at(t, b), a.saved.h[l].at(t, b), c_prev, dh, dc_of(l, b),
                       task.carried + i * s.H,    dsums[l].at(t, b)};
      task.from[i] = dsums[l].at(t, b);
    }
    cell_rows<T>(task.cells, rows, s.H, nullptr);
    if (l) {
      by_x[l].multiply(rows, task.from, [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
        T* out = task.dout + i * s.H + column;
        store(out, s.residual ? sum + load(out, lanes) : sum, lanes);
      });
    } else if (s.beside()) {
      by_beside.multiply(rows, task.from, [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
        store(task.dbeside + i * s.beside() + column, sum, lanes);
      });
    }
  }

  // dL/dx of the steps [t, end).
  void inputs(Task& task, int64_t t, int64_t end) {
    const int64_t rows = task.b1 - task.b0;
    int64_t i = 0;
    for (int64_t step = t; step < end; ++step) {
      for (int64_t b = task.b0; b < task.b1; ++b, ++i) {
        task.from[i] = dsums[0].at(step, b);
        task.dx[i] = a.dx.at(step, b);
      }
    }
    by_x[0].multiply((end - t) * rows, task.from,
                     [&](int64_t row, int64_t column, Vec<T> sum, int lanes) {
                       store(task.dx[row] + column, sum, lanes);
                     });
  }

  // dL/dh of the step before, by W_hh (and W_q).
  void states(Task& task, int64_t l, int64_t t, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      task.from[i] = dsums[l].at(t, task.b0 + i) + Row::kRecurrent * s.H;
    }
    by_h[l].multiply(rows, task.from, [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
      T* dh = dh_of(task, l, i) + column;
      store(dh, Cell::kCarriesH ? sum + load(dh, lanes) : sum, lanes);
    });
  }

  void step(Task& task, int64_t t) {
    const int64_t rows = task.b1 - task.b0;
    if (after()) {
      attend_after(task, t, rows);
    } else {
      features_before(task, t, rows);
    }
    for (int64_t l = top(); l >= 0; --l) {
      layer(task, l, t, rows);
      if constexpr (Cell::kCarriesH) {
        for (int64_t i = 0; i < rows; ++i) {
          copy_row<T>(dh_of(task, l, i), task.carried + i * s.H, s.H);
        }
      }
      if (l != top() || after()) states(task, l, t, rows);
    }
    if (after()) return;
    for (int64_t i = 0; i < rows; ++i) {
      T* context = dcontext.at(t, task.b0 + i);
      add_rows<T>(context, context, task.dbeside + i * s.C, s.C);
      attend(task, t, task.b0 + i);
    }
    states(task, top(), t, rows);
    for (int64_t i = 0; i < rows && !a.w_q; ++i) {
      T* dh = dh_of(task, top(), i);
      add_rows<T>(dh, dh, dquery.at(t, task.b0 + i), s.H);
    }
  }

  void run(Task& task) {
    begin(task);
    const int64_t rows = task.b1 - task.b0;
    for (int64_t t = s.T - 1, end = s.T; t >= 0; --t) {
      step(task, t);
      if (!a.dx.base || (t && end - t < task.together)) continue;
      inputs(task, t, end);
      end = t;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = task.b0 + i;
      for (int64_t l = 0; l < s.L; ++l) {
        copy_row<T>(a.dh0 + (l * s.B + b) * s.H, dh_of(task, l, i), s.H);
      }
      if (a.dfeed0) set_row(a.dfeed0 + b * s.A, s.feeds ? task.dbeside + i * s.A : nullptr, s.A);
    }
  }
};
