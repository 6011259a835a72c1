"""The command line's models and recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastseq.training.checkpoint import load
from tests.command_line import BEST, SMALL, files, succeed, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, "train", 200, seed=0)
    write_text(folder, "valid", 40, seed=1)
    return folder


def test_the_published_model_by_its_name(text, tmp_path):
    out = tmp_path / "run"
    limits = ["--limit", "20", "--batch-size", "20", "--epochs", "1"]
    succeed("train", *files(text), "--out", out, "--model", "bahdanau", *limits)
    saved = load(out / "last.pt").settings
    assert (saved.embedding, saved.hidden, saved.dropout) == (256, 512, 0.5)
    assert (saved.learning_rate, saved.clip, saved.min_frequency) == (1e-3, 1.0, 2)
    succeed("train", *files(text), "--out", tmp_path / "other", *SMALL, *BEST, *limits)
    other = load(tmp_path / "other" / "last.pt").settings
    assert (other.hidden, other.dropout, other.output_dropout) == (20, 0.5, 0.2)
    assert other.label_smoothing == 0.1


def test_pieces_of_words_are_trained_saved_and_translated(text, tmp_path):
    out = tmp_path / "run"
    pieces = ["--subwords", "12", "--hidden", "32", "--epochs", "25", "--learning-rate", "0.01"]
    succeed("train", *files(text), "--out", out, *SMALL, *pieces)
    saved = load(out / "last.pt")
    assert any(word.endswith(" ") for word in saved.target.words)
    succeed("train", "--resume", out / "last.pt", "--epochs", "26")
    again = load(out / "last.pt")
    assert again.target.state() == saved.target.state()
    assert again.target.subwords.pairs == saved.target.subwords.pairs
    result = succeed(
        *("translate", out / "last.pt", "--source", text / "valid.de"),
        *("--reference-text", text / "valid.en.gz", "--output", tmp_path / "out"),
    )
    assert float(re.match(r"BLEU = (\d+\.\d+)", result.stdout)[1]) > 80


def test_the_learning_rate_decays_after_epochs_that_were_not_the_best(text, tmp_path, monkeypatch):
    given, rates = iter([3.0, 2.0, 2.0, 1.0, 2.0]), []
    monkeypatch.setattr("fastseq.training.run.evaluate", lambda *_: next(given))

    def recorded(model, pairs, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return 1.0, 1.0

    monkeypatch.setattr("fastseq.training.run.train_epoch", recorded)
    options = ["--learning-rate", "0.5", "--decay", "0.5"]
    out = tmp_path / "run"
    succeed("train", *files(text), "--out", out, *SMALL, *options, "--epochs", "4")
    succeed("train", "--resume", out / "last.pt", "--epochs", "5")
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25]


PERPLEXITY = r"perplexity (\d+\.\d+) given the right words before each, (\d+\.\d+) given its own\n"


def test_the_published_model_learns_translates_and_is_measured(text, tmp_path):
    out = tmp_path / "run"
    learning = ["--hidden", "32", "--epochs", "25", "--learning-rate", "0.01", "--dropout", "0"]
    succeed("train", *files(text), "--out", out, *SMALL, "--model", "bahdanau", *learning)
    arguments = ["translate", out / "best.pt", "--source", text / "valid.de"]
    arguments += ["--reference-text", text / "valid.en.gz", "--output", tmp_path / "out"]
    for beam in ("1", "3"):
        result = succeed(*arguments, "--beam", beam)
        assert float(re.match(r"BLEU = (\d+\.\d+)", result.stdout)[1]) > 90
    given, own = map(float, re.search(PERPLEXITY, result.stdout).groups())
    assert abs(given - load(out / "best.pt").history[-1].perplexity) < 0.01
    assert 1 < given <= own
