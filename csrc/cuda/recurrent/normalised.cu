// The step kernels of cells that normalise, both passes: a block of threads a row.
#include "../support/launch.cuh"
#include "normalised.h"

namespace fastseq {
namespace cuda {

namespace {

struct DeviceBlock {
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
};

template <class Cell, class T>
__global__ void __launch_bounds__(kRowThreads, 4)
    normalised_forward_kernel(const __grid_constant__ Forward<T> a, int64_t t) {
  extern __shared__ __align__(16) char memory[];
  normalised_forward_row<Cell>(a, t, blockIdx.x, DeviceBlock{}, reinterpret_cast<Wide<T>*>(memory));
}

template <class Cell, class T>
__global__ void __launch_bounds__(kRowThreads, 4)
    normalised_backward_kernel(const __grid_constant__ Backward<T> a, int64_t t, bool initial) {
  extern __shared__ __align__(16) char memory[];
  normalised_backward_row<Cell>(a, t, initial, blockIdx.x, DeviceBlock{},
                                reinterpret_cast<Wide<T>*>(memory));
}

template <class T>
int shared_bytes(int64_t rows, int64_t H) {
  return int(normalised_memory(rows, H) * int64_t(sizeof(Wide<T>)));
}

}  // namespace

template <class Cell, class T>
const char* normalised_forward(const Forward<T>& a, int64_t t, void* stream) {
  if (a.walk.B == 0 || a.walk.H == 0) return nullptr;
  return launch(normalised_forward_kernel<Cell, T>, dim3(unsigned(a.walk.B)), dim3(kRowThreads),
                shared_bytes<T>(2, a.walk.H), stream, a, t);
}

template <class Cell, class T>
const char* normalised_backward(const Backward<T>& a, int64_t t, bool initial, void* stream) {
  if (a.walk.B == 0 || a.walk.H == 0) return nullptr;
  return launch(normalised_backward_kernel<Cell, T>, dim3(unsigned(a.walk.B)), dim3(kRowThreads),
                shared_bytes<T>(2 + 2 * Cell::kGates, a.walk.H), stream, a, t, initial);
}

#define DEFINE(Cell, T)                                                                \
  template const char* normalised_forward<Cell, T>(const Forward<T>&, int64_t, void*); \
  template const char* normalised_backward<Cell, T>(const Backward<T>&, int64_t, bool, void*);
FASTSEQ_STEP_TYPES(DEFINE, cell::LayerNormLstm)

}  // namespace cuda
}  // namespace fastseq
