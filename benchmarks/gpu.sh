#!/usr/bin/env bash
# Everything there is to check on a GPU, in one go and in under eight minutes: run on a machine with
# a GPU whose python3 has a CUDA build of torch, triton, pytest, numpy, rich, typer, tqdm,
# matplotlib, sacrebleu, ninja and setuptools (with pytest-xdist, kernels compile side by side).
# Nothing is downloaded. Results and the log, gpu.log, go to $OUT where that is set, else to
# benchmarks/results/. A part that fails or takes too long does not keep the others from running;
# the exit status is 1 if one did.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-benchmarks/results}"
budget="${SECONDS_IN_ALL:-470}"
mkdir -p "$out" && : > "$out/gpu.log" || exit 1
export PYTHONUNBUFFERED=1
failed=0 summary=""

# part NAME SECONDS COMMAND..: run it within so many seconds, or what is left of all.
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  limit=$((limit < budget - SECONDS ? limit : budget - SECONDS))
  if ((limit < 1)); then
    status="no time left"
  else
    printf '\n== %s\n' "$name" | tee -a "$out/gpu.log"
    timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$out/gpu.log"
    status=${PIPESTATUS[0]}
  fi
  summary+="$name: "
  case $status in
    0) summary+="ok" ;;
    124 | 137) summary+="FAILED: more than $limit s" ;;
    *) summary+="FAILED: $status" ;;
  esac
  summary+=", $((SECONDS - start)) s"$'\n'
  if [ "$status" != 0 ]; then
    failed=1
    return 1
  fi
}

finish() {
  printf '\n== summary\n%s' "$summary" | tee -a "$out/gpu.log"
  exit "$1"
}

part "a GPU" 60 python3 -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False")' ||
  finish 1
install=(python3 -m pip install -q --no-deps --no-index --no-build-isolation -e .)
# The Triton kernels need no compiler.
part "build" 180 env FASTSEQ_REQUIRE_NATIVE=1 "${install[@]}" ||
  part "install without the native library" 60 env -u FASTSEQ_REQUIRE_NATIVE "${install[@]}" || finish 1
part "doctor" 60 python3 -m fastseq.cli doctor

side_by_side=()
python3 -c 'import xdist' > /dev/null 2>&1 && side_by_side=(-n 8 --dist worksteal)
part "tests" 180 python3 -m pytest -q --durations=5 ${side_by_side[@]+"${side_by_side[@]}"} \
  tests/test_gpu.py tests/kernels/test_attention_gpu.py tests/decoding/test_on_a_gpu.py
part "recurrent tests" 150 python3 -m pytest -q --durations=5 \
  ${side_by_side[@]+"${side_by_side[@]}"} tests/cuda
part "recurrent" 100 python3 -m benchmarks.bench_recurrent_gpu --output "$out"
part "decoder" 60 python3 -m benchmarks.bench_decoder --device cuda --output "$out"
part "attention" 150 python3 -m benchmarks.bench_attention --device cuda --output "$out"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck; do
    part "$tool" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 python3 -m pytest -q tests/kernels/test_attention_gpu.py -k small
  done
  for tool in memcheck racecheck synccheck; do
    part "recurrent $tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 python3 -m pytest -q tests/cuda/test_on_device.py -k small
  done
fi
part "loss" 40 python3 -m benchmarks.bench_loss --device cuda --output "$out"
part "decoding" 60 python3 -m benchmarks.bench_decoding --device cuda --quick --output "$out"
part "tiles" 60 python3 -m fastseq.kernels.tune --seconds 45
part "demo" 60 python3 -m fastseq.cli demo --steps 300 --device cuda --out "$out/demo-gpu"
finish $failed
