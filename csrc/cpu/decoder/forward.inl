// The forward pass of a decoder: tasks are some of the sequences, through all steps.

// Adds up what the cells of a layer start from: [sums][H].
template <class Cell, class T>
void sum_biases(const DecoderLayer<T>& layer, int64_t H, T* out) {
  constexpr int kGates = Cell::kGates, kApart = Cell::kApart;
  for (int sum = 0; sum < cell::kSums<Cell>; ++sum) {
    const bool own = sum >= kGates, apart = sum == kApart;
    const int64_t first = (own ? kApart : sum) * H;
    for (int64_t u = 0; u < H; ++u) {
      T value = 0;
      if (layer.b_ih && !own) value += layer.b_ih[first + u];
      if (layer.b_hh && !apart) value += layer.b_hh[first + u];
      *out++ = value;
    }
  }
}

template <class Cell, class T>
struct DecoderForwardLoop {
  static constexpr int64_t kGates = Cell::kGates;
  // Rows of inputs that are multiplied at once, of several steps: for fewer, weights that no near
  // cache holds are read more often than they need be.
  static constexpr int64_t kInputRows = 96;

  const DecoderForward<T>& a;
  const DecoderShape& s;
  // Those that share the products of a step, where all sequences are one task's.
  Threads inner;
  bool by_forms;                     // whether scores are made of exponentials
  Packed<T> by_x[kMostLayers] = {};  // W_ih, of the first layer the columns of x
  Packed<T> by_beside = {};          // the others of the first layer
  // W_hh, and W_q below that of the top layer where it reads the same h.
  Packed<T> by_h[kMostLayers] = {};
  Packed<T> by_out = {}, by_attended = {};  // W_q, W_c, where attention comes after the cell
  Likeliest<T> vocabulary = {};
  KeyForms<T> forms = {};
  T* bias[kMostLayers] = {};

  struct Task {
    int64_t b0, b1;
    int64_t* live;  // the sequences that go on
    const T** from;
    int64_t together;  // steps whose inputs there is room for
    T* inputs;         // [together, rows, G*H]: sums of the inputs of the steps [first, known)
    int64_t first, known;
    T* from_x;    // [rows, G*H], of a layer above the first
    T* from_h;    // [rows, G*H], of a layer below the top
    T* from_top;  // [rows, G*H + K], of the top layer's h: its sums, and the query beside them
    CellForwardRow<Cell, T>* cells;
    T* c;      // [L, rows, H]
    T* query;  // [rows, K], where it is not saved
    T* form;   // [K]
    T* read;   // [rows, a.read()]: what w_out reads
    T* best;   // of Likeliest
    int64_t* likeliest;
  };

  bool after() const { return s.A > 0; }
  int64_t top() const { return s.L - 1; }
  int64_t gates() const { return kGates * s.H; }
  bool reads_apart() const { return a.w_out && (a.reads_x || a.read_factor.base); }
  bool chooses() const { return a.w_out && a.forced; }
  // Steps whose inputs may be multiplied at once. With a factor they are no rows of a table, and
  // sequences that end leave gaps.
  int64_t together(int64_t rows) const {
    if (a.x_factor.base || a.end_token >= 0) return 1;
    return max64(1, min64(s.T, kInputRows / max64(1, rows)));
  }
  int64_t by_h_width() const { return gates() + (!after() && a.w_q ? s.K : 0); }

  template <class Memory>
  void lay_out(Memory& memory, Task* tasks, int64_t count, int64_t rows) {
    for (int64_t l = 0; l < s.L; ++l) {
      by_x[l].lay_out(memory, gates(), l ? s.H : s.E, true);
      by_h[l].lay_out(memory, l == top() ? by_h_width() : gates(), s.H, true);
      bias[l] = memory.template take<T>(size_t(cell::kSums<Cell> * s.H));
    }
    by_beside.lay_out(memory, gates(), s.beside(), true);
    by_out.lay_out(memory, after() && a.w_q ? s.K : 0, s.H, true);
    by_attended.lay_out(memory, s.A, s.A ? s.C + s.H : 0, true);
    vocabulary.weights.lay_out(memory, chooses() ? s.V : 0, chooses() ? a.read() : 0, true);
    forms.lay_out(memory, s, s.B / s.width, by_forms);
    for (int64_t i = 0; i < count; ++i) {
      Task task{};
      task.b0 = min64(i * rows, s.B);
      task.b1 = min64(task.b0 + rows, s.B);
      task.live = memory.template take<int64_t>(size_t(rows));
      task.together = together(rows);
      task.from = memory.template take<const T*>(size_t(task.together * rows));
      task.inputs = memory.template take<T>(size_t(task.together * rows * gates()));
      task.from_x = memory.template take<T>(size_t(s.L > 1 ? rows * gates() : 0));
      task.from_h = memory.template take<T>(size_t(s.L > 1 ? rows * gates() : 0));
      task.from_top = memory.template take<T>(size_t(rows * by_h_width()));
      task.cells = memory.template take<CellForwardRow<Cell, T>>(size_t(rows));
      task.c = memory.template take<T>(size_t(s.L * rows * s.H));
      task.query = memory.template take<T>(size_t(a.saved.query.base ? 0 : rows * s.K));
      task.form = memory.template take<T>(size_t(by_forms ? s.K : 0));
      task.read = memory.template take<T>(size_t(reads_apart() ? rows * a.read() : 0));
      const int64_t parts = chooses() ? min64(inner.count, kMostParts) : 0;
      task.best = memory.template take<T>(size_t(parts * rows));
      task.likeliest = memory.template take<int64_t>(size_t(parts * rows));
      if (tasks) tasks[i] = task;
    }
  }

