"""The demonstration: one training run with the reference modules, the same with the fast ones.

The task is to copy a row of digits. Both models start from the same weights, and each step gives
both the same batch and the same teacher-forcing coins, so what differs is rounding and time.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from fastseq import nn
from fastseq._files import atomic_write, check_writable
from fastseq.decoding import greedy

__all__ = ["DemoResult", "Learner", "build_pair", "digits", "run", "train_side_by_side"]

VOCAB_SIZE = 10
SEQ_LENGTH = 5
EMBEDDING_DIM = 16
HIDDEN_DIM = 32
LEARNING_RATE = 0.005
FRESH = 1000
"""Sequences never trained on, for the accuracy (of 9^5 = 59049 there are)."""


class Learner:
    """One model in training: its optimiser, its losses, and the seconds its steps took."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.criterion = nn.CrossEntropyLoss()
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, batch: Tensor, teacher_forcing_ratio: float = 0.5) -> None:
        """Forward, backward and optimiser step on copying ``batch`` [B, S]."""
        started = _now(batch.device)
        self.optimizer.zero_grad()
        output = self.model(batch, batch, teacher_forcing_ratio)
        loss = self.criterion(output[:, 1:].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.seconds += _now(batch.device) - started
        self.losses.append(loss.item())

    @torch.no_grad()
    def exact_match(self, batch: Tensor) -> float:
        """Share of the rows of ``batch`` [B, S] copied without error, decoding freely."""
        copies = self.model(batch, batch, 0.0).argmax(2)
        return (copies == batch)[:, 1:].all(1).double().mean().item()


@dataclass(frozen=True)
class DemoResult:
    """What :func:`run` found. Losses are one a step; accuracies are shares of exact copies."""

    model: str
    steps: int
    seed: int
    device: str
    reference_losses: list[float]
    fast_losses: list[float]
    reference_seconds: float
    fast_seconds: float
    reference_accuracy: float
    fast_accuracy: float
    pictures: list[Path]

    @property
    def differences(self) -> list[float]:
        """Absolute loss differences, one a step."""
        return [abs(r - f) for r, f in zip(self.reference_losses, self.fast_losses, strict=True)]

    @property
    def speedup(self) -> float:
        """Reference seconds over fast seconds."""
        return self.reference_seconds / self.fast_seconds


def digits(rng: np.random.Generator, rows: int) -> Tensor:
    """Random digits 1..9, [rows, 5], int64; the target of copying is the source itself."""
    return torch.from_numpy(rng.integers(1, VOCAB_SIZE, (rows, SEQ_LENGTH)))


def build_pair(
    model: str, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Learner, Learner]:
    """The reference and the fast model with the same initial weights, each with its optimiser."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        houses = [import_module(f"fastseq.{house}.{model}") for house in ("reference", "models")]
        pair = [_build(house).to(device, dtype) for house in houses]
    pair[1].load_state_dict(pair[0].state_dict())
    return Learner(pair[0]), Learner(pair[1])


def _build(house: ModuleType) -> nn.Module:
    sizes = (VOCAB_SIZE, EMBEDDING_DIM, HIDDEN_DIM)
    attention = (house.Attention(HIDDEN_DIM),) if hasattr(house, "Attention") else ()
    encoder = house.Encoder(*sizes)
    return house.Seq2Seq(encoder, house.Decoder(*sizes, *attention))


def train_side_by_side(
    pair: tuple[Learner, Learner],
    steps: int,
    batch_size: int,
    seed: int,
    *,
    progress: bool = False,
) -> None:
    """Train both models on the same batches with the same coins, a step of each in turn.

    Python's ``random`` is left as it was found.
    """
    rng = np.random.default_rng(seed)
    device = next(pair[0].model.parameters()).device
    found = random.getstate()
    random.seed(seed)
    try:
        with tqdm(total=steps, unit="step", disable=not progress, leave=False) as bar:
            for step in range(steps):
                batch = digits(rng, batch_size).to(device)
                coins = random.getstate()
                # Who goes first alternates, so neither always finds the other's data in cache.
                for learner in pair if step % 2 == 0 else pair[::-1]:
                    random.setstate(coins)
                    learner.step(batch)
                if progress and step % 20 == 0:
                    now = {"reference": pair[0].losses[-1], "fast": pair[1].losses[-1]}
                    bar.set_postfix(now, refresh=False)
                bar.update()
    finally:
        random.setstate(found)


def run(
    steps: int = 2000,
    batch_size: int = 64,
    seed: int = 0,
    out: str | os.PathLike[str] = "demo-output",
    device: str = "auto",
    model: str = "attention",
    *,
    quiet: bool = False,
) -> DemoResult:
    """Train the digit-copy task both ways, show a table, and draw losses and alignment.

    Args:
        steps: training steps.
        batch_size: rows a step.
        seed: of weights, data and coins.
        out: directory for ``losses.png`` and, with attention, ``alignment.png``.
        device: "auto" takes a GPU if there is one.
        model: "attention" or "plain".
        quiet: no progress bar and no table.

    Raises:
        ValueError: an unknown model, or ``steps`` or ``batch_size`` below 1.
        OSError: ``out`` cannot be written; found out before training.
    """
    if model not in ("attention", "plain"):
        raise ValueError(f'fastseq.demo: expected model "attention" or "plain", got {model!r}')
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"fastseq.demo: expected {name} of at least 1, got {value}")
    out = Path(out)
    check_writable(out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    pair = build_pair(model, seed, device)
    train_side_by_side(pair, steps, batch_size, seed, progress=not quiet)
    fresh = digits(np.random.default_rng([seed, 1]), FRESH).to(device)
    accuracies = [learner.exact_match(fresh) for learner in pair]

    pictures = [out / "losses.png"]
    result = DemoResult(
        model=model,
        steps=steps,
        seed=seed,
        device=device,
        reference_losses=pair[0].losses,
        fast_losses=pair[1].losses,
        reference_seconds=pair[0].seconds,
        fast_seconds=pair[1].seconds,
        reference_accuracy=accuracies[0],
        fast_accuracy=accuracies[1],
        pictures=pictures,
    )
    _draw_losses(result, pictures[0])
    if model == "attention":
        pictures.append(out / "alignment.png")
        _draw_alignment(pair[1].model, fresh, pictures[1])
    if not quiet:
        _show(result)
    return result


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _show(result: DemoResult) -> None:
    console = Console()
    table = Table(
        title=f"Copying {SEQ_LENGTH} digits: {result.model} model, {result.steps} steps, "
        f"{result.device}, seed {result.seed}"
    )
    table.add_column()
    table.add_column("reference", justify="right")
    table.add_column("fast", justify="right")
    table.add_row(
        "final loss", f"{result.reference_losses[-1]:.3g}", f"{result.fast_losses[-1]:.3g}"
    )
    table.add_row(
        f"exact copies of {FRESH} fresh rows",
        f"{result.reference_accuracy:.1%}",
        f"{result.fast_accuracy:.1%}",
    )
    table.add_row(
        "seconds in training steps", f"{result.reference_seconds:.2f}", f"{result.fast_seconds:.2f}"
    )
    table.add_row("speed-up", "1", f"{result.speedup:.2f}")
    console.print(table)
    console.print(
        f"Largest difference between the losses: {max(result.differences[:100]):.2g} in the first "
        f"{min(100, result.steps)} steps, {max(result.differences):.2g} in all. The two differ by "
        "rounding. Training is chaotic where a near tie decides which token is fed back: rounding "
        "can then grow, so the late losses need only agree in course, the early ones in digits.",
        highlight=False,
    )
    for picture in result.pictures:
        console.print(f"Wrote {picture}", highlight=False, soft_wrap=True)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_losses(result: DemoResult, path: Path) -> None:
    figure = _figure(8, 5.5)
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, result.steps + 1)
    losses.semilogy(
        steps, result.reference_losses, color="#f2b134", linewidth=3, label="fastseq.reference"
    )
    losses.semilogy(
        steps, result.fast_losses, color="#1b4965", linewidth=0.8, label="fastseq.models"
    )
    losses.set_ylabel("cross-entropy")
    losses.set_title(
        f"Digit copy, {result.model} model: {result.reference_seconds:.1f} s with the reference, "
        f"{result.fast_seconds:.1f} s with the fast modules",
        fontsize=11,
    )
    losses.legend(frameon=False)
    # A log axis has no zero: steps of exactly equal losses are left out.
    shown = [d or float("nan") for d in result.differences]
    differences.semilogy(steps, shown, ".", color="#1b4965", markersize=2)
    differences.set_ylabel("absolute difference")
    differences.set_xlabel("training step")
    for axes in (losses, differences):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def _draw_alignment(model: nn.Module, rows: Tensor, path: Path) -> None:
    """Draw the attention weights of the first row of [N, S] without a repeated digit."""
    ordered = rows.sort(1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).all(1)
    row = rows[int(distinct.int().argmax())].unsqueeze(0)
    tokens, weights = greedy(
        model, row, max_length=row.shape[1] - 1, bos=row[:, 0], eos=None, return_weights=True
    )
    grid = weights[0].float().cpu().numpy()
    figure = _figure(5.6, 4.1)
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(grid.shape[1]), [str(token) for token in row[0].tolist()])
    axes.set_yticks(range(grid.shape[0]), [str(token) for token in tokens[0].tolist()])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("source digits (the first is the start token)")
    axes.set_ylabel("digits written, in order")
    axes.set_title("Where the decoder looks", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for q, row_weights in enumerate(grid):
        for s, weight in enumerate(row_weights):
            color = "white" if weight > 0.5 else "black"
            axes.text(s, q, f"{weight:.2f}", ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, label="attention weight", shrink=0.8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
