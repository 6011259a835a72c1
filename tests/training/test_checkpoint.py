from __future__ import annotations

import pickle
import struct
import zipfile
from dataclasses import replace

import pytest
import torch

from fastseq.training import checkpoint as checkpoints
from fastseq.training.checkpoint import Checkpoint, Epoch, load, save
from fastseq.training.model import build_model
from fastseq.training.settings import Settings
from fastseq.training.vocabulary import Vocabulary

SETTINGS = Settings("a.de", "a.en", "v.de", "v.en", embedding=3, hidden=5, limit=7)


@pytest.fixture
def made() -> Checkpoint:
    source, target = Vocabulary(["ein", "zwei"]), Vocabulary(["one", "two", "three"])
    model = build_model(SETTINGS, len(source), len(target))
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    history = [Epoch(1, 2.5, 2.0, 7.4, 0.5, 100.0)]
    return Checkpoint(SETTINGS, source, target, history, model.state_dict(), optimizer.state_dict())


@pytest.fixture
def path(made, tmp_path):
    save(made, tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_round_trip(made, path):
    got = load(path)
    assert got.settings == made.settings
    assert (got.source.words, got.target.words) == (made.source.words, made.target.words)
    assert got.history == made.history
    assert got.model.keys() == made.model.keys()
    assert all(torch.equal(got.model[name], made.model[name]) for name in made.model)
    assert str(got.optimizer) == str(made.optimizer)
    for reference in (True, False):
        built = got.build(reference).state_dict()
        assert all(torch.equal(built[name], made.model[name]) for name in made.model)


def refused(path, message):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith("fastseq.training: expected a checkpoint of fastseq train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_refuses_a_truncated_file(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    refused(path, "damaged or of another kind")


def test_refuses_a_flipped_bit_in_any_part(path):
    with zipfile.ZipFile(path) as archive:
        parts = [part for part in archive.infolist() if part.file_size]
    data = path.read_bytes()
    assert len(parts) > 20
    for part in parts[::3]:
        # The two lengths stand at bytes 26 and 28 of a local header of 30 bytes.
        name, extra = struct.unpack_from("<HH", data, part.header_offset + 26)
        flipped = bytearray(data)
        flipped[part.header_offset + 30 + name + extra + part.file_size // 2] ^= 16
        path.write_bytes(flipped)
        refused(path, "damaged")


@pytest.mark.parametrize(
    "foreign",
    [
        b"hello\n" * 9,
        b"\x1f\x8b\x08" + bytes(64),
        pickle.dumps({"format": checkpoints.FORMAT, "version": 1}),
    ],
)
def test_refuses_files_of_another_kind(path, foreign):
    path.write_bytes(foreign)
    refused(path, "damaged or of another kind")


def test_refuses_other_archives(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    refused(path, "damaged or of another kind")


@pytest.mark.parametrize("state", [{"state_dict": {}}, [1, 2], torch.zeros(3)])
def test_refuses_what_other_programs_save(path, state):
    torch.save(state, path)
    refused(path, "saved by another program")


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_runs_no_code_from_the_file(path, capsys):
    torch.save({"format": checkpoints.FORMAT, "version": 1, "settings": Evil()}, path)
    refused(path, "damaged or of another kind")
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_refuses_other_versions(path, version):
    state = torch.load(path, weights_only=True)
    torch.save(state | {"version": version}, path)
    refused(path, f"format version {version}")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {k: v for k, v in s.items() if k != "model"},
        lambda s: {k: v for k, v in s.items() if k != "version"} | {"version": 1, "history": [{}]},
        lambda s: s | {"settings": {"hidden": 5}},
        lambda s: s | {"settings": s["settings"] | {"hidden": 6}},
        lambda s: s | {"settings": s["settings"] | {"hidden": "wide"}},
        lambda s: s | {"settings": s["settings"] | {"from_the_future": 1}},
        lambda s: s | {"settings": None},
        lambda s: s | {"source": s["source"] + ["more"]},
        lambda s: s | {"target": ["one", "one", "one"]},
        lambda s: s | {"model": {}},
    ],
)
def test_refuses_parts_that_do_not_fit(path, change):
    torch.save(change(torch.load(path, weights_only=True)), path)
    refused(path, "do not fit together")


def test_saving_over_a_checkpoint_is_all_or_nothing(made, path, monkeypatch):
    before = path.read_bytes()

    def interrupted(state, file):
        with open(file, "wb") as out:
            out.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(replace(made, history=[]), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
