from __future__ import annotations

import json
import random

import pytest

from fastseq.training.vocabulary import BOS, EOS, PAD, UNK, Vocabulary, detokenise, tokenise


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man in a T-shirt.", ["a", "man", "in", "a", "t", "@-@", "shirt", "."]),
        ("man's (best) friend - ever", None),
        ("“Größe”: 1,5 m!", ["“", "größe", "”", ":", "1", "@,@", "5", "m", "!"]),
        ("a-b-c d'e", ["a", "@-@", "b", "@-@", "c", "d", "@'@", "e"]),
        ("<eos> <pad>", ["<", "eos", ">", "<", "pad", ">"]),
        ("  \t ", []),
        ("", []),
    ],
)
def test_tokenise(text, tokens):
    got = tokenise(text)
    assert tokens is None or got == tokens
    assert not {"<eos>", "<pad>"} & set(got)


@pytest.mark.parametrize(
    "text",
    [
        "a man in a t-shirt, a hat (red) and shorts.",
        "the 1.5 m tall girl's black-haired friend: who?",
        'he says "hello there" to them!',
        "zwei männer grüßen.",
        "one word",
        "",
    ],
)
def test_detokenise_restores_the_spacing(text):
    assert detokenise(tokenise(text)) == text


def test_composed_and_decomposed_letters_are_one_word():
    assert tokenise("Ma\u0308dchen") == tokenise("mädchen") == ["mädchen"]


def test_ids_follow_frequency_then_text_whatever_the_order():
    sentences = [["b", "a", "c"], ["a", "c"], ["a", "rare"], ["b"]]
    vocabulary = Vocabulary.build(sentences, min_frequency=2)
    assert vocabulary.words == ["<pad>", "<unk>", "<bos>", "<eos>", "a", "b", "c"]
    random.Random(0).shuffle(sentences)
    assert Vocabulary.build(sentences, min_frequency=2).words == vocabulary.words


def test_encode_and_decode():
    vocabulary = Vocabulary(["a", "b"])
    assert (PAD, UNK, BOS, EOS) == (0, 1, 2, 3)
    assert vocabulary.encode(["b", "nowhere", "a"]) == [5, UNK, 4]
    assert vocabulary.decode([BOS, 5, UNK, PAD, 4, EOS, 5]) == ["b", "<unk>", "a"]
    assert len(vocabulary) == 6


def test_state_survives_json():
    vocabulary = Vocabulary.build([tokenise("Grüße aus Köln")])
    again = Vocabulary(*json.loads(json.dumps(vocabulary.state())))
    assert again.words == vocabulary.words
    assert again.encode(["köln"]) == vocabulary.encode(["köln"])


def test_refuses_no_words_and_repeated_words():
    with pytest.raises(ValueError, match=r"at least 3 times.*lower --min-frequency"):
        Vocabulary.build([["a", "a"], ["b"]], min_frequency=3)
    with pytest.raises(ValueError, match="every word once"):
        Vocabulary(["a", "a"])
    with pytest.raises(ValueError, match="every word once"):
        Vocabulary(["<eos>"])
