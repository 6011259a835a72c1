//   h = tanh(z)   or   h = max(z, 0)
//
// Source: Elman 1990.
#pragma once

#include "cell.h"

namespace fastseq {
namespace cell {

struct RnnTanh {
  static constexpr int kGates = 1, kApart = -1, kStates = 1;
  static constexpr int kSaved = 1, kSavedC = -1, kSavedH = 0;
  static constexpr bool kReadsH = false, kCarriesH = false;
  static constexpr int kParams = 0, kMasks = 0;

  template <class V>
  FASTSEQ_CELL V forward(const V* z, V, V&, const V*, const V*, V* saved) {
    return saved[0] = tanh(z[0]);
  }
  template <class V>
  FASTSEQ_CELL void backward(const V* saved, V, V, const V*, const V*, V dh, V&, V&, V* dz, V*,
                             V& h) {
    h = saved[0];
    dz[0] = dh * (V{} + 1 - h * h);
  }
};

struct RnnRelu : RnnTanh {
  template <class V>
  FASTSEQ_CELL V forward(const V* z, V, V&, const V*, const V*, V* saved) {
    return saved[0] = relu(z[0]);
  }
  template <class V>
  FASTSEQ_CELL void backward(const V* saved, V, V, const V*, const V*, V dh, V&, V&, V* dz, V*,
                             V& h) {
    h = saved[0];
    dz[0] = where_positive(h, dh);
  }
};

}  // namespace cell
}  // namespace fastseq
