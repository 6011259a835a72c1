"""Additive and dot attention on a GPU."""

from __future__ import annotations


def obstacle(*arguments) -> str | None:
    return "none yet"
