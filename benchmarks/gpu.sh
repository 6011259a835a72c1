#!/usr/bin/env bash
# Everything there is to check on a GPU, in one go: run on a machine with a GPU whose python3 has a
# CUDA build of torch, pytest, numpy, rich, typer, tqdm, matplotlib, sacrebleu, ninja and setuptools.
# Nothing is downloaded. Results go to $OUT where that is set, else to benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-benchmarks/results}"
python3 -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False")'
FASTSEQ_REQUIRE_NATIVE=1 python3 -m pip install -q --no-deps --no-index --no-build-isolation -e .
python3 -m fastseq.cli doctor
python3 -m pytest -q tests/test_gpu.py
python3 -m fastseq.cli demo --steps 300 --device cuda --out "$out/demo-gpu"
