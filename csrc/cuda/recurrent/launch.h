// The entry points of every (cell, type): declared here, defined by the .cu files for the device.
#pragma once

#include "../../cell/cells.h"
#include "../../cell/projected.h"
#include "recurrent.h"

namespace fastseq {
namespace cuda {

template <class Cell, class T>
const char* step_forward(const Forward<T>& a, int64_t t, void* stream);
template <class Cell, class T>
const char* step_backward(const Backward<T>& a, int64_t t, bool initial, void* stream);
// The same two for cells that normalise over all units of a row.
template <class Cell, class T>
const char* normalised_forward(const Forward<T>& a, int64_t t, void* stream);
template <class Cell, class T>
const char* normalised_backward(const Backward<T>& a, int64_t t, bool initial, void* stream);
template <class Cell, class T>
const char* whole_forward(const Forward<T>* sides, int D, const WholePlan& plan, void* stream);
template <class Cell, class T>
const char* whole_backward(const Backward<T>* sides, int D, const WholePlan& plan, void* stream);
template <class Cell, class T>
const char* grid_forward(const Forward<T>* sides, int D, const GridPlan& plan,
                         const GridSpace& space, void* stream);
template <class Cell, class T>
const char* grid_backward(const Backward<T>* sides, int D, const GridPlan& plan,
                          const GridSpace& space, void* stream);

// Most threads of a block. Beyond 512 a thread of `whole` had fewer than the 128 registers that its
// sums want.
constexpr int kStepThreads = 128, kWholeThreads = 512, kGridThreads = 256, kRowThreads = 128;

// X(name, cell) of all that `step` serves; F(cell, type) for those, and for those of `whole` and
// `grid`.
#define FASTSEQ_STEP_CELLS(X) FASTSEQ_CELLS(X) X("projection", cell::Zoneout<cell::Projected>)
#define FASTSEQ_STEP_TYPES(F, Cell) F(Cell, double) F(Cell, float) F(Cell, Half) F(Cell, BFloat16)
#define FASTSEQ_WHOLE_TYPES(F, Cell) F(Cell, float) F(Cell, Half) F(Cell, BFloat16)
#define FASTSEQ_WHOLE_CELLS(X) X(cell::Lstm) X(cell::Gru) X(cell::RnnTanh) X(cell::RnnRelu)

}  // namespace cuda
}  // namespace fastseq
