// Matrix products, vector functions one by one, and the peak of the machine.
#include "../isa/isa.inl"

namespace fastseq {
namespace {

#include "gemm.inl"

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

template <class T>
const BasicFunctions<T> kBasic = {gemm<T>, map_sigmoid<T>, map_tanh<T>};

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

}  // namespace

namespace FASTSEQ_ISA {
extern const Machine kMachine;
extern const Part<BasicFunctions> kBasicPart;
const Machine kMachine = {FASTSEQ_VECTOR_BYTES, peak_f32};
const Part<BasicFunctions> kBasicPart = {&kBasic<float>, &kBasic<double>};
}  // namespace FASTSEQ_ISA
}  // namespace fastseq
