"""The search for tiles: what it tries, and when it stops."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastseq.kernels import _lang, _launch, aot, tune  # noqa: E402
from fastseq.kernels.attention import kernel, launch, tuned  # noqa: E402
from fastseq.kernels.attention.tuned import TUNED, Tuned, tiles  # noqa: E402


@pytest.fixture(autouse=True)
def no_plans():
    yield
    _launch.forget()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("stage", tune.CANDIDATES)
def test_the_default_comes_first_then_what_differs_least(stage, single, exact):
    tried = tune.candidates(stage, single, exact)
    assert tried[0] == tiles(stage, single, exact) and len(tried) > 3
    assert all(config not in tried[:at] for at, config in enumerate(tried))
    changes = [sum(config[name] != tried[0].get(name) for name in config) for config in tried]
    assert changes == sorted(changes)
    for config in tried[1:]:
        assert config.keys() == tried[0].keys() | tune.CANDIDATES[stage].keys()
        assert not single or config.get("BLOCK_Q", 1) == config.get("SUB_Q", 1) == 1


def test_no_candidate_asks_for_more_registers_than_the_budget_has(monkeypatch):
    monkeypatch.setitem(tune.CANDIDATES, "additive_bwd", {"maxnreg": (168, 208, 255)})
    found = {config["maxnreg"] for config in tune.candidates("additive_bwd", False, True)}
    assert found == {168, 208} and aot.BUDGETS["additive_bwd"].registers == 208


def a_call():
    """Backward, of the additive score, on the host: for launches that come no further."""
    query, keys = torch.zeros(1, 2, 64), torch.zeros(1, 16, 64)
    weights = torch.zeros(1, 2, 16)
    given = query, None, query, keys, keys, query[0, 0], None, None, weights, 1.0, True, False
    return lambda: kernel("additive_bwd")(*given)


def test_tiles_above_the_budget_are_seen(monkeypatch):
    for maxnreg in (208, 32):
        won = {("additive_bwd", False, True): tiles("additive_bwd", False, True)}
        won["additive_bwd", False, True]["maxnreg"] = maxnreg
        monkeypatch.setitem(TUNED, "a device", Tuned("sm_90", won))
        said = tune.too_much("additive_bwd", a_call(), "sm_90", "a device")
        assert (said is None) == (maxnreg == 208), said


# Within the budget in half dtypes and above it in float32 under "high", which the same tiles serve.
FOR_HALF_ALONE = tiles("dot_fwd", False, False) | {"BLOCK_K": 64, "BLOCK_C": 64}


def test_tiles_above_the_budget_in_another_dtype_or_precision_are_seen(monkeypatch):
    for config, good in ((tiles("dot_fwd", False, False), True), (FOR_HALF_ALONE, False)):
        won = {("dot_fwd", False, False): config}
        monkeypatch.setitem(TUNED, "a device", Tuned("sm_90", won))
        tensors = [torch.zeros(1, 2, 64, dtype=torch.bfloat16)] * 3
        call = lambda given=tensors: kernel("dot_fwd")(*given, None, None, 1.0)  # noqa: E731
        assert tune.too_much("dot_fwd", call, "sm_90", "a device") is None
        monkeypatch.setattr(_lang, "BACKEND", "cuda")
        said = tune.too_much_elsewhere("dot_fwd", config, "sm_90", "a device")
        assert (said is None) == good and (good or "fp32" in said), said


@pytest.fixture
def device(monkeypatch):
    """A device on which nothing is compiled, and candidates of dot_fwd take as long as they say."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "CANDIDATES", {"dot_fwd": {"BLOCK_S": (32, 64, 128, 256)}})
    monkeypatch.setattr(launch, "_device", lambda index: ("a device", 1))
    tried = lambda: TUNED["a device"].won  # noqa: E731

    def latest():
        return list(tried().values())[-1]

    def call(stage, single, dtype):
        return lambda: (torch.ones(3) * (2 if latest()["BLOCK_S"] == 64 else 1),)

    def too_much(stage, call, target, name):
        assert (target, name) == ("sm_90", "a device")
        return "above" if latest()["BLOCK_S"] == 128 else None

    monkeypatch.setattr(tune, "_call", call)
    monkeypatch.setattr(tune, "too_much", too_much)
    monkeypatch.setattr(tune, "too_much_elsewhere", lambda *_, **__: None)
    monkeypatch.setattr(tune, "_seconds", lambda call: 1.0 / latest()["BLOCK_S"])
    yield
    TUNED.pop("a device", None)


