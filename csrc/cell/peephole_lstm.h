// An LSTM whose gates see the cell state: params p_i, p_f, p_o.
//
//   i = sigmoid(z_i + p_i c_prev)   f = sigmoid(z_f + p_f c_prev)   g = tanh(z_g)
//   c = f * c_prev + i * g          o = sigmoid(z_o + p_o c)        h = o * tanh(c)
//
// Source: Gers and Schmidhuber 2000; Graves 2013, equations 7 to 11.
#pragma once

#include "cell.h"

namespace fastseq {
namespace cell {

struct PeepholeLstm {
  static constexpr int kGates = 4, kApart = -1, kStates = 2;
  static constexpr int kSaved = 5, kSavedC = 4, kSavedH = -1;
  static constexpr bool kReadsH = false, kCarriesH = false;
  static constexpr int kParams = 3, kMasks = 0;

  template <class V>
  FASTSEQ_CELL V forward(const V* z, V, V& c, const V* p, const V*, V* saved) {
    saved[0] = sigmoid(fma(p[0], c, z[0]));
    saved[1] = sigmoid(fma(p[1], c, z[1]));
    saved[2] = tanh(z[2]);
    c = fma(saved[1], c, saved[0] * saved[2]);
    saved[3] = sigmoid(fma(p[2], c, z[3]));
    saved[4] = c;
    return saved[3] * tanh(c);
  }

  template <class V>
  FASTSEQ_CELL void backward(const V* saved, V, V c_prev, const V* p, const V*, V dh, V& dc, V&,
                             V* dz, V* dp, V& h) {
    const V one = V{} + 1;
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], c = saved[4];
    const V tanh_c = tanh(c);
    h = o * tanh_c;
    dz[3] = dh * tanh_c * o * (one - o);
    const V dcell = fma(dz[3], p[2], fma(dh * o, one - tanh_c * tanh_c, dc));
    dz[0] = dcell * (i * (one - i)) * g;
    dz[1] = dcell * (f * (one - f)) * c_prev;
    dz[2] = dcell * i * (one - g * g);
    dc = fma(dz[0], p[0], fma(dz[1], p[1], dcell * f));
    dp[0] = dz[0] * c_prev;
    dp[1] = dz[1] * c_prev;
    dp[2] = dz[3] * c;
  }
};

}  // namespace cell
}  // namespace fastseq
