"""fastseq in a model that is already there: ``replace_modules``, ``restore_modules``, ``patched``.

A module changes its class and nothing else, as torch's own parametrizations do: fastseq's classes
keep their state the way torch's do. The object, its parameters, hooks, names and attributes stay,
and with them whatever refers to them: optimisers, parents, DistributedDataParallel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from fastseq import nn
from fastseq.explanation import ACCELERATED, explain
from fastseq.models import attention, bahdanau, plain
from fastseq.reference import attention as reference_attention
from fastseq.reference import bahdanau as reference_bahdanau
from fastseq.reference import plain as reference_plain

__all__ = ["Report", "Row", "patched", "replace_modules", "restore_modules"]

_TORCHS = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in ("GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell")
}
_REFERENCES = {
    getattr(theirs, name): getattr(ours, name)
    for theirs, ours in (
        (reference_attention, attention),
        (reference_bahdanau, bahdanau),
        (reference_plain, plain),
    )
    for name in ours.__all__
}
# Attributes that a fast class has and the reference's lacks.
_ADDED = {
    bahdanau.Attention: {
        "key_dim": lambda module: 2 * module.v.in_features,
        "scale": lambda module: 1.0,
        "g": lambda module: None,
    }
}
# Replaced where nothing else is said, and where it is asked for by name.
_DEFAULT = {**_TORCHS, **_REFERENCES}
_ON_REQUEST = {torch.nn.Linear: nn.LinearCrossEntropy}

# What a subclass may not have of its own: fastseq's forward pass doesn't ask it.
_FORWARD = ("__call__", "_call_impl", "forward", "check_input", "check_hidden_size",
            "check_forward_args", "get_expected_hidden_size", "get_expected_cell_size",
            "permute_hidden")  # fmt: skip
# Other modules of these names are in the report too.
_BY_NAME = (*_TORCHS, reference_attention.Attention)
_MARK = "_fastseq_replaced"


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one module.

    Attributes:
        name: of the module within the model; "" is the model itself.
        kind: its class before, such as "torch.nn.LSTM".
        outcome: "replaced", "already" (fastseq's before), "excluded" (by the caller's choice) or
            "left".
        reason: of a module replaced, what runs it now; else why it was not.
    """

    name: str
    kind: str
    outcome: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`replace_modules` did; ``str()`` of it is a table.

    Attributes:
        rows: one a recurrent or attention module of the model, in the model's order.
    """

    rows: tuple[Row, ...]

    @property
    def replaced(self) -> list[str]:
        """Names of the modules replaced."""
        return [row.name for row in self.rows if row.outcome == "replaced"]

    @property
    def left(self) -> dict[str, str]:
        """Names of the modules that could not be replaced, and why."""
        return {row.name: row.reason for row in self.rows if row.outcome == "left"}

    def __str__(self) -> str:
        lines = [f"fastseq: replaced {len(self.replaced)} of {len(self.rows)} modules"]
        cells = [(row.name or "(model)", row.kind, row.outcome, row.reason) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            padded = map(str.ljust, row, widths)
            lines.append(f"  {'  '.join(padded).rstrip()}")
        return "\n".join(lines)


def replace_modules(
    model: torch.nn.Module,
    include: Iterable[type] | None = None,
    filter_fn: Callable[[str, torch.nn.Module], bool] | None = None,
    strict: bool = False,
) -> Report:
    """Make a model's recurrent layers and cells fastseq's, in place.

    Replaced are torch.nn.LSTM, GRU and RNN, their cells, and the models of fastseq.reference;
    subclasses too, unless they compute in their own way. ``include`` may ask for torch.nn.Linear to
    become :class:`fastseq.nn.LinearCrossEntropy`, which computes the same until it gets a target.

    Args:
        model: any module; it may itself be one to replace.
        include: the classes to replace, torch's or fastseq's; None: all but torch.nn.Linear.
        filter_fn: called with each module's name and the module; False leaves it alone.
        strict: whether a module that can't be replaced is an error.

    Returns:
        A :class:`Report`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a class in ``include`` that has no counterpart; with ``strict``, a module that
            can't be replaced. The model is then as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastseq.replace_modules: expected a module, got {type(model).__name__}")
    wanted = _wanted(include)
    found = []
    for name, module in model.named_modules():
        kind, ours = _counterpart(module, wanted)
        if kind is None:
            continue
        outcome, reason = "replaced", ""
        if isinstance(ours, str):
            outcome, reason = "left", ours
        if isinstance(module, _known(wanted)[kind]):
            outcome, reason = "already", "it is fastseq's"
        elif kind not in wanted:
            outcome, reason = "excluded", "not in include"
        elif filter_fn is not None and not filter_fn(name, module):
            outcome, reason = "excluded", "filter_fn said no"
        found.append((module, ours, Row(name, _title(type(module)), outcome, reason)))
    report = Report(tuple(row for _, _, row in found))
    if strict and report.left:
        raise ValueError(f"fastseq.replace_modules: expected all to be replaceable, got {report}")
    rows = []
    for module, ours, row in found:
        if row.outcome == "replaced":
            _swap(module, ours)
            row = dataclasses.replace(row, reason=_what_runs(module))
        rows.append(row)
    return Report(tuple(rows))


