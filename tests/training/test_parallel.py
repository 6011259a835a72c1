from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from fastseq.testing import assert_close_to_reference
from fastseq.training.checkpoint import load
from fastseq.training.data import collate, make_pair
from fastseq.training.parallel import ALONE, Team, join

ROOT = Path(__file__).parents[2]
needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    """Start two processes, as a user would."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@needs_gloo
def test_two_processes_give_the_weights_of_one():
    done = torchrun("tests/training/in_two_processes.py")
    assert done.returncode == 0, done.stderr
    assert all(f"process {rank} is content" in done.stdout for rank in (0, 1))


@needs_gloo
def test_the_command_line_under_torchrun(tmp_path):
    rng = random.Random(0)
    for name, count in (("train", 60), ("valid", 15)):
        lines = [" ".join(rng.choices("abcdef", k=rng.randint(1, 6))) for _ in range(count)]
        (tmp_path / f"{name}.source").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / f"{name}.target").write_text("".join(f"{line[::-1]}\n" for line in lines))
    texts = [
        word
        for name in ("train", "valid")
        for side in ("source", "target")
        for word in (f"--{name}-{side}", tmp_path / f"{name}.{side}")
    ]
    sizes = ["--embedding", 8, "--hidden", 12, "--batch-size", 16, "--threads", 1]
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["train", *texts, *sizes, "--epochs", 2, "--teacher-forcing", 0.5]
    subprocess.run(
        [sys.executable, "-m", "fastseq.cli", *map(str, command), "--out", one],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    done = torchrun("-m", "fastseq.cli", *command, "--out", two)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in two.iterdir()) == ["best.pt", "history.csv", "last.pt"]
    # One process speaks.
    assert done.stdout.count("epoch 1/2") == done.stdout.count("Losses in nats") == 1
    losses = [
        torch.tensor([epoch[1:3] for epoch in load(folder / "last.pt").history])
        for folder in (two, one)
    ]
    # Single elements: their budget is half the digits of float32.
    for actual, expected in zip(*(both.flatten() for both in losses), strict=True):
        assert_close_to_reference(actual, expected.double(), what="loss")
    refused = torchrun("-m", "fastseq.cli", *command, "--out", two)
    assert refused.returncode != 0
    assert "a directory without a run in it" in refused.stderr


def batch(count: int):
    rng = random.Random(0)
    sources = [rng.choices(range(4, 9), k=n + 1) for n in range(count)]
    return collate([make_pair(source, source) for source in sources])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_shares_are_the_batch(rows):
    together = batch(rows)
    members = [Team(rank, 3).share(together) for rank in range(3)]
    working = [share for share, weight in members if weight]
    assert len(working) == min(rows, 3)
    assert sum(share.tokens for share in working) == together.tokens
    assert sum(weight for _, weight in members) == pytest.approx(3)
    for share in working:
        assert share.src.shape == (len(share.trg), int(share.src_lengths.max()))
        assert share.trg.shape[1] == together.trg.shape[1]
    kept = sorted(tuple(row) for share in working for row in share.trg.tolist())
    assert kept == sorted(tuple(row) for row in together.trg.tolist())


def test_alone_nothing_changes(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with join() as team:
        assert team is ALONE
    together, value = batch(3), torch.tensor(0.1)
    assert team.share(together) == (together, 1.0)
    assert torch.equal(team.mean(value), value)
    module = torch.nn.Linear(1, 1)
    assert team.wrap(module) is module
