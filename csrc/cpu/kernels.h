// The table of kernels, one an instruction set: what production, tests and benchmarks choose from.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "decoder/decoder.h"
#include "gemm/gemm.h"
#include "recurrent/recurrent.h"
#include "support/threads.h"

namespace fastseq {

template <class T>
struct BasicFunctions {
  void (*gemm)(const Gemm<T>&, const Threads&);
  void (*sigmoid)(const T* x, T* y, int64_t n);
  void (*tanh)(const T* x, T* y, int64_t n);
};

// One of these a cell, in the order of csrc/cell/cells.h.
template <class T>
struct RecurrentFunctions {
  void (*forward)(const RecurrentForward<T>&, const Threads&);
  void (*backward)(const RecurrentBackward<T>&, const Threads&);
};

// One of these a cell; null for those it has no decoder of.
template <class T>
struct DecoderFunctions {
  void (*forward)(const DecoderForward<T>&, const Threads&);
  void (*backward)(const DecoderBackward<T>&, const Threads&);
  void (*beams)(const DecoderBeams<T>&, const Threads&);
  void (*samples)(const DecoderSamples<T>&, const Threads&);
};

template <class T>
struct AttentionFunctions {
  void (*forward)(const AttentionForward<T>&, const Threads&);
  void (*backward)(const AttentionBackward<T>&, const Threads&);
};

// The functions of one kernel file, by dtype.
template <template <class> class Functions>
struct Part {
  const Functions<float>* f32;
  const Functions<double>* f64;

  template <class T>
  const Functions<T>* of() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }
};

// Accumulators that peak_f32 keeps in flight: latency (4 or 5 cycles) times units (2), and spare;
// they fit into 16 registers beside their operands.
constexpr int kPeakChains = 12;

struct Machine {
  int vector_bytes;
  // `rounds` float32 FMAs on vectors in each of kPeakChains accumulators, the most a core can do;
  // returns their sum, so that none is dead code.
  float (*peak_f32)(int64_t rounds);
};

struct Kernels {
  const char* isa;
  const Machine& machine;
  const Part<BasicFunctions>& basic;
  const Part<RecurrentFunctions>& recurrent;
  const Part<DecoderFunctions>& decoder;
  const Part<AttentionFunctions>& attention;
};

// The cells, in the order of csrc/cell/cells.h.
int cell_count();
const CellInfo& cell_info(int cell);

}  // namespace fastseq
