"""Tile sizes, as data: what runs where nothing was measured, and what won where something was.

A key is a stage, and what of a call may choose: whether a row has one query or many, and whether
products are exact (IEEE float32, on the vector units) or run on tensor cores. Never the batch or
the source's length, which change from call to call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["DEFAULTS", "OTHERWISE", "PATH", "TUNED", "Tuned", "read", "tiles", "written"]

# (stage, one query a row[, exact products]) -> tiles, warps, registers of a thread at most.
DEFAULTS: dict[tuple, dict[str, int]] = {
    ("additive_fwd", False): dict(
        BLOCK_Q=16,
        SUB_Q=4,
        BLOCK_S=32,
        BLOCK_K=32,
        RANGE_S=32,
        BLOCK_C=64,
        num_warps=8,
        num_stages=1,
        maxnreg=96,
    ),
    ("additive_fwd", True): dict(
        BLOCK_Q=1,
        SUB_Q=1,
        BLOCK_S=16,
        BLOCK_K=128,
        RANGE_S=16,
        BLOCK_C=128,
        num_warps=4,
        maxnreg=88,
    ),
    ("dot_fwd", False): dict(
        BLOCK_Q=16, BLOCK_S=32, BLOCK_K=32, BLOCK_C=32, num_warps=4, maxnreg=168
    ),
    # With a limit, or a third stage, the products on the vector units spill.
    ("dot_fwd", False, True): dict(
        BLOCK_Q=16, BLOCK_S=32, BLOCK_K=32, BLOCK_C=32, num_warps=4, num_stages=2
    ),
    ("dot_fwd", True): dict(BLOCK_Q=1, BLOCK_S=16, BLOCK_K=128, BLOCK_C=128, num_warps=4),
    ("scores_bwd", False): dict(BLOCK_Q=16, BLOCK_S=32, BLOCK_C=32, num_warps=4, maxnreg=128),
    ("scores_bwd", False, True): dict(BLOCK_Q=16, BLOCK_S=32, BLOCK_C=32, num_warps=4),
    ("scores_bwd", True): dict(BLOCK_Q=1, BLOCK_S=16, BLOCK_C=128, num_warps=4),
    ("additive_bwd", False): dict(BLOCK_S=8, BLOCK_K=128, num_warps=1, maxnreg=208),
    ("additive_bwd", True): dict(BLOCK_S=8, BLOCK_K=128, num_warps=1, maxnreg=208),
    ("merge", False): dict(BLOCK_S=1024, BLOCK_C=32, num_warps=4),
    ("merge", True): dict(BLOCK_S=1024, BLOCK_C=32, num_warps=4),
}

# (stage, one query a row, circumstance[, exact products]) -> what is different there. Where a
# width, a stride or an address is no multiple of 16, each element has an address and a condition of
# its own, for which there have to be registers.
OTHERWISE: dict[tuple, dict[str, int]] = {
    ("additive_fwd", False, "unaligned"): dict(maxnreg=128),
    ("additive_fwd", True, "unaligned"): dict(
        BLOCK_S=8, RANGE_S=8, BLOCK_K=64, BLOCK_C=64, maxnreg=128
    ),
    ("additive_bwd", False, "unaligned"): dict(BLOCK_S=4),
    ("additive_bwd", True, "unaligned"): dict(BLOCK_S=4),
    ("dot_fwd", False, "unaligned"): dict(BLOCK_S=16),
    # As three products of bfloat16, those of 32 positions spill 19 registers on gfx942.
    ("additive_fwd", False, "hip"): dict(RANGE_S=16),
    ("additive_fwd", False, "hip", True): dict(),
}

# (stage, one query a row, exact products) -> tiles and warps.
Winners = dict[tuple[str, bool, bool], dict[str, int]]


class Tuned(NamedTuple):
    """What won on a device, and which of aot.TARGETS it is."""

    target: str
    won: Winners


def read(path: Path) -> dict[str, Tuned]:
    """By device, what a table such as tuned.json says of it."""
    return {
        device: Tuned(
            said["target"],
            {(row["stage"], row["single"], row["exact"]): row["tiles"] for row in said["won"]},
        )
        for device, said in json.loads(path.read_text()).items()
    }


def written(devices: dict[str, Tuned]) -> str:
    """The text of such a table."""
    table = {
        device: {
            "target": target,
            "won": [
                {"stage": stage, "single": single, "exact": exact, "tiles": best}
                for (stage, single, exact), best in won.items()
            ],
        }
        for device, (target, won) in devices.items()
    }
    return json.dumps(table, indent=1) + "\n"


PATH = Path(__file__).with_name("tuned.json")
# By torch.cuda.get_device_name(); the table is ``python -m fastseq.kernels.tune``'s.
TUNED: dict[str, Tuned] = read(PATH)


def tiles(
    stage: str, single: bool, exact: bool, device: str = "", circumstances: Sequence[str] = ()
) -> dict[str, int]:
    """What to run a stage with: what won on ``device``, else the default.

    circumstances: of those in ``OTHERWISE``. What won, won on aligned tensors.
    """
    if device in TUNED and "unaligned" not in circumstances:
        best = TUNED[device].won.get((stage, single, exact))
        if best is not None:
            return dict(best)

    def known(table: dict[tuple, dict[str, int]], *key: object) -> dict[str, int]:
        return table.get((*key, exact), table.get(key, {}))

    chosen = dict(known(DEFAULTS, stage, single))
    for circumstance in circumstances:
        chosen |= known(OTHERWISE, stage, single, circumstance)
    return chosen
