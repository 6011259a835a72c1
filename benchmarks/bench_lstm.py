"""The name by which the command line finds benchmarks.bench_recurrent."""

from benchmarks.bench_recurrent import main

__all__ = ["main"]
