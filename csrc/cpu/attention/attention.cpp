// Attention, of every score.
#include "../isa/isa.inl"

namespace fastseq {
namespace {

#include "../gemm/gemm.inl"

#include "row.inl"

#include "forward.inl"

#include "backward.inl"

template <class T>
const AttentionFunctions<T> kAttention = {attention_forward<T>, attention_backward<T>};

}  // namespace

namespace FASTSEQ_ISA {
extern const Part<AttentionFunctions> kAttentionPart;
const Part<AttentionFunctions> kAttentionPart = {&kAttention<float>, &kAttention<double>};
}  // namespace FASTSEQ_ISA
}  // namespace fastseq
