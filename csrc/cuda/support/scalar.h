// Numbers as kernels hold them: storage types, the type they are summed in, a few of them side by
// side. Compiled for the device by nvcc and, to be tested without one, for the host by any
// compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTSEQ_BOTH __host__ __device__ __forceinline__
#else
#define FASTSEQ_BOTH inline __attribute__((always_inline))
#endif

// In front of a loop that is not worth its code several times over.
#if defined(__CUDA_ARCH__)
#define FASTSEQ_ROLLED _Pragma("unroll 1")
#else
#define FASTSEQ_ROLLED
#endif

namespace fastseq {
namespace cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#if defined(__CUDACC__)
FASTSEQ_BOTH float wide(Half x) {
  __half_raw raw;
  raw.x = x.bits;
  return __half2float(__half(raw));
}
FASTSEQ_BOTH void round_to(Half& out, float x) {
  out.bits = static_cast<__half_raw>(__float2half_rn(x)).x;
}
FASTSEQ_BOTH float wide(BFloat16 x) {
  __nv_bfloat16_raw raw;
  raw.x = x.bits;
  return __bfloat162float(__nv_bfloat16(raw));
}
FASTSEQ_BOTH void round_to(BFloat16& out, float x) {
  out.bits = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x;
}
#else
inline float wide(Half x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof(half));
  return float(half);
}
inline void round_to(Half& out, float x) {
  const _Float16 half = _Float16(x);
  std::memcpy(&out, &half, sizeof(half));
}
inline float wide(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline void round_to(BFloat16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // To nearest, ties to even; a NaN keeps its upper bits and stays one.
  const uint32_t kept = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = uint16_t(kept >> 16);
}
#endif
FASTSEQ_BOTH float wide(float x) { return x; }
FASTSEQ_BOTH double wide(double x) { return x; }
FASTSEQ_BOTH void round_to(float& out, float x) { out = x; }
FASTSEQ_BOTH void round_to(double& out, double x) { out = x; }

// What a storage type is computed and carried in.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// N neighbours moved as one: N * sizeof(T) bytes, so aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// N numbers that go through the same maths: the vector type of csrc/cell.
template <class A, int N>
struct Lanes {
  A v[N];

  friend FASTSEQ_BOTH Lanes operator+(Lanes x, Lanes y) {
    for (int i = 0; i < N; ++i) x.v[i] = x.v[i] + y.v[i];
    return x;
  }
  friend FASTSEQ_BOTH Lanes operator-(Lanes x, Lanes y) {
    for (int i = 0; i < N; ++i) x.v[i] = x.v[i] - y.v[i];
    return x;
  }
  friend FASTSEQ_BOTH Lanes operator*(Lanes x, Lanes y) {
    for (int i = 0; i < N; ++i) x.v[i] = x.v[i] * y.v[i];
    return x;
  }
  friend FASTSEQ_BOTH Lanes operator+(Lanes x, A y) {
    for (int i = 0; i < N; ++i) x.v[i] = x.v[i] + y;
    return x;
  }
};

// The accurate functions of the CUDA maths library (no -use_fast_math): a unit or two in the last
// place. 1 / (1 + inf) is the right 0 where e^-x overflows.
FASTSEQ_BOTH float fma_of(float x, float y, float z) { return fmaf(x, y, z); }
FASTSEQ_BOTH double fma_of(double x, double y, double z) { return ::fma(x, y, z); }
FASTSEQ_BOTH float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }
FASTSEQ_BOTH double sigmoid_of(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FASTSEQ_BOTH float tanh_of(float x) { return tanhf(x); }
FASTSEQ_BOTH double tanh_of(double x) { return ::tanh(x); }

template <class A, int N>
FASTSEQ_BOTH Lanes<A, N> fma(Lanes<A, N> x, Lanes<A, N> y, Lanes<A, N> z) {
  for (int i = 0; i < N; ++i) x.v[i] = fma_of(x.v[i], y.v[i], z.v[i]);
  return x;
}
template <class A, int N>
FASTSEQ_BOTH Lanes<A, N> sigmoid(Lanes<A, N> x) {
  for (int i = 0; i < N; ++i) x.v[i] = sigmoid_of(x.v[i]);
  return x;
}
template <class A, int N>
FASTSEQ_BOTH Lanes<A, N> tanh(Lanes<A, N> x) {
  for (int i = 0; i < N; ++i) x.v[i] = tanh_of(x.v[i]);
  return x;
}
// max(x, 0), NaN staying NaN.
template <class A, int N>
FASTSEQ_BOTH Lanes<A, N> relu(Lanes<A, N> x) {
  for (int i = 0; i < N; ++i) x.v[i] = x.v[i] <= A(0) ? A(0) : x.v[i];
  return x;
}
// d where x is positive or NaN, else 0: as torch's gradient.
template <class A, int N>
FASTSEQ_BOTH Lanes<A, N> where_positive(Lanes<A, N> x, Lanes<A, N> d) {
  for (int i = 0; i < N; ++i) d.v[i] = x.v[i] <= A(0) ? A(0) : d.v[i];
  return d;
}

// A hint to have the line at p in the second-level cache by the time it is read.
FASTSEQ_BOTH void fetch_soon(const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

// p must be aligned to N elements.
template <int N, class T>
FASTSEQ_BOTH Lanes<Wide<T>, N> load(const T* p) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
  Lanes<Wide<T>, N> x;
  for (int i = 0; i < N; ++i) x.v[i] = wide(pack.v[i]);
  return x;
}
template <int N, class T>
FASTSEQ_BOTH void store(T* p, Lanes<Wide<T>, N> x) {
  Pack<T, N> pack;
  for (int i = 0; i < N; ++i) round_to(pack.v[i], x.v[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

}  // namespace cuda
}  // namespace fastseq
