// The table of kernels by cell, and the plans of the `whole` and `grid` ones.
#include <algorithm>

#include "grid.h"
#include "launch.h"
#include "normalised.h"
#include "whole.h"

namespace fastseq {
namespace cuda {

namespace {

int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class Cell, class T>
constexpr bool kHasWhole = false;
#define HAS_WHOLE_OF(Cell, T) \
  template <>                 \
  constexpr bool kHasWhole<Cell, T> = true;
#define HAS_WHOLE(Cell) FASTSEQ_WHOLE_TYPES(HAS_WHOLE_OF, Cell)
FASTSEQ_WHOLE_CELLS(HAS_WHOLE)

template <class Cell, class T>
RecurrentKernels<T> entry() {
  RecurrentKernels<T> k{};
  k.size = whole_size<Cell, T>();
  k.reads_h = Cell::kReadsH;
  if constexpr (cell::kNormalised<Cell>) {
    k.step_forward = normalised_forward<Cell, T>;
    k.step_backward = normalised_backward<Cell, T>;
    k.blocks = NormalisedGradientRow<Cell>::kBlocks;
    k.biases = Cell::kGates;
    return k;
  } else {
    k.step_forward = step_forward<Cell, T>;
    k.step_backward = step_backward<Cell, T>;
    k.blocks = GradientRow<Cell>::kBlocks;
  }
  if constexpr (kHasWhole<Cell, T>) {
    k.whole_forward = whole_forward<Cell, T>;
    k.whole_backward = whole_backward<Cell, T>;
    k.grid_forward = grid_forward<Cell, T>;
    k.grid_backward = grid_backward<Cell, T>;
  }
  return k;
}

}  // namespace

int recurrent_kernel_count() {
#define ONE(name, Cell) +1
  return 0 FASTSEQ_ALL_CELLS(ONE);
}

template <class T>
const RecurrentKernels<T>& recurrent_kernels(int cell) {
#define ENTRY(name, Cell) entry<Cell, T>(),
  static const RecurrentKernels<T> table[] = {FASTSEQ_ALL_CELLS(ENTRY)};
  return table[cell];
}
template <class T>
const RecurrentKernels<T>& projection_kernels() {
  static const RecurrentKernels<T> kernels = entry<cell::Zoneout<cell::Projected>, T>();
  return kernels;
}
#define OF_TYPE(T)                                               \
  template const RecurrentKernels<T>& recurrent_kernels<T>(int); \
  template const RecurrentKernels<T>& projection_kernels<T>();
OF_TYPE(double)
OF_TYPE(float)
OF_TYPE(Half)
OF_TYPE(BFloat16)

WholePlan plan_whole(const WholeSize& size, int64_t H, int64_t B, int64_t D, bool backward,
                     const DeviceLimits& limits) {
  // More than eight parts of a sum cost more to put together than they save.
  constexpr int64_t kMostSlices = 8;
  const int64_t unit_threads = (H + 31) / 32 * 32;
  if (unit_threads > kWholeThreads || H == 0) return {};
  int rows = B * D > limits.multiprocessors ? 4 : 1;
  const int64_t depth = quads(int(backward ? size.gates * H : H));
  const int64_t most = std::min(std::min(kMostSlices, depth), kWholeThreads / unit_threads);
  for (; rows >= 1; rows /= 4) {
    for (int slices = int(most); slices >= 1; slices = slices > 1 ? slices / 2 : 0) {
      const WholeMemory memory(size, int(H), rows, slices, backward);
      if (memory.bytes <= limits.shared) {
        return {rows, slices, int(unit_threads), int(slices * unit_threads), memory.bytes};
      }
    }
  }
  return {};
}

const char* const kNotTogether = "the device can't run all blocks at once";

GridPlan plan_grid(const WholeSize& size, int64_t H, int64_t B, int64_t D, bool backward,
                   const DeviceLimits& limits) {
  constexpr int64_t kWarps = kGridThreads / 32, kMostUnits = 128;
  GridPlan best{};
  if (!limits.cooperative || H == 0 || B == 0 || D == 0) return best;
  const int64_t pack = 16 / size.bytes, depth = backward ? size.gates * H : H;
  const int64_t depth_packs = up(depth, pack);
  if (depth_packs > (1 << 20)) return best;
  for (int64_t units = 4; units <= kMostUnits; units += 4) {
    GridPlan p{};
    const int64_t blocks = up(H, units),
                  groups = up((backward ? 1 : size.gates) * units, kGridColumns);
    const int64_t most = std::min(limits.multiprocessors / (blocks * D), up(B, kGridRows));
    if (most == 0) continue;
    if (groups > kGridThreads) break;
    const int64_t rows = up(B, most), slices = std::min(kGridThreads / groups, depth_packs);
    p.units = int(units), p.blocks = int(blocks), p.rows = int(rows), p.tiles = int(up(B, rows));
    p.groups = int(groups), p.slices = int(slices), p.packs = int(up(depth_packs, slices));
    p.row = int(depth_packs * pack);
    for (int pieces = 1; pieces <= p.packs; ++pieces) {
      p.part = int(up(p.packs, pieces));
      p.shared = GridMemory(size, p).bytes;
      if (p.shared <= limits.shared) break;
    }
    if (p.shared > limits.shared) continue;
    // A warp's pass over a pack is R * C FMAs for each of its elements on four units, and reads
    // C * 512 bytes of weights and R packs at 128 bytes a clock. Handing in and adding up the parts
    // touches each twice; 300 clocks are what it takes to begin. The exchange comes at some 24
    // bytes a clock and multiprocessor; a meeting is about 1500.
    const int64_t pass =
        std::max<int64_t>(kGridRows * kGridColumns * pack / 4, kGridColumns * 4 + 2 * kGridRows);
    const int64_t chunk = kWarps * (p.packs * pass + 2 * kGridRows * kGridColumns) + 300;
    p.clocks = 1500 + up(rows, kGridRows) * chunk + rows * p.row * size.bytes / 24;
    if (!best.units || p.clocks < best.clocks) best = p;
  }
  return best;
}

int64_t step_clocks(const WholeSize& size, int64_t H, int64_t B, int64_t D,
                    const DeviceLimits& limits) {
  // Two launches, of about two microseconds each; 128 FMAs a clock and multiprocessor, or eight
  // times as many by tensor cores.
  const int64_t fmas = B * size.gates * H * H, rate = 128 * (size.bytes == 2 ? 8 : 1);
  return D * (7000 + fmas / (rate * limits.multiprocessors));
}

Choice choose_way(const WholeSize& size, bool has_whole, int wanted, int64_t H, int64_t B,
                  int64_t D, int64_t most, bool backward, const DeviceLimits& limits) {
  Choice choice{};
  if (wanted >= kIfItCan) {
    choice = choose_way(size, has_whole, wanted % kIfItCan, H, B, D, most, backward, limits);
    if (choice.way != kNone) return choice;
    return choose_way(size, has_whole, kAnyWay, H, B, D, most, backward, limits);
  }
  if (has_whole && (wanted == kAnyWay || wanted == kWhole)) {
    choice.whole = plan_whole(size, H, B, D, backward, limits);
    choice.way = kWhole;
    if (choice.whole.rows) return choice;
  }
  if (has_whole && (wanted == kAnyWay || wanted == kGrid)) {
    choice.way = kGrid;
    for (int64_t together = most; together >= 1; --together) {
      choice.grid = plan_grid(size, H, B, together, backward, limits);
      choice.together = int(together);
      if (!choice.grid.units) continue;
      const int64_t clocks = choice.grid.clocks * (D / together);
      if (wanted == kGrid || clocks < step_clocks(size, H, B, D, limits)) return choice;
    }
  }
  choice.way = wanted == kAnyWay || wanted == kStep ? kStep : kNone;
  return choice;
}

}  // namespace cuda
}  // namespace fastseq
