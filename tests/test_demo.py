"""The demonstration: both trainings take the same course, and it learns."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fastseq import demo

KINDS = ["attention", "plain"]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_agree_step_by_step_in_float64(kind):
    """Near ties of the free-running argmax could part the two; in float64 none comes so near."""
    pair = demo.build_pair(kind, seed=0, dtype=torch.float64)
    demo.train_side_by_side(pair, 300, 64, seed=0)
    expected, actual = (np.array(learner.losses) for learner in pair)
    np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=0)
    assert actual[-20:].mean() < actual[:20].mean() / 5


@pytest.mark.parametrize("kind", KINDS)
def test_losses_agree_step_by_step_in_float32(kind):
    pair = demo.build_pair(kind, seed=0)
    demo.train_side_by_side(pair, 50, 64, seed=0)
    expected, actual = (np.array(learner.losses) for learner in pair)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=0)


def test_learns_to_copy():
    _, learner = demo.build_pair("attention", seed=0)
    demo.train_side_by_side((learner,), 500, 64, seed=0)
    fresh = demo.digits(np.random.default_rng([0, 1]), 1000)
    assert learner.exact_match(fresh) >= 0.99


def test_same_seed_same_run_whatever_was_drawn_before():
    losses = []
    for _ in range(2):
        pair = demo.build_pair("plain", seed=3)
        before = random.getstate()
        demo.train_side_by_side(pair, 3, 8, seed=3)
        assert random.getstate() == before
        losses.append(pair[1].losses)
        random.random()
        torch.rand(1)
    assert losses[0] == losses[1]


def test_global_generators_are_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    demo.build_pair("plain", seed=3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_run_reports_and_draws(kind, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    result = demo.run(steps=3, batch_size=4, out=out, device="cpu", model=kind)
    names = ["losses.png", "alignment.png"][: 2 if kind == "attention" else 1]
    assert [p.name for p in result.pictures] == names
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in result.pictures)
    assert len(result.reference_losses) == len(result.fast_losses) == result.steps == 3
    assert 0 <= result.fast_accuracy == result.reference_accuracy <= 1
    assert result.speedup == result.reference_seconds / result.fast_seconds > 0
    said = capsys.readouterr().out
    assert "speed-up" in said and "exact copies" in said and "losses.png" in said


def test_quiet_says_nothing(tmp_path, capfd):
    demo.run(steps=1, batch_size=1, out=tmp_path, device="cpu", model="plain", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_a_directory_that_cannot_be_is_found_out_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train_side_by_side", lambda *_, **__: pytest.fail("trained"))
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        with pytest.raises(OSError, match="expected a directory to write to"):
            demo.run(steps=1, out=out, quiet=True)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "both"}, 'expected model "attention" or "plain", got \'both\''),
        ({"steps": 0}, "expected steps of at least 1, got 0"),
        ({"batch_size": -1}, "expected batch_size of at least 1, got -1"),
    ],
)
def test_bad_arguments(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=f"^fastseq.demo: {message}"):
        demo.run(out=tmp_path / "out", **kwargs)
    assert not (tmp_path / "out").exists()
