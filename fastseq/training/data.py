"""Parallel text to padded batches."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.training.vocabulary import BOS, EOS, PAD

__all__ = [
    "Batch",
    "Pair",
    "check_line_counts",
    "collate",
    "decode_lines",
    "make_pair",
    "pad",
    "plan",
    "read_lines",
]

Pair = tuple[list[int], list[int]]
"""The ids of a source, ending in <eos>, and of its target, between <bos> and <eos>."""

GZIP_MAGIC = b"\x1f\x8b"


class Batch(NamedTuple):
    """Padded sentence pairs."""

    src: Tensor
    """Source ids, [B, S], int64."""
    src_lengths: Tensor
    """Tokens in each source row, [B], int64."""
    trg: Tensor
    """Target ids, [B, T], int64."""
    tokens: int
    """Target tokens to predict: all but <bos> and <pad>."""


def decode_lines(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a binary stream, without their ends.

    Raises:
        ValueError: a line is not UTF-8; the text calls the stream ``name``.
    """
    # Only a newline ends a line: str.splitlines would also cut at form feeds and U+2028, and so
    # pair up the wrong sentences.
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"fastseq.training: expected {name} to be UTF-8, got byte "
                f"0x{line[error.start]:02x} in line {number}"
            ) from error
        yield text.rstrip("\r\n")


def read_lines(path: str | os.PathLike[str], limit: int | None = None) -> list[str]:
    """The lines of a UTF-8 text file, plain or gzip-compressed, without their ends.

    Args:
        path: the file; compressed if its name ends in .gz or it starts as gzip does.
        limit: read no further than this many lines.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is empty, not UTF-8, or not complete gzip data.
    """
    with open(path, "rb") as file:
        packed = os.fspath(path).endswith(".gz") or file.peek(2).startswith(GZIP_MAGIC)
        with closing(gzip.GzipFile(fileobj=file)) if packed else file as stream:
            try:
                lines = list(islice(decode_lines(stream, os.fspath(path)), limit))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(
                    f"fastseq.training: expected complete gzip data in {path}, got: {error}"
                ) from error
    if not lines:
        raise ValueError(f"fastseq.training: expected text in {path}, got an empty file")
    return lines


def check_line_counts(files: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError unless the files, lines by name, have equally many lines."""
    if len({len(lines) for lines in files.values()}) > 1:
        counts = " and ".join(f"{len(lines)} in {name}" for name, lines in files.items())
        raise ValueError(
            f"fastseq.training: expected as many lines in one file as in the other, got {counts}"
        )


def make_pair(source: list[int], target: list[int]) -> Pair:
    """Add the ends: <eos> to a source, so that none is empty; <bos> and <eos> to a target."""
    return [*source, EOS], [BOS, *target, EOS]


def plan(
    lengths: Sequence[Any], batch_size: int, seed: int | None = None, chunk: int = 100
) -> list[list[int]]:
    """Which items go into one batch: those of about equal length.

    Args:
        lengths: what to sort by, an entry an item.
        batch_size: items a batch; the last batch of a chunk may be smaller.
        seed: shuffles the items and the batches, the same way each time; None: no shuffling.
        chunk: batches' worth of items sorted together. More means less padding and batches that
            are less random.

    Returns:
        The items' numbers, batch by batch, each item once.
    """
    order = torch.arange(len(lengths))
    generator = torch.Generator()
    if seed is not None:
        order = torch.randperm(len(lengths), generator=generator.manual_seed(seed))
    batches = []
    for part in order.split(batch_size * chunk):
        by_length = sorted(part.tolist(), key=lengths.__getitem__)
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    if seed is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def pad(rows: Sequence[list[int]]) -> Tensor:
    """Rows of ids as one tensor, [rows, longest], int64, filled up with <pad>."""
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def collate(pairs: Sequence[Pair]) -> Batch:
    """Make one batch of pairs."""
    sources, targets = zip(*pairs, strict=True)
    lengths = torch.tensor([len(row) for row in sources])
    return Batch(pad(sources), lengths, pad(targets), sum(len(row) - 1 for row in targets))
