// What every kernel file starts with. A kernel file, <op>/<op>.cpp, is compiled once per
// instruction set, with that set's compiler flags and -DFASTSEQ_ISA=<its name>; everything in it
// lives in an anonymous namespace, but for the table of its functions, in namespace fastseq::<its
// name>.
#pragma once

#include <type_traits>

#include "../kernels.h"
#include "../support/kept.h"
#include "../support/lanes.h"
#include "../support/scratch.h"

#if defined(__AVX512F__)
#define FASTSEQ_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTSEQ_VECTOR_BYTES 32
#else
#define FASTSEQ_VECTOR_BYTES 16
#endif

#if FASTSEQ_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

#define FASTSEQ_INLINE inline __attribute__((always_inline))
// A register tile stands alone: inlined beside other code, its sums get spilled to the stack.
#define FASTSEQ_TILE static __attribute__((noinline))

namespace fastseq {
namespace {

#include "../support/vec.inl"

#include "../support/maths.inl"

#include "../gemm/tile.inl"

}  // namespace
}  // namespace fastseq
