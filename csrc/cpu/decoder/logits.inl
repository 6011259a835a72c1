// Loops that look at all logits of a step: of each row they keep one step, and the output layer is
// packed for the whole call.

template <class Cell, class T>
struct LogitsLoop : DecoderForwardLoop<Cell, T> {
  using Base = DecoderForwardLoop<Cell, T>;
  using Task = typename Base::Task;

  Packed<T> by_vocabulary = {};

  // `rows`: what `a` refers to.
  template <class Memory>
  void lay_out(Memory& memory, DecoderForward<T>& rows, Task* tasks, int64_t count,
               int64_t rows_a_task) {
    const DecoderShape& s = this->s;
    auto by_row = [&](int64_t width) {
      return StepRows<T>{memory.template take<T>(size_t(s.B * width)), 0, width};
    };
    rows.saved.input = by_row(s.input(0));
    for (int64_t l = 0; l < s.L; ++l) {
      rows.saved.h[l] = by_row(s.H);
      rows.saved.out[l] = l && s.residual ? by_row(s.H) : rows.saved.h[l];
    }
    rows.saved.attended = by_row(s.A ? s.C + s.H : 0);
    rows.features = by_row(s.features());
    rows.weights = by_row(s.S);
    Base::lay_out(memory, tasks, count, rows_a_task);
    by_vocabulary.lay_out(memory, s.V, rows.read(), true);
  }
  void pack(const Threads& threads) {
    Base::pack(threads);
    by_vocabulary.set_rows(0, this->a.w_out, this->s.V, this->a.read());
    Packed<T>* const all[] = {&by_vocabulary};
    pack_all(all, 1, threads);
  }

  void feed(int64_t row, int64_t token) const {
    const int64_t E = this->s.E;
    copy_row(this->a.saved.input.at(0, row), this->a.table + token * E, E);
  }

  // Logits of step t of the first `count` live rows, to `out` [count][V].
  void logits(Task& task, int64_t t, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) task.from[i] = Base::read(task, t, i);
    by_vocabulary.multiply(
        count, task.from,
        [&](int64_t i, int64_t column, Vec<T> sum, int lanes) {
          if (this->a.b_out) sum += load(this->a.b_out + column, lanes);
          store(out + i * this->s.V + column, sum, lanes);
        },
        this->inner);
  }
};
