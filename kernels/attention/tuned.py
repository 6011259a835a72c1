"""Tile sizes, as data: what runs where nothing was measured, and what won where something was.

A key is a stage, and what of a call may choose: whether a row has one query or many, and whether
products are exact (IEEE float32, on the vector units) or run on tensor cores. Never the batch or
the source's length, which change from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["DEFAULTS", "OTHERWISE", "TUNED", "tiles"]

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
    ("scores_bwd", False): dict(BLOCK_Q=16, BLOCK_S=32, BLOCK_C=32, num_warps=4),
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
    ("dot_fwd", False, "unaligned", True): dict(),
    # Three products of bfloat16 a product.
    ("additive_fwd", False, "hip"): dict(RANGE_S=16),
}

# Device name as torch.cuda.get_device_name() has it -> (stage, one query a row, exact products)
# -> tiles and warps. Filled by ``python -m fastseq.kernels.tune``.
TUNED: dict[str, dict[tuple[str, bool, bool], dict[str, int]]] = {}


def tiles(
    stage: str, single: bool, exact: bool, device: str = "", circumstances: Sequence[str] = ()
) -> dict[str, int]:
    """What to run a stage with: what won on ``device``, else the default.

    circumstances: of those in ``OTHERWISE``. What won, won on aligned tensors.
    """
    won = TUNED.get(device, {}).get((stage, single, exact))
    if won is not None and "unaligned" not in circumstances:
        return dict(won)

    def known(table: dict[tuple, dict[str, int]], *key: object) -> dict[str, int]:
        return table.get((*key, exact), table.get(key, {}))

    chosen = dict(known(DEFAULTS, stage, single))
    for circumstance in circumstances:
        chosen |= known(OTHERWISE, stage, single, circumstance)
    return chosen
