"""benchmarks/precision_table.py and the table it made for docs/numbers.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import precision_table
from fastseq import _native
from fastseq.testing import LOWERED

if not _native.loaded() or _native.isa() != "avx512" or _native.eager is None:
    pytest.skip("no tiles without the AVX-512 kernels and the module", allow_module_level=True)

PAGE = Path(__file__).parent.parent.parent / "docs" / "numbers.md"


def documented(row: str) -> list[float]:
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == row.replace(",", ", "):
            return [float(cell) for cell in cells[1:]]
    raise AssertionError(f"no row {row} in {PAGE}")


def test_a_row_is_as_documented():
    before = _native.tiles()
    _native.set_tiles("emulated")
    try:
        found = precision_table.errors("rnn_tanh,50,32,256,256")
    finally:
        _native.set_tiles(before)
    assert found == pytest.approx(documented("rnn_tanh,50,32,256,256"), rel=0.05)


def test_every_documented_error_keeps_the_budget():
    for row in precision_table.ROWS:
        _, _, *high, medium_outputs, medium_gradients = documented(row)
        assert max(high) <= LOWERED["high"]
        assert max(medium_outputs, medium_gradients) <= LOWERED["medium"]


def test_the_table_is_printed(capsys):
    before = _native.tiles()
    try:
        assert precision_table.main(["gru,3,8,16,16"]) == 0
    finally:
        _native.set_tiles(before)
    assert "| gru, 3, 8, 16, 16 | " in capsys.readouterr().out
