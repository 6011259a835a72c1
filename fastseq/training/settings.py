"""What defines a training run; free of torch, so that help can show the defaults at once."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The options of ``fastseq train`` that a checkpoint remembers; its help explains them."""

    train_source: str
    train_target: str
    valid_source: str
    valid_target: str
    epochs: int = 10
    batch_size: int = 128
    embedding: int = 256
    hidden: int = 256
    learning_rate: float = 1e-3
    clip: float = 1.0
    min_frequency: int = 2
    max_length: int = 50
    teacher_forcing: float = 1.0
    seed: int = 0
    limit: int | None = None
