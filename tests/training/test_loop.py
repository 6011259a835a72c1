from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from fastseq.testing import assert_close_to_reference
from fastseq.training import loop
from fastseq.training.data import Pair, collate, make_pair
from fastseq.training.model import build_model
from fastseq.training.settings import MODELS, PRECISIONS, Settings
from fastseq.training.vocabulary import PAD

WORDS, HIDDEN = 12, 24


def reversals(count: int, seed: int) -> list[Pair]:
    """Pairs whose target is the source backwards, of 1 to 6 words."""
    rng = random.Random(seed)
    sources = [rng.choices(range(4, WORDS), k=rng.randint(1, 6)) for _ in range(count)]
    return [make_pair(source, source[::-1]) for source in sources]


def learner(reference: bool, dtype: torch.dtype = torch.float32, name: str = "attention"):
    torch.manual_seed(0)
    settings = Settings("", "", "", "", model=name, embedding=16, hidden=HIDDEN)
    model = build_model(settings, WORDS, WORDS, reference).to(dtype)
    return model, torch.optim.Adam(model.parameters(), lr=5e-3)


def train(model, optimizer, epochs: int, teacher_forcing: float = 0.5) -> None:
    pairs = reversals(256, seed=0)
    for epoch in range(epochs):
        random.seed(epoch)
        loop.train_epoch(model, pairs, optimizer, 32, epoch, teacher_forcing, clip=1.0)


@pytest.mark.parametrize("name", MODELS)
def test_reference_and_fast_losses_agree_step_by_step(name, monkeypatch):
    finite, steps = loop.finite, []

    def recorded(loss):
        steps[-1].append(loss.detach())
        return finite(loss)

    monkeypatch.setattr(loop, "finite", recorded)
    for reference, dtype in (
        (True, torch.float64),
        (True, torch.float32),
        (False, torch.float32),
    ):
        steps.append([])
        train(*learner(reference, dtype, name), epochs=3)
    truth, baseline, actual = (torch.stack(losses) for losses in steps)
    assert len(truth) == 24
    assert truth[-1] < truth[0]
    assert_close_to_reference(actual, truth, baseline, what="losses")


@pytest.mark.parametrize("name", MODELS)
def test_the_model_learns(name):
    torch.set_num_threads(1)
    model, optimizer = learner(reference=False, name=name)
    held_out = reversals(64, seed=1)
    before = loop.evaluate(model, held_out, 32)
    train(model, optimizer, epochs=40, teacher_forcing=1.0)
    assert before > 2.3
    assert loop.evaluate(model, held_out, 32) < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_loss(name):
    model, _ = learner(reference=False, dtype=torch.float64, name=name)
    pairs = reversals(9, seed=2)
    together = loop.batch_loss(model, collate(pairs), 1.0)
    each = [collate([pair]) for pair in pairs]
    alone = sum(loop.batch_loss(model, one, 1.0) * one.tokens for one in each)
    assert_close_to_reference(
        together, alone / sum(one.tokens for one in each), terms=WORDS * HIDDEN
    )


