// Any cell, with a part `keep` of each state kept from the step before: masks keep_h and, with two
// states, keep_c, of zeros and ones in training and of the constant probability in evaluation.
//
//   h = keep_h * h_prev + (1 - keep_h) * h_new      c likewise; h_new is made from the new c.
//
// Where h is projected, the loop mixes it after the projection; keep_h is zero here then.
//
// Source: Krueger et al. 2016, equations 2 to 4.
#pragma once

#include "cell.h"

namespace fastseq {
namespace cell {

template <class Base>
struct Zoneout : Base {
  static constexpr int kMasks = Base::kStates;
  static constexpr int kSavedH = Base::kSaved, kSavedC = Base::kStates == 2 ? Base::kSaved + 1 : -1;
  static constexpr int kSaved = Base::kSaved + Base::kStates;
  static constexpr bool kReadsH = true, kCarriesH = true;

  template <class V>
  FASTSEQ_CELL V mix(V keep, V old, V fresh) {
    return fma(keep, old, (V{} + 1 - keep) * fresh);
  }

  template <class V>
  FASTSEQ_CELL V forward(const V* z, V h_prev, V& c, const V* params, const V* keep, V* saved) {
    V c_new = c;
    const V h_new = Base::forward(z, h_prev, c_new, params, static_cast<const V*>(nullptr), saved);
    if constexpr (Base::kStates == 2) {
      c = mix(keep[1], c, c_new);
      saved[kSavedC] = c;
    }
    return saved[kSavedH] = mix(keep[0], h_prev, h_new);
  }

  template <class V>
  FASTSEQ_CELL void backward(const V* saved, V h_prev, V c_prev, const V* params, const V* keep,
                             V dh, V& dc, V& dh_prev, V* dz, V* dparams, V& h) {
    const V one = V{} + 1;
    V dc_new = dc, dh_base = V{};
    if constexpr (Base::kStates == 2) dc_new = (one - keep[1]) * dc;
    Base::backward(saved, h_prev, c_prev, params, static_cast<const V*>(nullptr),
                   (one - keep[0]) * dh, dc_new, dh_base, dz, dparams, h);
    if constexpr (Base::kStates == 2) dc = fma(keep[1], dc, dc_new);
    dh_prev = fma(keep[0], dh, dh_base);
    h = saved[kSavedH];
  }
};

}  // namespace cell
}  // namespace fastseq