  void pack(const Threads& threads) {
    Packed<T>* all[2 * kMostLayers + 4];
    int count = 0;
    by_beside.set_rows(0, a.layers[0].w_ih + s.E, gates(), s.input(0));
    all[count++] = &by_beside;
    for (int64_t l = 0; l < s.L; ++l) {
      const DecoderLayer<T>& layer = a.layers[l];
      by_x[l].set_rows(0, layer.w_ih, gates(), s.input(l));
      by_h[l].set_rows(0, layer.w_hh, gates(), s.H);
      sum_biases<Cell>(layer, s.H, bias[l]);
      all[count++] = &by_x[l];
      all[count++] = &by_h[l];
    }
    if (a.w_q && after()) {
      by_out.set_rows(0, a.w_q, s.K, s.H);
      all[count++] = &by_out;
    } else if (a.w_q) {
      by_h[top()].set_rows(gates(), a.w_q, s.K, s.H);
    }
    if (after()) {
      by_attended.set_rows(0, a.w_c, s.A, s.C + s.H);
      all[count++] = &by_attended;
    }
    if (chooses()) {
      vocabulary.weights.set_rows(0, a.w_out, s.V, a.read());
      vocabulary.b = a.b_out;
      all[count++] = &vocabulary.weights;
    }
    pack_all(all, count, threads);
  }

  void begin(Task& task) {
    for (int64_t b = task.b0; b < task.b1; ++b) {
      task.live[b - task.b0] = b;
      forms.prepare(a, b);
      for (int64_t l = 0; l < s.L; ++l) {
        copy_row(a.saved.h[l].at(0, b), a.h0 + (l * s.B + b) * s.H, s.H);
        if (Cell::kStates == 2) copy_row(c_of(task, l, b), a.c0 + (l * s.B + b) * s.H, s.H);
      }
    }
  }
  T* c_of(Task& task, int64_t l, int64_t b) const {
    return task.c + (l * (task.b1 - task.b0) + b - task.b0) * s.H;
  }
  T* query_of(Task& task, int64_t t, int64_t b) const {
    return a.saved.query.base ? a.saved.query.at(t, b) : task.query + (b - task.b0) * s.K;
  }

