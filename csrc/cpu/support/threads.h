// Threads, as the kernels see them: a way to run tasks, lent by the caller. No torch here.
#pragma once

#include <cstdint>

namespace fastseq {

struct Threads {
  using Task = void (*)(int64_t begin, int64_t end, void* context);
  int count;  // threads worth splitting the work for; 1 keeps everything on the caller's
  void (*parallel_for)(int64_t tasks, Task task, void* context);
};

// Runs f(task) for every task in [0, tasks), each once, in any order, perhaps concurrently. Some
// runtimes give fewer threads than asked for, down to one: tasks must not wait for each other.
template <class F>
inline __attribute__((always_inline)) void run_tasks(const Threads& threads, int64_t tasks,
                                                     const F& f) {
  if (threads.count <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  threads.parallel_for(
      tasks,
      [](int64_t begin, int64_t end, void* context) {
        const F& body = *static_cast<const F*>(context);
        for (int64_t task = begin; task < end; ++task) body(task);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// The same, handed out one by one to whoever is free: cores are not equally fast while others use
// them too. f(task, worker): a worker, below both threads.count and `tasks`, does a task at a time.
template <class F>
inline __attribute__((always_inline)) void run_queue(const Threads& threads, int64_t tasks,
                                                     const F& f) {
  const int64_t workers = threads.count < tasks ? threads.count : tasks;
  int64_t next = 0;
  run_tasks(threads, workers, [&](int64_t worker) {
    int64_t task;
    while ((task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks) f(task, worker);
  });
}

// Runs f(step, share) for every share of step 0, then of step 1, and so on: no share of a step
// starts before the whole step before it has ended. A thread takes its own shares, so that data
// stays in its cache, then any that nobody has begun, if shares are large or others take long. So
// one thread alone finishes everything.
class Steps {
 public:
  static constexpr int kMaxShares = 64;
  Steps(int64_t steps, int shares) : steps_(steps), shares_(shares) {}

  // By the thread whose shares are [own, own + count).
  template <class F>
  inline __attribute__((always_inline)) void work(int own, int count, const F& f) {
    bool alone = false;
    for (int64_t step = begun(); step < steps_; ++step) {
      // To and fro: what a share read last may still be in a near cache.
      const bool back = step % 2;
      for (int i = 0; i < count; ++i) take(step, back ? own + count - 1 - i : own + i, f);
      // A look at another's share moves cache lines between cores: not unless it pays. First the
      // one its owner comes to last.
      for (int i = 0; i < shares_ - count && count > 1; ++i) {
        take(step, (back ? own + count + i : own + shares_ - 1 - i) % shares_, f);
      }
      while (!wait_for(step, alone ? 0 : kPatience)) {
        alone = false;
        for (int i = 0; i < shares_; ++i) alone |= take(step, (own + count + i) % shares_, f);
      }
    }
  }

 private:
  // Looks, at some tens of nanoseconds each, before a thread takes what is another's.
  static constexpr int kPatience = 64;
  // A line each: neighbours on one cache line would be torn between cores.
  struct alignas(64) Counter {
    int64_t value = 0;
  };

  template <class F>
  inline __attribute__((always_inline)) bool take(int64_t step, int share, const F& f) {
    int64_t expected = step;
    if (__atomic_load_n(&claimed_[share].value, __ATOMIC_RELAXED) != step ||
        !__atomic_compare_exchange_n(&claimed_[share].value, &expected, step + 1, false,
                                     __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
      return false;
    }
    f(step, share);
    __atomic_store_n(&done_[share].value, step + 1, __ATOMIC_RELEASE);
    return true;
  }

  // The step under way.
  int64_t begun() const;
  // Whether all shares of `step` are done, after so many looks.
  bool wait_for(int64_t step, int looks) const;

  int64_t steps_;
  int shares_;
  Counter claimed_[kMaxShares];  // steps of a share that have been begun
  Counter done_[kMaxShares];     // steps of a share that have ended
};

}  // namespace fastseq
