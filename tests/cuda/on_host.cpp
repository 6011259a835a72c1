// The GPU kernels run by the host: the same text as the device's, thread after thread. Stands in
// for the .cu files behind the same entry points; the stream is not looked at.
//
// Threads of a phase run in an order that fastseq_thread_order chooses: what depends on it is a
// race. Shared memory is exactly as large as planned, is full of NaN at first, and keeps nothing
// from block to block. Blocks that meet are threads of the host of which one runs at a time, as far
// as its next meeting, in that order too: whichever is first is a whole step ahead of the last.
// What the host can't show: memory ordering between real threads, alignment faults, speed.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/cuda/recurrent/grid.h"
#include "../../csrc/cuda/recurrent/launch.h"
#include "../../csrc/cuda/recurrent/normalised.h"
#include "../../csrc/cuda/recurrent/step.h"
#include "../../csrc/cuda/recurrent/whole.h"

namespace {

using fastseq::cuda::DeviceLimits;

int order = 0;
// An H100's or H200's.
const DeviceLimits kHopper{132, 232448, true};
DeviceLimits limits = kHopper;
int at_once = 0;  // blocks that run at once; 0: one a multiprocessor

// The i-th of n threads: in order, in reverse order, or in one that mixes all.
int pick(int i, int n) {
  if (order == 1) return n - 1 - i;
  if (order != 2) return i;
  int stride = n / 2 + 1;
  const auto divides = [](int a, int b) {
    while (b) {
      const int rest = a % b;
      a = b;
      b = rest;
    }
    return a != 1;
  };
  while (divides(stride, n)) ++stride;
  return int(int64_t(i) * stride % n);
}

struct HostBlock {
  int threads;
  template <class F>
  void each(const F& f) const {
    for (int i = 0; i < threads; ++i) f(pick(i, threads));
  }
};

// The grid's threads, as the step kernels number them; f(row, group of units) once each.
template <class F>
void each_of_grid(int64_t groups, int64_t B, const F& f) {
  const fastseq::cuda::StepGrid g = fastseq::cuda::step_grid(groups, B);
  const int64_t wide = int64_t(g.blocks_x) * g.threads_x, high = int64_t(g.blocks_y) * g.threads_y;
  const int threads = int(wide * high);
  for (int i = 0; i < threads; ++i) {
    const int64_t at = pick(i, threads), x = at % wide, y = at / wide;
    if (x >= groups) continue;
    for (int64_t b = y; b < B; b += high) f(b, x);
  }
}

template <class Program, class Arguments>
const char* run_blocks(const Arguments* sides, int D, const fastseq::cuda::WholePlan& plan) {
  if (plan.threads > fastseq::cuda::kWholeThreads || plan.threads % 32) return "a block too large";
  const int64_t blocks = (sides[0].walk.B + plan.rows - 1) / plan.rows;
  for (int64_t i = 0; i < blocks * D; ++i) {
    // Its own allocation each time: a sanitizer sees the first byte too far.
    std::unique_ptr<char, void (*)(void*)> memory(
        static_cast<char*>(std::aligned_alloc(16, size_t(plan.shared))), std::free);
    std::memset(memory.get(), 0xff, size_t(plan.shared));
    const int64_t at = pick(int(i), int(blocks * D));
    Program(sides[at / blocks], plan, at % blocks, memory.get()).run(HostBlock{plan.threads});
  }
  return nullptr;
}

// Whose turn it is among the blocks of a group.
struct Turns {
  int blocks, turn = 0, left, passed = 0;
  std::vector<bool> done;
  std::mutex mutex;
  std::condition_variable changed;

  explicit Turns(int n) : blocks(n), left(n), done(size_t(n)) {}
  void await(int place) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return turn == place; });
  }
  void pass_on() {
    std::unique_lock<std::mutex> lock(mutex);
    // Nobody arrived anywhere while all had their turns: they would wait forever.
    if (left && ++passed > 2 * blocks) {
      std::fputs("blocks wait for each other forever\n", stderr);
      std::abort();
    }
    do turn = (turn + 1) % blocks;
    while (left && done[size_t(turn)]);
    changed.notify_all();
  }
};

