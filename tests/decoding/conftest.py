"""Models to decode with: real ones, and one whose every distribution can be looked up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastseq.models import attention as fast_house
from fastseq.models import plain as fast_plain
from fastseq.reference import attention as reference_house
from fastseq.reference import plain as reference_plain

SIZES = (9, 6, 8)


def _wide(model: nn.Module) -> nn.Module:
    """Float64 and weights wider than the default, so that tokens matter."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.mul_(4.0)
    return model


@pytest.fixture(params=[reference_house, fast_house], ids=["reference", "fast"])
def model(request):
    house = request.param
    encoder = house.Encoder(*SIZES)
    return _wide(house.Seq2Seq(encoder, house.Decoder(*SIZES, house.Attention(SIZES[2]))))


@pytest.fixture(params=[reference_plain, fast_plain], ids=["reference", "fast"])
def plain_model(request):
    house = request.param
    return _wide(house.Seq2Seq(house.Encoder(*SIZES), house.Decoder(*SIZES)))


class Lookup(nn.Module):
    """A Seq2Seq whose logits are a fixed function of the source and all tokens so far.

    The first token of a source is its number. ``change`` maps logits [V] to others. ``calls`` lists
    the rows of each step.
    """

    def __init__(self, vocabulary: int, change: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        super().__init__()
        self.vocabulary, self.change, self.calls = vocabulary, change, []
        self.encoder, self.decoder = self.encode, self

    def encode(self, src: Tensor, lengths: Tensor | None = None):
        numbers = src[:, :1, None].double()
        return numbers.expand(-1, src.shape[1], -1), numbers[:, 0].unsqueeze(0)

    def logits(self, number: int, history: tuple[int, ...]) -> Tensor:
        """Of the token after ``history``, which begins with the start token."""
        code = float(number) + 1
        for token in history:
            code = (code * 7.3 + token + 1) % 1009
        return self._spread(torch.tensor([code], dtype=torch.float64))[0]

    def _spread(self, code: Tensor) -> Tensor:
        places = torch.arange(self.vocabulary, dtype=torch.float64)
        return self.change(3 * torch.sin(code.unsqueeze(1) * 12.9898 + places * (places + 5.233)))

    def log_p(self, number: int, history: tuple[int, ...]) -> list[float]:
        return self.logits(number, history).log_softmax(0).tolist()

    def stepper(self, outputs: Tensor, mask: Tensor | None):
        def step(token: Tensor, state: Tensor):
            self.calls.append(len(token))
            fresh = not getattr(step, "begun", False)
            step.begun = True
            code = state[0, :, 0] + 1 if fresh else state[0, :, 0]
            code = (code * 7.3 + token[:, 0] + 1) % 1009
            return self._spread(code).unsqueeze(1), code.view(1, -1, 1)

        def select(sources: Tensor):
            narrowed = self.stepper(outputs[sources], mask)
            narrowed.begun = True
            return narrowed

        step.select = select
        return step


@pytest.fixture
def lookup() -> type[Lookup]:
    return Lookup
