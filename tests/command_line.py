"""Running the command line in tests, and a language small enough to learn."""

from __future__ import annotations

import csv
import gzip
import random
import re
from pathlib import Path

import torch
from typer.testing import CliRunner

from fastseq.cli import app
from fastseq.training.checkpoint import load

NUMBERS = dict(
    zip("eins zwei drei vier fünf".split(), "one two three four five".split(), strict=True)
)
SMALL = ["--embedding", "12", "--hidden", "20", "--batch-size", "16", "--threads", "1"]
BEST = ["--model", "bahdanau", "--output-dropout", "0.2", "--label-smoothing", "0.1"]


def write_text(folder: Path, name: str, count: int, seed: int) -> None:
    """A language to translate: number words, whose order the other language reverses."""
    rng = random.Random(seed)
    rows = [rng.choices(list(NUMBERS), k=rng.randint(1, 5)) for _ in range(count)]
    source = "".join(" ".join(row).capitalize() + ".\n" for row in rows)
    target = "".join(" ".join(NUMBERS[word] for word in row[::-1]) + ".\n" for row in rows)
    (folder / f"{name}.de").write_text(source, encoding="utf-8")
    (folder / f"{name}.en.gz").write_bytes(gzip.compress(target.encode()))


def files(text: Path, **other: Path) -> list[str]:
    paths = {
        "train-source": text / "train.de",
        "train-target": text / "train.en.gz",
        "valid-source": text / "valid.de",
        "valid-target": text / "valid.en.gz",
    }
    paths |= {name.replace("_", "-"): path for name, path in other.items()}
    return [word for name, path in paths.items() for word in (f"--{name}", str(path))]


def invoke(*arguments: object, **more: object):
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **more)
    finally:
        torch.set_num_threads(threads)


def succeed(*arguments: object, **more: object):
    result = invoke(*arguments, **more)
    assert result.exit_code == 0, result.output
    return result


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def losses(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "history.csv", newline="") as file:
        return [(row["train_loss"], row["valid_loss"]) for row in csv.DictReader(file)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load(path).model


def check_refusal(result, command: str, message: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"fastseq {command}: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.output
