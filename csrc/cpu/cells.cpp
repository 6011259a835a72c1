// What callers need to know of each cell, read off the cells themselves.
#include "../cell/cells.h"

#include "kernels.h"

namespace fastseq {

namespace {

#define FASTSEQ_INFO(name, Cell) \
  {name, Cell::kGates, Cell::kStates, Cell::kSaved, Cell::kParams, Cell::kMasks},
const CellInfo kCells[] = {FASTSEQ_ALL_CELLS(FASTSEQ_INFO)};
#undef FASTSEQ_INFO

}  // namespace

int cell_count() { return int(sizeof(kCells) / sizeof(kCells[0])); }
const CellInfo& cell_info(int cell) { return kCells[cell]; }

}  // namespace fastseq
