from __future__ import annotations

import gzip
import random

import pytest
import torch

from fastseq.training.data import collate, make_pair, plan, read_lines
from fastseq.training.vocabulary import BOS, EOS, PAD

TEXT = "Größe\r\n\nline\u2028separator\x0bform feed\nlast"
LINES = ["Größe", "", "line\u2028separator\x0bform feed", "last"]


@pytest.mark.parametrize("name", ["plain.de", "packed.gz", "packed-without-suffix"])
def test_reads_plain_and_compressed_lines(tmp_path, name):
    path = tmp_path / name
    data = TEXT.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if "packed" in name else data)
    assert read_lines(path) == LINES
    assert read_lines(path, limit=2) == LINES[:2]
    path.write_bytes(gzip.compress(data + b"\n", mtime=0) if "packed" in name else data + b"\n")
    assert read_lines(path) == LINES


def test_a_byte_order_mark_is_no_word(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert read_lines(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty", b"", "empty file"),
        ("empty.gz", b"", "empty file"),
        ("empty-inside.gz", gzip.compress(b"", mtime=0), "empty file"),
        ("truncated.gz", gzip.compress(b"some words\n" * 999, mtime=0)[:-12], "complete gzip data"),
        ("short.gz", gzip.compress(b"words", mtime=0)[:5], "complete gzip data"),
        ("plain.gz", b"words\n", "complete gzip data"),
        ("latin1", b"fine\nGr\xf6\xdfe\n", "UTF-8, got byte 0xf6 in line 2"),
        ("cut", "Größe".encode()[:3], "UTF-8, got byte 0xc3 in line 1"),
    ],
)
def test_refuses_what_is_not_text(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_lines(path)
    assert str(path) in str(caught.value)


def test_a_damaged_checksum_is_noticed(tmp_path):
    data = bytearray(gzip.compress(b"some words\n" * 99, mtime=0))
    data[-6] ^= 1
    path = tmp_path / "text.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="complete gzip data"):
        read_lines(path)


def test_missing_files_and_directories_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_lines(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        read_lines(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("seed", [None, 3])
def test_plan_has_every_item_once(count, seed):
    lengths = random.Random(0).choices(range(1, 20), k=count)
    batches = plan(lengths, 8, seed, chunk=3)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert all(1 <= len(batch) <= 8 for batch in batches)


def test_plan_depends_on_the_seed_alone():
    lengths = random.Random(0).choices(range(1, 20), k=500)
    once = plan(lengths, 8, seed=1, chunk=10)
    torch.rand(3)
    random.random()
    assert plan(lengths, 8, seed=1, chunk=10) == once
    assert plan(lengths, 8, seed=2, chunk=10) != once


def test_plan_leaves_global_random_numbers_alone():
    before = torch.get_rng_state()
    plan([3, 1, 2], 2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_plan_puts_like_lengths_together():
    lengths = random.Random(0).choices(range(1, 40), k=2000)
    filled = [
        sum(lengths[i] for i in batch) / (len(batch) * max(lengths[i] for i in batch))
        for batch in plan(lengths, 20, seed=0)
    ]
    shuffled = [
        sum(lengths[i : i + 20]) / (20 * max(lengths[i : i + 20])) for i in range(0, 2000, 20)
    ]
    assert min(filled) > 0.6
    assert sum(filled) / len(filled) > 0.95 > 0.7 > sum(shuffled) / len(shuffled)


def test_collate_pads_and_counts():
    batch = collate([make_pair([5, 6, 7], [8]), make_pair([], [9, 9])])
    assert batch.src.tolist() == [[5, 6, 7, EOS], [EOS, PAD, PAD, PAD]]
    assert batch.src_lengths.tolist() == [4, 1]
    assert batch.trg.tolist() == [[BOS, 8, EOS, PAD], [BOS, 9, 9, EOS]]
    assert batch.tokens == 5 == int((batch.trg[:, 1:] != PAD).sum())
    assert batch.src.dtype == batch.src_lengths.dtype == batch.trg.dtype == torch.int64
