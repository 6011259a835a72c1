//   r = sigmoid(z_r)   u = sigmoid(z_z)   n = tanh(x half of z_n + r * recurrent half of z_n)
//   h = (1 - u) * n + u * h_prev
//
// The reset gate acts after the product, as in torch and cuDNN. Source: Cho et al. 2014.
#pragma once

#include "cell.h"

namespace fastseq {
namespace cell {

struct Gru {
  static constexpr int kGates = 3, kApart = 2, kStates = 1;
  static constexpr int kSaved = 5, kSavedC = -1, kSavedH = 4;
  static constexpr bool kReadsH = true, kCarriesH = true;
  static constexpr int kParams = 0, kMasks = 0;

  template <class V>
  FASTSEQ_CELL V forward(const V* z, V h_prev, V&, const V*, const V*, V* saved) {
    saved[0] = sigmoid(z[0]);
    saved[1] = sigmoid(z[1]);
    saved[2] = tanh(fma(saved[0], z[3], z[2]));
    saved[3] = z[3];
    saved[4] = fma(saved[1], h_prev - saved[2], saved[2]);
    return saved[4];
  }

  template <class V>
  FASTSEQ_CELL void backward(const V* saved, V h_prev, V, const V*, const V*, V dh, V&, V& dh_prev,
                             V* dz, V*, V& h) {
    const V one = V{} + 1;
    const V r = saved[0], u = saved[1], n = saved[2];
    h = saved[4];
    dh_prev = dh * u;
    dz[1] = dh * (u * (one - u)) * (h_prev - n);
    dz[2] = dh * (one - u) * (one - n * n);
    dz[0] = dz[2] * (r * (one - r)) * saved[3];
    dz[3] = dz[2] * r;
  }
};

}  // namespace cell
}  // namespace fastseq
