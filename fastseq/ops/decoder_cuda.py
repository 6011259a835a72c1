"""``attention_decoder_fwd`` and ``_bwd`` on a GPU: a loop of launches, as one graph.

A step is a product for the query, fastseq's attention operator, a product with what stands beside
the input, and for each layer ``fastseq::recurrent_cuda_fwd`` of one step. What can wait stays
outside of the loop: the inputs' sums before it where all tokens are known, and after it the
gradients of weights, keys and values, one product (one attention call) over all steps. Without the
loop's graph (:mod:`fastseq.ops.graphs`) its cost is that of its launches.

Arguments and results are those of :mod:`fastseq.ops.decoder`; float32 and float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops import recurrent_cuda
from fastseq.ops.graphs import Replayed

__all__ = ["GRAPHS", "backward", "forward", "saved_parts", "uncaptured"]

_CELLS = tuple(_native.cells().values()) if _native.loaded() else ()


def saved_parts(kind, T, h0, keys, values, weights, w_q, w_c, residual) -> dict:
    """What each step and sequence keeps for the backward pass, in order: (steps, width) by name."""
    (L, _, H), K, C = h0.shape, keys.shape[2], values.shape[2]
    parts = {"input": (T, weights[0].shape[1])}
    for layer in range(L):
        parts["h", layer] = (T + 1, H)
        if layer and residual:
            parts["out", layer] = (T, H)
        parts["cells", layer] = (T, kind.saved * H)
    if w_q is not None:
        parts["query"] = (T, K)
    if w_c is not None:
        parts["attended"] = (T, C + H)
    return parts


class _Layer(NamedTuple):
    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None  # of the sums over the input
    apart: list[Tensor]  # of a gate whose sums over h stay apart


class _Decoder:
    """What both passes are given, and the memory between them: ``rows`` [steps, B, width] each."""

    def __init__(self, cell, T, saved, h0, keys, values, weights, has_biases, w_q, v, w_c, feeds,
                 residual, scale):  # fmt: skip
        self.kind, self.T, self.w_q, self.w_c = _CELLS[cell], T, w_q, w_c
        self.keys, self.values, self.v, self.scale = keys, values, v, scale
        self.residual, self.feeds = residual, feeds
        self.L, self.B, self.H = h0.shape
        self.stream = recurrent_cuda.current_stream(h0)
        self.layers = []
        per_layer = 4 if has_biases else 2
        for i in range(0, len(weights), per_layer):
            w_ih, w_hh, *biases = (w.contiguous() for w in weights[i : i + per_layer])
            sums = recurrent_cuda.sum_biases(self.kind, *biases or (None, None))
            self.layers.append(_Layer(w_ih, w_hh, *sums))
        beside = values.shape[2] if w_c is None else w_c.shape[0] if feeds else 0
        self.E = weights[0].shape[1] - beside
        # Of the first layer: by the input, and by what stands beside it.
        self.by_x, self.by_beside = self.layers[0].w_ih.split((self.E, beside), 1)
        parts = saved_parts(self.kind, T, h0, keys, values, weights, w_q, w_c, residual)
        sizes = [steps * self.B * width for steps, width in parts.values()]
        self.saved = h0.new_empty(sum(sizes)) if saved is None else saved
        self.rows = {
            name: piece.view(steps, self.B, width)
            for (name, (steps, width)), piece in zip(
                parts.items(), self.saved.split(sizes), strict=True
            )
        }

    def out(self, layer: int) -> Tensor:
        """What a layer hands on, [T, B, H]."""
        own = self.rows.get(("out", layer))
        return self.rows["h", layer][1:] if own is None else own

    def attention(self, stage: str, query: Tensor, *rest, first=()):
        """The score's operator: query [B, Q, K]."""
        score, more = ("dot", ()) if self.v is None else ("additive", (self.v, None))
        op = getattr(torch.ops.fastseq, f"{score}_attention_{stage}")
        return op(*first, query, self.keys, self.values, *more, *rest)


