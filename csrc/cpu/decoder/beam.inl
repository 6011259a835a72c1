// Beam search: the loop of the forward pass over the hypotheses of each source, `width` rows for
// each, and between its steps the choice of those that go on.

// The k largest of x [n], descending, the first of equals first; minus infinity is never one.
// Returns how many there are.
template <class T>
int64_t largest_of(const T* x, int64_t n, int64_t k, T* value, int64_t* index) {
  constexpr int N = kLanes<T>;
  constexpr T kLowest = -__builtin_huge_val();
  int64_t found = 0;
  T least = kLowest;
  for (int64_t i = 0; i < n; i += N) {
    const int lanes = int(min64(N, n - i));
    if (lanes == N && largest_lane<T>(load(x + i)) <= least) continue;
    for (int64_t j = i; j < i + lanes; ++j) {
      if (!(x[j] > least)) continue;
      int64_t at = found < k ? found++ : k - 1;
      for (; at > 0 && value[at - 1] < x[j]; --at) {
        value[at] = value[at - 1];
        index[at] = index[at - 1];
      }
      value[at] = x[j];
      index[at] = j;
      if (found == k) least = value[k - 1];
    }
  }
  return found;
}

// log(sum of e^x) of x [n]; NaN where there is one, or an infinity above.
template <class T>
double log_sum_of_powers(const T* x, int64_t n) {
  constexpr int N = kLanes<T>;
  const T largest = largest_of_all(x, n);
  Vec<T> total{};
  for (int64_t i0 = 0; i0 < n; i0 += N * kChain) {
    Vec<T> sum{};
    for (int64_t i = i0; i < min64(i0 + N * kChain, n); i += N) {
      const int lanes = int(min64(N, n - i));
      const Vec<T> power = exp_below_zero<T>(load(x + i, lanes) - largest);
      sum += lanes < N ? first_lanes<T>(power, lanes) : power;
    }
    total += sum;
  }
  return double(largest) + __builtin_log(double(sum_of_lanes<T>(total)));
}

template <class Cell, class T>
struct DecoderBeamLoop {
  using Loop = LogitsLoop<Cell, T>;

  const DecoderBeams<T>& a;
  const DecoderShape& s;
  Loop loop;

  // A hypothesis and a token after it.
  struct Continuation {
    double score;
    int64_t parent, token;
  };
  // A source's search. Rows of hypotheses are those of the loop.
  struct Source {
    int64_t live;      // hypotheses in the beam
    int64_t finished;  // those that have ended among the likeliest
    bool done;
  };
  struct Task {
    typename Loop::Task rows;
    Source* sources;
    double* scores;   // [rows]: log-probabilities, descending in each beam
    int64_t* tokens;  // [rows, most]: what was written
    int64_t* before;  // [width, most]: the same, a step ago
    T* spare;         // [width, widest state]
    T* logits;        // [rows, V]
    T* value;         // [most_next()]
    int64_t* index;
    Continuation* next;  // [most_next()]
  };

  // One continuation of each hypothesis may be its end.
  int64_t most_next() const { return 2 * a.width; }
  int64_t widest() const { return max64(s.H, s.A); }

  template <class Memory>
  void lay_out(Memory& memory, DecoderForward<T>& rows, Task* tasks, int64_t count,
               int64_t rows_a_task, typename Loop::Task* loops) {
    loop.lay_out(memory, rows, loops, count, rows_a_task);
    for (int64_t i = 0; i < count; ++i) {
      Task task{};
      task.sources = memory.template take<Source>(size_t(rows_a_task / a.width));
      task.scores = memory.template take<double>(size_t(rows_a_task));
      task.tokens = memory.template take<int64_t>(size_t(rows_a_task * a.most));
      task.before = memory.template take<int64_t>(size_t(a.width * a.most));
      task.spare = memory.template take<T>(size_t(a.width * widest()));
      task.logits = memory.template take<T>(size_t(rows_a_task * s.V));
      task.value = memory.template take<T>(size_t(most_next()));
      task.index = memory.template take<int64_t>(size_t(most_next()));
      task.next = memory.template take<Continuation>(size_t(most_next()));
      if (!tasks) continue;
      task.rows = loops[i];
      tasks[i] = task;
    }
  }

  int64_t* tokens_of(Task& task, int64_t row) const {
    return task.tokens + (row - task.rows.b0) * a.most;
  }
  double& score_of(Task& task, int64_t row) const { return task.scores[row - task.rows.b0]; }

