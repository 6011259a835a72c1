"""One pass over the data: training or evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastseq.training.data import Batch, Pair, collate, plan
from fastseq.training.parallel import ALONE, Team
from fastseq.training.vocabulary import PAD

__all__ = ["batch_loss", "evaluate", "train_epoch"]


def batch_loss(model: nn.Module, batch: Batch, teacher_forcing: float) -> Tensor:
    """Mean cross entropy a target token, in nats; <bos> and <pad> do not count.

    Args:
        model: called as ``model(src, trg, teacher_forcing, lengths=src_lengths)``.
        batch: on the CPU.
        teacher_forcing: probability that a step is given the target's own last token.
    """
    device = next(model.parameters()).device
    trg = batch.trg.to(device)
    logits = model(batch.src.to(device), trg, teacher_forcing, lengths=batch.src_lengths)
    # Position 0 is given, not predicted.
    return F.cross_entropy(logits[:, 1:].flatten(0, 1), trg[:, 1:].flatten(), ignore_index=PAD)


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

    Returns:
        The mean loss a target token, each batch taken before its own step; target tokens a second.

    Raises:
        RuntimeError: a loss is not finite.
    """
    model.train()
    lengths = [(len(target), len(source)) for source, target in pairs]
    total, tokens, start = 0.0, 0, time.perf_counter()
    batches, loss_of = plan(lengths, batch_size, seed), team.wrap(Loss(model))
    quiet = None if team.rank == 0 else True
    with tqdm(batches, label, unit="batch", leave=False, disable=quiet) as bar:
        for indices in bar:
            batch = collate([pairs[index] for index in indices])
            optimizer.zero_grad()
            share, weight = team.share(batch)
            loss = loss_of(share, teacher_forcing) * weight
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
def evaluate(model: nn.Module, pairs: Sequence[Pair], batch_size: int, team: Team = ALONE) -> float:
    """Mean loss a target token, each token predicted from the target's own ones before it.

    That is teacher forcing of 1, whatever the training used: the negative log-likelihood, whose
    exponential is the perplexity. The batches are divided among the team.

    Raises:
        RuntimeError: a loss is not finite.
    """
    model.eval()
    total, tokens = 0.0, 0
    batches = plan([(len(target), len(source)) for source, target in pairs], batch_size)
    for indices in batches[team.rank :: team.size]:
        batch = collate([pairs[index] for index in indices])
        total += finite(batch_loss(model, batch, teacher_forcing=1.0)) * batch.tokens
        tokens += batch.tokens
    total, tokens = team.sum(torch.tensor([total, tokens], dtype=torch.float64)).tolist()
    return total / tokens
