"""Writing the table that fastseq chooses kernels on a GPU by: fastseq/ops/measured_cuda.py."""

from __future__ import annotations

import json
from pathlib import Path

from fastseq._files import atomic_write
from fastseq.ops import measured_cuda

__all__ = ["untimed", "write_part"]


def untimed(status: object) -> dict[str, str]:
    """What stands in a row in place of times: what was wrong with our side, or why neither was
    measured."""
    name, _, reason = str(status).partition(": ")
    return {"unmeasured": reason} if name == "unmeasured" else {"wrong": str(status)}


def write_part(path: Path, device: str, part: str, rows: list[dict[str, object]]) -> None:
    """Put ``rows`` in place of that part of a device's; all else stays as the file has it, or where
    there is none as fastseq has it."""
    table = json.loads(path.read_text()) if path.exists() else dict(measured_cuda.TABLE)
    table[device] = table.get(device, {}) | {part: rows}
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(table, indent=1) + "\n")