class _Forward(_Decoder):
    """The loop of the forward pass."""

    def __init__(self, cell, T, h0, c0, mask, b_c, *rest):
        super().__init__(cell, T, None, h0, *rest)
        self.b_c = b_c
        self.where = None if mask is None else mask.unsqueeze(1)
        copy = {"copy": True, "memory_format": torch.contiguous_format}
        # They change from step to step: [L, B, H].
        self.states = [s.to(s.dtype, **copy) for s in (h0, c0) if s is not None]
        self.hs = self.states[0].split(1)
        self.cs = self.states[1].split(1) if c0 is not None else [None] * self.L
        for layer in range(self.L):
            self.rows["h", layer][0] = self.hs[layer][0]
        self.features, self.besides, self.attended = [], [], []

    def attend(self, t: int, h: Tensor) -> Tensor:
        """The context of step t, its weights kept."""
        if self.w_q is not None:
            h = torch.mm(h, self.w_q.t(), out=self.rows["query"][t])
        context, weights = self.attention("fwd", h.unsqueeze(1), self.where, None, self.scale)
        self.attended.append(weights.squeeze(1))
        return context.squeeze(1)

    def step(self, t: int, zx: Tensor) -> Tensor:
        """All layers, given the first one's sums over its input; what the last one hands on."""
        out = None
        for layer, held in enumerate(self.layers):
            if layer:
                zx = _linear(out, held.w_ih, held.bias)
            h = self.rows["h", layer][t + 1]
            torch.ops.fastseq.recurrent_cuda_fwd(
                self.kind.number, recurrent_cuda.STEP, self.stream, 1, zx, [held.w_hh], held.apart,
                [], [], None, None, None, self.hs[layer], self.cs[layer], h,
                self.rows["cells", layer][t : t + 1], *recurrent_cuda.NO_PROJECTION,
            )  # fmt: skip
            own = self.rows.get(("out", layer))
            out = h if own is None else torch.add(h, out, out=own[t])
        return out

    def feature(self, t: int, out: Tensor, context: Tensor | None) -> Tensor:
        if self.w_c is None:
            return torch.cat((out, context), 1)
        context = self.attend(t, out)
        both = torch.cat((context, out), 1, out=self.rows["attended"][t])
        return _linear(both, self.w_c, self.b_c).tanh_()

    def freeze(self, done: Tensor, before: list[Tensor]) -> None:
        """Take back what the last step did to sequences that have ended."""
        done = done.unsqueeze(1)
        for kept in (self.features, self.attended):
            kept[-1] = kept[-1].masked_fill(done, 0)
        for state, old in zip(self.states, before, strict=True):
            state.copy_(torch.where(done, old, state))


