"""One pass over the data: training or evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastseq.functional import linear_cross_entropy
from fastseq.training.data import Batch, Pair, collate, plan
from fastseq.training.parallel import ALONE, Team
from fastseq.training.vocabulary import PAD

__all__ = ["batch_loss", "evaluate", "train_epoch"]


def batch_loss(
    model: nn.Module, batch: Batch, teacher_forcing: float, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross entropy a target token, in nats; <bos> and <pad> do not count.

    Args:
        model: called as ``model(src, trg, teacher_forcing, lengths=src_lengths)``. If it has
            ``features``, that is called instead, and the logits of ``model.decoder.fc`` are never
            held all at once.
        batch: on the CPU.
        teacher_forcing: probability that a step is given the target's own last token.
        label_smoothing: part of the target spread over the vocabulary, between 0 and 1.
    """
    device = next(model.parameters()).device
    trg = batch.trg.to(device)
    arguments = batch.src.to(device), trg, teacher_forcing, batch.src_lengths
    # Position 0 is given, not predicted.
    wanted, how = trg[:, 1:], {"ignore_index": PAD, "label_smoothing": label_smoothing}
    if hasattr(model, "features"):
        fc = model.decoder.fc
        return linear_cross_entropy(model.features(*arguments), fc.weight, fc.bias, wanted, **how)
    logits = model(*arguments)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), **how)


@contextmanager
def high_precision(wanted: bool) -> Iterator[None]:
    """Let products of float32 be as "high" allows for the time being, if wanted."""
    before = torch.get_float32_matmul_precision()
    try:
        if wanted:
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Loss(nn.Module):
    """:func:`batch_loss` as a module, whose forward pass is all that a wrapper of modules sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments) -> Tensor:
        return batch_loss(self.model, *arguments)


def finite(loss: Tensor) -> float:
    """The value of a loss; RuntimeError if it is infinite or not a number."""
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(
            f"fastseq.training: expected a finite loss, got {value}; "
            "lower --learning-rate or --clip"
        )
    return value


def train_epoch(
    model: nn.Module,
    pairs: Sequence[Pair],
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    seed: int,
    teacher_forcing: float,
    clip: float,
    label: str = "",
    team: Team = ALONE,
    label_smoothing: float = 0.0,
    precision: str = "float32",
) -> tuple[float, float]:
    """Train on every pair once, with a progress bar if standard error is a terminal.

    Args:
        model, optimizer: changed in place.
        pairs: what to train on.
        batch_size: pairs a step.
        seed: of the order of the pairs.
        teacher_forcing: as :func:`batch_loss`.
        clip: largest norm of the gradients of a step; 0: no limit.
        label: heads the progress bar.
        team: the processes that share the work; the first has the bar.
        label_smoothing: as :func:`batch_loss`.
        precision: "high" is torch's switch for products of float32, "bfloat16" autocast.

    Returns:
        The mean loss a target token, each batch taken before its own step; target tokens a second.

    Raises:
        RuntimeError: a loss is not finite.
    """
    model.train()
    lengths = [(len(target), len(source)) for source, target in pairs]
    total, tokens, start = 0.0, 0, time.perf_counter()
    batches, loss_of = plan(lengths, batch_size, seed), team.wrap(Loss(model))
    place = next(model.parameters()).device.type
    lower = torch.autocast(place, torch.bfloat16, enabled=precision == "bfloat16")
    quiet = None if team.rank == 0 else True
    bar = tqdm(batches, label, unit="batch", leave=False, disable=quiet)
    with bar, high_precision(precision == "high"):
        for indices in bar:
            batch = collate([pairs[index] for index in indices])
            optimizer.zero_grad()
            share, weight = team.share(batch)
            with lower:
                loss = loss_of(share, teacher_forcing, label_smoothing) * weight
            value = finite(team.mean(loss))
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            total += value * batch.tokens
            tokens += batch.tokens
            rate = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {total / tokens:.3f}, {rate:.0f} tokens/s", refresh=False)
    return total / tokens, rate


@torch.no_grad()
def evaluate(
    model: nn.Module,
    pairs: Sequence[Pair],
    batch_size: int,
    team: Team = ALONE,
    teacher_forcing: float = 1.0,
) -> float:
    """Mean loss a target token.

    Args:
        model: left in evaluation mode.
        pairs: what to measure on.
        batch_size: pairs at a time.
        team: the processes that divide the batches among them.
        teacher_forcing: 1: each token is predicted from the target's own ones before it, whatever
            the training used; the loss is the negative log-likelihood, whose exponential is the
            perplexity. 0: from the model's own.

    Raises:
        RuntimeError: a loss is not finite.
    """
    model.eval()
    total, tokens = 0.0, 0
    batches = plan([(len(target), len(source)) for source, target in pairs], batch_size)
    for indices in batches[team.rank :: team.size]:
        batch = collate([pairs[index] for index in indices])
        total += finite(batch_loss(model, batch, teacher_forcing)) * batch.tokens
        tokens += batch.tokens
    total, tokens = team.sum(torch.tensor([total, tokens], dtype=torch.float64)).tolist()
    return total / tokens