  // Finds the tokens that step t is fed, of the first `count` live sequences; those that have ended
  // leave. Returns how many go on.
  int64_t choose(Task& task, int64_t t, int64_t count) {
    const bool given = t < s.T && (!a.forced || a.forced[t]);
    if (!given) {
      for (int64_t i = 0; i < count; ++i) task.from[i] = read(task, t - 1, i);
      vocabulary.find(count, task.from, task.best, task.likeliest, inner);
    }
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = task.live[i];
      const int64_t token = given ? a.tokens[b * s.T + t] : task.likeliest[i];
      if (a.used) a.used[b * a.used_row + t] = token;
      if (t == s.T) continue;
      if (!given && token == a.end_token) {
        end(task, t, b);
        continue;
      }
      task.live[left++] = b;
      T* x = a.saved.input.at(t, b);
      copy_row(x, a.table + token * s.E, s.E);
      if (a.x_factor.base) multiply_row(x, a.x_factor.at(t, b), s.E);
    }
    return left;
  }

  // What w_out reads of step t, of the i-th live sequence.
  const T* read(Task& task, int64_t t, int64_t i) {
    const int64_t b = task.live[i];
    const T* features = a.features.at(t, b);
    if (!reads_apart()) return features;
    T* row = task.read + i * a.read();
    copy_row(row, features, s.features());
    if (a.reads_x) copy_row<T>(row + s.features(), a.saved.input.at(t, b), s.E);
    if (a.read_factor.base) multiply_row(row, a.read_factor.at(t, b), a.read());
    return row;
  }
  static void multiply_row(T* row, const T* by, int64_t n) {
    for (int64_t i = 0; i < n; ++i) row[i] *= by[i];
  }

  // One layer's cells, from the sums of its input.
  void cells(Task& task, int64_t l, int64_t t, int64_t count) {
    const bool highest = l == top();
    const T* from_h = highest ? task.from_top : task.from_h;
    const int64_t width = highest ? by_h_width() : gates();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = task.live[i];
      T* c = Cell::kStates == 2 ? c_of(task, l, b) : nullptr;
      task.cells[i] = {l ? task.from_x + i * gates() : inputs_of(task, t, b),
                       from_h + i * width,
                       a.saved.h[l].at(t, b),
                       c,
                       a.saved.h[l].at(t + 1, b),
                       c,
                       a.save ? a.saved.cells[l].at(t, b) : nullptr};
    }
    cell_rows(task.cells, count, s.H, bias[l]);
  }

  void multiply(const Packed<T>& packed, int64_t count, const T* const* from, T* out,
                int64_t width) {
    packed.multiply(
        count, from,
        [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
          store(out + i * width + column, sum, lanes);
        },
        inner);
  }

  void layers(Task& task, int64_t t, int64_t count) {
    for (int64_t l = 0; l < s.L; ++l) {
      // Attention before the cell has made the top layer's with the query.
      if (l != top() || after()) multiply_h(task, l, t, count);
      if (l) {
        for (int64_t i = 0; i < count; ++i) {
          task.from[i] = a.saved.out[l - 1].at(t + 1, task.live[i]);
        }
        multiply(by_x[l], count, task.from, task.from_x, gates());
      } else {
        multiply_input(task, t, count);
      }
      cells(task, l, t, count);
      for (int64_t i = 0; i < count && s.residual && l; ++i) {
        const int64_t b = task.live[i];
        add_rows<T>(a.saved.out[l].at(t + 1, b), a.saved.h[l].at(t + 1, b),
                    a.saved.out[l - 1].at(t + 1, b), s.H);
      }
    }
  }

  T* inputs_of(Task& task, int64_t t, int64_t b) const {
    return task.inputs + ((t - task.first) * (task.b1 - task.b0) + b - task.b0) * gates();
  }

  // The first layer's sums of x, of all steps from t on whose inputs are known, as far as there is
  // room; then those of what stands beside x.
  void multiply_input(Task& task, int64_t t, int64_t count) {
    const int64_t rows = task.b1 - task.b0;
    if (t >= task.known) {
      const int64_t most = min64(s.T, t + task.together);
      task.first = t;
      task.known = t + 1;
      while (task.known < most && (!a.forced || a.forced[task.known])) ++task.known;
      for (int64_t i = 0; i < count; ++i) task.from[i] = a.saved.input.at(t, task.live[i]);
      for (int64_t later = t + 1; later < task.known; ++later) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t b = task.live[i];
          task.from[(later - t) * rows + i] =
              a.tokens ? a.table + a.tokens[b * s.T + later] * s.E : a.x.at(later, b);
        }
      }
      by_x[0].multiply((task.known - t - 1) * rows + count, task.from,
                       [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
                         const int64_t row = i < count ? task.live[i] - task.b0 : i;
                         store(task.inputs + row * gates() + column, sum, lanes);
                       },
                       inner);
    }
    if (s.beside() == 0) return;
    for (int64_t i = 0; i < count; ++i) task.from[i] = a.saved.input.at(t, task.live[i]) + s.E;
    by_beside.multiply(
        count, task.from,
        [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
          T* out = inputs_of(task, t, task.live[i]) + column;
          store(out, load(out, lanes) + sum, lanes);
        },
        inner);
  }

  // The recurrent sums of a layer; where by_h has W_q too, the query beside them.
  void multiply_h(Task& task, int64_t l, int64_t t, int64_t count) {
    for (int64_t i = 0; i < count; ++i) task.from[i] = a.saved.h[l].at(t, task.live[i]);
    if (l == top()) {
      multiply(by_h[l], count, task.from, task.from_top, by_h_width());
    } else {
      multiply(by_h[l], count, task.from, task.from_h, gates());
    }
  }

  void attend_before(Task& task, int64_t t, int64_t count) {
    multiply_h(task, top(), t, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = task.live[i];
      const T* query = a.saved.h[top()].at(t, b);
      if (a.w_q) {
        T* kept = query_of(task, t, b);
        copy_row<T>(kept, task.from_top + i * by_h_width() + gates(), s.K);
        query = kept;
      }
      attend<T>(a, forms, b, query, task.form, a.weights.at(t, b), a.saved.input.at(t, b) + s.E);
    }
  }

  void attend_after(Task& task, int64_t t, int64_t count) {
    if (a.w_q) {
      for (int64_t i = 0; i < count; ++i) task.from[i] = a.saved.out[top()].at(t + 1, task.live[i]);
      by_out.multiply(
          count, task.from,
          [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
            store(query_of(task, t, task.live[i]) + column, sum, lanes);
          },
          inner);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = task.live[i];
      const T* out = a.saved.out[top()].at(t + 1, b);
      T* attended = a.saved.attended.at(t, b);
      attend<T>(a, forms, b, a.w_q ? query_of(task, t, b) : out, task.form, a.weights.at(t, b),
                attended);
      copy_row(attended + s.C, out, s.H);
      task.from[i] = attended;
    }
    by_attended.multiply(
        count, task.from,
        [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
          if (a.b_c) sum += load(a.b_c + column, lanes);
          store(a.features.at(t, task.live[i]) + column, tanh(sum), lanes);
        },
        inner);
  }

  void step(Task& task, int64_t t, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = task.live[i];
      T* input = a.saved.input.at(t, b);
      if (!a.tokens) copy_row(input, a.x.at(t, b), s.E);
      if (!s.feeds) continue;
      if (t) {
        copy_row<T>(input + s.E, a.features.at(t - 1, b), s.A);
      } else if (a.feed0) {
        copy_row(input + s.E, a.feed0 + b * s.A, s.A);
      } else {
        for (int64_t u = 0; u < s.A; ++u) input[s.E + u] = 0;
      }
    }
    if (!after()) attend_before(task, t, count);
    layers(task, t, count);
    if (after()) {
      attend_after(task, t, count);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = task.live[i];
      copy_row<T>(a.features.at(t, b), a.saved.out[top()].at(t + 1, b), s.H);
      copy_row<T>(a.features.at(t, b) + s.H, a.saved.input.at(t, b) + s.E, s.C);
    }
  }

  // The final states of sequence b after `steps` steps.
  void finish(Task& task, int64_t steps, int64_t b) {
    for (int64_t l = 0; l < s.L; ++l) {
      copy_row<T>(a.h_n + (l * s.B + b) * s.H, a.saved.h[l].at(steps, b), s.H);
      if (Cell::kStates == 2) copy_row<T>(a.c_n + (l * s.B + b) * s.H, c_of(task, l, b), s.H);
    }
  }

  // What a sequence that ends before step t leaves behind: zeros, and its last states.
  void end(Task& task, int64_t t, int64_t b) {
    finish(task, t, b);
    for (int64_t later = t; later < s.T; ++later) {
      for (int64_t u = 0; u < s.features(); ++u) a.features.at(later, b)[u] = 0;
      for (int64_t i = 0; i < s.S; ++i) a.weights.at(later, b)[i] = 0;
    }
    for (int64_t later = t + 1; later < a.used_row && a.used; ++later) {
      a.used[b * a.used_row + later] = a.end_token;
    }
  }

  void run(Task& task) {
    begin(task);
    int64_t count = task.b1 - task.b0;
    for (int64_t t = 0; t < s.T && count; ++t) {
      if (a.tokens) count = choose(task, t, count);
      step(task, t, count);
    }
    for (int64_t i = 0; i < count; ++i) finish(task, s.T, task.live[i]);
    if (a.used && a.used_row > s.T && count) choose(task, s.T, count);
  }
};

