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

// Runs f(step, share) for every share of step 0, then of step 1, and so on: no share of a step
// starts before the whole step before it has ended. A thread takes its own share, so that data
// stays in its cache, and waits for the others; where that takes long, it takes any share nobody
// has begun. So one thread alone finishes everything.
class Steps {
 public:
  static constexpr int kMaxShares = 64;
  Steps(int64_t steps, int shares) : steps_(steps), shares_(shares) {}

  template <class F>
  inline __attribute__((always_inline)) void work(int own, const F& f) {
    bool alone = false;
    for (int64_t step = begun(); step < steps_; ++step) {
      take(step, own, f);
      // A look at another's share moves cache lines between cores: not unless it pays.
      while (!wait_for(step, alone ? 0 : kPatience)) {
        alone = false;
        for (int i = 1; i < shares_; ++i) alone |= take(step, (own + i) % shares_, f);
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
