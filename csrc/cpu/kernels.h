// The table of kernels, one an instruction set: what production, tests and benchmarks choose from.
#pragma once

#include <cstdint>

#include "gemm/gemm.h"
#include "recurrent/recurrent.h"
#include "support/threads.h"

namespace fastseq {

template <class T>
struct TypedKernels {
  struct Recurrent {
    void (*forward)(const RecurrentForward<T>&, const Threads&);
    void (*backward)(const RecurrentBackward<T>&, const Threads&);
  };
  const Recurrent* recurrent;  // [cells], in the order of csrc/cell/cells.h
  void (*gemm)(const Gemm<T>&, const Threads&);
  void (*sigmoid)(const T* x, T* y, int64_t n);
  void (*tanh)(const T* x, T* y, int64_t n);
};

// Accumulators that peak_f32 keeps in flight: latency (4 or 5 cycles) times units (2), and spare.
constexpr int kPeakChains = 16;

struct Kernels {
  const char* isa;
  int vector_bytes;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  // `rounds` float32 FMAs on vectors in each of kPeakChains accumulators, the most a core can do;
  // returns their sum, so that none is dead code.
  float (*peak_f32)(int64_t rounds);

  template <class T>
  const TypedKernels<T>& of() const;
};
template <>
inline const TypedKernels<float>& Kernels::of<float>() const {
  return f32;
}
template <>
inline const TypedKernels<double>& Kernels::of<double>() const {
  return f64;
}

// One definition an ISA file; which of them are linked in is the build's choice (FASTSEQ_HAVE_*).
extern const Kernels kKernelsScalar, kKernelsAvx2, kKernelsAvx512;

// The cells, in the order of csrc/cell/cells.h.
int cell_count();
const CellInfo& cell_info(int cell);

}  // namespace fastseq