// Sequences need nothing from each other: a share of `groups`, of `width` rows each, a thread.
inline int64_t rows_a_task(const DecoderShape& s, int64_t work, int64_t steps, int64_t groups,
                           const Threads& threads) {
  constexpr int64_t kWorthSharing = int64_t(1) << 18;
  const bool worth = work * steps * s.B >= kWorthSharing;
  return max64(1, ceil_div(groups, worth ? threads.count : 1)) * s.width;
}

// Multiply-adds of a step and sequence.
inline int64_t decoder_work(const DecoderShape& s, int64_t gates) {
  int64_t work = s.K * s.H + s.S * (s.K + s.C) + s.A * (s.C + s.H);
  for (int64_t l = 0; l < s.L; ++l) work += gates * s.H * (s.input(l) + s.H);
  return work;
}

template <class Cell, class T>
void decoder_forward(const DecoderForward<T>& a, const Threads& threads) {
  using Loop = DecoderForwardLoop<Cell, T>;
  const DecoderShape& s = a.shape;
  const int64_t rows = rows_a_task(s, decoder_work(s, Cell::kGates), s.T, s.B, threads);
  const int64_t count = ceil_div(s.B, rows);
  Loop loop{a, a.shape, count == 1 ? threads : Threads{1, nullptr}, KeyForms<T>::wanted(a)};
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
}
