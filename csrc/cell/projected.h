// What a projection hands on, as a cell: h = z. On a GPU an h that is projected and then mixed with
// the one before is a step of its own, that of Zoneout<Projected>, behind the step that made it.
#pragma once

#include "zoneout.h"

namespace fastseq {
namespace cell {

struct Projected {
  static constexpr int kGates = 1, kApart = -1, kStates = 1;
  static constexpr int kSaved = 0, kSavedC = -1, kSavedH = -1;
  static constexpr bool kReadsH = false, kCarriesH = false;
  static constexpr int kParams = 0, kMasks = 0;

  template <class V>
  FASTSEQ_CELL V forward(const V* z, V, V&, const V*, const V*, V*) {
    return z[0];
  }
  template <class V>
  FASTSEQ_CELL void backward(const V*, V, V, const V*, const V*, V dh, V&, V&, V* dz, V*, V&) {
    dz[0] = dh;
  }
};

}  // namespace cell
}  // namespace fastseq
