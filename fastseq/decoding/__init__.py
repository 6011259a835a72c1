"""Decoding: from a trained model and a source to a target."""

from fastseq.decoding._explained import explains_itself
from fastseq.decoding.beam import Beams, beam_search
from fastseq.decoding.greedy import greedy
from fastseq.decoding.next import next_tokens
from fastseq.decoding.sampling import sample

__all__ = ["Beams", "beam_search", "greedy", "next_tokens", "sample"]

for _function in (beam_search, greedy, next_tokens, sample):
    explains_itself(_function)
