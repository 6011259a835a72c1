// The blocks of `whole` on a device.
#pragma once

#include "../support/launch.cuh"
#include "launch.h"
#include "whole.h"

namespace fastseq {
namespace cuda {

// A pass, Forward or Backward, of one or two directions.
template <class Pass>
struct Sides {
  Pass of[2];
};

struct DeviceBlock {
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

// kernel_of(rows): the kernel for blocks of so many rows.
template <class Pass, class F>
const char* launch_whole(const Pass* sides, int D, const WholePlan& plan, void* stream,
                         const F& kernel_of) {
  const int64_t blocks = (sides[0].walk.B + plan.rows - 1) / plan.rows;
  if (blocks == 0) return nullptr;
  const Sides<Pass> both{{sides[0], sides[D - 1]}};
  return with_rows(plan.rows, [&](auto rows) {
    return launch(kernel_of(rows), dim3(unsigned(blocks), unsigned(D)),
                  dim3(unsigned(plan.threads)), plan.shared, stream, both, plan);
  });
}

}  // namespace cuda
}  // namespace fastseq