  void begin(Task& task) {
    for (int64_t row = task.rows.b0; row < task.rows.b1; row += a.width) {
      const int64_t b = row / a.width;
      loop.forms.prepare(loop.a, b);
      task.sources[(row - task.rows.b0) / a.width] = {1, 0, false};
      score_of(task, row) = 0;
      for (int64_t l = 0; l < s.L; ++l) {
        const int64_t state = (l * a.sources + b) * s.H;
        copy_row(loop.a.saved.h[l].at(0, row), loop.a.h0 + state, s.H);
        if (Cell::kStates == 2) copy_row(loop.c_of(task.rows, l, row), loop.a.c0 + state, s.H);
      }
      loop.feed(row, a.start[b]);
    }
  }

  // A finished hypothesis competes for the best of its source. `last`: a token after `tokens`, or
  // -1.
  void finish(int64_t b, const int64_t* tokens, int64_t count, int64_t last, double score) {
    const int64_t length = count + (last >= 0);
    const double ranked = score / a.penalty[length];
    double* scores = a.scores + b * a.n_best;
    int64_t* lengths = a.lengths + b * a.n_best;
    int64_t at = a.n_best;
    while (at > 0 && scores[at - 1] < ranked) --at;
    if (at == a.n_best) return;
    auto best = [&](int64_t i) { return a.tokens + (b * a.n_best + i) * a.most; };
    for (int64_t i = a.n_best - 1; i > at; --i) {
      scores[i] = scores[i - 1];
      lengths[i] = lengths[i - 1];
      for (int64_t t = 0; t < a.most; ++t) best(i)[t] = best(i - 1)[t];
    }
    scores[at] = ranked;
    lengths[at] = length;
    for (int64_t t = 0; t < a.most; ++t) best(at)[t] = t < count ? tokens[t] : 0;
    if (last >= 0) best(at)[count] = last;
  }

  // Whether `token` after `count` others would hold n tokens in a row that were there before.
  bool repeats(const int64_t* tokens, int64_t count, int64_t token) const {
    const int64_t n = a.no_repeat;
    for (int64_t from = 0; n && from + n <= count; ++from) {
      bool same = tokens[from + n - 1] == token;
      for (int64_t i = 0; i + 1 < n && same; ++i) {
        same = tokens[from + i] == tokens[count - n + 1 + i];
      }
      if (same) return true;
    }
    return false;
  }

  // The likeliest continuations of all hypotheses of a source, to task.next; returns how many, or
  // -1 where logits are no numbers. `logits`: of its first hypothesis.
  int64_t continue_all(Task& task, int64_t row, const Source& source, int64_t length, T* logits) {
    const int64_t most = most_next(), b = row / a.width;
    int64_t count = 0;
    for (int64_t w = 0; w < source.live; ++w, logits += s.V) {
      const double log_sum = log_sum_of_powers(logits, s.V);
      if (!(log_sum - log_sum == 0)) return -1;
      const int64_t* tokens = tokens_of(task, row + w);
      if (a.ends && length <= a.min_length) logits[a.ends[b]] = -__builtin_huge_val();
      for (int64_t from = a.no_repeat - 1; a.no_repeat && from < length - 1; ++from) {
        const int64_t token = tokens[from];
        if (repeats(tokens, length - 1, token)) logits[token] = -__builtin_huge_val();
      }
      const int64_t found = largest_of(logits, s.V, min64(most, s.V), task.value, task.index);
      for (int64_t i = 0; i < found; ++i) {
        const double score = score_of(task, row + w) + (double(task.value[i]) - log_sum);
        if (count == most && !(score > task.next[most - 1].score)) break;
        int64_t at = count < most ? count++ : most - 1;
        for (; at > 0 && task.next[at - 1].score < score; --at) task.next[at] = task.next[at - 1];
        task.next[at] = {score, w, task.index[i]};
      }
    }
    return count;
  }

