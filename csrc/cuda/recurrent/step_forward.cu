// The `step` kernels of the forward pass: a thread a row and one or four units.
#include "../support/launch.cuh"
#include "launch.h"
#include "step.h"

namespace fastseq {
namespace cuda {

namespace {

template <class Cell, class T, int N>
__global__ void __launch_bounds__(kStepThreads)
    step_forward_kernel(const __grid_constant__ Forward<T> a, int64_t t) {
  const int64_t u = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (u >= a.walk.H) return;
  const int64_t first = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  for (int64_t b = first; b < a.walk.B; b += int64_t(gridDim.y) * blockDim.y) {
    forward_step<Cell, T, N>(a, t, b, u);
  }
}

}  // namespace

template <class Cell, class T>
const char* step_forward(const Forward<T>& a, int64_t t, void* stream) {
  if (a.walk.B == 0 || a.walk.H == 0) return nullptr;
  const auto start = [&](auto kernel, int n) {
    const StepGrid g = step_grid(a.walk.H / n, a.walk.B);
    const dim3 grid(g.blocks_x, g.blocks_y), block(g.threads_x, g.threads_y);
    return launch(kernel, grid, block, 0, stream, a, t);
  };
  if constexpr (sizeof(T) <= 4) {
    if (by_four(a)) return start(step_forward_kernel<Cell, T, 4>, 4);
  }
  return start(step_forward_kernel<Cell, T, 1>, 1);
}

#define DEFINE_OF(Cell, T) \
  template const char* step_forward<Cell, T>(const Forward<T>&, int64_t, void*);
#define DEFINE(name, Cell) FASTSEQ_STEP_TYPES(DEFINE_OF, Cell)
FASTSEQ_STEP_CELLS(DEFINE)

}  // namespace cuda
}  // namespace fastseq
