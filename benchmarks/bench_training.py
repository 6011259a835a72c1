"""A training step of the attention encoder-decoder against the reference and plain PyTorch.

python -m benchmarks.bench_training [--rows 1,3] [--quick] [--output FOLDER]

Forward and backward of Seq2Seq and cross entropy, every gradient, equal weights and equal coins.
"tuned" is what a careful hand makes of the reference without leaving PyTorch: keys projected once a
source, LSTMCell, one product for all logits; it knows a teacher-forcing ratio of 1 only. "compiled"
is that under torch.compile (not with --quick). The last columns are fastseq's time a part, each
measured alone, the peak of memory beyond what a step starts with over the reference's, and one by
`features` and linear_cross_entropy, as `fastseq train` takes it: never all logits at once.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.bench_loss import peak_bytes
from benchmarks.command import Row, command, milliseconds
from fastseq.functional import linear_cross_entropy
from fastseq.models import attention as fast
from fastseq.reference import attention as reference
from fastseq.testing import assert_matches

COLUMNS = (
    "V E H B S T forcing status fastseq_ms reference_ms ratio target met tuned_ms tuned_ratio "
    "tuned_target tuned_met compiled_ms encoder_ms decoder_ms output_ms memory_part fused_loss_ms "
    "fused_loss_ratio fused_loss_memory_part"
).split()
# V, E, H, B, S = T, and what the reference's and the tuned loop's time over ours is meant to be.
SIZES = [
    ((10, 16, 32, 64, 5), 12, 7),
    ((1000, 256, 256, 32, 30), 5.5, 2.2),
    ((8000, 256, 512, 64, 40), 6.5, 1.5),
]


def model(house, V: int, E: int, H: int) -> nn.Module:
    torch.manual_seed(0)
    return house.Seq2Seq(house.Encoder(V, E, H), house.Decoder(V, E, H, house.Attention(H)))


class Tuned(nn.Module):
    """The reference's modules, run as a careful hand would run them."""

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made
        lstm = made.decoder.lstm
        self.cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size)
        self.cell.weight_ih, self.cell.weight_hh = lstm.weight_ih_l0, lstm.weight_hh_l0
        self.cell.bias_ih, self.cell.bias_hh = lstm.bias_ih_l0, lstm.bias_hh_l0

    def forward(self, src: Tensor, trg: Tensor) -> Tensor:
        decoder, attention = self.made.decoder, self.made.decoder.attention
        outputs, (hidden, cell) = self.made.encoder(src)
        state = hidden[0], cell[0]
        query_weight, key_weight = attention.attn.weight.chunk(2, dim=1)
        keys = F.linear(outputs, key_weight, attention.attn.bias)
        found = []
        for emb in decoder.embedding(trg[:, :-1]).unbind(1):
            energy = (F.linear(state[0], query_weight).unsqueeze(1) + keys).tanh()
            weights = attention.v(energy).mT.softmax(2)
            context = torch.bmm(weights, outputs).squeeze(1)
            state = self.cell(torch.cat((emb, context), dim=1), state)
            found.append(torch.cat((state[0], context), dim=1))
        return decoder.fc(torch.stack(found, dim=1))


def loss(logits: Tensor, trg: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), trg[:, -logits.shape[1] :].flatten())


def fused_loss(made: nn.Module, src: Tensor, trg: Tensor, forcing: float) -> Tensor:
    """The same loss as `fastseq train` computes it: the logits are never held all at once."""
    fc = made.decoder.fc
    features = made.features(src, trg, forcing)
    return linear_cross_entropy(features, fc.weight, fc.bias, trg[:, 1:])


def step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], list]:
    """One step's loss and gradients; the coins are those of one seed, every time."""
    parameters = list(dict.fromkeys(module.parameters()))

    def call() -> list[Tensor]:
        random.seed(0)
        found = loss()
        return [found, *torch.autograd.grad(found, parameters)]

    return call


def batch(size: tuple) -> tuple[Tensor, Tensor]:
    V, _, _, B, S = size
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(V, (B, S), generator=generator) for _ in range(2))


def sides(size: tuple, forcing: float) -> dict[str, Callable[[], list]]:
    V, E, H, *_ = size
    src, trg = batch(size)
    calls = {}
    for name, house in (("fastseq", fast), ("reference", reference)):
        made = model(house, V, E, H)
        calls[name] = step(made, lambda m=made: loss(m(src, trg, forcing)[:, 1:], trg))
    if forcing == 1:
        made, tuned = model(fast, V, E, H), Tuned(model(reference, V, E, H))
        calls["fused_loss"] = step(made, lambda: fused_loss(made, src, trg, forcing))
        calls["tuned"] = step(tuned, lambda: loss(tuned(src, trg), trg))
    return calls


