"""Saving a training run, and loading it without trusting the file."""

from __future__ import annotations

import os
import zipfile
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from fastseq._files import atomic_write
from fastseq.training.model import build_model
from fastseq.training.settings import Settings
from fastseq.training.vocabulary import Vocabulary

__all__ = ["Checkpoint", "Epoch", "load", "save"]

FORMAT, VERSION = "fastseq.training", 1


class Epoch(NamedTuple):
    """What one epoch gave; losses are in nats a target token, <eos> counted."""

    epoch: int
    train_loss: float
    valid_loss: float
    perplexity: float
    seconds: float
    tokens_per_second: float


@dataclass
class Checkpoint:
    """A run after its last whole epoch.

    There is no random state in it: every epoch seeds Python's and torch's generators anew from the
    run's seed and its own number.
    """

    settings: Settings
    source: Vocabulary
    target: Vocabulary
    history: list[Epoch]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]

    def build(self, reference: bool = False) -> torch.nn.Module:
        """The model with its trained weights, on the CPU.

        Raises:
            RuntimeError: the weights are not those of such a model.
        """
        model = build_model(self.settings, len(self.source), len(self.target), reference)
        model.load_state_dict(self.model)
        return model


def save(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint; an interruption leaves the file that was there before."""
    state = {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(checkpoint.settings),
        "source": checkpoint.source.state()[0],
        "target": checkpoint.target.state()[0],
        "subwords": (checkpoint.source.state()[1], checkpoint.target.state()[1]),
        "history": [epoch._asdict() for epoch in checkpoint.history],
        "model": checkpoint.model,
        "optimizer": checkpoint.optimizer,
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint onto the CPU, running no code from the file.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is not a whole checkpoint of ``fastseq train``, or from a newer version.
    """
    with open(path, "rb") as file:
        try:
            # torch.load does not compare the checksums.
            damaged = zipfile.ZipFile(file).testzip()
            file.seek(0)
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # A broken archive fails in more ways than either library documents.
            raise ValueError(_refusal(path, "a file that is damaged or of another kind")) from error
    if damaged:
        raise ValueError(_refusal(path, f"a file damaged at {damaged}"))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(_refusal(path, "a file saved by another program"))
    if state["version"] != VERSION:
        raise ValueError(_refusal(path, f"one of format version {state['version']}"))
    try:
        # Runs from before there were subwords have none.
        pairs = state.get("subwords", ((), ()))
        checkpoint = Checkpoint(
            Settings(**state["settings"]),
            Vocabulary(state["source"], pairs[0]),
            Vocabulary(state["target"], pairs[1]),
            [Epoch(**epoch) for epoch in state["history"]],
            state["model"],
            state["optimizer"],
        )
        checkpoint.build()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(_refusal(path, "one whose parts do not fit together")) from error
    return checkpoint


def _refusal(path: str | os.PathLike[str], got: str) -> str:
    return f"fastseq.training: expected a checkpoint of fastseq train in {path}, got {got}"
