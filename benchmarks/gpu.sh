#!/usr/bin/env bash
# Everything there is to check on a GPU, in one go: run on a machine with a GPU whose python3 has a
# CUDA build of torch, triton, pytest, numpy, rich, typer, tqdm, matplotlib, sacrebleu, ninja and
# setuptools.
# Nothing is downloaded. Results go to $OUT where that is set, else to benchmarks/results/.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-benchmarks/results}"
python3 -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False")'
FASTSEQ_REQUIRE_NATIVE=1 python3 -m pip install -q --no-deps --no-index --no-build-isolation -e .
python3 -m fastseq.cli doctor
python3 -m pytest -q tests/test_gpu.py tests/kernels/test_attention_gpu.py
if command -v compute-sanitizer > /dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
    python3 -m pytest -q tests/kernels/test_attention_gpu.py -k small
  compute-sanitizer --tool racecheck --error-exitcode 1 \
    python3 -m pytest -q tests/kernels/test_attention_gpu.py -k small
fi
timeout 240 python3 -m benchmarks.bench_attention --device cuda --output "$out"
python3 -m fastseq.cli demo --steps 300 --device cuda --out "$out/demo-gpu"