def verify(size: tuple, forcing: float) -> None:
    """Loss and gradients of the step to be timed against the reference in float64.

    A bias inside the score's tanh moves all scores of a softmax alike, nearly: of its gradient
    little is left but what rounding does to sums that are zero, one draw for all its elements. Such
    tensors are judged by the errors torch makes nearby too, as everywhere.
    """
    V, E, H, *_ = size
    src, trg = batch(size)

    class Loss(nn.Module):
        def __init__(self, house, of: Callable[..., Tensor]) -> None:
            super().__init__()
            self.model, self.of = model(house, V, E, H), of

        def forward(self) -> Tensor:
            return self.of(self.model, src, trg, forcing)

    def by(house, of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        made = Loss(house, of)
        names = [name for name, _ in made.named_parameters()]

        def call(*parameters: Tensor) -> Tensor:
            random.seed(0)
            return functional_call(made, dict(zip(names, parameters, strict=True)), ())

        return call

    def whole(made: nn.Module, src: Tensor, trg: Tensor, forcing: float) -> Tensor:
        return loss(made(src, trg, forcing)[:, 1:], trg)

    plain = by(reference, whole)
    parameters = dict(model(reference, V, E, H).named_parameters())
    for found in (by(fast, whole), by(fast, fused_loss)):
        assert_matches(found, plain, plain, parameters, [torch.ones(())])


def parts(size: tuple) -> dict[str, Callable[[], object]]:
    """fastseq's encoder, decoder loop, and output layer with the loss: forward and backward."""
    V, E, H, B, S = size
    made = model(fast, V, E, H)
    tokens = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(1))
    outputs, (hidden, cell) = made.encoder(tokens)
    encoded = [t.detach().requires_grad_() for t in (outputs, hidden, cell)]
    decoder, fc = made.decoder, made.decoder.fc
    features = torch.randn(B, S - 1, 2 * H, requires_grad=True)

    def loop() -> object:
        fc_was, decoder.fc = decoder.fc, nn.Identity()
        try:
            found = decoder.decode(tokens, None, encoded[1], encoded[2], encoded[0])
        finally:
            decoder.fc = fc_was
        wrt = [p for name, p in decoder.named_parameters() if not name.startswith("fc")]
        return torch.autograd.grad(found.sum(), [*encoded, *wrt])

    def encode() -> object:
        found, (h, c) = made.encoder(tokens)
        return torch.autograd.grad(found.sum() + h.sum() + c.sum(), list(made.encoder.parameters()))

    def output() -> object:
        return torch.autograd.grad(loss(fc(features), tokens), [features, *fc.parameters()])

    return {"encoder": encode, "decoder": loop, "output": output}


def rows(what: tuple, device: str, quick: bool) -> Iterator[Row]:
    size, target, tuned_target = what
    V, E, H, B, S = size
    for forcing in (1.0, 0.5):
        wanted = target if forcing == 1 else 0.8 * target

        def measure(seconds: float, forcing=forcing, wanted=wanted) -> dict[str, object]:
            verify(size, forcing)
            calls = sides(size, forcing)
            if forcing == 1 and not quick:
                tuned = Tuned(model(reference, V, E, H))
                compiled = torch.compile(tuned)
                src, trg = batch(size)
                calls["compiled"] = step(tuned, lambda: loss(compiled(src, trg), trg))
            times = milliseconds(calls, device, seconds)
            said = {f"{name}_ms": f"{ms:.4g}" for name, ms in times.items()}
            ratio = times["reference"] / times["fastseq"]
            said |= {"ratio": f"{ratio:.2f}", "target": wanted}
            said["met"] = "yes" if ratio >= wanted else "no"
            if "tuned" in times:
                ratio = times["tuned"] / times["fastseq"]
                said |= {"tuned_ratio": f"{ratio:.2f}", "tuned_target": tuned_target}
                said["tuned_met"] = "yes" if ratio >= tuned_target else "no"
                split = milliseconds(parts(size), device, seconds)
                said |= {f"{name}_ms": f"{ms:.4g}" for name, ms in split.items()}
                ratio = times["reference"] / times["fused_loss"]
                said["fused_loss_ratio"] = f"{ratio:.2f}"
                held, fused, most = (
                    peak_bytes(calls[name], device)
                    for name in ("fastseq", "fused_loss", "reference")
                )
                said["memory_part"] = f"{held / most:.2f}"
                said["fused_loss_memory_part"] = f"{fused / most:.2f}"
            return said

        yield Row({"V": V, "E": E, "H": H, "B": B, "S": S, "T": S, "forcing": forcing}, measure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    sizes = {"cpu": SIZES, "cuda": []}
    return command("training", __doc__.splitlines()[0], sizes, COLUMNS, rows, argv)


if __name__ == "__main__":
    sys.exit(main())
