// The blocks of `grid` on a device.
#pragma once

#include "grid.h"

namespace fastseq {
namespace cuda {

// Blocks that wait for each other all run: the launch is cooperative, and fails where they can't.
template <class T>
struct DeviceGroup {
  GridSums<T> sums;
  uint32_t* arrived;
  uint32_t blocks, awaited;

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    f(int(threadIdx.x), sums);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }

  // After each(), so that one thread speaks for all: its release at the scope of the device covers
  // what the others wrote before __syncthreads(), and its acquire what they read after. Counts are
  // never taken back, and compared by their difference, which stays small when they overflow.
  __device__ __forceinline__ void meet() {
    awaited += blocks;
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
      uint32_t count;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
      } while (int32_t(count - awaited) < 0);
    }
    __syncthreads();
  }
};

template <class Program, class Arguments>
__device__ __forceinline__ void run_grid(const Arguments& a, const GridPlan& plan,
                                         const GridSpace& space) {
  using T = typename Program::Type;
  extern __shared__ __align__(16) char memory[];
  const int64_t exchange = 2 * a.walk.B * plan.row * blockIdx.z;
  DeviceGroup<T> group;
  group.arrived = space.arrived + (blockIdx.z * gridDim.y + blockIdx.y) * kArrivedStride;
  group.blocks = gridDim.x;
  group.awaited = 0;
  Program(a, plan, int(blockIdx.x), int(blockIdx.y), static_cast<T*>(space.exchange) + exchange,
          memory)
      .run(group);
}

}  // namespace cuda
}  // namespace fastseq
