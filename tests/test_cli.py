from __future__ import annotations

import csv
import gzip
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastseq
from fastseq import _native
from fastseq.training.checkpoint import load
from fastseq.training.model import build_model
from tests.command_line import (
    BEST,
    SMALL,
    check_refusal,
    files,
    invoke,
    losses,
    snapshot,
    succeed,
    weights,
    write_text,
)

REPOSITORY = Path(fastseq.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, "train", 200, seed=0)
    write_text(folder, "valid", 40, seed=1)
    return folder


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    """A run that has learnt the language."""
    out = tmp_path_factory.mktemp("trained") / "run"
    succeed(
        *("train", *files(text), "--out", out, *SMALL),
        *("--hidden", "32", "--epochs", "25", "--learning-rate", "0.01"),
    )
    return out


@pytest.fixture(scope="module")
def short(text, tmp_path_factory) -> Path:
    """A run of two epochs."""
    out = tmp_path_factory.mktemp("short") / "run"
    succeed("train", *files(text), "--out", out, *SMALL, "--epochs", "2")
    return out


@pytest.fixture
def run(short, tmp_path) -> Path:
    """A copy of the run of two epochs."""
    return Path(shutil.copytree(short, tmp_path / "run"))


def test_training_writes_its_results_and_shows_them(text, tmp_path):
    out = tmp_path / "new" / "run"
    result = succeed("train", *files(text), "--out", out, *SMALL, "--epochs", "2")
    assert sorted(snapshot(out)) == ["best.pt", "history.csv", "last.pt"]
    with open(out / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    history = load(out / "last.pt").history
    assert [epoch.train_loss for epoch in history] == [float(row["train_loss"]) for row in rows]
    for epoch in history:
        assert f"epoch {epoch.epoch}/2: training loss {epoch.train_loss:.4f}" in result.stdout
        assert f"{epoch.perplexity:.2f}" in result.stdout
    assert result.stdout.count("│") > 2 * 6


def test_training_is_the_same_each_time_and_depends_on_the_seed(text, short, tmp_path):
    for out, seed in (("same", 0), ("other", 1)):
        succeed(
            "train", *files(text), "--out", tmp_path / out, *SMALL, "--epochs", 2, "--seed", seed
        )
    assert losses(tmp_path / "same") == losses(short)
    assert losses(tmp_path / "other")[0] != losses(short)[0]


@pytest.mark.parametrize("more", [[], ["--teacher-forcing", "0.5"], [*BEST, "--decay", "0.5"]])
def test_resuming_is_exact(text, tmp_path, more):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    succeed("train", *files(text), "--out", straight, *SMALL, *more, "--epochs", "3")
    succeed("train", *files(text), "--out", parts, *SMALL, *more, "--epochs", "1")
    first = losses(parts)
    for epochs in (2, 3):
        torch.rand(5)
        random.random()
        succeed("train", "--resume", parts / "last.pt", "--epochs", epochs, "--threads", "1")
    assert losses(parts) == losses(straight)
    assert losses(parts)[:1] == first
    one, other = (weights(folder / "last.pt") for folder in (parts, straight))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_resuming_elsewhere_leaves_the_first_run_alone(run, tmp_path):
    before = snapshot(run)
    succeed("train", "--resume", run / "best.pt", "--epochs", "3", "--out", tmp_path / "on")
    assert snapshot(run) == before
    assert len(losses(tmp_path / "on")) == 3


def test_best_is_the_epoch_of_least_validation_loss(text, tmp_path, monkeypatch):
    valid = [3.0, 2.0, 1.0, 1.0, 2.0]
    given = iter(valid)
    monkeypatch.setattr("fastseq.training.run.evaluate", lambda *_: next(given))
    succeed("train", *files(text), "--out", tmp_path / "run", *SMALL, "--epochs", "5")
    assert [epoch.valid_loss for epoch in load(tmp_path / "run" / "last.pt").history] == valid
    assert len(load(tmp_path / "run" / "best.pt").history) == 3


@pytest.mark.parametrize("name", ["attention", "bahdanau"])
def test_reference_training_gives_the_same_kind_of_checkpoint(
    name, text, short, tmp_path, monkeypatch
):
    families = []

    def recorded(*arguments):
        model = build_model(*arguments)
        families.append(type(model).__module__)
        return model

    monkeypatch.setattr("fastseq.training.run.build_model", recorded)
    out = tmp_path / "run"
    more = ["--model", name, "--precision", "bfloat16"]
    succeed("train", *files(text), "--out", out, *SMALL, *more, "--epochs", "1", "--reference")
    if name == "attention":
        assert weights(out / "last.pt").keys() == weights(short / "last.pt").keys()
    resumed = ["--resume", out / "last.pt", "--precision", "float32"]
    succeed("train", *resumed, "--epochs", "2")
    succeed("train", *resumed, "--epochs", "3", "--reference")
    assert families == [f"fastseq.{house}.{name}" for house in ("reference", "models", "reference")]
    assert load(out / "last.pt").settings.precision == "float32"


def test_limit_and_max_length(text, tmp_path):
    out = tmp_path / "run"
    succeed(
        *("train", *files(text), "--out", out, *SMALL, "--epochs", "1"),
        *("--limit", "30", "--max-length", "4", "--min-frequency", "1"),
    )
    saved = load(out / "last.pt").settings
    assert (saved.limit, saved.max_length, saved.batch_size) == (30, 4, 16)


def test_force_replaces_a_run(text, run):
    arguments = ["train", *files(text), "--out", run, *SMALL, "--epochs", "1"]
    before = snapshot(run)
    assert invoke(*arguments).exit_code == 1
    assert snapshot(run) == before
    succeed(*arguments, "--force")
    assert len(losses(run)) == 1


@pytest.fixture
def bad(tmp_path, text, short) -> Path:
    """A folder of files that cannot be used."""
    folder = tmp_path / "bad"
    folder.mkdir()
    target = (text / "train.en.gz").read_bytes()
    (folder / "truncated.gz").write_bytes(target[: len(target) // 2])
    (folder / "plain.gz").write_text("one\n")
    (folder / "latin1").write_bytes("fünf\n".encode("latin-1") * 200)
    (folder / "empty").write_bytes(b"")
    (folder / "spaces").write_text(" \n" * 200)
    (folder / "longer").write_text("one\n" * 201)
    checkpoint = (short / "last.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(checkpoint[:-100])
    flipped = bytearray(checkpoint)
    flipped[len(flipped) // 2] ^= 1
    (folder / "flipped.pt").write_bytes(flipped)
    torch.save({"weights": torch.zeros(3)}, folder / "foreign.pt")
    return folder


@pytest.mark.parametrize(
    ("which", "file", "message"),
    [
        ("train_source", "none", "none: No such file or directory"),
        ("valid_target", "none", "none: No such file or directory"),
        ("valid_source", "", "bad: Is a directory"),
        ("train_target", "truncated.gz", "complete gzip data in .*truncated.gz"),
        ("train_target", "plain.gz", "complete gzip data in .*plain.gz"),
        ("train_source", "latin1", "latin1 to be UTF-8, got byte 0xfc in line 1"),
        ("valid_source", "empty", "empty, got an empty file"),
        ("train_target", "longer", "as many lines in .* got 200 .* and 201 in .*longer"),
        ("valid_target", "longer", "as many lines in .* got 40 .* and 201 in .*longer"),
        ("train_source", "spaces", "none among 0 different words"),
    ],
)
def test_train_refuses_bad_text(text, bad, tmp_path, which, file, message):
    before = snapshot(tmp_path)
    arguments = files(text, **{which: bad / file})
    check_refusal(invoke("train", *arguments, "--out", tmp_path / "run"), "train", message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "bad/empty"], "directory to write to, got .*empty is not a directory"),
        (["--out", "bad/empty/below"], "directory to write to, got .*empty is not a directory"),
        (["--out", "run"], "without a run in it, got .*last.pt; .*--resume.*--force"),
        (["--out", "new", "--device", "gpu"], "a device auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--out", "new", "--device", "cuda:99"], "expected device cuda:99 to exist"),
        (["--out", "new", "--dropout", "0.5"], "no dropout with the model attention.*--model"),
        (["--out", "new", "--max-length", "1"], "at most 1 words, got none in 200; raise"),
        (["--out", "new", "--min-frequency", "9999"], "at least 9999 times.*lower"),
        (["--out", "new", "--learning-rate", "1e30", "--clip", "0"], "finite loss.*lower"),
    ],
)
def test_train_refuses_what_cannot_work(text, bad, run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    result = invoke("train", *files(text), *SMALL, *options)
    check_refusal(result, "train", message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "none.pt"], "none.pt: No such file or directory"),
        (["--resume", "bad/truncated.pt"], "truncated.pt, got a file that is damaged"),
        (["--resume", "bad/flipped.pt"], "flipped.pt, got a file damaged at"),
        (["--resume", "bad/foreign.pt"], "foreign.pt, got a file saved by another program"),
        (["--resume", "bad/longer"], "longer, got a file that is damaged or of another kind"),
        (["--resume", "run/last.pt"], "more than the 2 epochs.*raise --epochs"),
        (["--resume", "run/last.pt", "--hidden", "8"], "checkpoint's --hidden 20, got 8"),
        (["--resume", "run/last.pt", "--limit", "9"], "checkpoint's --limit None, got 9"),
        (["--resume", "run/last.pt", "--model", "bahdanau"], "--model attention, got bahdanau"),
        (["--resume", "run/last.pt", "--epochs", "3", "--out", "other"], "without a run in it"),
        (
            ["--resume", "run/last.pt", "--epochs", "3", "--train-source", "bad/truncated.gz"],
            "complete gzip data",
        ),
    ],
)
def test_resume_refuses_what_cannot_work(bad, run, tmp_path, monkeypatch, options, message):
    shutil.copytree(run, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    check_refusal(invoke("train", *options), "train", message)
    assert snapshot(tmp_path) == before


def test_training_stops_before_it_saves_weights_that_are_not_numbers(run):
    before = snapshot(run)
    state = torch.load(run / "last.pt", weights_only=True)
    state["model"]["decoder.fc.bias"][4] = float("inf")
    torch.save(state, run / "poisoned.pt")
    result = invoke("train", "--resume", run / "poisoned.pt", "--epochs", "3")
    check_refusal(result, "train", "finite loss")
    assert snapshot(run) == before | {"poisoned.pt": (run / "poisoned.pt").read_bytes()}


def test_translation_is_right_and_scored(trained, text, tmp_path):
    write_text(tmp_path, "test", 50, seed=2)
    output = tmp_path / "out" / "test.out"
    arguments = ["translate", trained / "best.pt", "--source", tmp_path / "test.de"]
    scored = ["--reference-text", tmp_path / "test.en.gz"]
    result = succeed(*arguments, *scored, "--output", output)
    references = gzip.decompress((tmp_path / "test.en.gz").read_bytes()).decode().splitlines()
    translations = output.read_text(encoding="utf-8").splitlines()
    right = sum(a == b for a, b in zip(translations, references, strict=True))
    assert right >= 45
    score = re.match(r"BLEU = (\d+\.\d+) .*nrefs:1\|case:lc.*version:", result.stdout)
    assert float(score[1]) > 90
    # The same on standard output, in which nothing else may be.
    result = succeed(*arguments, *scored, "--batch-size", "7")
    assert result.stdout.splitlines() == translations
    assert result.stderr.startswith("BLEU = ")


def test_translation_keeps_order_and_blank_lines(trained):
    result = succeed(
        *("translate", trained / "best.pt", "--source", "-", "--batch-size", "2"),
        input="Eins zwei drei vier.\n\nDrei.\n \nZwei unbekannt.\nVier eins.\nDrei.",
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "four three two one."
    assert lines[1] == lines[3] == ""
    assert lines[2] == lines[6] == "three."
    assert lines[5] == "one four."
    assert len(lines) == 7


def test_translation_of_nothing_is_nothing(trained):
    assert succeed("translate", trained / "best.pt", "--source", "-", input="").stdout == ""


def test_max_length_cuts_translations_off(trained):
    result = succeed(
        *("translate", trained / "best.pt", "--source", "-", "--max-length", "2"),
        input="Eins zwei drei vier.\n",
    )
    assert result.stdout == "four three\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pt", "--source", "bad/longer"], "none.pt: No such file or directory"),
        (["bad/truncated.pt", "--source", "bad/longer"], "damaged"),
        (["bad/flipped.pt", "--source", "bad/longer"], "damaged at"),
        (["bad/foreign.pt", "--source", "bad/longer"], "saved by another program"),
        (["run/last.pt", "--source", "none"], "none: No such file or directory"),
        (["run/last.pt", "--source", "bad/truncated.gz"], "complete gzip data"),
        (["run/last.pt", "--source", "bad/latin1"], "UTF-8"),
        (["run/last.pt", "--source", "bad"], "bad: Is a directory"),
        (
            ["run/last.pt", "--source", "bad/longer", "--reference-text", "bad/spaces"],
            "as many lines in .* got 201 in bad/longer and 200 in bad/spaces",
        ),
        (["run/last.pt", "--source", "bad/longer", "--output", "bad/empty/x"], "not a directory"),
        (["run/last.pt", "--source", "bad/longer", "--output", "bad"], "bad: Is a directory"),
        (["run/last.pt", "--source", "bad/longer", "--output", "run/last.pt"], "other than the in"),
        (["run/last.pt", "--source", "bad/longer", "--device", "cuda:99"], "cuda:99 to exist"),
    ],
)
def test_translate_refuses_what_cannot_work(bad, run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    options = [] if "--output" in arguments else ["--output", "kept.txt"]
    (tmp_path / "kept.txt").write_text("an earlier translation\n")
    before = snapshot(tmp_path)
    check_refusal(invoke("translate", *arguments, *options), "translate", message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "without --resume, --train-source, --train-target, --valid-source"),
        (["train", "--epochs", "0"], "--epochs"),
        (["train", "--batch-size", "many"], "--batch-size"),
        (["translate"], "Missing argument"),
        (["demo", "--model", "magic"], "--model"),
        (["train", "--no-such-option"], "No such option"),
        (["nonsense"], "No such command"),
    ],
)
def test_usage_errors_exit_with_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not snapshot(tmp_path)


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEQ_DEBUG", "1")
    result = invoke("translate", tmp_path / "none.pt", "--source", "-")
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize("command", ["demo", "train", "translate", "doctor", "bench"])
def test_help_teaches_by_example(command):
    text = succeed(command, "--help").stdout
    assert "Usage" in text
    if command != "doctor":
        assert f"Example: fastseq {command}" in text
    assert command in succeed("--help").stdout


