"""What is measured, and how many times faster than the baseline each is meant to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

__all__ = ["CELLS", "GROUPS", "MODES", "Measurement", "measurements", "select"]

MODES = ("train", "inf")
GROUPS = ("layers", "packed", "stacked", "cells", "bf16", "high")
# Gates of each cell; the keys are those of fastseq.testing.recurrent_case.
CELLS = {"lstm": 4, "gru": 3, "rnn_tanh": 1}

# T steps, B rows, I inputs, H units.
SIZES = (
    (5, 64, 16, 32),
    (50, 32, 256, 256),
    (100, 128, 128, 128),
    (50, 64, 512, 512),
    (200, 16, 128, 128),
    (500, 8, 40, 320),
    (50, 1, 256, 256),
    (1000, 1, 64, 64),
    (5, 1, 16, 32),
)
# The baseline's time over ours, a number a size.
SINGLE = {
    ("lstm", "train"): (4.5, 1.35, 2.1, 1.4, 1.8, 2, 2, 4, 4),
    ("lstm", "inf"): (4, 1.25, 1.4, 1.15, 1.6, 1.5, 2.5, 6, 6),
    ("gru", "train"): (6, 2.3, 2.9, 1.7, 2.5, 2.5, 2.5, 5, 5),
    ("gru", "inf"): (4, 2, 2.4, 1.6, 2, 2, 2.5, 6, 6),
}
PACKED = {
    ("lstm", "train"): (6, 4, 9, 2.6, 5, 4),
    ("lstm", "inf"): (5, 2.5, 3, 1.9, 3, 2.5),
    # No target has been set.
    ("gru", "train"): (None,) * 6,
    ("gru", "inf"): (None,) * 6,
}
CELL_SIZES = ((1, 64, 16, 32), (1, 32, 256, 256), (1, 1, 256, 256))
# Fewer bits on request: (cell, sizes, mode, target) by group.
FEWER_BITS = {
    "bf16": (
        ("lstm", SIZES[3], "train", 2.2),
        ("lstm", SIZES[3], "inf", 1.4),
        ("gru", SIZES[3], "train", 4),
        ("gru", SIZES[3], "inf", 2.2),
        ("lstm", SIZES[1], "train", 1.6),
        ("gru", SIZES[1], "train", 4),
    ),
    "high": (("lstm", SIZES[3], "train", 2.5), ("lstm", SIZES[3], "inf", 2.0)),
}
# Left out of short runs: (group, sizes).
LONG = {("stacked", SIZES[i]) for i in (2, 3, 4, 5, 7)}
# What torch.compile is to unroll, by (cell, group, variant, mode), beside all cells. It compiles
# step by step, a layer in 3 to 18 s at T = 5, and at T = 50 an LSTM's training in over a minute, a
# GRU's inference in 31 s; but an LSTM's inference is one operator of oneDNN's, 1 s at any T.
COMPILED = {
    ("lstm", "layers", "", "train"): SIZES[:1],
    ("lstm", "layers", "", "inf"): SIZES,
    ("gru", "layers", "", "train"): SIZES[:1],
    ("gru", "layers", "", "inf"): SIZES[:1],
    ("rnn_tanh", "layers", "", "train"): SIZES[:1],
    ("rnn_tanh", "layers", "", "inf"): SIZES[:1],
}
FULL_COST = 0.6  # of padded, at most, for packed rows half full
LONG_COST = 10.5  # of T = 400, at most, for T = 4000


@dataclass(frozen=True)
class Measurement:
    """One cell at one size in one mode.

    ``variant`` says what sets it apart in its group. ``baseline`` is what the time is compared
    with: torch, or for the cost of packing and of length another call of fastseq's own.
    ``target_of`` says what the target is for: this "row", the "geomean" of all measurements of the
    cell, variant and group, or the "float32 row" of the same sizes, which this one then repeats.
    """

    cell: str
    group: str
    sizes: tuple[int, int, int, int]
    mode: str
    target: float | None = None
    variant: str = ""
    baseline: str = "torch"
    target_of: str = "row"

    @property
    def label(self) -> str:
        return ", ".join(map(str, self.sizes))

    @property
    def name(self) -> str:
        return f"{self.cell} {self.variant}".strip()

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.group == "bf16" else "float32"

    @property
    def precision(self) -> str:
        """Torch's switch of float32 products."""
        return "high" if self.group == "high" else "highest"

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is to unroll its time loop."""
        key = self.cell, self.group, self.variant, self.mode
        return self.group == "cells" or self.sizes in COMPILED.get(key, ())

    @property
    def long(self) -> bool:
        return (self.group, self.sizes) in LONG

    def in_float32(self) -> Measurement:
        """This one where there is nothing faster: its target is that of plain float32."""
        target = dict(zip(SIZES, SINGLE[self.cell, self.mode], strict=True))[self.sizes]
        return replace(self, target=target, target_of="float32 row")

    @property
    def options(self) -> dict[str, object]:
        """Of the module, beyond its sizes."""
        H = self.sizes[3]
        return {
            "bidirectional": {"bidirectional": True},
            "two layers": {"num_layers": 2},
            "proj": {"proj_size": H // 2},
        }.get(self.variant, {})

    def flop(self, tokens: int) -> float:
        """Multiplications and additions of the matrix products, the bulk of the arithmetic.

        Forward has one product with each weight matrix; backward two more of the same size.
        """
        _, _, I, H = self.sizes  # noqa: E741
        P = self.options.get("proj_size", 0)
        D = 2 if "bidirectional" in self.options else 1
        weights, width = 0, I
        for _ in range(self.options.get("num_layers", 1)):
            weights += D * (CELLS[self.cell] * H * (width + (P or H)) + P * H)
            width = D * (P or H)
        return 2.0 * tokens * weights * (3 if self.mode == "train" else 1)


def measurements() -> Iterator[Measurement]:
    """All of them, a group after the other."""
    for (cell, mode), targets in SINGLE.items():
        for sizes, target in zip(SIZES, targets, strict=True):
            yield Measurement(cell, "layers", sizes, mode, target)
    for sizes in SIZES:
        for mode in MODES:
            yield Measurement("rnn_tanh", "layers", sizes, mode, 1.5, target_of="geomean")
        yield Measurement("lstm", "layers", sizes, "train", 1.8, "proj")
    for (cell, mode), targets in PACKED.items():
        for sizes, target in zip(SIZES, targets, strict=False):
            yield Measurement(cell, "packed", sizes, mode, target)
    for cell in ("lstm", "gru"):
        for mode in MODES:
            yield Measurement(cell, "packed", SIZES[1], mode, 1 / FULL_COST, "half full", "padded")
            yield Measurement(
                cell, "packed", (4000, 4, 64, 64), mode, 10 / LONG_COST, "long", "10 x T=400"
            )
    for variant in ("bidirectional", "two layers"):
        for (cell, mode), targets in SINGLE.items():
            for sizes, target in zip(SIZES, targets, strict=True):
                yield Measurement(cell, "stacked", sizes, mode, target, variant)
    for cell in ("lstm", "gru"):
        for sizes in CELL_SIZES:
            for mode in MODES:
                yield Measurement(cell, "cells", sizes, mode, 2.5, "cell", target_of="geomean")
    for group, rows in FEWER_BITS.items():
        for cell, sizes, mode, target in rows:
            yield Measurement(cell, group, sizes, mode, target)


def select(
    cells: str = "all", groups: str = "all", rows: str = "all", quick: bool = False
) -> list[Measurement]:
    """The measurements of these cells and groups; of those, the rows by number from 1.

    Modes of one cell, variant and size stand together. With ``quick`` the long ones are left out,
    unless a number names them.

    Raises:
        ValueError: no such cell, group or row.
    """
    chosen = list(measurements())
    for words, known, field in ((cells, tuple(CELLS), "cell"), (groups, GROUPS, "group")):
        if words == "all":
            continue
        wanted = [word.strip() for word in words.split(",")]
        for word in wanted:
            if word not in known:
                raise ValueError(f"expected {field}s among {', '.join(known)}, got {word!r}")
        chosen = [m for m in chosen if getattr(m, field) in wanted]
    places: dict[tuple[object, ...], list[Measurement]] = {}
    for m in chosen:
        places.setdefault((m.group, m.cell, m.variant, m.sizes), []).append(m)
    if rows == "all":
        together = [m for modes in places.values() for m in modes]
        return [m for m in together if not (quick and m.long)]
    picked = []
    for word in rows.split(","):
        if not word.strip().isdigit() or not 1 <= int(word) <= len(places):
            raise ValueError(f"expected rows from 1 to {len(places)}, got {word.strip()!r}")
        picked += list(places.values())[int(word) - 1]
    return picked
