"""The model that is trained, and where it runs."""

from __future__ import annotations

import re
from importlib import import_module

import torch
from torch import nn

from fastseq.training.settings import MODELS, Settings

__all__ = ["build_model", "resolve_device"]


def build_model(
    settings: Settings, source_words: int, target_words: int, reference: bool = False
) -> nn.Module:
    """The model of a run, from :mod:`fastseq.models` or :mod:`fastseq.reference`.

    The parts are made in the same order for both, so the same seed gives the same weights.

    Args:
        settings: name, widths and dropout of the model.
        source_words, target_words: sizes of the two vocabularies.
        reference: take the plain PyTorch modules.

    Raises:
        ValueError: an unknown name, or dropout for a model that has none.
    """
    name, drops = settings.model, (settings.dropout, settings.output_dropout)
    if name not in MODELS:
        raise ValueError(
            f"fastseq.training: expected a model among {', '.join(MODELS)}, got {name!r}"
        )
    if "dropout" not in MODELS[name]:
        if any(drops):
            raise ValueError(
                f"fastseq.training: expected no dropout with the model {name}, which has none, "
                f"got {drops[0]} and {drops[1]}; choose another with --model"
            )
        drops = ()
    family = import_module(f"fastseq.{'reference' if reference else 'models'}.{name}")
    widths = settings.embedding, settings.hidden
    attention = family.Attention(settings.hidden)
    encoder = family.Encoder(source_words, *widths, *drops[:1])
    decoder = family.Decoder(target_words, *widths, attention, *drops)
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
