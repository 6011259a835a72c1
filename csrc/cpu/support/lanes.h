// Chains of work, some of which wait for others: a loop over time, and what can be made for its
// stretches before it comes to them, or of them after it has left them.
#pragma once

#include <cstdint>

namespace fastseq {

// So many lanes of so many items each. A lane's items are done in order, one at a time, by whoever
// is free; the first lane that can go on goes first. A thread waits for nothing but items that
// another is at, so that one thread alone finishes everything.
class Lanes {
 public:
  static constexpr int kMost = 8;
  inline __attribute__((always_inline)) Lanes(int lanes, int64_t items)
      : lanes_(lanes), items_(items) {}

  // Items of a lane that have ended. What they wrote may be read.
  inline __attribute__((always_inline)) int64_t done(int lane) const {
    return __atomic_load_n(&lane_[lane].done, __ATOMIC_ACQUIRE);
  }

  // Until all is done. f(lane, item) does an item; ready(lane, item): whether what it needs of
  // other lanes has ended. Once true, it stays true.
  template <class Ready, class F>
  inline __attribute__((always_inline)) void work(const Ready& ready, const F& f) {
    for (int looks = 0;;) {
      bool ended = true, worked = false;
      for (int lane = 0; lane < lanes_ && !worked; ++lane) {
        const int64_t item = done(lane);
        if (item == items_) continue;
        ended = false;
        if (!ready(lane, item) || !claim(lane, item)) continue;
        f(lane, item);
        __atomic_store_n(&lane_[lane].done, item + 1, __ATOMIC_RELEASE);
        worked = true;
      }
      if (ended) return;
      looks = worked ? 0 : looks + 1;
      if (looks) rest(looks);
    }
  }

 private:
  // A cache line each: neighbours on one would be torn between cores.
  struct alignas(64) Lane {
    int64_t claimed = 0, done = 0;
  };

  inline __attribute__((always_inline)) bool claim(int lane, int64_t item) {
    return __atomic_load_n(&lane_[lane].claimed, __ATOMIC_RELAXED) == item &&
           __atomic_compare_exchange_n(&lane_[lane].claimed, &item, item + 1, false,
                                       __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
  }
  // Between two looks; after many, the awaited thread may have lost its core.
  static void rest(int looks);

  int lanes_;
  int64_t items_;
  Lane lane_[kMost];
};

}  // namespace fastseq
