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
from fastseq.training.data import Pair, make_pair, read_lines
from fastseq.training.loop import evaluate, train_epoch
from fastseq.training.model import build_model, resolve_device
from fastseq.training.settings import Settings
from fastseq.training.vocabulary import Vocabulary, tokenise

__all__ = ["check_inputs", "train"]

Tokens = list[list[str]]


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


def read_parallel(source: str, target: str, limit: int | None) -> tuple[Tokens, Tokens]:
    """The tokens of two files in which line n of one translates line n of the other.

    Raises:
        OSError, ValueError: a file cannot be read; the files are of unequal length.
    """
    sides = read_lines(source, limit), read_lines(target, limit)
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            "fastseq.training: expected as many lines in both files, "
            f"got {len(sides[0])} in {source} and {len(sides[1])} in {target}"
        )
    return [tokenise(line) for line in sides[0]], [tokenise(line) for line in sides[1]]


def write_history(history: Sequence[Epoch], path: Path) -> None:
    """Write the epochs as a CSV file with a line of column names."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Epoch._fields)
        writer.writerows(history)


def train(
    settings: Settings,
    out: str | os.PathLike[str],
    resume: Checkpoint | None = None,
    reference: bool = False,
    device: str = "auto",
    force: bool = False,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train the attention model, saving after every epoch.

    ``out`` gets last.pt, best.pt (the least validation loss so far) and history.csv. The same
    settings give the same losses, whether in one go or resumed: an epoch's random numbers depend
    on the seed and the epoch alone.

    Args:
        settings: the run; when resuming, with the sizes of ``resume``.
        out: directory for the results, created if need be.
        resume: go on from here.
        reference: train the plain PyTorch modules.
        device: auto, cpu, cuda or cuda:N.
        force: replace a run that is in ``out`` already.
        on_epoch: called with each epoch's result, once it is saved.

    Returns:
        The epochs, those before ``resume`` included.

    Raises:
        OSError, RuntimeError, ValueError: an input, the output or the device cannot be used;
            nothing has been written then.
        RuntimeError: the loss is not finite; the last whole epoch is saved.
        KeyboardInterrupt: as raised, saying what is saved.
    """
    out = Path(out)
    target_device = resolve_device(device)
    check_inputs(settings, out, force)
    done = resume.history if resume else []
    if len(done) >= settings.epochs:
        raise ValueError(
            f"fastseq.training: expected more than the {len(done)} epochs that the checkpoint has, "
            f"got {settings.epochs}; raise --epochs"
        )
    sources, targets = read_parallel(settings.train_source, settings.train_target, settings.limit)
    valid = read_parallel(settings.valid_source, settings.valid_target, settings.limit)
    if resume:
        source_words, target_words = resume.source, resume.target
    else:
        source_words = Vocabulary.build(sources, settings.min_frequency)
        target_words = Vocabulary.build(targets, settings.min_frequency)

    def encode(source: Tokens, target: Tokens) -> list[Pair]:
        return [
            make_pair(source_words.encode(one), target_words.encode(other))
            for one, other in zip(source, target, strict=True)
        ]

    short = [
        max(len(one), len(other)) <= settings.max_length
        for one, other in zip(sources, targets, strict=True)
    ]
    pairs = [pair for pair, keep in zip(encode(sources, targets), short, strict=True) if keep]
    valid_pairs = encode(*valid)
    if not pairs:
        raise ValueError(
            f"fastseq.training: expected pairs of at most {settings.max_length} words, got none "
            f"in {len(sources)}; raise --max-length"
        )

    torch.manual_seed(settings.seed)
    model = build_model(
        len(source_words), len(target_words), settings.embedding, settings.hidden, reference
    )
    if resume:
        model.load_state_dict(resume.model)
    model.to(target_device)
    # fused: 13 ms a step instead of 60 for the 8 million parameters of the default sizes.
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    if resume:
        optimizer.load_state_dict(resume.optimizer)

    history = list(done)
    try:
        for number in range(len(done) + 1, settings.epochs + 1):
            # One stream of random numbers an epoch, so that no generator's state has to be saved.
            seed = settings.seed + 1_000_003 * number
            random.seed(seed)
            torch.manual_seed(seed)
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
            )
            seconds = time.perf_counter() - start
            valid_loss = evaluate(model, valid_pairs, settings.batch_size)
            perplexity = math.exp(valid_loss) if valid_loss < 700 else math.inf
            best = all(valid_loss < epoch.valid_loss for epoch in history)
            epoch = Epoch(number, loss, valid_loss, perplexity, seconds, rate)
            state = Checkpoint(
                settings,
                source_words,
                target_words,
                [*history, epoch],
                model.state_dict(),
                optimizer.state_dict(),
            )
            # last.pt comes after best.pt: whoever resumes from an older last.pt redoes this epoch
            # and so writes best.pt again.
            for name in ("best.pt", "last.pt") if best else ("last.pt",):
                checkpoints.save(state, out / name)
            history.append(epoch)
            write_history(history, out / "history.csv")
            on_epoch(epoch)
    except KeyboardInterrupt:
        saved = f"go on with --resume {out / 'last.pt'}"
        raise KeyboardInterrupt(
            f"interrupted in epoch {len(history) + 1}; "
            + (saved if len(history) > len(done) else "nothing was written")
        ) from None
    return history
