"""What the benchmarks of single operations share."""

from __future__ import annotations

import pytest

from benchmarks import command


@pytest.mark.parametrize("within, begun", [(None, 5), (100, 5), (10, 5), (7, 3), (5, 2), (0, 1)])
def test_no_row_is_begun_that_would_end_too_late(within, begun, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    done = []
    for row in command.in_time(range(5), within):
        done.append(row)
        clock[0] += 2
    assert done == list(range(begun))
    said = capsys.readouterr().out
    assert said == ("" if begun == 5 else f"{5 - begun} of 5 rows left: {within} s are up\n")