def restore_modules(model: torch.nn.Module) -> list[str]:
    """Undo :func:`replace_modules` and :func:`patched` within a model.

    Modules made as fastseq's stay so, and what was done to a module since stays done.

    Returns:
        The names of the modules restored.
    """
    restored = []
    for name, module in model.named_modules():
        if _MARK not in vars(module):
            continue
        for attribute in _ADDED.get(type(module), ()):
            delattr(module, attribute)
        _set_class(module, vars(module).pop(_MARK))
        restored.append(name)
    return restored


_patches = threading.RLock()
_depth = 0
_constructors: dict[type, Callable] = {}


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Make what is constructed as torch.nn.LSTM, GRU, RNN or one of their cells fastseq's.

    For programs that can't be edited. The names in torch stay torch's classes, wherever they were
    imported to: isinstance, issubclass and subclassing are as ever, and subclasses are made as
    they are. In force in every thread until the block is left; blocks may nest.
    :func:`restore_modules` undoes it for a model.
    """
    global _depth
    with _patches:
        if _depth == 0:
            for theirs, ours in _TORCHS.items():
                _constructors[theirs] = theirs.__init__
                theirs.__init__ = _constructing(theirs, ours)
        _depth += 1
    try:
        yield
    finally:
        with _patches:
            _depth -= 1
            if _depth == 0:
                for theirs in _TORCHS:
                    theirs.__init__ = _constructors.pop(theirs)


def _constructing(theirs: type, ours: type) -> Callable:
    construct = theirs.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs) -> None:
        construct(self, *args, **kwargs)
        if type(self) is theirs:
            _swap(self, ours)

    return __init__


def _wanted(include: Iterable[type] | None) -> dict[type, type]:
    if include is None:
        return _DEFAULT
    known = {**_DEFAULT, **_ON_REQUEST}
    by_ours = {ours: theirs for theirs, ours in known.items()}
    classes = [by_ours.get(cls, cls) for cls in include]
    for cls in classes:
        if cls not in known:
            names = ", ".join(map(_title, known))
            raise ValueError(f"fastseq.replace_modules: expected classes among {names}, got {cls}")
    return {cls: known[cls] for cls in classes}


def _known(wanted: dict[type, type]) -> dict[type, type]:
    return {**_DEFAULT, **wanted}


def _counterpart(module, wanted) -> tuple[type | None, type | str]:
    """The known class a module belongs to, and the class to give it or why there is none."""
    known = _known(wanted)
    cls = type_before_parametrizations(module)
    for kind, ours in known.items():
        if isinstance(module, ours):
            return kind, ours
    kind = next((base for base in cls.__mro__ if base in known), None)
    if kind is None:
        said = getattr(module, "original_name", cls.__name__)
        kind = next((k for k in _BY_NAME if k.__name__ == said), None)
        if kind is None:
            return None, ""
        if isinstance(module, torch.jit.ScriptModule):
            return kind, "TorchScript: replace before scripting or tracing"
        return kind, f"not the class {_title(kind)}"
    if "forward" in vars(module):
        return kind, "this instance has a forward of its own"
    own = cls.__mro__[: cls.__mro__.index(kind)]
    for base in own:
        if methods := [name for name in _FORWARD if name in vars(base)]:
            return kind, f"{_title(base)} has {methods[0]} of its own"
    return kind, _merged(cls, known[kind]) if own else known[kind]


def _swap(module: torch.nn.Module, ours: type) -> None:
    # Not by setattr: torch.nn.Module's looks for parameters.
    vars(module)[_MARK] = type_before_parametrizations(module)
    vars(module).update({name: make(module) for name, make in _ADDED.get(ours, {}).items()})
    _set_class(module, ours)


def _set_class(module: torch.nn.Module, cls: type) -> None:
    if is_parametrized(module):
        # torch made a class of the module's own, with its parametrizations as properties.
        wrapper = type(module)
        body = {k: v for k, v in vars(wrapper).items() if k not in ("__dict__", "__weakref__")}
        cls = type(wrapper.__name__, (cls,), body)
    module.__class__ = cls


@functools.cache
def _merged(cls: type, ours: type) -> type:
    """A subclass of one of torch's classes that computes as fastseq's does."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super(merged, self).__reduce_ex__(protocol)
        return _bare, (cls, ours), *state

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    merged = type(cls.__name__, (cls, ours), {**names, "__reduce_ex__": __reduce_ex__})
    return merged


def _bare(cls: type, ours: type) -> torch.nn.Module:
    merged = _merged(cls, ours)
    return merged.__new__(merged)


def _what_runs(module: torch.nn.Module) -> str:
    if isinstance(module, ACCELERATED) and module._weights_now() is not None:
        said = explain(module)
        return f"{said.backend}: {said.reason}"
    return f"now {_title(type_before_parametrizations(module))}"


def _title(cls: type) -> str:
    """Where a class is found: torch.nn.LSTM rather than torch.nn.modules.rnn.LSTM."""
    home = "torch.nn" if getattr(torch.nn, cls.__name__, None) is cls else cls.__module__
    return f"{home}.{cls.__qualname__}"