@pytest.mark.parametrize("reference", [False, True])
def test_the_loss_is_cross_entropy_of_the_tokens_after_bos(reference):
    model, _ = learner(reference=reference, dtype=torch.float64)
    batch = collate(reversals(5, seed=3))
    logits = model(batch.src, batch.trg, 1.0, lengths=batch.src_lengths).log_softmax(2)
    wanted = [
        -logits[b, t, batch.trg[b, t]]
        for b in range(5)
        for t in range(1, batch.trg.shape[1])
        if batch.trg[b, t] != PAD
    ]
    assert len(wanted) == batch.tokens
    mean = torch.stack(wanted).mean()
    assert_close_to_reference(loop.batch_loss(model, batch, 1.0), mean, terms=WORDS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("teacher_forcing", [0.0, 0.5, 1.0])
def test_the_loss_of_features_is_that_of_the_logits(name, teacher_forcing):
    model, _ = learner(reference=False, dtype=torch.float64, name=name)
    batch = collate(reversals(7, seed=3))
    random.seed(1)
    logits = model(batch.src, batch.trg, teacher_forcing, lengths=batch.src_lengths)[:, 1:]
    wanted = F.cross_entropy(
        logits.flatten(0, 1), batch.trg[:, 1:].flatten(), ignore_index=PAD, label_smoothing=0.1
    )
    random.seed(1)
    loss = loop.batch_loss(model, batch, teacher_forcing, label_smoothing=0.1)
    assert_close_to_reference(loss, wanted, terms=WORDS * HIDDEN)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(each, parameters) for each in (loss, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close_to_reference(ours, theirs, terms=10_000)


@pytest.mark.parametrize("name", MODELS)
def test_no_step_holds_all_logits(name):
    model, optimizer = learner(reference=False, name=name)
    rows = []
    model.decoder.fc.register_forward_hook(lambda *called: rows.append(called[-1].shape))
    loop.train_epoch(model, reversals(32, seed=3), optimizer, 32, 0, 1.0, 1.0)
    assert not rows
    loop.train_epoch(model, reversals(32, seed=3), optimizer, 32, 0, 0.0, 1.0)
    # At the most between the steps: for the token that is fed to the next one.
    assert set(rows) <= {(32, 1, WORDS)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_is_what_was_asked_for_while_training(precision, monkeypatch):
    seen, batch_loss = [], loop.batch_loss

    def recorded(*arguments):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return batch_loss(*arguments)

    monkeypatch.setattr(loop, "batch_loss", recorded)
    losses = []
    for chosen in ("float32", precision):
        model, optimizer = learner(reference=False, name="bahdanau")
        pairs = reversals(16, seed=3)
        arguments = (model, pairs, optimizer, 16, 0, 1.0, 1.0)
        losses.append(loop.train_epoch(*arguments, precision=chosen)[0])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    before = torch.get_float32_matmul_precision()
    expected = ("high" if precision == "high" else before, precision == "bfloat16")
    assert seen == [(before, False), expected]
    assert abs(losses[0] - losses[1]) < 0.02
    assert (losses[0] == losses[1]) or precision != "float32"


def test_evaluation_is_a_mean_over_tokens_and_changes_nothing():
    model, _ = learner(reference=False, dtype=torch.float64)
    pairs = reversals(10, seed=4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    by_one, by_ten = (torch.tensor(loop.evaluate(model, pairs, size)) for size in (1, 10))
    assert_close_to_reference(by_one.double(), by_ten.double(), terms=WORDS * HIDDEN)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_evaluation_from_the_models_own_words():
    fast, _ = learner(reference=False, dtype=torch.float64)
    plain, _ = learner(reference=True, dtype=torch.float64)
    pairs = reversals(10, seed=4)
    own, wanted, given = (
        torch.tensor(loop.evaluate(model, pairs, 4, teacher_forcing=forcing)).double()
        for model, forcing in ((fast, 0.0), (plain, 0.0), (fast, 1.0))
    )
    assert_close_to_reference(own, wanted, terms=WORDS * HIDDEN)
    assert abs(own - given) > 1e-6


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_gradients_are_clipped_to_the_norm_asked_for(clip):
    model, _ = learner(reference=False)
    pairs = reversals(8, seed=5)
    loop.batch_loss(model, collate(pairs), 1.0).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.1
    start = [parameter.detach().clone() for parameter in model.parameters()]
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    loop.train_epoch(model, pairs, plain, 8, 0, 1.0, clip)
    moved = torch.cat(
        [(s - p.detach()).flatten() for s, p in zip(start, model.parameters(), strict=True)]
    )
    assert F.cosine_similarity(moved, torch.cat([g.flatten() for g in gradients]), 0) > 0.999
    assert (moved.norm() < 0.0101) if clip else (moved.norm() > 0.99 * norm)


def test_a_loss_that_is_not_finite_stops_the_training():
    model, optimizer = learner(reference=False)
    with torch.no_grad():
        model.decoder.fc.bias[5] = float("nan")
    weight = model.encoder.embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="finite loss, got nan; lower --learning-rate"):
        loop.train_epoch(model, reversals(8, seed=6), optimizer, 4, 0, 1.0, 1.0)
    assert torch.equal(model.encoder.embedding.weight, weight)
    with pytest.raises(RuntimeError, match="finite loss"):
        loop.evaluate(model, reversals(8, seed=6), 4)
