// The `whole` kernels of the backward pass.
#include "whole.cuh"

namespace fastseq {
namespace cuda {

namespace {

template <class Cell, class T, int R>
__global__ void __launch_bounds__(kWholeThreads, 1)
    whole_backward_kernel(const __grid_constant__ Sides<Backward<T>> sides,
                          const __grid_constant__ WholePlan plan) {
  extern __shared__ __align__(16) char memory[];
  WholeBackward<Cell, T, R>(sides.of[blockIdx.y], plan, blockIdx.x, memory).run(DeviceBlock{});
}

}  // namespace

template <class Cell, class T>
const char* whole_backward(const Backward<T>* sides, int D, const WholePlan& plan, void* stream) {
  return launch_whole(sides, D, plan, stream, [](auto rows) {
    return whole_backward_kernel<Cell, T, decltype(rows)::value>;
  });
}

#define DEFINE_OF(Cell, T) \
  template const char* whole_backward<Cell, T>(const Backward<T>*, int, const WholePlan&, void*);
#define DEFINE(Cell) FASTSEQ_WHOLE_TYPES(DEFINE_OF, Cell)
FASTSEQ_WHOLE_CELLS(DEFINE)

}  // namespace cuda
}  // namespace fastseq
