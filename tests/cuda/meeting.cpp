// Blocks of `grid` as threads of the host that all run at once, for ThreadSanitizer: what orders
// one block's writes before another's reads is the meeting's counter alone, with the memory orders
// that the device's meeting has (csrc/cuda/recurrent/grid.cuh). Returns 0 where every run gives the
// same bits. -DARRIVE=__ATOMIC_RELAXED plants the defect that must be found.
#include <cstddef>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cell/cells.h"
#include "../../csrc/cuda/recurrent/grid.h"

#ifndef ARRIVE
#define ARRIVE __ATOMIC_RELEASE
#endif

namespace {

using namespace fastseq::cuda;
using fastseq::cell::Lstm;
constexpr int64_t T = 4, B = 19, H = 24, G = 4;

struct FreeGroup {
  uint32_t* arrived;
  uint32_t blocks, awaited = 0;
  std::vector<GridSums<float>> sums = std::vector<GridSums<float>>(kGridThreads);

  template <class F>
  void each(const F& f) {
    for (int thread = 0; thread < kGridThreads; ++thread) f(thread, sums[size_t(thread)]);
  }
  void meet() {
    awaited += blocks;
    __atomic_add_fetch(arrived, 1, ARRIVE);
    while (int32_t(__atomic_load_n(arrived, __ATOMIC_ACQUIRE) - awaited) < 0) {
      std::this_thread::yield();
    }
  }
};

// All rows in one tile, four units a block, a pack of the depth for each slice.
GridPlan plan_of(int64_t depth, int groups) {
  GridPlan p{};
  p.units = 4, p.blocks = int(H) / 4, p.tiles = 1, p.rows = int(B);
  p.groups = groups, p.slices = int(depth) / 4, p.packs = 1, p.part = 1, p.row = int(depth);
  p.shared = GridMemory({int(G), 2, false, 4, 4}, p).bytes;
  return p;
}

template <class Program, class Arguments>
void run(const Arguments& a, const GridPlan& plan) {
  std::vector<float> exchange(size_t(2 * B * plan.row));
  uint32_t arrived = 0;
  std::vector<std::thread> blocks;
  for (int block = 0; block < plan.blocks; ++block) {
    blocks.emplace_back([&, block] {
      std::vector<std::max_align_t> memory(size_t(plan.shared) / sizeof(std::max_align_t) + 1);
      FreeGroup group{&arrived, uint32_t(plan.blocks)};
      Program(a, plan, block, 0, exchange.data(), reinterpret_cast<char*>(memory.data()))
          .run(group);
    });
  }
  for (std::thread& block : blocks) block.join();
}

std::vector<float> numbers(int64_t count) {
  static std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(-0.5f, 0.5f);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) x = uniform(generator);
  return out;
}

// Forward and backward; everything that came out, one after the other.
std::vector<float> both_passes(bool reverse) {
  static const std::vector<float> weights = numbers(G * H * H), sums = numbers(T * B * G * H),
                                  initial = numbers(B * H), dy = numbers(T * B * H);
  std::vector<int64_t> lengths(size_t(B), T);
  for (size_t b = 0; b < lengths.size(); b += 3) lengths[b] = int64_t(b) % (T + 1);
  const Walk walk{T, B, H, nullptr, lengths.data(), nullptr, reverse};
  std::vector<float> h = initial, c = initial, y(size_t(T * B * H)), saved(size_t(T * B * 5 * H));
  Forward<float> f{};
  f.walk = walk;
  f.w_hh = weights.data();
  f.zx = sums.data();
  f.zx_row = G * H;
  f.h = h.data();
  f.c = c.data();
  f.y = y.data();
  f.y_row = H;
  f.saved = saved.data();
  run<GridForward<Lstm, float>>(f, plan_of(H, 4));

  std::vector<float> dsums(size_t(T * B * G * H)), dh0(size_t(B * H)), dc0(size_t(B * H));
  Backward<float> g{};
  g.walk = walk;
  g.w_hh = weights.data();
  g.saved = saved.data();
  g.dy = dy.data();
  g.dy_row = H;
  g.h0 = g.c0 = initial.data();
  g.dsums = dsums.data();
  g.dsums_row = G * H;
  g.dh0 = dh0.data();
  g.dc0 = dc0.data();
  run<GridBackward<Lstm, float>>(g, plan_of(G * H, 1));

  std::vector<float> out;
  for (const auto* part : {&h, &c, &y, &dsums, &dh0, &dc0}) {
    out.insert(out.end(), part->begin(), part->end());
  }
  return out;
}

}  // namespace

int main() {
  for (bool reverse : {false, true}) {
    const std::vector<float> first = both_passes(reverse);
    for (int i = 0; i < 3; ++i) {
      const std::vector<float> again = both_passes(reverse);
      if (std::memcmp(first.data(), again.data(), first.size() * sizeof(float))) return 1;
    }
  }
  return 0;
}