def test_demo_draws_its_pictures(tmp_path):
    result = succeed("demo", "--steps", "3", "--out", tmp_path / "demo", "--device", "cpu")
    assert sorted(snapshot(tmp_path / "demo")) == ["alignment.png", "losses.png"]
    assert "reference" in result.stdout


def test_demo_refuses_what_cannot_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("demo", "--steps", "1", "--out", tmp_path / "file" / "below")
    check_refusal(result, "demo", "not a directory")
    result = invoke("demo", "--steps", "1", "--out", tmp_path / "new", "--device", "cuda:99")
    check_refusal(result, "demo", "cuda:99 to exist")
    assert sorted(snapshot(tmp_path)) == ["file"]


def test_bench_needs_the_source_tree(tmp_path, monkeypatch):
    monkeypatch.setattr("fastseq.cli.__file__", str(tmp_path / "fastseq" / "cli.py"))
    check_refusal(invoke("bench"), "bench", "expected the source tree")


def test_bench_hands_all_arguments_on(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    result = invoke("bench", "--", "--help")
    assert result.exit_code == 0
    assert "--quick" in result.stdout
    said = []
    script = SimpleNamespace(main=lambda arguments: said.extend(arguments) or 3)
    monkeypatch.setattr("fastseq.cli.import_module", {"benchmarks.bench_recurrent": script}.get)
    assert invoke("bench", "--quick", "--rows", "1,3", "--", "--help").exit_code == 3
    assert said == ["--quick", "--rows", "1,3", "--help"]


def command_line(*arguments: object, **more: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastseq.cli", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        **more,
    )


def test_as_a_process(text, bad, tmp_path):
    done = command_line("doctor")
    assert done.returncode == (0 if _native.loaded() else 1)
    assert torch.__version__ in done.stdout
    assert command_line("train").returncode == 2
    arguments = files(text, valid_target=bad / "truncated.gz")
    done = command_line("train", *arguments, "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fastseq train: expected complete gzip data")
    assert done.stderr.count("\n") == 1


def test_the_installed_command():
    command = Path(sys.executable).with_name("fastseq")
    if not command.exists():
        pytest.skip("fastseq is not installed in this environment")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{fastseq.__version__}\n")


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, fastseq; before = 'torch' in sys.modules; import fastseq.cli; "
        "print(('torch' in sys.modules) == before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n", done.stderr


def test_an_interruption_keeps_the_last_whole_epoch(text, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastseq.cli", "train", *files(text), *SMALL]
        + ["--out", str(out), "--epochs", "100000"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert "200 training pairs" in process.stdout.readline()
        assert process.stdout.readline().startswith("epoch 1/100000: ")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    message = rf"fastseq train: interrupted in epoch \d+; go on with --resume {out}/last.pt\n"
    assert re.fullmatch(message, error), error
    assert sorted(snapshot(out)) == ["best.pt", "history.csv", "last.pt"]
    epochs = len(load(out / "last.pt").history)
    assert epochs >= 1
    succeed("train", "--resume", out / "last.pt", "--epochs", epochs + 1, "--threads", "1")
    assert len(losses(out)) == epochs + 1


def test_an_interruption_in_the_first_epoch_leaves_nothing(text, tmp_path, monkeypatch):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastseq.training.run.train_epoch", interrupted)
    result = invoke("train", *files(text), "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 130
    assert result.stderr == "fastseq train: interrupted in epoch 1; nothing is written\n"
    assert not snapshot(tmp_path)


def multi30k() -> Path:
    named = os.environ.get("FASTSEQ_MULTI30K")
    return Path(named) if named else REPOSITORY.parent / "shared" / "data" / "multi30k"


@pytest.mark.skipif(not multi30k().is_dir(), reason="set FASTSEQ_MULTI30K to the Multi30k folder")
def test_multi30k(tmp_path):
    data, out = multi30k(), tmp_path / "run"
    arguments = [
        word
        for name, file in (("train", "train"), ("valid", "val"))
        for side, end in (("source", "de"), ("target", "en"))
        for word in (f"--{name}-{side}", data / f"{file}.{end}.gz")
    ]
    small = ["--limit", "200", "--epochs", "2", "--embedding", "32", "--hidden", "32"]
    succeed("train", *arguments, *small, "--batch-size", "20", "--out", out)
    first, last = losses(out)
    assert float(last[0]) < float(first[0])
    result = succeed(
        *("translate", out / "last.pt", "--source", data / "test_2016_flickr.de.gz"),
        *("--reference-text", data / "test_2016_flickr.en.gz", "--output", tmp_path / "out"),
        *("--max-length", "12"),
    )
    assert result.stdout.startswith("BLEU = ")
    assert len((tmp_path / "out").read_text().splitlines()) == 1000
