// C = A B, or C += A B: the deferred products of a recurrent layer's backward pass.
#pragma once

#include <cstdint>

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
};

}  // namespace fastseq
