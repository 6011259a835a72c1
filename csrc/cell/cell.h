// What a cell is: the maths of one recurrent unit, written once for every vector type and for
// device scalars. The sequence loops know nothing else of it.
//
// A cell is a struct of
//
//   kGates    row blocks of W_ih and W_hh, in torch's order
//   kApart    the gate whose input and recurrent sums it wants apart, or -1. The sums z come as
//             z[0 .. kGates), and the recurrent half of gate kApart as z[kGates].
//   kStates   1: h alone; 2: h and c
//   kSaved    values a unit and step that the backward pass needs
//   kSavedC, kSavedH   which of them are the new c and h; -1: no c, or backward() makes h again
//   kReadsH   whether forward() or backward() look at the h of the step before
//   kCarriesH whether dL/dh reaches the step before by another way than W_hh
//   kParams   parameters a unit beside weights and biases
//   kMasks    inputs a unit and step beside x; constants to the backward pass
//
// and of two functions of vectors V, which need + - *, fma, sigmoid, tanh, relu and where_positive:
//
//   h = forward(z, h_prev, c, params, masks, saved)      c: in the old, out the new; saved: out
//   backward(saved, h_prev, c_prev, params, masks, dh, dc, dh_prev, dz, dparams, h)
//     In: dh = dL/dh of this step from every path, dc = dL/dc from the later step.
//     Out: dc for the earlier step, dh_prev (where kCarriesH), dz as z, dparams: this step's
//     share, and h once more.
#pragma once

#if defined(__CUDACC__)
#define FASTSEQ_CELL static __host__ __device__ __forceinline__
#else
#define FASTSEQ_CELL static inline __attribute__((always_inline))
#endif

namespace fastseq {
namespace cell {

// Whether a cell's step needs all units of a row before it can finish any: such a cell has stages
// in place of forward() and backward(), see layer_norm_lstm.h.
template <class Cell>
constexpr bool kNormalised = false;

// Sums a unit: one a gate, and one more for a gate in two halves.
template <class Cell>
constexpr int kSums = Cell::kGates + (Cell::kApart >= 0 ? 1 : 0);

}  // namespace cell
}  // namespace fastseq
