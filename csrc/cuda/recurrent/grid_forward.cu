// The `grid` kernels of the forward pass.
#include "../support/launch.cuh"
#include "grid.cuh"
#include "launch.h"

namespace fastseq {
namespace cuda {

namespace {

template <class Cell, class T>
__global__ void __launch_bounds__(kGridThreads, 1)
    grid_forward_kernel(const __grid_constant__ Forward<T> first,
                        const __grid_constant__ Forward<T> second,
                        const __grid_constant__ GridPlan plan,
                        const __grid_constant__ GridSpace space) {
  run_grid<GridForward<Cell, T>>(blockIdx.z ? second : first, plan, space);
}

}  // namespace

template <class Cell, class T>
const char* grid_forward(const Forward<T>* sides, int D, const GridPlan& plan,
                         const GridSpace& space, void* stream) {
  const dim3 grid(unsigned(plan.blocks), unsigned(plan.tiles), unsigned(D));
  return launch_together(kNotTogether, grid_forward_kernel<Cell, T>, grid, dim3(kGridThreads),
                         plan.shared, stream, sides[0], sides[D - 1], plan, space);
}

#define DEFINE_OF(Cell, T)                                                            \
  template const char* grid_forward<Cell, T>(const Forward<T>*, int, const GridPlan&, \
                                             const GridSpace&, void*);
#define DEFINE(Cell) FASTSEQ_WHOLE_TYPES(DEFINE_OF, Cell)
FASTSEQ_WHOLE_CELLS(DEFINE)

}  // namespace cuda
}  // namespace fastseq
