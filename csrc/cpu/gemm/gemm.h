// C = A B, or C += A B: the deferred products of a recurrent layer's backward pass.
#pragma once

#include <cstdint>

#include "../support/tiles.h"

#define FASTSEQ_GEMM_MEMBER inline __attribute__((always_inline))

namespace fastseq {

template <class T>
struct Gemm {
  int64_t M, N, K;
  // A[m][k] at a + m * a_m + k * a_k; one of the two is 1.
  const T* a;
  int64_t a_m, a_k;
  // Row k of B, contiguous in n: b_rows[k], or b + k * ldb where b_rows is null.
  const T* const* b_rows;
  const T* b;
  int64_t ldb;
  // Row m of C: c_rows[m], or c + m * ldc where c_rows is null. May alias neither A nor B.
  T* const* c_rows;
  T* c;
  int64_t ldc;
  bool accumulate;
  int64_t chain;  // products summed up in a row; 0: as many as usual
  // The columns from `split` on, a multiple of a panel's, are of another B and C, given by rows;
  // 0: there are none. A, read once, serves both.
  int64_t split;
  const T* const* b_rows_2;
  T* const* c_rows_2;
  Tiles tiles;

  FASTSEQ_GEMM_MEMBER const T* b_at(int64_t k, int64_t n) const {
    if (split && n >= split) return b_rows_2[k] + n - split;
    return (b_rows ? b_rows[k] : b + k * ldb) + n;
  }
  FASTSEQ_GEMM_MEMBER T* c_at(int64_t m, int64_t n) const {
    if (split && n >= split) return c_rows_2[m] + n - split;
    return (c_rows ? c_rows[m] : c + m * ldc) + n;
  }
};

// The chain for sums over K tokens. Most accurate is the square root of K: chains and what they add
// up to are then equally long. Below 32 the adding up would cost more than a tenth.
inline int64_t chain_over(int64_t K) { return K <= 1024 ? 32 : K <= 2048 ? 64 : 0; }

}  // namespace fastseq
