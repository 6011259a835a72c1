"""Decoding: from a trained model and a source to a target."""

from fastseq.decoding.greedy import greedy

__all__ = ["greedy"]