def _forward(cell, x, tokens, table, forced, h0, c0, keys, values, mask, weights, has_biases, w_q,
             v, w_c, b_c, feed0, feeds, residual, scale, w_out, b_out, x_factor, read_factor,
             end_token, save):  # fmt: skip
    T = (x if tokens is None else tokens).shape[1]
    d = _Forward(cell, T, h0, c0, mask, b_c, keys, values, weights, has_biases, w_q, v, w_c, feeds,
                 residual, scale)  # fmt: skip
    inputs, first = d.rows["input"], d.layers[0]
    if forced is None:
        inputs[:, :, : d.E] = x.transpose(0, 1) if tokens is None else table[tokens.t()]
        if x_factor is not None:
            inputs[:, :, : d.E] *= x_factor.transpose(0, 1)
        # What stands beside an input is added step by step.
        sums = _linear(inputs[:, :, : d.E].flatten(0, 1), d.by_x, first.bias)
        sums = sums.unflatten(0, (T, d.B))

    def likeliest(t: int) -> Tensor:
        """After step t, the last there is."""
        read = d.features[-1]
        if w_out.shape[1] > read.shape[1]:
            read = torch.cat((read, inputs[t, :, : d.E]), 1)
        if read_factor is not None:
            read = read * read_factor[:, t]
        return _linear(read, w_out, b_out).argmax(1)

    fed, context, done, before = [], None, None, None
    feed = None
    if feeds:
        feed = h0.new_zeros(d.B, w_c.shape[0]) if feed0 is None else feed0
    # What stands beside the inputs, and the features made of it: at once at the end, unless the
    # next step's token is found by them.
    later = forced is None
    for t in range(T):
        if not later:
            token = tokens[:, t]
            if t:
                found = likeliest(t - 1)
                token = torch.where(forced[t], token, found)
                if end_token >= 0:
                    ends = ~forced[t] & (found == end_token)
                    done = ends if done is None else done | ends
                    token = token.masked_fill(done, end_token)
                    before = [state.clone() for state in d.states]
            fed.append(token)
            inputs[t, :, : d.E] = table[token]
            if x_factor is not None:
                inputs[t, :, : d.E] *= x_factor[:, t]
        if w_c is None:
            context = d.attend(t, d.hs[-1][0])
        beside = feed if w_c is not None else context
        if beside is not None:
            d.besides.append(beside)
        if later:
            zx = sums[t] if beside is None else sums[t].addmm_(beside, d.by_beside.t())
        else:
            if beside is not None:
                inputs[t, :, d.E :] = beside
            zx = _linear(inputs[t], first.w_ih, first.bias)
        out = d.step(t, zx)
        if w_c is not None or not later:
            d.features.append(d.feature(t, out, context))
        if done is not None:
            d.freeze(done, before)
        feed = d.features[-1] if feeds else None
    if forced is not None and len(forced) > T:
        found = likeliest(T - 1)
        fed.append(found if done is None else found.masked_fill(done, end_token))
    if later and d.besides:
        inputs[:, :, d.E :] = torch.stack(d.besides)
    width = values.shape[2] if w_c is None else w_c.shape[0]
    if w_c is None and later:
        contexts = _by_row(d.besides, h0, width)
        features = torch.cat((d.out(d.L - 1).transpose(0, 1), contexts), 2)
    else:
        features = _by_row(d.features, h0, width + d.H if w_c is None else width)
    out = [features, _by_row(d.attended, h0, keys.shape[1]), *d.states]
    if tokens is not None:
        out.append(tokens.clone() if forced is None else torch.stack(fed, 1))
    return [*out, d.saved] if save else out


