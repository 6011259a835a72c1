"""The decoder with attention as a function: a whole target sequence in one call.

Shapes: T time, B batch, S source length, E input width, H hidden, G gate blocks, L layers, K width
of queries and keys, C of values and contexts, A of the attentional vector, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import backends
from fastseq.functional.attention import additive_attention
from fastseq.ops import decoder as _op
from fastseq.ops import measured_cuda
from fastseq.reference import decoder as _reference
from fastseq.reference.rnn import CELLS

__all__ = ["attention_decoder"]


class Decoded(NamedTuple):
    """What :func:`attention_decoder` returns.

    Attributes:
        features: what an output layer makes logits of, [B, T, F]: [h | context], F = H + C, with
            attention before the cell; the attentional vectors, F = A, with attention after it.
        states: the final h, and c of an LSTM, [L, B, H] each.
        weights: of the attention, [B, T, S].
        tokens: those that were fed, [B, T], int64, and with T + 1 entries of ``forced`` the
            likeliest after the last step, [B, T+1]; None where ``input`` are no tokens.
    """

    features: Tensor
    states: tuple[Tensor, ...]
    weights: Tensor
    tokens: Tensor | None


def attention_decoder(
    input: Tensor,
    hx: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    params: Sequence[Tensor],
    *,
    cell: str = "lstm",
    has_biases: bool = True,
    query_weight: Tensor | None = None,
    v: Tensor | None = None,
    combine: tuple[Tensor, Tensor | None] | None = None,
    input_feeding: bool = False,
    feed: Tensor | None = None,
    residual: bool = False,
    scale: float = 1.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    embedding: Tensor | None = None,
    forced: Sequence[bool] | Tensor | None = None,
    output: tuple[Tensor, Tensor | None] | None = None,
    input_factor: Tensor | None = None,
    output_factor: Tensor | None = None,
    end_token: int | None = None,
    location: tuple[Tensor, Tensor] | None = None,
) -> Decoded:
    """Run a recurrent decoder with attention over a whole target.

    Without ``combine`` attention comes before the cell: the query is the top layer's h of the step
    before, and the context stands beside the first layer's input, [x | context]. With it attention
    comes after: the query is the top layer's output o of this step, the attentional vector is
    a = tanh(W_c [context | o] + b_c), and with ``input_feeding`` the a of the step before stands
    beside the input, [x | a].

    Args:
        input: inputs x, [B, T, E], floating; or tokens, [B, T], int64, rows of ``embedding``.
        hx: the initial h, and c of an LSTM, [L, B, H] each.
        keys: what queries are scored against, projected already, [B, S, K].
        values: what is averaged, [B, S, C].
        params: of each layer in turn weight_ih [G*H, E+C] ([G*H, E+A] with input feeding,
            [G*H, E] without; [G*H, H] from the second layer on), weight_hh [G*H, H] and, with
            ``has_biases``, bias_ih and bias_hh [G*H]. Gate blocks in torch's order.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        has_biases: whether ``params`` hold biases.
        query_weight: W_q [K, H] of the query W_q h; None: h itself, K = H.
        v: of the additive score v . tanh(q + k), [K]; None: the dot score q . k.
        combine: (W_c [A, C+H], b_c [A] or None), or None.
        input_feeding: see above.
        feed: the attentional vector that the first step is fed, [B, A]; None: zero.
        residual: from the second layer on, a layer's input is added to its output.
        scale: of the scores.
        lengths: source positions that count, [B], int64 in 0..S; None: all.
        mask: bool, [B, S], True = attend; None: all. A source without any has context zero.
        embedding: [V, E], beside tokens.
        forced: for each step whether its token is the one given, else it is the likeliest by
            ``output`` after the step before; the first is always given. None: all are. With T + 1
            entries, the last False, the token after the last step is found too. (A compiled graph
            takes a bool tensor as it is, without a look at it.)
        output: (weight [V, F], bias [V] or None), to find likeliest tokens by; no gradient comes of
            it. The first of equals wins. With a weight [V, F+E] it reads [features | x].
        input_factor: what the tokens' rows x of ``embedding`` are multiplied by, [B, T, E], and
        output_factor: what ``output`` reads is, [B, T, F] or [B, T, F+E]: the factors of a dropout,
            which get no gradient. None: 1.
        end_token: a sequence for which this token was found likeliest stops there: features and
            weights are zero from then on, tokens ``end_token``, states those before. Without
            gradients only. None: none stops.
        location: (filters [F, J, N], U [K, F]) of an additive score with a further term inside the
            tanh, U f, f = filters * weights of the step before (J = 1), or these and their sum over
            all steps before (J = 2); N odd. The loop then runs step by step.

    Returns:
        A :class:`Decoded`: features, states, weights, tokens.

    Raises:
        ValueError: a shape or a cell that does not fit.
        TypeError: an argument of the wrong kind or dtype.
        IndexError: a token outside 0..V-1.

    Source: attention before the cell, Bahdanau, Cho and Bengio 2015, appendix A.2; after it, with
    input feeding, Luong, Pham and Manning 2015, sections 3 and 3.3; residual layers, Wu et al.
    2016, section 3.1; scheduled sampling, Bengio et al. 2015.
    """
    if torch.is_autocast_enabled(values.device.type):
        # In the dtype of the products inside, as torch's own modules would run them.
        lower = _lowered(values)
        input, keys, values, embedding = map(lower, (input, keys, values, embedding))
        query_weight, v, feed = map(lower, (query_weight, v, feed))
        hx, params = tuple(map(lower, hx)), list(map(lower, params))
        input_factor, output_factor = lower(input_factor), lower(output_factor)
        location = None if location is None else tuple(map(lower, location))
        combine, output = (
            None if pair is None else tuple(map(lower, pair)) for pair in (combine, output)
        )
    # (Those that a GPU holds stay there: looking at them would mean waiting.)
    if isinstance(forced, Tensor) and forced.is_cpu and not torch.compiler.is_compiling():
        forced = forced.tolist()
    arguments = {
        "cell": cell, "has_biases": has_biases, "query_weight": query_weight, "v": v,
        "combine": combine, "input_feeding": input_feeding, "feed": feed, "residual": residual,
        "scale": scale, "embedding": embedding, "forced": forced, "output": output,
        "input_factor": input_factor, "output_factor": output_factor,
    }  # fmt: skip
    check_decoder(
        _OP, input, hx, keys, values, params, arguments, lengths, mask, end_token, location
    )
    if lengths is not None:
        within = torch.arange(keys.shape[1], device=keys.device) < lengths.unsqueeze(1)
        mask = within if mask is None else within & mask
    known = forced is not None and not isinstance(forced, Tensor)
    if known and all(forced[: input.shape[1]]) and len(forced) == input.shape[1]:
        forced = arguments["forced"] = None
    kind = kind_of(cell, hx[0].shape[0], arguments)
    obstacle = backends.decoder_obstacle(values, params, kind, input.shape[1], keys.shape[2])
    if obstacle is not None or location is not None:
        if end_token is not None:
            raise NotImplementedError(
                "fastseq.attention_decoder: expected end_token with the kernel only; cut the "
                "tokens behind it instead"
            )
        if location is not None:
            arguments |= {"location": location, "score": additive_attention}
        found = _reference.attention_decoder(
            input, hx, keys, values, params, mask=mask, **arguments
        )
        return Decoded(*found)
    dtype, wide = values.dtype, widening(values.dtype)
    tokens = None if input.is_floating_point() else input
    w_out, b_out = (None, None) if output is None or forced is None else output
    settings = _op.Settings(
        _op.DECODER_CELLS[cell].number, tokens,
        _on_the_host(forced) if known and forced else forced, mask, has_biases,
        input_feeding, residual, float(scale),
        *(wide(_detached(t)) for t in (w_out, b_out, input_factor, output_factor)),
        -1 if end_token is None else end_token,
    )  # fmt: skip
    w_c, b_c = (None, None) if combine is None else combine
    h0, *c0 = hx
    features, weights, *rest = _op.run(
        settings,
        *map(
            wide,
            (
                input if tokens is None else None, embedding if tokens is not None else None, h0,
                c0[0] if c0 else None, keys, values, query_weight, v, w_c, b_c,
                feed if input_feeding else None, *params,
            ),
        ),
    )  # fmt: skip
    fed = None if tokens is None else rest[len(hx)]
    states = tuple(state.to(dtype) for state in rest[: len(hx)])
    return Decoded(features.to(dtype), states, weights.to(dtype), fed)


_OP = "fastseq.attention_decoder"


def kind_of(cell: str, layers: int, arguments: dict[str, object]) -> measured_cuda.DecoderKind:
    """Of a call with these arguments, as far as it is known by them."""
    after = "feeding" if arguments.get("input_feeding") else "after"
    return measured_cuda.DecoderKind(
        cell,
        "before" if arguments.get("combine") is None else after,
        "dot" if arguments.get("v") is None else "additive",
        layers,
        "given" if arguments.get("forced") is None else "chosen",
    )


def picks_obstacle(
    cell: str, values: Tensor, hidden: Tensor, steps: int | None, K: int
) -> str | None:
    """Why the loop of one layer behind additive attention, choosing its tokens, is not one call:
    of so many steps, if that is known, with keys K wide."""
    kind = measured_cuda.DecoderKind(cell, tokens="chosen")
    return backends.decoder_obstacle(values, (hidden,), kind, steps, K)


def from_start(start: Tensor, steps: int) -> dict[str, object]:
    """``input`` and ``forced`` of a loop that writes ``steps`` tokens of its own after ``start``
    [B]."""
    tokens = start.unsqueeze(1).expand(-1, steps).contiguous()
    return {"input": tokens, "forced": (True, *[False] * steps)}


def _on_the_host(flags) -> Tensor:
    """Whatever the default device is."""
    return torch.tensor([bool(flag) for flag in flags], device="cpu")


def past_end(tokens: Tensor, end_token: int) -> Tensor:
    """Where of tokens [B, N] a row has ended before: what stands behind its first end."""
    ends = tokens == end_token
    return ends.cumsum(1) - ends.long() > 0


def widening(dtype: torch.dtype) -> Callable[[Tensor | None], Tensor | None]:
    """What takes a tensor of this dtype, or None, to the dtype it is computed in."""
    return (lambda t: t) if dtype in _NATIVE else (lambda t: None if t is None else t.float())


_NATIVE = (torch.float32, torch.float64)
_FLOATING = (*_NATIVE, torch.bfloat16, torch.float16)


def _lowered(like: Tensor):
    """What takes a tensor, where it is one of a floating dtype but float64, to that of autocast."""
    dtype = torch.get_autocast_dtype(like.device.type)

    def lower(t):
        narrow = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if narrow else t

    return lower


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def check_decoder(
    op, input, hx, keys, values, params, arguments, lengths, mask, end_token, location=None
) -> None:
    """Refuse what does not fit, naming the function and the argument."""
    cell = arguments["cell"]
    if cell not in CELLS or CELLS[cell].extras:
        known = [name for name, kind in CELLS.items() if not kind.extras]
        raise ValueError(f"{op}: expected cell to be one of {known}, got {cell!r}")
    kind = CELLS[cell]
    hx_names = ("h0", "c0")[: kind.states]
    if not isinstance(hx, tuple) or len(hx) != kind.states:
        got = len(hx) if isinstance(hx, tuple) else type(hx).__name__
        raise ValueError(f"{op}: expected hx to be a tuple ({', '.join(hx_names)}), got {got}")
    for name, tensor, dims in (
        ("input", input, None), *((n, t, 3) for n, t in zip(hx_names, hx, strict=True)),
        ("keys", keys, 3), ("values", values, 3),
    ):  # fmt: skip
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if dims is not None and tensor.dim() != dims:
            raise ValueError(
                f"{op}: expected {name} of {dims} dimensions, got {list(tensor.shape)}"
            )
    L, B, H = hx[0].shape
    S, K = keys.shape[1:]
    C, G = values.shape[2], kind.gates
    combine, feeds = arguments["combine"], arguments["input_feeding"]
    if feeds and combine is None:
        raise ValueError(f"{op}: expected combine beside input_feeding=True, got None")
    A = combine[0].shape[0] if combine is not None else 0
    beside = (A if feeds else 0) if combine is not None else C
    F = A if combine is not None else H + C
    E = _check_input(op, input, B, arguments)
    per_layer = 4 if arguments["has_biases"] else 2
    if L < 1 or len(params) != L * per_layer:
        raise ValueError(
            f"{op}: expected {per_layer} params for each of {L} layers, got {len(params)}"
        )
    expected = {"keys": (keys, (B, S, K)), "values": (values, (B, S, C))}
    expected |= {n: (t, (L, B, H)) for n, t in zip(hx_names, hx, strict=True)}
    for i in range(L):
        shapes = ((G * H, H if i else E + beside), (G * H, H), (G * H,), (G * H,))
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for j in range(per_layer):
            expected[f"{names[j]} of layer {i}"] = (params[i * per_layer + j], shapes[j])
    if arguments["query_weight"] is not None:
        expected["query_weight"] = (arguments["query_weight"], (K, H))
    elif K != H:
        raise ValueError(f"{op}: expected keys as wide as h, {H}, without query_weight, got {K}")
    expected["v"] = (arguments["v"], (K,))
    expected["feed"] = (arguments["feed"], (B, A))
    expected["embedding"] = (arguments["embedding"], None)
    if combine is not None:
        expected["combine[0]"] = (combine[0], (A, C + H))
        expected["combine[1]"] = (combine[1], (A,))
    if arguments["output"] is not None:
        V = arguments["output"][0].shape[0]
        if arguments["embedding"] is not None and V != arguments["embedding"].shape[0]:
            raise ValueError(
                f"{op}: expected output of the embedding's {arguments['embedding'].shape[0]} "
                f"tokens, got {V}"
            )
        if arguments["embedding"] is not None and arguments["output"][0].shape[1:] == (F + E,):
            F += E
        expected["output[0]"] = (arguments["output"][0], (V, F))
        expected["output[1]"] = (arguments["output"][1], (V,))
    elif arguments["output_factor"] is not None:
        raise ValueError(f"{op}: expected output beside output_factor, got None")
    if arguments["input_factor"] is not None and input.is_floating_point():
        raise ValueError(f"{op}: expected tokens as input beside input_factor, got {input.dtype}")
    T = input.shape[1]
    expected["input_factor"] = (arguments["input_factor"], (B, T, E))
    expected["output_factor"] = (arguments["output_factor"], (B, T, F))
    _check_tensors(op, values, expected)
    _check_where(op, B, S, lengths, mask)
    if location is not None:
        _check_location(op, values, K, arguments["v"], location)
    if end_token is not None and (arguments["forced"] is None or torch.is_grad_enabled()):
        raise ValueError(f"{op}: expected end_token with forced, and without gradients, only")


def _check_location(op, values, K, v, location) -> None:
    if v is None:
        raise ValueError(f"{op}: expected v beside location, got None")
    filters, weight = location
    F = filters.shape[0]
    _check_tensors(op, values, {"location[0]": (filters, None), "location[1]": (weight, (K, F))})
    if filters.dim() != 3 or filters.shape[1] not in (1, 2) or filters.shape[2] % 2 == 0:
        raise ValueError(
            f"{op}: expected location[0] of shape [F, J, N], J 1 or 2 and N odd, got "
            f"{list(filters.shape)}"
        )


def _check_tensors(op, like, expected) -> None:
    if like.dtype not in _FLOATING:
        raise TypeError(f"{op}: expected values of a floating dtype, got {like.dtype}")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: expected {name} to be a tensor, got {type(tensor).__name__}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{op}: expected {name} of shape {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != like.dtype:
            raise TypeError(
                f"{op}: expected {name} of the values' dtype {like.dtype}, got {tensor.dtype}"
            )
        if tensor.device != like.device:
            raise ValueError(
                f"{op}: expected {name} on the values' device {like.device}, got {tensor.device}"
            )


def _check_input(op, input, B, arguments) -> int:
    """Check inputs or tokens and what goes with them; return E."""
    embedding, forced = arguments["embedding"], arguments["forced"]
    if input.is_floating_point():
        if input.dim() != 3 or input.shape[0] != B:
            raise ValueError(
                f"{op}: expected input of shape [B, T, E] with B = {B}, got {list(input.shape)}"
            )
        if forced is not None:
            raise ValueError(f"{op}: expected tokens as input beside forced, got {input.dtype}")
        return input.shape[2]
    if input.dtype != torch.int64:
        raise TypeError(f"{op}: expected input floating or int64, got {input.dtype}")
    if input.dim() != 2 or input.shape[0] != B:
        raise ValueError(
            f"{op}: expected tokens of shape [B, T] with B = {B}, got {list(input.shape)}"
        )
    if not isinstance(embedding, Tensor) or embedding.dim() != 2:
        raise ValueError(f"{op}: expected an embedding [V, E] beside tokens")
    T, V = input.shape[1], embedding.shape[0]
    if forced is not None:
        entries = forced.shape[0] if isinstance(forced, Tensor) else len(forced)
        if entries not in (T, T + 1):
            raise ValueError(f"{op}: expected forced of T = {T} entries or one more, got {entries}")
        if T and not isinstance(forced, Tensor) and not forced[0]:
            raise ValueError(f"{op}: expected the first entry of forced to be True")
        if arguments["output"] is None:
            raise ValueError(f"{op}: expected output beside forced, got None")
    if not input.is_cpu or torch.compiler.is_compiling():
        return embedding.shape[1]
    # Those that are never fed may be anything.
    fed = input if forced is None else input[:, _on_the_host(forced[:T])]
    if fed.numel():
        least, most = (int(t) for t in fed.aminmax())
        if least < 0 or most >= V:
            raise IndexError(f"{op}: expected tokens in 0..{V - 1}, got {least} to {most}")
    return embedding.shape[1]


def _check_where(op, B, S, lengths, mask) -> None:
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{op}: expected mask to be a bool tensor (True = attend), got {got}")
        if tuple(mask.shape) != (B, S):
            raise ValueError(
                f"{op}: expected mask of shape [B, S] = [{B}, {S}], got {list(mask.shape)}"
            )
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{op}: expected lengths to be an int64 tensor, got {got}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(f"{op}: expected lengths of shape [B] = [{B}], got {list(lengths.shape)}")
    # On a GPU looking would mean waiting.
    if lengths.is_cuda or torch.compiler.is_compiling():
        return
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= S:
        raise ValueError(
            f"{op}: expected lengths between 0 and S = {S}, got {int(lengths.min())} to "
            f"{int(lengths.max())}"
        )
