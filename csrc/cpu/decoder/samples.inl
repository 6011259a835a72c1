// Sampling: the loop of the forward pass, and after each of its steps a token drawn for every row.

// The largest of x [n], n > 0; where there is a NaN, anything.
template <class T>
T largest_of_all(const T* x, int64_t n) {
  T largest = x[0];
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    if (n - i >= kLanes<T>) {
      const T most = largest_lane<T>(load(x + i));
      largest = most > largest ? most : largest;
      continue;
    }
    for (int64_t j = i; j < n; ++j) largest = x[j] > largest ? x[j] : largest;
  }
  return largest;
}

// Draws tokens from softmax(logits / temperature), or from what top_k and then top_p leave of it.
struct Draw {
  double temperature;
  int64_t top_k;  // at least 1; V or more: all
  double top_p;
  int64_t V;

  static constexpr int64_t kBlock = 64;

  struct Room {
    double* p;       // [V]
    double* blocks;  // [blocks of V]: sums of p
    int64_t* order;  // [V]
  };
  template <class Memory>
  Room lay_out(Memory& memory) const {
    return {memory.template take<double>(size_t(V)),
            memory.template take<double>(size_t(ceil_div(V, kBlock))),
            memory.template take<int64_t>(size_t(V))};
  }

  // The token at which the CDF passes `drawn` in [0, 1); -1 where logits are no distribution.
  template <class T>
  int64_t token(const T* logits, double drawn, const Room& room) const {
    const double total = powers(logits, room);
    if (!(total - total == 0)) return -1;
    if (top_k >= V && top_p >= 1) return in_order(drawn * total, room);
    return of_the_best(drawn, total, room);
  }

 private:
  // To room.p e^((logits - largest) / temperature), and their sum. (Less the largest before the
  // division: a small temperature must not overflow.)
  template <class T>
  double powers(const T* logits, const Room& room) const {
    const double largest = double(largest_of_all(logits, V));
    double total = 0;
    for (int64_t first = 0; first < V; first += kBlock) {
      const int64_t end = min64(first + kBlock, V);
      for (int64_t i = first; i < end; ++i) {
        room.p[i] = (double(logits[i]) - largest) / temperature;
      }
      VecD sum{};
      for (int64_t i = first; i < end; i += kLanes<double>) {
        const int lanes = int(min64(kLanes<double>, end - i));
        const VecD power = exp_below_zero<double>(load(room.p + i, lanes));
        store(room.p + i, power, lanes);
        sum += lanes < kLanes<double> ? first_lanes<double>(power, lanes) : power;
      }
      total += room.blocks[first / kBlock] = sum_of_lanes<double>(sum);
    }
    return total;
  }

  // The first token whose CDF is above `target`: never one of probability zero.
  int64_t in_order(double target, const Room& room) const {
    double before = 0;
    int64_t last = 0;
    for (int64_t first = 0; first < V; first += kBlock) {
      const double sum = room.blocks[first / kBlock];
      if (before + sum > target || first + kBlock >= V) {
        double cdf = before;
        for (int64_t i = first; i < min64(first + kBlock, V); ++i) {
          cdf += room.p[i];
          if (cdf > target) return i;
          if (room.p[i] > 0) last = i;
        }
        // A block's own sum is rounded otherwise.
        if (before + sum > target) return last;
      }
      before += sum;
    }
    return last;
  }

