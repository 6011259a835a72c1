"""Losses as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.functional.loss import REDUCTIONS, linear_cross_entropy
from fastseq.nn._scripting import refusal

__all__ = ["LinearCrossEntropy"]


class LinearCrossEntropy(torch.nn.Linear):
    """An output layer and its cross entropy in one: :class:`torch.nn.Linear`, then
    :class:`torch.nn.CrossEntropyLoss`, without the logits of all rows in between.

    Parameters, initialisation and state_dict are those of torch.nn.Linear, of which this is a
    subclass: checkpoints go both ways and tied weights stay tied. Class weights are a buffer that
    the state_dict leaves out. Without a target it is the layer alone.
    """

    ignore_index = -100
    label_smoothing = 0.0
    reduction = "mean"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layer.

        Args:
            in_features: H.
            out_features: V.
            bias: whether the layer has one.
            ignore_index, label_smoothing, reduction: as in torch.nn.CrossEntropyLoss.
            weight: class weights, [V]; None: all 1.
            device, dtype: of the parameters.

        Raises:
            ValueError: an unknown reduction, a smoothing outside 0..1, class weights not [V].
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        where = "fastseq.LinearCrossEntropy: expected"
        if reduction not in REDUCTIONS:
            raise ValueError(f"{where} reduction to be one of {REDUCTIONS}, got {reduction!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"{where} label_smoothing between 0 and 1, got {label_smoothing}")
        if weight is not None and weight.shape != (out_features,):
            raise ValueError(
                f"{where} weight of shape [V] = [{out_features}], got {list(weight.shape)}"
            )
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        kept = None if weight is None else weight.to(device=device, dtype=self.weight.dtype)
        self.register_buffer("class_weight", kept, persistent=False)

    def forward(self, hidden: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of rows ``hidden`` [.., H] with target ids [..], int64; without, the logits.

        Arguments, result and errors are those of
        :func:`fastseq.functional.loss.linear_cross_entropy`.
        """
        if target is None:
            return self.logits(hidden)
        return linear_cross_entropy(
            hidden,
            self.weight,
            self.bias,
            target,
            getattr(self, "class_weight", None),
            self.ignore_index,
            self.label_smoothing,
            self.reduction,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """The layer alone, for decoding: [.., V] of hidden [.., H]."""
        return super().forward(hidden)

    def __prepare_scriptable__(self):
        raise refusal(self)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        )
