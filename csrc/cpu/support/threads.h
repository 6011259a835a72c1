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
// starts before the whole step before it has ended. A thread takes its own share first, so that
// data stays in its cache, and then any share nobody has begun: it waits only for work that another
// thread is in the middle of, so one thread alone finishes everything.
class Steps {
 public:
  static constexpr int kMaxShares = 64;
  Steps(int64_t steps, int shares) : steps_(steps), shares_(shares) {
    for (int share = 0; share < shares; ++share) claimed_[share].value = 0;
  }

  template <class F>
  inline __attribute__((always_inline)) void work(int first_share, const F& f) {
    for (int64_t step = __atomic_load_n(&done_.value, __ATOMIC_ACQUIRE) / shares_; step < steps_;
         ++step) {
      for (int i = 0; i < shares_; ++i) {
        const int share = (first_share + i) % shares_;
        int64_t expected = step;
        if (__atomic_load_n(&claimed_[share].value, __ATOMIC_RELAXED) == step &&
            __atomic_compare_exchange_n(&claimed_[share].value, &expected, step + 1, false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
          f(step, share);
          __atomic_fetch_add(&done_.value, 1, __ATOMIC_ACQ_REL);
        }
      }
      wait_for(int64_t(shares_) * (step + 1));
    }
  }

 private:
  // A line each: neighbours on one cache line would be torn between cores.
  struct alignas(64) Counter {
    int64_t value = 0;
  };
  void wait_for(int64_t done);

  int64_t steps_;
  int shares_;
  Counter done_;
  Counter claimed_[kMaxShares];
};

}  // namespace fastseq
