"""Tile sizes, as data: what runs where nothing was measured, and what won where something was.

A key is a stage, and what of a call may choose: whether a row has one query or many, and whether
products are exact (IEEE float32, on the vector units) or run on tensor cores. Never the batch or
the source's length, which change from call to call.
"""

from __future__ import annotations

__all__ = ["DEFAULTS", "TUNED", "tiles"]

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
    ("merge", False): dict(BLOCK_S=1024, BLOCK_C=128, num_warps=4),
}

# Device name as torch.cuda.get_device_name() has it -> (stage, one query a row, exact products)
# -> tiles and warps. Filled by ``python -m fastseq.kernels.tune``.
TUNED: dict[str, dict[tuple[str, bool, bool], dict[str, int]]] = {}


def tiles(stage: str, single: bool, exact: bool, device: str = "") -> dict[str, int]:
    """What to run a stage with: what won on ``device``, else the default."""
    key = (stage, single, exact)
    default = DEFAULTS.get(key) or DEFAULTS[stage, single]
    return dict(TUNED.get(device, {}).get(key, default))
