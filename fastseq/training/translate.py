"""Translating text with a trained model, and scoring the result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tqdm import tqdm

from fastseq.decoding import beam_search, greedy
from fastseq.training.checkpoint import Checkpoint
from fastseq.training.data import make_pair, pad, plan
from fastseq.training.loop import evaluate
from fastseq.training.vocabulary import BOS, EOS, detokenise, tokenise

__all__ = ["bleu", "perplexities", "translate"]


def translate(
    checkpoint: Checkpoint,
    lines: Sequence[str],
    batch_size: int = 64,
    max_length: int = 100,
    device: str | torch.device = "cpu",
    *,
    beam: int = 1,
    length_penalty: float = 1.0,
) -> list[str]:
    """Translate sentences, with a progress bar if standard error is a terminal.

    Args:
        checkpoint: from training.
        lines: a sentence each.
        batch_size: sentences decoded together.
        max_length: the most words a translation may have.
        device: where to compute.
        beam: width of the search; 1: greedy.
        length_penalty: of the search, as in :func:`fastseq.decoding.beam_search`.

    Returns:
        A lower-case translation for each line, in their order; an empty one for a line without
        words.
    """
    model = checkpoint.build().to(device).eval()
    sources = [make_pair(checkpoint.source.encode(tokenise(line)), [])[0] for line in lines]
    lengths = [len(source) for source in sources]
    translations = [""] * len(lines)
    with tqdm(total=len(lines), unit="sentence", leave=False, disable=None) as bar:
        for indices in plan(lengths, batch_size):
            rows = [sources[index] for index in indices]
            arguments = {
                "lengths": torch.tensor([len(row) for row in rows]),
                "max_length": max_length,
                "bos": BOS,
                "eos": EOS,
            }
            source = pad(rows).to(device)
            if beam == 1:
                decoded = greedy(model, source, **arguments)
            else:
                found = beam_search(
                    model,
                    source,
                    **arguments,
                    # A vocabulary may have fewer words than the search is wide.
                    width=min(beam, len(checkpoint.target)),
                    length_penalty=length_penalty,
                )
                decoded = found.tokens[:, 0]
            for index, ids in zip(indices, decoded.tolist(), strict=True):
                # A source of nothing but <eos>.
                if lengths[index] > 1:
                    translations[index] = detokenise(checkpoint.target.decode(ids))
            bar.update(len(indices))
    return translations


def perplexities(
    checkpoint: Checkpoint,
    lines: Sequence[str],
    references: Sequence[str],
    batch_size: int = 64,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """Perplexity a target token of the right translations, <eos> counted.

    Args:
        checkpoint: from training.
        lines, references: sentences, and the translation of each.
        batch_size: sentences measured together.
        device: where to compute.

    Returns:
        Each token predicted from the right ones before it, as training measures it; and from those
        that the model itself found most likely, which some publications report.
    """
    model = checkpoint.build().to(device)
    sides = (checkpoint.source, lines), (checkpoint.target, references)
    encoded = ([words.encode(tokenise(line)) for line in text] for words, text in sides)
    pairs = [make_pair(*pair) for pair in zip(*encoded, strict=True)]
    given, own = (
        evaluate(model, pairs, batch_size, teacher_forcing=forcing) for forcing in (1.0, 0.0)
    )
    return tuple(math.exp(loss) if loss < 700 else math.inf for loss in (given, own))


def bleu(translations: Sequence[str], references: Sequence[str]) -> str:
    """Corpus BLEU without regard to case, as sacrebleu computes it, followed by its signature.

    Source: Papineni et al. 2002; Post 2018, "A Call for Clarity in Reporting BLEU Scores".
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=True)
    score = metric.corpus_score(translations, [references])
    return f"{score.format(width=2)} {metric.get_signature()}"
