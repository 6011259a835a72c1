"""What defines a training run; free of torch, so that help can show the defaults at once."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODELS", "PRECISIONS", "Settings"]

MODELS: dict[str, dict[str, float]] = {
    "attention": {},
    "bahdanau": {"hidden": 512, "dropout": 0.5},
}
"""The models there are, each with the settings it was published with where they differ."""

PRECISIONS = ("float32", "high", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """The options of ``fastseq train`` that a checkpoint remembers; its help explains them."""

    train_source: str
    train_target: str
    valid_source: str
    valid_target: str
    epochs: int = 10
    batch_size: int = 128
    model: str = "attention"
    embedding: int = 256
    hidden: int = 256
    dropout: float = 0.0
    output_dropout: float = 0.0
    learning_rate: float = 1e-3
    decay: float = 1.0
    label_smoothing: float = 0.0
    clip: float = 1.0
    min_frequency: int = 2
    subwords: int = 0
    max_length: int = 50
    teacher_forcing: float = 1.0
    seed: int = 0
    limit: int | None = None
    precision: str = "float32"
