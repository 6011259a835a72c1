"""Seeded inputs and error budgets, shared by tests and benchmarks."""

from fastseq.testing.budgets import (
    LOWERED,
    assert_close_to_reference,
    assert_lowered_close,
    assert_matches,
    assert_results_close,
    assert_sums_lowered_close,
    run_with_grads,
)
from fastseq.testing.cases import LSTMCase, RecurrentCase, lstm_case, recurrent_case
from fastseq.testing.layouts import LAYOUTS, edge_sizes, with_layout
from fastseq.testing.tf32 import TF32Products, allow_tf32

__all__ = [
    "LAYOUTS",
    "LOWERED",
    "LSTMCase",
    "RecurrentCase",
    "TF32Products",
    "allow_tf32",
    "assert_close_to_reference",
    "assert_lowered_close",
    "assert_matches",
    "assert_results_close",
    "assert_sums_lowered_close",
    "edge_sizes",
    "lstm_case",
    "recurrent_case",
    "run_with_grads",
    "with_layout",
]
