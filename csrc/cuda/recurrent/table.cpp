// The table of kernels by cell, and the plan of the `whole` ones.
#include <algorithm>

#include "launch.h"
#include "whole.h"

namespace fastseq {
namespace cuda {

namespace {

template <class Cell, class T>
constexpr bool kHasWhole = false;
#define HAS_WHOLE_OF(Cell, T) \
  template <>                 \
  constexpr bool kHasWhole<Cell, T> = true;
#define HAS_WHOLE(Cell) FASTSEQ_WHOLE_TYPES(HAS_WHOLE_OF, Cell)
FASTSEQ_WHOLE_CELLS(HAS_WHOLE)

template <class Cell, class T>
RecurrentKernels<T> entry() {
  RecurrentKernels<T> k{step_forward<Cell, T>, step_backward<Cell, T>,    nullptr, nullptr,
                        whole_size<Cell, T>(), GradientRow<Cell>::kBlocks};
  if constexpr (kHasWhole<Cell, T>) {
    k.whole_forward = whole_forward<Cell, T>;
    k.whole_backward = whole_backward<Cell, T>;
  }
  return k;
}

}  // namespace

int recurrent_kernel_count() {
#define ONE(name, Cell) +1
  return 0 FASTSEQ_CELLS(ONE);
}

template <class T>
const RecurrentKernels<T>& recurrent_kernels(int cell) {
#define ENTRY(name, Cell) entry<Cell, T>(),
  static const RecurrentKernels<T> table[] = {FASTSEQ_CELLS(ENTRY)};
  return table[cell];
}
template const RecurrentKernels<double>& recurrent_kernels<double>(int);
template const RecurrentKernels<float>& recurrent_kernels<float>(int);
template const RecurrentKernels<Half>& recurrent_kernels<Half>(int);
template const RecurrentKernels<BFloat16>& recurrent_kernels<BFloat16>(int);

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

}  // namespace cuda
}  // namespace fastseq
