// Everything that is compiled once per instruction set. The including file has set
// FASTSEQ_VECTOR_BYTES, FASTSEQ_TABLE and FASTSEQ_ISA_NAME; its compiler flags say the rest.
#include "../kernels.h"
#include "../support/scratch.h"

#if FASTSEQ_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))
// A register tile stands alone: inlined beside other code, its sums get spilled to the stack.
#define FASTSEQ_TILE static __attribute__((noinline))

namespace fastseq {
namespace {

#include "../support/vec.inl"

}  // namespace
}  // namespace fastseq

// After the vector maths, which its templates look up by name.
#include "../../cell/cells.h"

namespace fastseq {
namespace {

#include "../gemm/tile.inl"

#include "../gemm/gemm.inl"

#include "../recurrent/plan.inl"

#include "../recurrent/pack.inl"

#include "../recurrent/tile.inl"

#include "../recurrent/forward.inl"

#include "../recurrent/backward_loop.inl"

#include "../recurrent/deferred.inl"

#include "../recurrent/backward.inl"

template <class T>
void map_sigmoid(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int lanes = int(min64(kLanes<T>, n - i));
    store(y + i, sigmoid(load(x + i, lanes)), lanes);
  }
}

template <class T>
void map_tanh(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int lanes = int(min64(kLanes<T>, n - i));
    store(y + i, tanh(load(x + i, lanes)), lanes);
  }
}

// The factor and addend are read at run time and keep every accumulator near 1: neither folded
// away nor slowed by subnormals.
FASTSEQ_TILE float peak_f32(int64_t rounds) {
  volatile float factor = 0.5f, addend = 0.5f;
  const VecF a = broadcast(float(factor)), b = broadcast(float(addend));
  VecF sums[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) sums[i] = broadcast(1.0f + float(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kPeakChains; ++i) sums[i] = fma(sums[i], a, b);
  }
  VecF sum{};
  for (int i = 0; i < kPeakChains; ++i) sum += sums[i];
  float total = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) total += sum[lane];
  return total;
}

#define FASTSEQ_ENTRY(name, Cell) {recurrent_forward<Cell, T>, recurrent_backward<Cell, T>},
template <class T>
const typename TypedKernels<T>::Recurrent kRecurrent[] = {FASTSEQ_CELLS(FASTSEQ_ENTRY)};
#undef FASTSEQ_ENTRY

template <class T>
constexpr TypedKernels<T> typed_kernels() {
  return {kRecurrent<T>, gemm<T>, map_sigmoid<T>, map_tanh<T>};
}

}  // namespace

extern const Kernels FASTSEQ_TABLE;
const Kernels FASTSEQ_TABLE = {FASTSEQ_ISA_NAME, FASTSEQ_VECTOR_BYTES, typed_kernels<float>(),
                               typed_kernels<double>(), peak_f32};

}  // namespace fastseq
