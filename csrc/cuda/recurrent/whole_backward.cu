// The `whole` kernels of the backward pass.
#include "../support/launch.cuh"
#include "launch.h"
#include "whole.h"

namespace fastseq {
namespace cuda {

namespace {

template <class T>
struct Sides {
  Backward<T> of[2];
};

struct DeviceBlock {
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

template <class Cell, class T, int R>
__global__ void __launch_bounds__(kWholeThreads, 1)
    whole_backward_kernel(const __grid_constant__ Sides<T> sides,
                          const __grid_constant__ WholePlan plan) {
  extern __shared__ __align__(16) char memory[];
  WholeBackward<Cell, T, R>(sides.of[blockIdx.y], plan, blockIdx.x, memory).run(DeviceBlock{});
}

}  // namespace

template <class Cell, class T>
const char* whole_backward(const Backward<T>* sides, int D, const WholePlan& plan, void* stream) {
  const int64_t blocks = (sides[0].walk.B + plan.rows - 1) / plan.rows;
  if (blocks == 0) return nullptr;
  const Sides<T> both{{sides[0], sides[D - 1]}};
  return with_rows(plan.rows, [&](auto rows) {
    return launch(whole_backward_kernel<Cell, T, decltype(rows)::value>,
                  dim3(unsigned(blocks), unsigned(D)), dim3(unsigned(plan.threads)), plan.shared,
                  stream, both, plan);
  });
}

#define DEFINE_OF(Cell, T) \
  template const char* whole_backward<Cell, T>(const Backward<T>*, int, const WholePlan&, void*);
#define DEFINE(Cell) FASTSEQ_WHOLE_TYPES(DEFINE_OF, Cell)
FASTSEQ_WHOLE_CELLS(DEFINE)

}  // namespace cuda
}  // namespace fastseq