class _Backward(_Decoder):
    """The loop of the backward pass: gradients of the sums, queries and contexts of every step."""

    def __init__(self, cell, features, attended, saved, c0, dfeatures, dweights, states, h0, *rest):
        T = features.shape[1]
        super().__init__(cell, T, saved, h0, *rest)
        self.apart = int(recurrent_cuda.wants_apart(self.kind))
        self.features = None if self.w_c is None else _turned(features)
        self.attended = _turned(attended)
        dfeatures = torch.zeros_like(features) if dfeatures is None else dfeatures
        widths = (self.H, self.values.shape[2]) if self.w_c is None else (features.shape[2],)
        # Of what the top layer hands on and of the context, or of the attentional vector.
        self.dfeatures = [_turned(part) for part in dfeatures.split(widths, 2)]
        self.dweights = None if dweights is None else _turned(dweights)
        blocks = self.kind.gates + self.apart
        self.dsums = [h0.new_empty(T, self.B, blocks * self.H) for _ in self.layers]
        self.dqueries = []
        self.dcontext = h0.new_empty(T, self.B, self.values.shape[2])
        self.dpre = None if self.w_c is None else torch.empty_like(self.features)
        self.dstates = [list(state.split(1)) for state in states]
        # The c that entered each step; the cells keep the one that left.
        self.c_prev = [None] * self.L
        if c0 is not None:
            self.c_prev = [
                torch.cat((c0[i : i + 1], self.rows["cells", i][:-1, :, -self.H :]))
                for i in range(self.L)
            ]
        self.queries = self.rows.get("query")
        if self.queries is None:
            self.queries = self.query_source()

    def query_source(self) -> Tensor:
        """What queries are made of, [T, B, H]: the top layer's h before, or its output after."""
        top = self.L - 1
        return self.rows["h", top][:-1] if self.w_c is None else self.out(top)

    def of_x(self, layer: int) -> Tensor:
        """Gradients of the sums over the input, [T, B, G*H]."""
        return self.dsums[layer][:, :, self.apart * self.H :]

    def of_h(self, layer: int) -> Tensor:
        """Those of the sums over h, the last gate's first where they differ."""
        return self.dsums[layer][:, :, : self.kind.gates * self.H]

    def source_gradients(self, attended, dweights, need_keys, need_values):
        """Of keys, values and v, from all steps at once."""
        if not self.T:
            more = () if self.v is None else (self.v,)
            return [torch.zeros_like(t) for t in (self.keys, self.values, *more)]
        return self.attention(
            "bwd", _turned(self.queries), None, attended, self.scale, need_keys, need_values,
            first=(_turned(self.dcontext), dweights),
        )[1:]  # fmt: skip

    def add_query_gradient(self, t: int, to: Tensor) -> Tensor:
        """Add what reaches the query's source at step t by way of the scores, [B, H]."""
        one = slice(t, t + 1)
        first = (_turned(self.dcontext[one]), None)
        if self.dweights is not None:
            first = (first[0], _turned(self.dweights[one]))
        grads = self.attention(
            "bwd", _turned(self.queries[one]), None, _turned(self.attended[one]), self.scale,
            True, False, first=first,
        )  # fmt: skip
        self.dqueries.append(grads[0].squeeze(1))
        if self.w_q is None:
            return to.add_(self.dqueries[-1])
        return to.addmm_(self.dqueries[-1], self.w_q)

    def step(self, t: int, dout: Tensor) -> None:
        """All layers, given the gradient of what the last one hands on, [B, H]."""
        for layer in reversed(range(self.L)):
            held = self.layers[layer]
            before = [states[layer] for states in self.dstates]
            after = [torch.empty_like(state) for state in before]
            one = slice(t, t + 1)
            c_prev = self.c_prev[layer]
            torch.ops.fastseq.recurrent_cuda_bwd(
                self.kind.number, recurrent_cuda.STEP, self.stream, 1, self.B,
                self.rows["cells", layer][one], dout, *_two(before),
                self.rows["h", layer][one], None if c_prev is None else c_prev[one], [held.w_hh],
                [], [], None, None, None, self.dsums[layer][t], None, *_two(after),
                *recurrent_cuda.NO_PROJECTION,
            )  # fmt: skip
            for states, state in zip(self.dstates, after, strict=True):
                states[layer] = state
            if layer:
                below = self.of_x(layer)[t] @ held.w_ih
                dout = below + dout if self.residual else below

    def run(self) -> Tensor | None:
        """Through all steps; the gradient of what stood beside the first input."""
        C, beside = self.values.shape[2], None
        for t in reversed(range(self.T)):
            d, *of_context = (part[t] for part in self.dfeatures)
            if of_context:
                self.step(t, d)
                of_sums, dcontext = self.of_x(0)[t], self.dcontext[t]
                torch.addmm(*of_context, of_sums, self.by_beside, out=dcontext)
                self.add_query_gradient(t, self.dstates[0][-1][0])
                continue
            d = d if beside is None else d + beside
            torch.ops.aten.tanh_backward.grad_input(d, self.features[t], grad_input=self.dpre[t])
            torch.mm(self.dpre[t], self.w_c[:, :C], out=self.dcontext[t])
            self.step(t, self.add_query_gradient(t, self.dpre[t] @ self.w_c[:, C:]))
            if self.feeds:
                beside = self.of_x(0)[t] @ self.by_beside
        return beside


