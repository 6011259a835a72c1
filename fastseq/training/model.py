"""The model that is trained, and where it runs."""

from __future__ import annotations

import re
from importlib import import_module

import torch
from torch import nn

__all__ = ["build_model", "resolve_device"]


def build_model(
    source_words: int, target_words: int, embedding: int, hidden: int, reference: bool = False
) -> nn.Module:
    """The attention encoder-decoder, from :mod:`fastseq.models` or :mod:`fastseq.reference`.

    The parts are made in the same order for both, so the same seed gives the same weights.

    Args:
        source_words, target_words: sizes of the two vocabularies.
        embedding, hidden: widths.
        reference: take the plain PyTorch modules.
    """
    family = import_module(f"fastseq.{'reference' if reference else 'models'}.attention")
    attention = family.Attention(hidden)
    encoder = family.Encoder(source_words, embedding, hidden)
    decoder = family.Decoder(target_words, embedding, hidden, attention)
    return family.Seq2Seq(encoder, decoder)


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one, else the CPU.

    Raises:
        ValueError: a name that is neither auto, cpu, cuda nor cuda:N.
        RuntimeError: no such GPU here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(
            f"fastseq.training: expected a device auto, cpu, cuda or cuda:N, got {name!r}"
        )
    gpus = torch.cuda.device_count()
    if name != "cpu" and int(match[1] or 0) >= gpus:
        build = "" if torch.version.cuda or torch.version.hip else " by this CPU build of torch"
        raise RuntimeError(
            f"fastseq.training: expected device {name} to exist, got {gpus} GPUs seen{build}; "
            "use --device cpu"
        )
    return torch.device(name)
