"""Greedy decoding, sampling and beam search against the same loops in plain PyTorch.

python -m benchmarks.bench_decoding [--device cuda] [--rows 1,3] [--quick] [--output FOLDER]

Both sides have the same weights, of the reference attention encoder-decoder, and write T tokens a
source, none of which ends a target. Before anything is timed the two have to
write the same tokens, in float64, where no rounding decides between two of them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.command import Row, command, milliseconds
from fastseq import decoding
from fastseq.models import attention as fast
from fastseq.reference import attention as reference

COLUMNS = "way V E H B S T status fastseq_ms plain_ms ratio target met tokens_a_second".split()
BOS, WIDTH = 2, 5
# V, E, H, B, S, T, and what plain PyTorch's time over ours is meant to be: greedy, beam.
# Of the largest a fifth of the target: every further token costs the same.
SIZES = [
    ((10, 16, 32, 64, 5, 5), 12, 5),
    ((1000, 256, 256, 32, 30, 30), 6, 5),
    ((8000, 256, 512, 64, 40, 8), 5, 5),
    ((10, 16, 32, 1, 5, 5), 10, 5),
    ((1000, 256, 256, 1, 30, 30), 10, 5),
    ((8000, 256, 512, 1, 40, 40), 10, 5),
]


def models(V: int, E: int, H: int) -> tuple[nn.Module, nn.Module]:
    """The fast model and the reference, of the same weights: wide ones, so that tokens matter."""
    torch.manual_seed(0)
    made = [
        house.Seq2Seq(house.Encoder(V, E, H), house.Decoder(V, E, H, house.Attention(H))).eval()
        for house in (fast, reference)
    ]
    with torch.no_grad():
        for parameter in made[1].parameters():
            parameter.mul_(4.0)
    made[0].load_state_dict(made[1].state_dict())
    return made[0], made[1]


def _started(model: nn.Module, src: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs, (hidden, cell) = model.encoder(src)
    return src.new_full((len(src), 1), BOS), hidden, cell, outputs


@torch.no_grad()
def plain_greedy(model: nn.Module, src: Tensor, steps: int) -> Tensor:
    """The loop everyone writes: tokens [B, steps]."""
    token, hidden, cell, outputs = _started(model, src)
    tokens = []
    for _ in range(steps):
        logits, hidden, cell, _ = model.decoder(token, hidden, cell, outputs)
        token = logits.argmax(2)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def plain_sample(model: nn.Module, src: Tensor, steps: int, seed: int) -> Tensor:
    """A number from [0, 1) a row and step, and the token at which the CDF passes it."""
    token, hidden, cell, outputs = _started(model, src)
    generator = torch.Generator(src.device).manual_seed(seed)
    tokens = []
    for _ in range(steps):
        logits, hidden, cell, _ = model.decoder(token, hidden, cell, outputs)
        drawn = torch.rand(
            len(src), dtype=torch.float64, device=src.device, generator=generator
        ).unsqueeze(1)
        cdf = logits[:, 0].double().softmax(1).cumsum(1)
        token = torch.searchsorted(cdf, drawn * cdf[:, -1:], right=True)
        token = token.clamp(max=logits.shape[2] - 1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def plain_beam(model: nn.Module, src: Tensor, steps: int, width: int) -> Tensor:
    """A batched search with a copy of the source for each hypothesis: the best, [B, steps]."""
    token, hidden, cell, outputs = _started(model, src)
    batch = len(src)
    outputs, token = (t.repeat_interleave(width, dim=0) for t in (outputs, token))
    hidden, cell = (t.repeat_interleave(width, dim=1) for t in (hidden, cell))
    scores = outputs.new_full((batch, width), -torch.inf)
    scores[:, 0] = 0
    first = torch.arange(batch, device=src.device).unsqueeze(1) * width
    tokens = src.new_empty(batch * width, 0)
    for _ in range(steps):
        logits, hidden, cell, _ = model.decoder(token, hidden, cell, outputs)
        log_p = logits[:, 0].log_softmax(1)
        total = (scores.view(-1, 1) + log_p).view(batch, -1)
        scores, place = total.topk(width, dim=1)
        rows = (first + place // log_p.shape[1]).flatten()
        token = (place % log_p.shape[1]).view(-1, 1)
        tokens = torch.cat((tokens[rows], token), dim=1)
        hidden, cell = hidden[:, rows], cell[:, rows]
    return tokens.view(batch, width, steps)[:, 0]


def ways(fast_model: nn.Module, plain_model: nn.Module, src: Tensor, steps: int) -> dict:
    """Way of decoding -> fastseq's call and plain PyTorch's."""
    options = {"max_length": steps, "bos": BOS, "eos": None}
    return {
        "greedy": (
            lambda: decoding.greedy(fast_model, src, **options),
            lambda: plain_greedy(plain_model, src, steps),
        ),
        "sample": (
            lambda: decoding.sample(fast_model, src, **options, generator=0),
            lambda: plain_sample(plain_model, src, steps, 0),
        ),
        f"beam {WIDTH}": (
            lambda: decoding.beam_search(fast_model, src, **options, width=WIDTH).tokens[:, 0],
            lambda: plain_beam(plain_model, src, steps, WIDTH),
        ),
    }


def verify(way: str, pair: tuple[nn.Module, nn.Module], src: Tensor, steps: int) -> None:
    """The two write the same tokens in float64."""
    ours, plain = ways(*(copy.deepcopy(model).double() for model in pair), src, steps)[way]
    found, expected = ours(), plain()
    different = int((found != expected).sum()) if found.shape == expected.shape else found.shape
    assert different == 0, f"{different} of {list(expected.shape)} tokens differ"


def rows(what: tuple, device: str, quick: bool) -> Iterator[Row]:
    (V, E, H, B, S, T), greedy, beam = what
    pair = tuple(model.to(device) for model in models(V, E, H))
    src = torch.randint(min(4, V - 1), V, (B, S), generator=torch.Generator().manual_seed(1))
    src = src.to(device)
    targets = {"greedy": greedy, "sample": None, f"beam {WIDTH}": beam}
    for way, target in targets.items():

        def measure(seconds: float, way=way, target=target) -> dict[str, object]:
            verify(way, pair, src, min(T, 10))
            ours, plain = ways(*pair, src, T)[way]
            times = milliseconds({"fastseq": ours, "plain": plain}, device, seconds)
            ratio = times["plain"] / times["fastseq"]
            said = {f"{name}_ms": f"{ms:.4g}" for name, ms in times.items()}
            said |= {"ratio": f"{ratio:.2f}"}
            said["tokens_a_second"] = f"{B * T / times['fastseq'] * 1e3:.0f}"
            if target is not None:
                said |= {"target": target, "met": "yes" if ratio >= target else "no"}
            return said

        yield Row({"way": way, "V": V, "E": E, "H": H, "B": B, "S": S, "T": T}, measure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    sizes = dict.fromkeys(("cpu", "cuda"), SIZES)
    return command("decoding", __doc__.splitlines()[0], sizes, COLUMNS, rows, argv)


if __name__ == "__main__":
    sys.exit(main())