def test_winners_are_written_by_device_and_read_again(device, tmp_path, monkeypatch, capsys):
    """Of the four the second is wrong, the third above the budget."""
    table = tmp_path / "tuned.json"
    monkeypatch.setitem(TUNED, "another", Tuned("gfx942", {("merge", True, True): {"BLOCK_S": 1}}))
    tune.main(["--seconds", "60", "--output", str(table)])
    found = tuned.read(table)
    assert found == TUNED and found["another"].target == "gfx942"
    target, won = found["a device"]
    assert target == "sm_90" and len(won) == 4
    for single, exact in itertools.product((False, True), repeat=2):
        best = tiles("dot_fwd", single, exact) | {"BLOCK_S": 256}
        assert won["dot_fwd", single, exact] == best
        assert tiles("dot_fwd", single, exact, "a device") == best
        assert tiles("dot_fwd", single, exact, "a device", ["unaligned"])["BLOCK_S"] != 256
    said = capsys.readouterr().out
    assert said.count("another result") == said.count("above") == 4
    assert list(tmp_path.iterdir()) == [table]


def test_a_run_cut_off_keeps_what_it_found(device, tmp_path, monkeypatch):
    table, calls = tmp_path / "tuned.json", []

    def seconds(call):
        calls.append(call)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(tune, "_seconds", seconds)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--output", str(table)])
    assert list(tuned.read(table)["a device"].won) == [("dot_fwd", False, True)]


def test_what_is_installed_can_be_read():
    assert tuned.read(tuned.PATH) == TUNED
    for target, won in TUNED.values():
        assert target in aot.TARGETS and all(stage in aot.BUDGETS for stage, _, _ in won)


def test_the_fastest_that_runs_wins():
    def measure(config):
        if config["tile"] == 1:
            raise ValueError("does not compile")
        return config["tile"]

    tried = ({"tile": tile} for tile in (3, 1, 2, 4))
    assert tune.search(tried, measure, time.monotonic() + 60) == ({"tile": 2}, 2)


def test_the_fastest_that_nothing_speaks_against_wins():
    tried = [{"tile": tile} for tile in (3, 1, 2, 4)]
    measure, asked = lambda config: config["tile"], []

    def against(config):
        asked.append(config["tile"])
        return "above the budget" if config["tile"] == 1 else None

    best = tune.search(tried, measure, time.monotonic() + 60, against)
    # The slower ones are not asked about.
    assert best == ({"tile": 2}, 2) and asked == [3, 1, 2]


def test_time_is_bounded_and_the_first_always_runs():
    tried = iter([{"tile": 3}, {"tile": 2}])
    assert tune.search(tried, lambda config: config["tile"], 0.0) == ({"tile": 3}, 3)


def test_time_is_bounded_where_the_first_fails():
    seen = []

    def measure(config):
        seen.append(config["tile"])
        raise ValueError("does not compile")

    tried = [{"tile": tile} for tile in range(3)]
    assert tune.search(tried, measure, 0.0)[0] is None and seen == [0]
    assert tune.search(tried, measure, time.monotonic() + 60)[0] is None and seen == [0, 0, 1, 2]


def test_where_nothing_runs_the_default_stays_and_the_rest_is_tuned(
    device, tmp_path, monkeypatch, capsys
):
    table = tmp_path / "tuned.json"
    above = lambda stage, *rest: next(reversed(TUNED["a device"].won))[1] and "above"  # noqa: E731
    monkeypatch.setattr(tune, "too_much", above)
    tune.main(["--seconds", "0", "--output", str(table)])
    assert {single for _, single, _ in tuned.read(table)["a device"].won} == {False}
    assert tiles("dot_fwd", True, True, "a device") == tiles("dot_fwd", True, True)
    assert capsys.readouterr().out.count("the default stays") == 2
