// fastseq::stack_states: the final states of stacked layers as one tensor.
#include "tensors.h"

namespace fastseq {
namespace ops {

// states: [D, B, W] of each layer in turn, any strides; returns [L*D, B, W].
Tensor stack_states(Tensors states) {
  require(!states.empty(), "fastseq.stack_states: expected at least one state");
  const Tensor& first = states[0];
  int64_t rows = 0;
  for (const Tensor& state : states) {
    require(state.dim() == 3, "fastseq.stack_states: expected states of 3 dimensions, got ",
            state.dim());
    check_tensor("stack_states", "states", state, first, {-1, first.size(1), first.size(2)});
    rows += state.size(0);
  }
  Tensor out = empty(first, {rows, first.size(1), first.size(2)});
  int64_t at = 0;
  for (const Tensor& state : states) {
    Tensor part = torch::stable::narrow(out, 0, at, state.size(0));
    torch::stable::copy_(part, state);
    at += state.size(0);
  }
  return out;
}

}  // namespace ops
}  // namespace fastseq

STABLE_TORCH_LIBRARY_FRAGMENT(fastseq, m) { m.def("stack_states(Tensor[] states) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {
  m.impl("stack_states", TORCH_BOX(&fastseq::ops::stack_states));
}
