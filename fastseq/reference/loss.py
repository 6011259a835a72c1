"""Cross entropy of a linear layer's logits in plain PyTorch: the oracle of the fused loss.

Runs on any device in any floating dtype and is differentiable any number of times. Holds the
logits of every row. Shapes: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` with target ids.

    With p the softmax of a row's logits, y its target, w the class weights (1 where there are
    none) and e the label smoothing, its loss is

        -(1 - e) w_y log p_y - e / V sum_c w_c log p_c

    and 0 where y is ``ignore_index``. The mean divides by the sum of w_y over rows not ignored.

    Args:
        hidden: [N, H], or any number of leading dimensions.
        weight: [V, H].
        bias: [V], or None.
        target: [N], the leading dimensions of ``hidden``, int64; 0..V-1 or ``ignore_index``.
        class_weight: [V], or None.
        ignore_index: the target of rows that do not count.
        label_smoothing: e, between 0 and 1.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or the loss of each row [N] with ``reduction="none"``.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
    section 7 (label smoothing); otherwise torch.nn.functional.cross_entropy.
    """
    log_p = F.log_softmax(F.linear(hidden, weight, bias), dim=-1)
    counted = target != ignore_index
    ids = target.where(counted, 0)
    w = weight.new_ones(weight.shape[0]) if class_weight is None else class_weight
    loss = -(1 - label_smoothing) * w[ids] * log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    # A term of weight zero would still turn logits of -inf into NaN.
    if label_smoothing:
        loss = loss - label_smoothing / weight.shape[0] * (w * log_p).sum(-1)
    loss = loss.masked_fill(~counted, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / w[ids].masked_fill(~counted, 0).sum()