def _backward(cell, dfeatures, dweights, dh_n, dc_n, features, attended, saved, h0, c0, keys,
              values, mask, weights, has_biases, w_q, v, w_c, b_c, feeds, residual, scale, need_dx,
              need_keys, need_values, need_weights):  # fmt: skip
    given = [(dh_n, h0)] if c0 is None else [(dh_n, h0), (dc_n, c0)]
    # Copies: the loop adds to them.
    dstates = [torch.zeros_like(s) if g is None else g.clone() for g, s in given]

    def rows(t: Tensor) -> Tensor:
        return t.flatten(0, 1)

    d = _Backward(cell, features, attended, saved, c0, dfeatures, dweights, dstates, h0, keys,
                  values, weights, has_biases, w_q, v, w_c, feeds, residual, scale)  # fmt: skip
    beside = d.run()
    sums = [(rows(d.of_x(layer)), rows(d.of_h(layer))) for layer in range(d.L)]
    out = []
    if need_dx:
        out.append(_turned((sums[0][0] @ d.by_x).view(d.T, d.B, d.E)))
    out += [torch.cat(states) for states in d.dstates]
    if feeds:
        out.append(h0.new_zeros(d.B, w_c.shape[0]) if beside is None else beside)
    if need_keys or need_values:
        dkeys, dvalues, *dv = d.source_gradients(attended, dweights, need_keys, need_values)
        out += [dkeys, *dv] if need_keys else []
        out += [dvalues] if need_values else []
    if not need_weights:
        return out
    for layer, (of_x, of_h) in enumerate(sums):
        under = d.out(layer - 1) if layer else d.rows["input"]
        dw_hh = of_h.t() @ rows(d.rows["h", layer][:-1])
        out += [of_x.t() @ rows(under), recurrent_cuda.in_order(dw_hh, d.apart * d.H)]
        if has_biases:
            out += [of_x.sum(0), recurrent_cuda.in_order(of_h.sum(0), d.apart * d.H)]
    if w_q is not None:
        # They were found from the last step back.
        dqueries = torch.cat(d.dqueries[::-1]) if d.T else w_q.new_empty(0, w_q.shape[0])
        out.append(dqueries.t() @ rows(d.query_source()))
    if w_c is not None:
        out.append(rows(d.dpre).t() @ rows(d.rows["attended"]))
        out += [rows(d.dpre).sum(0)] if b_c is not None else []
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _by_row(steps: list[Tensor], like: Tensor, width: int) -> Tensor:
    """[B, T, width] of T times [B, width]."""
    return torch.stack(steps, 1) if steps else like.new_empty(like.shape[1], 0, width)


def _turned(rows: Tensor) -> Tensor:
    """[B, T, n] to [T, B, n] or back, contiguous."""
    return rows.transpose(0, 1).contiguous()


def _two(states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return states[0], states[1] if len(states) > 1 else None


GRAPHS = {"forward": Replayed(_forward), "backward": Replayed(_backward)}


@contextlib.contextmanager
def uncaptured() -> Iterator[None]:
    """Inside, in all threads, the loop runs as it does where no graph of it is kept."""
    for graph in GRAPHS.values():
        graph.enabled = False
    try:
        yield
    finally:
        for graph in GRAPHS.values():
            graph.enabled = True


def forward(*arguments):
    """``attention_decoder_fwd``."""
    *before, forced = arguments[:5]
    if forced is not None:
        # Which tokens are given is known on the host; a graph serves any choice of them.
        forced = recurrent_cuda.send_flags(forced, arguments[5].device)
    with recurrent_cuda.on_device(arguments[5]):
        return GRAPHS["forward"](*before, forced, *arguments[5:])


def backward(*arguments):
    """``attention_decoder_bwd``."""
    with recurrent_cuda.on_device(arguments[5]):
        return GRAPHS["backward"](*arguments)
