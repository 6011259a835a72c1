"""Sampling: at each step a token drawn from the model's distribution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.decoding._rows import (
    Rows,
    a_token_each,
    check_integers,
    check_max_length,
    whole,
    write,
)
from fastseq.decoding._top import descending, top
from fastseq.functional.samples import check_sampling

__all__ = ["sample"]

# Most probable tokens among which a trained model's nucleus is looked for before all are sorted,
# which at V = 8000 costs as much as the rest of a step.
USUAL_NUCLEUS = 256

# Random numbers that are drawn before the first step, at the most: 128 MiB.
MOST_AHEAD = 1 << 24


@torch.no_grad()
def sample(
    model: nn.Module,
    src: Tensor,
    lengths: Tensor | None = None,
    max_length: int = 100,
    bos: int | Tensor = 2,
    eos: int | Tensor | None = 3,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Draw a target for each of a batch of sources from a Seq2Seq, fast or reference.

    A token is drawn from softmax(logits / temperature) over, first, the ``top_k`` most probable
    ones and, of these, the fewest most probable ones that hold ``top_p`` of the probability. A
    row's draws are the same whenever the rows beside it end: a step takes B numbers, float64 from
    [0, 1), of the generator. Rows that have ended take no part in further steps.

    Args:
        model: with the ``encoder`` and ``decoder`` of a Seq2Seq, with or without attention.
        src: source token ids, [B, S], int64.
        lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.
        max_length: the most tokens to draw.
        bos: start token, or one for each row, [B], int64.
        eos: token that ends a row, or one for each row, [B], int64; None: no row ends early.
        temperature: above 0: below 1 makes probable tokens more probable still.
        top_k: at least 1; None, or above V: all.
        top_p: above 0, at most 1.
        generator: of the random numbers, or a seed; None: torch's own.

    Returns:
        Tokens, [B, N], int64, N <= max_length: without the start token, with ``eos`` where it came,
        and <pad> = 0 after it.

    Raises:
        ValueError: an option out of range, ``bos`` or ``eos`` of another shape, ``lengths`` out of
            range.
        TypeError: ``lengths`` not int64, an option not the number it should be.
        RuntimeError: logits that are NaN or all minus infinity.

    Source: Fan, Lewis, Dauphin 2018, "Hierarchical Neural Story Generation" (top-k); Holtzman et
    al. 2020, "The Curious Case of Neural Text Degeneration" (nucleus).
    """
    check_max_length(max_length, "sample")
    if top_k is not None:
        check_integers("sample", top_k=top_k)
    check_sampling("fastseq.sample", temperature, top_k, top_p)
    start = a_token_each(bos, src, "bos", "sample")
    ends = None if eos is None else a_token_each(eos, src, "eos", "sample")
    if isinstance(generator, int):
        generator = torch.Generator(src.device).manual_seed(generator)
    device = src.device if generator is None else generator.device
    rows = None
    if 0 < len(src) * max_length <= MOST_AHEAD and src.is_cpu and device.type == "cpu":
        options = {"ends": ends, "temperature": temperature, "top_k": top_k, "top_p": top_p}

        def loop(drawn: Tensor) -> tuple[Tensor, ...] | None:
            nonlocal rows
            found = whole(model, "samples", src, lengths, start, drawn=drawn, **options)
            if found is None:
                rows = Rows(model, src, lengths, "sample")
                found = rows.alone("draw", start, drawn=drawn, **options)
            return found

        found = _drawn_ahead(loop, len(src), max_length, generator)
        if found is not None:
            return found
    rows = rows or Rows(model, src, lengths, "sample")

    def pick(logits: Tensor) -> Tensor:
        drawn = torch.rand(len(src), dtype=torch.float64, device=device, generator=generator)
        return _draw(logits, drawn.to(src.device)[rows.sources], temperature, top_k, top_p)

    return write(rows, start, ends, max_length, pick)[0]


def _drawn_ahead(
    loop: Callable, batch: int, max_length: int, generator: torch.Generator | None
) -> Tensor | None:
    """Tokens [B, N] by a loop that is given all numbers, [N, B]; None where it returns None. The
    generator is left as by the other loop, which draws for one step after the other and none after
    the last."""
    generator = torch.default_generator if generator is None else generator
    before = generator.get_state()
    draw = partial(torch.rand, dtype=torch.float64, device="cpu", generator=generator)
    found = loop(draw(max_length, batch))
    steps = 0 if found is None else int(found[1].max())
    if steps < max_length:
        generator.set_state(before)
        draw(steps, batch)
    return None if found is None else found[0][:, :steps]


def _draw(
    logits: Tensor, drawn: Tensor, temperature: float, top_k: int | None, top_p: float
) -> Tensor:
    """The tokens at which the CDFs of logits [B, V] pass the numbers drawn from [0, 1), [B]."""
    logits, kept = logits.double(), None
    # Less the largest before the division: a small temperature must not overflow.
    p = torch.softmax((logits - logits.amax(1, keepdim=True)) / temperature, dim=1)
    if not bool(p.isfinite().all()):
        raise RuntimeError("fastseq.sample: expected finite logits, got NaN or all minus infinity")
    if top_k is not None and top_k < p.shape[1]:
        p, kept = top(p, top_k)
        p = p / p.sum(1, keepdim=True)
    elif top_p < 1:
        best = top(p, min(p.shape[1], USUAL_NUCLEUS))
        p, kept = best if bool((best[0].sum(1) >= top_p).all()) else descending(p)
    if top_p < 1:
        p = p.masked_fill(F.pad(p.cumsum(1)[:, :-1], (1, 0)) >= top_p, 0)
    cdf = p.cumsum(1)
    # The first place whose CDF is larger: never one of probability zero, nor beyond the last.
    place = torch.searchsorted(cdf, (drawn * cdf[:, -1]).unsqueeze(1), right=True)
    return (place if kept is None else kept.gather(1, place)).squeeze(1)