template <class T>
struct HostGroup {
  using Sums = fastseq::cuda::GridSums<T>;
  Turns& turns;
  int place;
  uint32_t* arrived;
  uint32_t awaited = 0;
  std::vector<Sums> sums = std::vector<Sums>(fastseq::cuda::kGridThreads);

  template <class F>
  void each(const F& f) {
    for (int i = 0; i < int(sums.size()); ++i) {
      const int thread = pick(i, int(sums.size()));
      f(thread, sums[size_t(thread)]);
    }
  }
  void meet() {
    awaited += uint32_t(turns.blocks);
    ++*arrived;
    turns.passed = 0;
    while (int32_t(*arrived - awaited) < 0) {
      turns.pass_on();
      turns.await(place);
    }
  }
};

template <class Program, class Arguments>
const char* run_groups(const Arguments* sides, int D, const fastseq::cuda::GridPlan& plan,
                       const fastseq::cuda::GridSpace& space) {
  using T = typename Program::Type;
  if (plan.shared > limits.shared) return "a block too large";
  const int most = at_once ? at_once : limits.multiprocessors;
  if (plan.blocks * plan.tiles * D > most) return fastseq::cuda::kNotTogether;
  for (int i = 0; i < plan.tiles * D; ++i) {
    const int at = pick(i, plan.tiles * D), tile = at % plan.tiles, d = at / plan.tiles;
    T* exchange = static_cast<T*>(space.exchange) + d * 2 * sides[d].walk.B * plan.row;
    Turns turns(plan.blocks);
    const auto run = [&](int place) {
      std::unique_ptr<char, void (*)(void*)> memory(
          static_cast<char*>(std::aligned_alloc(16, size_t(plan.shared))), std::free);
      std::memset(memory.get(), 0xff, size_t(plan.shared));
      HostGroup<T> group{turns, place, space.arrived + at * fastseq::cuda::kArrivedStride};
      turns.await(place);
      Program(sides[d], plan, pick(place, plan.blocks), tile, exchange, memory.get()).run(group);
      turns.done[size_t(place)] = true;
      turns.passed = 0;
      --turns.left;
      turns.pass_on();
    };
    std::vector<std::thread> blocks;
    for (int place = 0; place < plan.blocks; ++place) blocks.emplace_back(run, place);
    for (std::thread& block : blocks) block.join();
  }
  return nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void fastseq_thread_order(int to) { order = to; }

// A device of so many multiprocessors, with so much shared memory a block, which runs so many
// blocks at once; 0: a Hopper's, and one a multiprocessor.
extern "C" __attribute__((visibility("default"))) void fastseq_device(int processors, int shared,
                                                                      int blocks) {
  limits = kHopper;
  if (processors) limits.multiprocessors = processors;
  if (shared) limits.shared = shared;
  at_once = blocks;
}

namespace fastseq {
namespace cuda {

// f(row, unit, how many units from it on) of all there are.
template <class T, class Pass, class F>
const char* each_step(const Pass& a, const F& f) {
  const auto run = [&](auto n) {
    constexpr int N = decltype(n)::value;
    each_of_grid(a.walk.H / N, a.walk.B, [&](int64_t b, int64_t i) { f(b, i * N, n); });
  };
  if (a.walk.B == 0 || a.walk.H == 0) return nullptr;
  if (sizeof(T) <= 4 && by_four(a)) {
    run(std::integral_constant<int, 4>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
  return nullptr;
}

template <class Cell, class T>
const char* step_forward(const Forward<T>& a, int64_t t, void*) {
  return each_step<T>(a, [&](int64_t b, int64_t u, auto n) {
    forward_step<Cell, T, decltype(n)::value>(a, t, b, u);
  });
}

template <class Cell, class T>
const char* step_backward(const Backward<T>& a, int64_t t, bool initial, void*) {
  return each_step<T>(a, [&](int64_t b, int64_t u, auto n) {
    backward_step<Cell, T, decltype(n)::value>(a, t, initial, b, u);
  });
}

// f(row, block, shared memory) of each row, its memory as whole.h's.
template <class A, class F>
const char* each_row(int64_t B, int64_t H, int64_t rows, const F& f) {
  for (int64_t i = 0; H && i < B; ++i) {
    std::vector<A> memory(size_t(normalised_memory(rows, H)), A(NAN));
    f(pick(int(i), int(B)), HostBlock{kRowThreads}, memory.data());
  }
  return nullptr;
}

template <class Cell, class T>
const char* normalised_forward(const Forward<T>& a, int64_t t, void*) {
  const auto row = [&](int64_t b, const HostBlock& block, Wide<T>* memory) {
    normalised_forward_row<Cell>(a, t, b, block, memory);
  };
  return each_row<Wide<T>>(a.walk.B, a.walk.H, 2, row);
}

template <class Cell, class T>
const char* normalised_backward(const Backward<T>& a, int64_t t, bool initial, void*) {
  const auto row = [&](int64_t b, const HostBlock& block, Wide<T>* memory) {
    normalised_backward_row<Cell>(a, t, initial, b, block, memory);
  };
  return each_row<Wide<T>>(a.walk.B, a.walk.H, 2 + 2 * Cell::kGates, row);
}

#define NORMALISED(Cell, T)                                                            \
  template const char* normalised_forward<Cell, T>(const Forward<T>&, int64_t, void*); \
  template const char* normalised_backward<Cell, T>(const Backward<T>&, int64_t, bool, void*);
FASTSEQ_STEP_TYPES(NORMALISED, cell::LayerNormLstm)

template <class Cell, class T>
const char* whole_forward(const Forward<T>* sides, int D, const WholePlan& plan, void*) {
  return with_rows(plan.rows, [&](auto rows) {
    return run_blocks<WholeForward<Cell, T, decltype(rows)::value>>(sides, D, plan);
  });
}

template <class Cell, class T>
const char* whole_backward(const Backward<T>* sides, int D, const WholePlan& plan, void*) {
  return with_rows(plan.rows, [&](auto rows) {
    return run_blocks<WholeBackward<Cell, T, decltype(rows)::value>>(sides, D, plan);
  });
}

template <class Cell, class T>
const char* grid_forward(const Forward<T>* sides, int D, const GridPlan& plan,
                         const GridSpace& space, void*) {
  return run_groups<GridForward<Cell, T>>(sides, D, plan, space);
}

template <class Cell, class T>
const char* grid_backward(const Backward<T>* sides, int D, const GridPlan& plan,
                          const GridSpace& space, void*) {
  return run_groups<GridBackward<Cell, T>>(sides, D, plan, space);
}

#define STEP_OF(Cell, T)                                                         \
  template const char* step_forward<Cell, T>(const Forward<T>&, int64_t, void*); \
  template const char* step_backward<Cell, T>(const Backward<T>&, int64_t, bool, void*);
#define STEP(name, Cell) FASTSEQ_STEP_TYPES(STEP_OF, Cell)
FASTSEQ_STEP_CELLS(STEP)

#define WHOLE_OF(Cell, T)                                                                         \
  template const char* whole_forward<Cell, T>(const Forward<T>*, int, const WholePlan&, void*);   \
  template const char* whole_backward<Cell, T>(const Backward<T>*, int, const WholePlan&, void*); \
  template const char* grid_forward<Cell, T>(const Forward<T>*, int, const GridPlan&,             \
                                             const GridSpace&, void*);                            \
  template const char* grid_backward<Cell, T>(const Backward<T>*, int, const GridPlan&,           \
                                              const GridSpace&, void*);
#define WHOLE(Cell) FASTSEQ_WHOLE_TYPES(WHOLE_OF, Cell)
FASTSEQ_WHOLE_CELLS(WHOLE)

DeviceLimits device_limits(int, const char** error) {
  *error = nullptr;
  return limits;
}
int device_count(const char** error) {
  *error = nullptr;
  return 1;
}

}  // namespace cuda
}  // namespace fastseq
