"""Tile sizes, as data: what runs where nothing was measured, and what won where something was.

A key is a stage, and what of a call may choose: the bytes of an element and whether a row has one
query or many. Never the batch or the source's length, which change from call to call.
"""

from __future__ import annotations

__all__ = ["DEFAULTS", "TUNED"]

# (stage, one query a row) -> tiles, warps, and the registers of a thread at most.
DEFAULTS: dict[tuple[str, bool], dict[str, int]] = {
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
        BLOCK_Q=1, SUB_Q=1, BLOCK_S=16, BLOCK_K=128, RANGE_S=16, BLOCK_C=128, num_warps=4
    ),
    ("dot_fwd", False): dict(BLOCK_Q=16, BLOCK_S=32, BLOCK_K=32, BLOCK_C=32, num_warps=4),
    ("dot_fwd", True): dict(BLOCK_Q=1, BLOCK_S=16, BLOCK_K=128, BLOCK_C=128, num_warps=4),
    ("scores_bwd", False): dict(BLOCK_Q=16, BLOCK_S=32, BLOCK_C=32, num_warps=4),
    ("scores_bwd", True): dict(BLOCK_Q=1, BLOCK_S=16, BLOCK_C=128, num_warps=4),
    ("additive_bwd", False): dict(BLOCK_S=8, BLOCK_K=128, num_warps=1, maxnreg=208),
    ("additive_bwd", True): dict(BLOCK_S=8, BLOCK_K=128, num_warps=1, maxnreg=208),
    ("merge", False): dict(BLOCK_S=1024, BLOCK_C=128, num_warps=4),
}

# Device name as torch.cuda.get_device_name() has it -> (stage, one query a row, bytes of an
# element) -> tiles and warps. Filled by ``python -m fastseq.kernels.tune``.
TUNED: dict[str, dict[tuple[str, bool, int], dict[str, int]]] = {}
