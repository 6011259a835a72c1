"""What the decoders share: teacher-forcing coins, steps one by one, guards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastseq.ops.forced_steps import draw, forced_steps

Forced = Sequence[bool] | Tensor
"""Of each step of a decoder, whether it is fed the target's token or the likeliest after the step
before. The first is fed the start token."""

Step = Callable[..., tuple[Tensor, ...]]
"""(token [B, 1], *state) -> (logits [B, 1, V], *state, ...)."""


def draw_forced(steps: int, teacher_forcing_ratio: float) -> Forced | None:
    """Which of ``steps`` steps are fed the target's token; None: all.

    The draws from Python's ``random`` are those of the reference, in number and order. A compiled
    graph, which serves any number of steps, draws when it runs, and nothing where all is certain.
    """
    if not torch.compiler.is_compiling():
        forced = draw(steps, teacher_forcing_ratio)
        return None if all(forced) else forced
    if teacher_forcing_ratio >= 1:
        return None
    return forced_steps(steps, torch.zeros((), dtype=torch.float64) + teacher_forcing_ratio)


def decode_by_steps(step: Step, trg: Tensor, forced: Forced | None, *state: Tensor) -> Tensor:
    """Logits [B, T-1, V] from one call of ``step`` a token, as the reference makes them."""
    logits: list[Tensor] = []
    for t in range(trg.shape[1] - 1):
        token = fed(t, trg, forced, lambda: logits[-1].argmax(2))
        prediction, *state = step(token, *state)[: 1 + len(state)]
        logits.append(prediction)
    return torch.cat(logits, dim=1)


def fed(t: int, trg: Tensor, forced: Forced | None, likeliest: Callable[[], Tensor]) -> Tensor:
    """The token [B, 1] of step t: the target's, or the likeliest."""
    token = trg[:, t : t + 1]
    if t == 0 or forced is None:
        return token
    if isinstance(forced, Tensor):
        return torch.where(forced[t].to(token.device), token, likeliest())
    return token if forced[t] else likeliest()


def tables(decoder: nn.Module) -> dict[str, object]:
    """What a loop that chooses its own tokens needs beside them."""
    return {"embedding": decoder.embedding.weight, "output": (decoder.fc.weight, decoder.fc.bias)}


def in_halves(fc: nn.Module, features: Tensor) -> Tensor:
    """Logits [B, N, V] of features [B, N, F], in two calls: the longer the one sum over all tokens,
    the worse the layer's gradients. By sources where there are several, so that each half, and its
    gradient, is one block: torch sums a bias's over anything else in one long chain."""
    if torch.compiler.is_compiling():
        # By tokens: half of a dimension would tie the graph to sizes that leave more than one.
        rows = features.flatten(0, 1)
        half = -(-rows.shape[0] // 2)
        logits = torch.cat([fc(rows[:half]), fc(rows[half:])])
        return logits.unflatten(0, features.shape[:2])
    dim = 0 if features.shape[0] > 1 else 1
    halves = features.split(-(-features.shape[dim] // 2), dim=dim)
    return torch.cat([fc(half) for half in halves], dim=dim)


def after_start(logits: Tensor | None, trg: Tensor, fc: nn.Linear) -> Tensor:
    """Put the zeros of the given first position before the logits: [B, T, V]."""
    zeros = fc.weight.new_zeros(trg.shape[0], 1, fc.out_features)
    return zeros if logits is None else torch.cat((zeros, logits), dim=1)


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is ``kind.forward`` and nothing else.

    False with a forward of its own (subclasses, quantised or adapted layers; one put on the module
    itself, as offloading does) and with hooks, which is how pruning and the older weight_norm work:
    such a module has to be called.
    """
    return getattr(type(module), "forward", None) is kind.forward and not (
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def check_plain(decoder: nn.Module, kind: type[nn.Module], where: str) -> None:
    """Refuse to run the steps of a decoder at once that wants to be called for each.

    Raises:
        NotImplementedError: ``decoder`` has hooks or a forward of its own.
    """
    if not computes_as(decoder, kind):
        raise NotImplementedError(
            f"fastseq.{where}.features: expected a decoder without hooks or a forward of its own, "
            f"got {type(decoder).__name__} with some; call the model for its logits instead"
        )


def is_one_layer(rnn: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``rnn`` is a single layer of ``kind`` and no more, batch first, with biases."""
    return (
        computes_as(rnn, kind)
        and (rnn.num_layers, rnn.proj_size, rnn.bidirectional) == (1, 0, False)
        and rnn.batch_first
        and rnn.bias
    )


def is_lookup(embedding: nn.Module) -> bool:
    """Whether ``embedding`` does no more than look rows up, gradients included."""
    return (
        computes_as(embedding, nn.Embedding)
        and embedding.padding_idx is None
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
    )


def embed(embedding: nn.Module, tokens: Tensor, where: str) -> Tensor:
    """Embed tokens; an id outside the vocabulary raises IndexError naming the range."""
    try:
        return embedding(tokens)
    except IndexError as error:
        raise IndexError(
            f"fastseq.{where}: expected token ids in 0..{embedding.num_embeddings - 1}, "
            f"got {int(tokens.min())} to {int(tokens.max())}"
        ) from error


def check_source(src: Tensor, where: str) -> None:
    """Refuse sources without tokens, with the error type of the reference."""
    if src.dim() and src.shape[-1] == 0:
        raise RuntimeError(
            f"fastseq.{where}: expected at least one source token a row, got {list(src.shape)}"
        )


def check_target(src: Tensor, trg: Tensor, where: str) -> None:
    """Refuse targets that are not [B, at least 1], with the error types of the reference."""
    if trg.dim() != 2:
        raise ValueError(f"fastseq.{where}: expected trg of shape [B, T], got {list(trg.shape)}")
    if trg.shape[1] == 0:
        raise IndexError(
            f"fastseq.{where}: expected a start token in each row of trg, got {list(trg.shape)}"
        )
    if src.dim() != 2 or src.shape[0] != trg.shape[0]:
        raise RuntimeError(
            f"fastseq.{where}: expected src of shape [B, S] with B = {trg.shape[0]} as in trg, "
            f"got {list(src.shape)}"
        )
