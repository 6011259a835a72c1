#include "threads.h"

#include <sched.h>

#include "lanes.h"

namespace fastseq {

namespace {
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}
}  // namespace

int64_t Steps::begun() const {
  int64_t step = steps_;
  for (int share = 0; share < shares_; ++share) {
    const int64_t done = __atomic_load_n(&done_[share].value, __ATOMIC_ACQUIRE);
    if (done < step) step = done;
  }
  return step;
}

bool Steps::wait_for(int64_t step, int looks) const {
  for (int share = 0; share < shares_; ++share) {
    while (__atomic_load_n(&done_[share].value, __ATOMIC_ACQUIRE) <= step) {
      if (looks-- <= 0) {
        // The awaited thread may have lost its core, and spinning on would keep it from getting
        // another.
        sched_yield();
        return false;
      }
      pause();
    }
  }
  return true;
}

void Lanes::rest(int looks) {
  constexpr int kPauses = 16, kPatience = 64;
  if (looks % kPatience == 0) sched_yield();
  for (int i = 0; i < kPauses; ++i) pause();
}

}  // namespace fastseq
