"""Layers whose h is projected, around the steps of a GPU's kernels: in two ways.

Where nothing but a product stands between a step's h and the next step's sums, the steps run on h
itself by W_hh W_hr, and projecting waits for the end: :class:`Behind`. Where zoneout mixes what is
projected, or sums over it are normalised, it is projected at each step: :class:`Among`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Among", "Behind", "Padding"]


class _Ends(NamedTuple):
    """Where the sequences begin and end, on a direction's walk."""

    first: Tensor  # each one's first token, [rows]
    last: Tensor
    enters: Tensor  # whether its initial state reaches a step, [rows, 1]
    leaves: Tensor  # whether its final one comes of a step
    empty: Tensor  # whether it has no steps


def _ends(tokens, resets: Tensor | None, reverse: bool, like: Tensor) -> _Ends:
    rows = torch.arange(tokens.rows, device=like.device)
    latest = rows.new_full((tokens.rows,), tokens.steps - 1)
    empty = rows < 0
    if tokens.lengths is not None:
        latest, empty = (tokens.lengths - 1).clamp(min=0), tokens.lengths == 0
    latest = rows + (latest * tokens.rows if tokens.first is None else tokens.first[latest])
    some = ~empty.unsqueeze(1)
    # A reset at step 0 stands before the first step, and behind the last of a walk back.
    uncut = some if resets is None else some & ~resets.reshape(-1, 1)[: tokens.rows]
    if reverse:
        return _Ends(latest, rows, some, uncut, ~some)
    return _Ends(rows, latest, uncut, some, ~some)


class Behind:
    """The projection of a layer whose steps run on h by W_hh W_hr, from an h of zeros.

    Args:
        sides: the weights of each direction, w_hh [G*H, P] and w_hr [P, H] among them.
        tokens: where each lies.
        resets, like: as the op is given them; any tensor of the device.
        h0: [D, rows, P], or None.
    """

    def __init__(self, sides, tokens, resets, like, h0):
        self.sides, self.h0 = sides, h0
        self.ends = None
        if tokens.steps:
            self.ends = [_ends(tokens, resets, d == 1, like) for d in range(len(sides))]

    def add_initial_sums(self, zx: Tensor) -> None:
        """What h0 adds to the first step's sums goes in with those over x."""
        if self.h0 is None or self.ends is None:
            return
        for d, (side, each) in enumerate(zip(self.sides, self.ends, strict=True)):
            sums = (self.h0[d] @ side.w_hh.t()).masked_fill_(~each.enters, 0)
            of_side = zx.view(zx.shape[0], len(self.sides), -1)[:, d]
            of_side[each.first] = of_side[each.first] + sums

    def project(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """y [tokens, D*P] and the final states [D, rows, P] from those before projection."""
        by_side = y.chunk(len(self.sides), 1)
        y = torch.cat([t @ s.w_hr.t() for t, s in zip(by_side, self.sides, strict=True)], 1)
        final = torch.stack([t @ s.w_hr.t() for t, s in zip(h, self.sides, strict=True)])
        if self.h0 is not None:
            if self.ends is None:
                return y, self.h0.clone()
            for d, each in enumerate(self.ends):
                final[d] = torch.where(each.empty, self.h0[d], final[d])
        return y, final

    def gradients_of_steps(self, dy, dh_n, h, without_padding):
        """dy and dh_n before projection, from those behind it; h [tokens, D, H] as it was kept."""
        self.h, self.dh_n, D = h, dh_n, len(self.sides)
        self.dy = None if dy is None else without_padding(dy).chunk(D, 1)
        by = [side.w_hr for side in self.sides]
        of_y = of_h = None
        if dy is not None:
            of_y = torch.cat([g @ w for g, w in zip(self.dy, by, strict=True)], 1)
        if dh_n is not None:
            of_h = torch.stack([g @ w for g, w in zip(dh_n, by, strict=True)])
        return of_y, of_h

    def _first_sums(self, d: int, of_h: Tensor) -> Tensor:
        """Gradients of the sums that h0 took part in, [rows, G*H]."""
        each = self.ends[d]
        return of_h[each.first].masked_fill_(~each.enters, 0)

    def initial_gradient(self, d: int, of_h: Tensor) -> Tensor:
        """dh0, [rows, P]."""
        if self.ends is None:
            return torch.zeros_like(self.h0[d]) if self.dh_n is None else self.dh_n[d]
        dh0 = self._first_sums(d, of_h) @ self.sides[d].w_hh
        return dh0 if self.dh_n is None else torch.where(self.ends[d].empty, self.dh_n[d], dh0)

    def weight_gradients(self, d: int, of_h: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
        """Those of w_hh and w_hr, from that of their product."""
        side = self.sides[d]
        dw_hh, dw_hr = dw @ side.w_hr.t(), side.w_hh.t() @ dw
        if self.ends is None:
            return dw_hh, dw_hr
        if self.h0 is not None:
            dw_hh.addmm_(self._first_sums(d, of_h).t(), self.h0[d])
        if self.dy is not None:
            dw_hr.addmm_(self.dy[d].t(), self.h[:, d])
        if self.dh_n is not None:
            each = self.ends[d]
            final = self.h[each.last, d].masked_fill_(~each.leaves, 0)
            dw_hr.addmm_(self.dh_n[d].t(), final)
        return dw_hh, dw_hr


class Among(NamedTuple):
    """What the steps need in order to project h themselves."""

    w_hr: list[Tensor]
    keep: list[Tensor]  # of each direction, how much of h stays, [tokens, P]
    masks: list[Tensor]  # of the cell itself, whose own h keeps nothing

    @classmethod
    def of(cls, sides, tokens, masks: Sequence[Tensor], like: Tensor) -> Among:
        P, H = sides[0].w_hr.shape
        keep = [tokens.flat(mask, P) for mask in masks[::2]]
        own = []
        for mask in masks[1::2]:
            own += [like.new_zeros(tokens.count, H), tokens.flat(mask, H)]
        keep = keep or [like.new_zeros(tokens.count, P)] * len(sides)
        return cls([side.w_hr for side in sides], keep, own)


class Padding:
    """Packed tokens [N, ..] as rows of one length [T, B, ..], and back.

    Args:
        batch_sizes: rows a step [T], on the host.
        rows: B.
        send: brings a tensor of the host to the device.
    """

    def __init__(self, batch_sizes: Tensor, rows: int, send):
        self.steps, self.rows = len(batch_sizes), rows
        host = {"device": "cpu"}
        step = torch.repeat_interleave(torch.arange(self.steps, **host), batch_sizes)
        row = torch.arange(len(step), **host) - (batch_sizes.cumsum(0) - batch_sizes)[step]
        lengths = torch.searchsorted(-batch_sizes, -torch.arange(rows, **host))
        sent = send(torch.cat((step * rows + row, lengths)))
        self.where, self.lengths = sent[: len(step)], sent[len(step) :]

    def padded(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        rows = t.new_zeros(self.steps * self.rows, *t.shape[1:]).index_copy_(0, self.where, t)
        return rows.view(self.steps, self.rows, *t.shape[1:])

    def packed(self, t: Tensor) -> Tensor:
        return t.flatten(0, 1)[self.where]