  bool better(const double* p, int64_t i, int64_t j) const {
    return p[i] > p[j] || (p[i] == p[j] && i < j);
  }
  // Lets the root of a heap of n, the best on top, sink to its place.
  void sink(const double* p, int64_t* heap, int64_t at, int64_t n) const {
    const int64_t moved = heap[at];
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
      if (child + 1 < n && better(p, heap[child + 1], heap[child])) ++child;
      if (!better(p, heap[child], moved)) break;
      heap[at] = heap[child];
    }
    heap[at] = moved;
  }

  // No token below this is among those kept.
  double least(double total, const double* p) const {
    // Those below it hold less than half of what the nucleus leaves out.
    if (top_k >= V) return (1 - top_p) * total / double(2 * V);
    // Each of top_k groups has one that is as large as the smallest of their maxima.
    const int64_t group = V / top_k;
    double smallest = __builtin_huge_val();
    for (int64_t k = 0; k < top_k; ++k) {
      const double most = largest_of_all(p + k * group, group);
      smallest = most < smallest ? most : smallest;
    }
    return smallest;
  }

  int64_t of_the_best(double drawn, double total, const Room& room) const {
    const double* p = room.p;
    int64_t* heap = room.order;
    const double bound = least(total, p);
    int64_t count = 0;
    for (int64_t i = 0; i < V; ++i) {
      heap[count] = i;
      count += p[i] >= bound;
    }
    for (int64_t i = count / 2; i-- > 0;) sink(p, heap, i, count);
    // The best leave the heap for the place behind it.
    const int64_t most = min64(top_k, count);
    const auto nth = [&](int64_t i) { return heap[count - 1 - i]; };
    const auto pop = [&](int64_t i) {
      const int64_t last = count - 1 - i, best = heap[0];
      heap[0] = heap[last];
      heap[last] = best;
      sink(p, heap, 0, last);
      return best;
    };
    if (top_k < V) {
      double held = 0;
      for (int64_t i = 0; i < most; ++i) held += p[pop(i)];
      total = held;
    }
    double held = 0;
    int64_t kept = 0;
    for (; kept < most && (top_p >= 1 || held < top_p); ++kept) {
      held += p[top_k < V ? nth(kept) : pop(kept)] / total;
    }
    double cdf = 0;
    for (int64_t i = 0; i < kept; ++i) {
      cdf += p[nth(i)] / total;
      if (cdf > drawn * held) return nth(i);
    }
    return nth(0);
  }
};

template <class Cell, class T>
struct DecoderSampleLoop {
  using Loop = LogitsLoop<Cell, T>;

  const DecoderSamples<T>& a;
  Loop loop;
  Draw draw;

  struct Task {
    typename Loop::Task rows;
    T* logits;  // [rows, V]
    Draw::Room room;
  };

  template <class Memory>
  void lay_out(Memory& memory, DecoderForward<T>& rows, Task* tasks, int64_t count,
               int64_t rows_a_task, typename Loop::Task* loops) {
    loop.lay_out(memory, rows, loops, count, rows_a_task);
    for (int64_t i = 0; i < count; ++i) {
      T* logits = memory.template take<T>(size_t(rows_a_task * loop.s.V));
      const Draw::Room room = draw.lay_out(memory);
      if (tasks) tasks[i] = {loops[i], logits, room};
    }
  }

  void run(Task& task) {
    loop.begin(task.rows);
    int64_t count = task.rows.b1 - task.rows.b0;
    for (int64_t b = task.rows.b0; b < task.rows.b1; ++b) loop.feed(b, a.start[b]);
    for (int64_t t = 0; t < a.most && count; ++t) {
      loop.step(task.rows, t, count);
      loop.logits(task.rows, t, count, task.logits);
      int64_t left = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t b = task.rows.live[i];
        const double drawn = a.drawn[t * loop.s.B + b];
        const int64_t token = draw.token(task.logits + i * loop.s.V, drawn, task.room);
        if (token < 0) {
          __atomic_store_n(a.not_numbers, 1, __ATOMIC_RELAXED);
          return;
        }
        a.tokens[b * a.most + t] = token;
        a.lengths[b] = t + 1;
        if (a.ends && token == a.ends[b]) continue;
        task.rows.live[left++] = b;
        loop.feed(b, token);
      }
      count = left;
    }
  }
};

template <class Cell, class T>
void decoder_samples(const DecoderSamples<T>& a, const Threads& threads) {
  using Samples = DecoderSampleLoop<Cell, T>;
  DecoderForward<T> rows = a.rows;
  const DecoderShape& s = rows.shape;
  const int64_t work = decoder_work(s, Cell::kGates) + s.V * rows.read();
  const int64_t each = rows_a_task(s, work, a.most, s.B, threads), count = ceil_div(s.B, each);
  const Threads inner = count == 1 ? threads : Threads{1, nullptr};
  Samples samples{
      a, {{rows, s, inner, KeyForms<T>::wanted(rows)}}, {a.temperature, a.top_k, a.top_p, s.V}};
  typename Samples::Task* tasks = nullptr;
  typename Samples::Loop::Task* loops = nullptr;
  auto lay_out = [&](auto& memory) {
    tasks = memory.template take<typename Samples::Task>(size_t(count));
    loops = memory.template take<typename Samples::Loop::Task>(size_t(count));
    samples.lay_out(memory, rows, tasks, count, each, loops);
  };
  ScratchSize needed;
  lay_out(needed);
  Scratch scratch(needed.bytes());
  lay_out(scratch);
  samples.loop.pack(threads);
  run_tasks(threads, count, [&](int64_t i) { samples.run(tasks[i]); });
}
