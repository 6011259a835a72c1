"""The plain model: known inputs go through the LSTM as one sequence."""

from __future__ import annotations

import torch

from fastseq.testing import assert_close_to_reference


def test_known_inputs_are_one_lstm_call(make_pair):
    _, model = make_pair("plain")
    lengths = []
    model.decoder.lstm.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    tokens = torch.ones(2, 7, dtype=torch.int64)
    model(tokens, tokens, 1.0)
    assert lengths == [6]
    model(tokens, tokens, 0.0)
    assert lengths == [6, 1, 1, 1, 1, 1, 1]


def test_many_tokens_at_once_are_the_tokens_one_by_one(make_pair):
    tokens = torch.randint(11, (3, 6))
    for model in make_pair("plain"):
        h, c = model.encoder(tokens)
        whole, *last = model.decoder(tokens, h, c)
        for t in range(6):
            logits, h, c = model.decoder(tokens[:, t : t + 1], h, c)
            assert_close_to_reference(logits[:, 0], whole[:, t])
        assert_close_to_reference(h, last[0])
        assert_close_to_reference(c, last[1])
