// The maths of one LSTM unit, written once for every vector type and for device scalars.
//
//   i = sigmoid(z_i)   f = sigmoid(z_f)   g = tanh(z_g)   o = sigmoid(z_o)
//   c = f * c_prev + i * g              h = o * tanh(c)
//
// Gate order i, f, g, o is torch's. Source: Hochreiter and Schmidhuber 1997; forget gate, Gers et
// al. 2000. V needs + - *, fma, sigmoid and tanh, found by argument-dependent or enclosing lookup.
#pragma once

#if defined(__CUDACC__)
#define FASTSEQ_CELL __host__ __device__ __forceinline__
#else
#define FASTSEQ_CELL inline __attribute__((always_inline))
#endif

namespace fastseq {
namespace cell {

template <class V>
struct LstmGates {
  V i, f, g, o;
};

// In: pre-activations z and the previous cell state c. Out: the activated gates in z, the new c.
// Returns h.
template <class V>
FASTSEQ_CELL V lstm_forward(LstmGates<V>& z, V& c) {
  z.i = sigmoid(z.i);
  z.f = sigmoid(z.f);
  z.g = tanh(z.g);
  z.o = sigmoid(z.o);
  c = fma(z.f, c, z.i * z.g);
  return z.o * tanh(c);
}

// In: activated gates a, cell states c and c_prev, dh = dL/dh of this step from every path, and
// dc = dL/dc from the later step. Out: dc for the earlier step, and h once more. Returns
// dL/d(pre-activations).
template <class V>
FASTSEQ_CELL LstmGates<V> lstm_backward(const LstmGates<V>& a, V c, V c_prev, V dh, V& dc, V& h) {
  const V one = V{} + 1;
  const V tanh_c = tanh(c);
  h = a.o * tanh_c;
  const V dcell = fma(dh * a.o, one - tanh_c * tanh_c, dc);
  LstmGates<V> dz;
  // Factors below one first: dcell * c_prev may overflow where dz.f does not.
  dz.i = dcell * (a.i * (one - a.i)) * a.g;
  dz.f = dcell * (a.f * (one - a.f)) * c_prev;
  dz.g = dcell * a.i * (one - a.g * a.g);
  dz.o = dh * tanh_c * a.o * (one - a.o);
  dc = dcell * a.f;
  return dz;
}

}  // namespace cell
}  // namespace fastseq
