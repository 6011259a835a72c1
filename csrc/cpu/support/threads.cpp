#include "threads.h"

#include <sched.h>

namespace fastseq {

namespace {
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}
}  // namespace

void Steps::wait_for(int64_t done) {
  // About ten microseconds of pauses; then the awaited thread has probably lost its core, and
  // spinning on would keep it from getting another.
  constexpr int kSpins = 400;
  for (int spin = 0; __atomic_load_n(&done_.value, __ATOMIC_ACQUIRE) < done; ++spin) {
    if (spin < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace fastseq