  // The beam of the next step; hypotheses that end leave it. `length`: tokens with this step's.
  void choose(Task& task, int64_t row, Source& source, int64_t length, T* logits) {
    const int64_t b = row / a.width, count = continue_all(task, row, source, length, logits);
    if (count <= 0) {
      if (count < 0) __atomic_store_n(a.not_numbers, 1, __ATOMIC_RELAXED);
      for (int64_t w = 0; w < source.live && count == 0; ++w) {
        finish(b, tokens_of(task, row + w), length - 1, -1, score_of(task, row + w));
      }
      source.done = true;
      return;
    }
    int64_t going = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Continuation next = task.next[i];
      if (a.ends && next.token == a.ends[b]) {
        if (i >= a.width) continue;
        finish(b, tokens_of(task, row + next.parent), length - 1, next.token, next.score);
        ++source.finished;
      } else if (going < a.width) {
        task.next[going++] = next;
      }
    }
    follow(task, row, source.live, going, length);
    source.live = going;
    for (int64_t w = 0; w < going && length == a.most; ++w) {
      finish(b, tokens_of(task, row + w), length, -1, score_of(task, row + w));
    }
    source.done = length == a.most || going == 0 || enough(source, b, score_of(task, row));
  }
  bool enough(const Source& source, int64_t b, double best_in_beam) const {
    if (a.early_stop) return source.finished >= a.width;
    // Log-probabilities only fall, and no penalty is larger than that of the full length.
    return a.scores[(b + 1) * a.n_best - 1] >= best_in_beam / a.penalty[a.most];
  }

  // Tokens, scores and states of the `going` hypotheses of task.next, from those of `live` parents.
  void follow(Task& task, int64_t row, int64_t live, int64_t going, int64_t length) {
    for (int64_t i = 0; i < live * a.most; ++i) task.before[i] = tokens_of(task, row)[i];
    bool moves = false;
    for (int64_t w = 0; w < going; ++w) {
      const Continuation& next = task.next[w];
      int64_t* tokens = tokens_of(task, row + w);
      for (int64_t t = 0; t < length - 1; ++t) tokens[t] = task.before[next.parent * a.most + t];
      tokens[length - 1] = next.token;
      score_of(task, row + w) = next.score;
      moves |= next.parent != w;
      loop.feed(row + w, next.token);
    }
    auto gather = [&](T* rows, int64_t width) {
      for (int64_t i = 0; i < live * width; ++i) task.spare[i] = rows[i];
      for (int64_t w = 0; w < going; ++w) {
        copy_row<T>(rows + w * width, task.spare + task.next[w].parent * width, width);
      }
    };
    if (!moves) return;
    for (int64_t l = 0; l < s.L; ++l) {
      gather(loop.a.saved.h[l].at(0, row), s.H);
      if (Cell::kStates == 2) gather(loop.c_of(task.rows, l, row), s.H);
    }
    if (s.feeds) gather(loop.a.features.at(0, row), s.A);
  }

  void run(Task& task) {
    begin(task);
    for (int64_t t = 0; t < a.most; ++t) {
      int64_t count = 0;
      for (int64_t row = task.rows.b0; row < task.rows.b1; row += a.width) {
        const Source& source = task.sources[(row - task.rows.b0) / a.width];
        for (int64_t w = 0; w < source.live && !source.done; ++w) {
          task.rows.live[count++] = row + w;
        }
      }
      if (!count) return;
      loop.step(task.rows, t, count);
      loop.logits(task.rows, t, count, task.logits);
      T* logits = task.logits;
      for (int64_t row = task.rows.b0; row < task.rows.b1; row += a.width) {
        Source& source = task.sources[(row - task.rows.b0) / a.width];
        if (source.done) continue;
        const int64_t live = source.live;
        choose(task, row, source, t + 1, logits);
        logits += live * s.V;
      }
    }
  }
};

template <class Cell, class T>
void decoder_beams(const DecoderBeams<T>& a, const Threads& threads) {
  using Beams = DecoderBeamLoop<Cell, T>;
  DecoderForward<T> rows = a.rows;
  const DecoderShape& s = rows.shape;
  const int64_t work = decoder_work(s, Cell::kGates) + s.V * rows.read();
  const int64_t each = rows_a_task(s, work, a.most, a.sources, threads);
  const int64_t count = ceil_div(s.B, each);
  const Threads inner = count == 1 ? threads : Threads{1, nullptr};
  Beams beams{a, s, {{rows, s, inner, KeyForms<T>::wanted(rows)}}};
  typename Beams::Task* tasks = nullptr;
  typename Beams::Loop::Task* loops = nullptr;
  auto lay_out = [&](auto& memory) {
    tasks = memory.template take<typename Beams::Task>(size_t(count));
    loops = memory.template take<typename Beams::Loop::Task>(size_t(count));
    beams.lay_out(memory, rows, tasks, count, each, loops);
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  beams.loop.pack(threads);
  run_tasks(threads, count, [&](int64_t i) { beams.run(tasks[i]); });
}
