"""A whole training run: from four text files to checkpoints, or on from a checkpoint."""

from __future__ import annotations

import csv
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastseq._files import atomic_write, check_writable
from fastseq.training import checkpoint as checkpoints
from fastseq.training.checkpoint import Checkpoint, Epoch
from fastseq.training.data import check_line_counts, make_pair, read_lines
from fastseq.training.loop import evaluate, train_epoch
from fastseq.training.model import build_model, resolve_device
from fastseq.training.parallel import ALONE, Team
from fastseq.training.settings import Settings
from fastseq.training.vocabulary import Vocabulary, tokenise

__all__ = ["check_inputs", "train"]

Parallel = list[tuple[list[str], list[str]]]
"""Sentence pairs as tokens."""


def check_inputs(settings: Settings, out: Path, force: bool = False) -> None:
    """Refuse what would fail later, before anything is read or written.

    Raises:
        OSError: a text file cannot be opened, or ``out`` cannot be written to.
        ValueError: ``out`` holds a run already, and ``force`` is not given.
    """
    for path in (
        settings.train_source,
        settings.train_target,
        settings.valid_source,
        settings.valid_target,
    ):
        with open(path, "rb"):
            pass
    check_writable(out)
    for name in ("last.pt", "best.pt", "history.csv"):
        if not force and (out / name).exists():
            raise ValueError(
                f"fastseq.training: expected a directory without a run in it, got {out / name}; "
                "continue that run with --resume, replace it with --force, or choose another --out"
            )


def read_parallel(source: str, target: str, limit: int | None) -> Parallel:
    """The tokens of two files in which line n of one translates line n of the other.

    Raises:
        OSError, ValueError: a file cannot be read; the files are of unequal length.
    """
    sides = read_lines(source, limit), read_lines(target, limit)
    check_line_counts({source: sides[0], target: sides[1]})
    return [(tokenise(one), tokenise(other)) for one, other in zip(*sides, strict=True)]


def write_history(history: Sequence[Epoch], path: Path) -> None:
    """Write the epochs as a CSV file with a line of column names."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Epoch._fields)
        writer.writerows(history)


def learning_rate(settings: Settings, history: Sequence[Epoch]) -> float:
    """What the next epoch trains with: decayed once for each epoch that was not the best so far."""
    best, worse = math.inf, 0
    for epoch in history:
        worse += epoch.valid_loss >= best
        best = min(best, epoch.valid_loss)
    return settings.learning_rate * settings.decay**worse


def train(
    settings: Settings,
    out: str | os.PathLike[str],
    resume: Checkpoint | None = None,
    reference: bool = False,
    device: str = "auto",
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    team: Team = ALONE,
) -> list[Epoch]:
    """Train the attention model, saving after every epoch.

    ``out`` gets last.pt, best.pt (the least validation loss so far) and history.csv. The same
    settings give the same losses, whether in one go or resumed: every epoch seeds Python's and
    torch's generators anew, from the seed and its number.

    Args:
        settings: the run; when resuming, with the sizes of ``resume``.
        out: directory for the results, created if need be.
        resume: go on from here.
        reference: train the plain PyTorch modules.
        device: auto, cpu, cuda or cuda:N.
        force: replace a run that is in ``out`` already.
        say: called with a line about the data, then with one about each epoch that is saved.
        team: the processes that share the work; the first writes the files.

    Returns:
        The epochs, those before ``resume`` included.

    Raises:
        OSError, RuntimeError, ValueError: an input, the output or the device cannot be used;
            nothing has been written then.
        RuntimeError: the loss is not finite; the last whole epoch is saved.
        KeyboardInterrupt: as raised, saying what is saved.
    """
    out, place = Path(out), team.place(resolve_device(device))
    check_inputs(settings, out, force)
    history = list(resume.history) if resume else []
    first = len(history) + 1
    if first > settings.epochs:
        raise ValueError(
            f"fastseq.training: expected more than the {len(history)} epochs that the checkpoint "
            f"has, got {settings.epochs}; raise --epochs"
        )
    text = read_parallel(settings.train_source, settings.train_target, settings.limit)
    valid_text = read_parallel(settings.valid_source, settings.valid_target, settings.limit)
    if resume:
        source, target = resume.source, resume.target
    else:
        how = settings.min_frequency, settings.subwords
        source = Vocabulary.build((one for one, _ in text), *how)
        target = Vocabulary.build((other for _, other in text), *how)
    short = [pair for pair in text if max(map(len, pair)) <= settings.max_length]
    if not short:
        raise ValueError(
            f"fastseq.training: expected pairs of at most {settings.max_length} words, got none "
            f"in {len(text)}; raise --max-length"
        )
    pairs, valid_pairs = (
        [make_pair(source.encode(one), target.encode(other)) for one, other in some]
        for some in (short, valid_text)
    )

    torch.manual_seed(settings.seed)
    model = build_model(settings, len(source), len(target), reference)
    if resume:
        model.load_state_dict(resume.model)
    model.to(place)
    # fused: 13 ms a step instead of 60 for the 8 million parameters of the default sizes.
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    if resume:
        optimizer.load_state_dict(resume.optimizer)
    say(
        f"{len(pairs)} training pairs ({len(text) - len(pairs)} too long), {len(valid_pairs)} "
        f"validation pairs, {len(source)} and {len(target)} words, "
        f"{sum(parameter.numel() for parameter in model.parameters())} parameters on {place}"
    )

    try:
        for number in range(first, settings.epochs + 1):
            # One stream of random numbers an epoch, so that no generator's state has to be saved.
            seed = settings.seed + 1_000_003 * number
            random.seed(seed)
            # Dropout differs from process to process, the coins of teacher forcing do not.
            torch.manual_seed(seed + team.rank)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, history)
            start = time.perf_counter()
            loss, rate = train_epoch(
                model,
                pairs,
                optimizer,
                settings.batch_size,
                seed,
                settings.teacher_forcing,
                settings.clip,
                f"epoch {number}/{settings.epochs}",
                team,
                settings.label_smoothing,
                settings.precision,
            )
            seconds = time.perf_counter() - start
            valid_loss = evaluate(model, valid_pairs, settings.batch_size, team)
            perplexity = math.exp(valid_loss) if valid_loss < 700 else math.inf
            epoch = Epoch(number, loss, valid_loss, perplexity, seconds, rate)
            best = all(valid_loss < earlier.valid_loss for earlier in history)
            weights, moments = model.state_dict(), optimizer.state_dict()
            state = Checkpoint(settings, source, target, [*history, epoch], weights, moments)
            # last.pt comes after best.pt: whoever resumes from an older last.pt redoes this epoch
            # and so writes best.pt again.
            names = ("best.pt", "last.pt") if best else ("last.pt",)
            for name in names if team.rank == 0 else ():
                checkpoints.save(state, out / name)
            history.append(epoch)
            if team.rank == 0:
                write_history(history, out / "history.csv")
            say(
                f"epoch {number}/{settings.epochs}: training loss {loss:.4f}, validation loss "
                f"{valid_loss:.4f}, perplexity {perplexity:.2f}, {seconds:.1f} s, "
                f"{rate:.0f} tokens/s"
            )
    except KeyboardInterrupt:
        number = len(history) + 1
        saved = f"go on with --resume {out / 'last.pt'}" if number > first else "nothing is written"
        raise KeyboardInterrupt(f"interrupted in epoch {number}; {saved}") from None
    return history
