// Recurrent layers, of every cell.
#include "../isa/isa.inl"

// After the vector maths, which its templates look up by name.
#include "../../cell/cells.h"

namespace fastseq {
namespace {

#include "../gemm/gemm.inl"

#include "../gemm/bfloat16.inl"

#include "../gemm/by_tiles.inl"

#include "../gemm/in_place.inl"

#include "plan.inl"

#include "pack.inl"

#include "keep.inl"

#include "tile.inl"

#include "by_tiles.inl"

#include "forward.inl"

#include "one_step.inl"

#include "gradient_row.inl"

#include "normalised.inl"

#include "backward_loop.inl"

#include "normalised_backward.inl"

#include "deferred.inl"

#include "deferred_by_rows.inl"

#include "deferred_by_chunks.inl"

#include "backward.inl"

#include "one_step_backward.inl"

template <class Cell, class T>
void forward(const RecurrentForward<T>& a, const Threads& threads) {
  if constexpr (cell::kNormalised<Cell>) {
    normalised_forward<Cell>(a, threads);
  } else if (in_place(a.shape, a.weights[0].w_hr)) {
    one_step_forward<Cell>(a, threads);
  } else {
    recurrent_forward<Cell>(a, threads);
  }
}

template <class Cell, class T>
void backward(const RecurrentBackward<T>& a, const Threads& threads) {
  if constexpr (!cell::kNormalised<Cell>) {
    if (in_place(a.shape, a.weights[0].w_hr)) return one_step_backward<Cell>(a, threads);
  }
  recurrent_backward<Cell>(a, threads);
}

#define FASTSEQ_ENTRY(name, Cell) {forward<Cell, T>, backward<Cell, T>},
template <class T>
const RecurrentFunctions<T> kRecurrent[] = {FASTSEQ_ALL_CELLS(FASTSEQ_ENTRY)};
#undef FASTSEQ_ENTRY

}  // namespace

namespace FASTSEQ_ISA {
extern const Part<RecurrentFunctions> kRecurrentPart;
const Part<RecurrentFunctions> kRecurrentPart = {kRecurrent<float>, kRecurrent<double>};
}  // namespace FASTSEQ_ISA
}  // namespace fastseq
