// Decoders with attention, of every cell that needs no more than its sums.
#include "../isa/isa.inl"

// After the vector maths, which its templates look up by name.
#include "../../cell/cells.h"

namespace fastseq {
namespace {

#include "../gemm/gemm.inl"

#include "../recurrent/plan.inl"

#include "../recurrent/tile.inl"

#include "../recurrent/gradient_row.inl"

#include "../attention/row.inl"

#include "scores.inl"

#include "products.inl"

#include "cells.inl"

#include "forward.inl"

#include "logits.inl"

#include "samples.inl"

#include "beam.inl"

#include "backward.inl"

#include "deferred.inl"

template <class Cell, class T>
constexpr DecoderFunctions<T> decoder_functions() {
  if constexpr (Cell::kParams == 0 && Cell::kMasks == 0) {
    return {decoder_forward<Cell, T>, decoder_backward<Cell, T>, decoder_beams<Cell, T>,
            decoder_samples<Cell, T>};
  } else {
    return {nullptr, nullptr, nullptr, nullptr};
  }
}

#define FASTSEQ_ENTRY(name, Cell) decoder_functions<Cell, T>(),
template <class T>
const DecoderFunctions<T> kDecoder[] = {FASTSEQ_CELLS(FASTSEQ_ENTRY)};
#undef FASTSEQ_ENTRY

}  // namespace

namespace FASTSEQ_ISA {
extern const Part<DecoderFunctions> kDecoderPart;
const Part<DecoderFunctions> kDecoderPart = {kDecoder<float>, kDecoder<double>};
}  // namespace FASTSEQ_ISA
}  // namespace fastseq
