//   i = sigmoid(z_i)   f = sigmoid(z_f)   g = tanh(z_g)   o = sigmoid(z_o)
//   c = f * c_prev + i * g              h = o * tanh(c)
//
// Source: Hochreiter and Schmidhuber 1997; forget gate, Gers et al. 2000.
#pragma once

#include "cell.h"

namespace fastseq {
namespace cell {

struct Lstm {
  static constexpr int kGates = 4, kApart = -1, kStates = 2;
  static constexpr int kSaved = 5, kSavedC = 4, kSavedH = -1;
  static constexpr bool kReadsH = false, kCarriesH = false;
  static constexpr int kParams = 0, kMasks = 0;

  template <class V>
  FASTSEQ_CELL V forward(const V* z, V, V& c, const V*, const V*, V* saved) {
    saved[0] = sigmoid(z[0]);
    saved[1] = sigmoid(z[1]);
    saved[2] = tanh(z[2]);
    saved[3] = sigmoid(z[3]);
    c = fma(saved[1], c, saved[0] * saved[2]);
    saved[4] = c;
    return saved[3] * tanh(c);
  }

  template <class V>
  FASTSEQ_CELL void backward(const V* saved, V, V c_prev, const V*, const V*, V dh, V& dc, V&,
                             V* dz, V*, V& h) {
    const V one = V{} + 1;
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = tanh(saved[4]);
    h = o * tanh_c;
    const V dcell = fma(dh * o, one - tanh_c * tanh_c, dc);
    // Factors below one first: dcell * c_prev may overflow where dz[1] does not.
    dz[0] = dcell * (i * (one - i)) * g;
    dz[1] = dcell * (f * (one - f)) * c_prev;
    dz[2] = dcell * i * (one - g * g);
    dz[3] = dh * tanh_c * o * (one - o);
    dc = dcell * f;
  }
};

}  // namespace cell
}  // namespace fastseq
