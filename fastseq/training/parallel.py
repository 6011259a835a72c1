"""Training in several processes at once, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fastseq.training.data import Batch
from fastseq.training.vocabulary import PAD

__all__ = ["ALONE", "Team", "join"]


class Team(NamedTuple):
    """The processes of a run: what each does of a batch, and how they come together again.

    All read the same text and plan the same batches; each computes some rows of every batch. So the
    steps and their order are those of a single process.
    """

    rank: int = 0
    size: int = 1

    def share(self, batch: Batch) -> tuple[Batch, float]:
        """The rows of a batch that are this process's.

        Targets stay padded to the longest of the whole batch, so that all processes draw the same
        coins for teacher forcing.

        Returns:
            The rows; and what to multiply their mean loss a token by, so that its mean over the
            processes is the mean over the batch. It is 0 for a process that no row is left for,
            which gets the first one.
        """
        if self.size == 1:
            return batch, 1.0
        rows = slice(self.rank, None, self.size) if self.rank < len(batch.src) else slice(0, 1)
        lengths, trg = batch.src_lengths[rows], batch.trg[rows]
        tokens = int((trg != PAD).sum()) - len(trg)
        share = Batch(batch.src[rows, : int(lengths.max())], lengths, trg, tokens)
        weight = self.size * tokens / batch.tokens if self.rank < len(batch.src) else 0.0
        return share, weight

    def place(self, device: torch.device) -> torch.device:
        """The GPU of this process, where the device is a GPU without a number."""
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose gradients are the mean over the processes; it starts from the weights of
        the first."""
        return module if self.size == 1 else nn.parallel.DistributedDataParallel(module)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over the processes, without gradient."""
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a value over the processes, without gradient."""
        value = value.detach()
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


ALONE = Team()


@contextmanager
def join() -> Iterator[Team]:
    """Meet the processes that torchrun started beside this one; alone if it did not start this one.

    They talk by gloo about tensors on the CPU, by nccl about those on GPUs.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield ALONE
        return
    dist.init_process_group()
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
