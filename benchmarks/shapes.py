"""The sizes that are measured, and how many times faster than torch each is meant to be."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LSTM", "MODES", "Shape", "select"]

MODES = ("train", "inf")


@dataclass(frozen=True)
class Shape:
    """T steps, B rows, I inputs, H units; targets are torch's time over ours, by mode."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    train: float
    inf: float

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.T, self.B, self.I, self.H

    @property
    def label(self) -> str:
        return ", ".join(map(str, self.sizes))

    def target(self, mode: str) -> float:
        return {"train": self.train, "inf": self.inf}[mode]

    def lstm_flop(self, mode: str) -> float:
        """Multiplications and additions of the matrix products, the bulk of the arithmetic.

        Forward has one product with each weight matrix; backward two more of the same size.
        """
        forward = 2.0 * self.T * self.B * 4 * self.H * (self.I + self.H)
        return forward * (3 if mode == "train" else 1)


LSTM = [
    Shape(5, 64, 16, 32, train=4.5, inf=4),
    Shape(50, 32, 256, 256, train=1.35, inf=1.25),
    Shape(100, 128, 128, 128, train=2.1, inf=1.4),
    Shape(50, 64, 512, 512, train=1.4, inf=1.15),
    Shape(200, 16, 128, 128, train=1.8, inf=1.6),
    Shape(500, 8, 40, 320, train=2, inf=1.5),
    Shape(50, 1, 256, 256, train=2, inf=2.5),
    Shape(1000, 1, 64, 64, train=4, inf=6),
    Shape(5, 1, 16, 32, train=4, inf=6),
]


def select(shapes: list[Shape], chosen: str) -> list[Shape]:
    """The shapes named by a list such as ``1,3`` (counted from 1), or ``all``.

    Raises:
        ValueError: not a number, or no such row.
    """
    if chosen == "all":
        return shapes
    picked = []
    for word in chosen.split(","):
        if not word.strip().isdigit() or not 1 <= int(word) <= len(shapes):
            raise ValueError(f"expected rows from 1 to {len(shapes)}, got {word.strip()!r}")
        picked.append(shapes[int(word) - 1])
    return picked
