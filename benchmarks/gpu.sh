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
export PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin"
failed=0 summary="" besides=()
work="$(mktemp -d)" && trap 'rm -rf "$work"' EXIT || exit 1

late=200
# within SECONDS COMMAND..: run it within so many seconds, or what is left of all.
within() {
  local limit=$(($1 < budget - SECONDS ? $1 : budget - SECONDS))
  ((limit > 0)) || return $late
  timeout -k 10 "$limit" "${@:2}"
}

# told NAME SECONDS STATUS TOOK: a line of the summary.
told() {
  case $3 in
    0) summary+="$1: ok, $4 s"$'\n' ;;
    124 | 137) summary+="$1: FAILED: more than $2 s, or than was left of all"$'\n' ;;
    "$late") summary+="$1: FAILED: no time left"$'\n' ;;
    *) summary+="$1: FAILED: $3, $4 s"$'\n' ;;
  esac
  [ "$3" = 0 ] || { failed=1 && return 1; }
}

# part NAME SECONDS COMMAND..
part() {
  local start=$SECONDS status
  printf '\n== %s\n' "$1" | tee -a "$out/gpu.log"
  within "${@:2}" 2>&1 | tee -a "$out/gpu.log"
  status=${PIPESTATUS[0]}
  told "$1" "$2" "$status" $((SECONDS - start))
}

# beside NAME SECONDS COMMAND..: the same in the background, for what is not timed, until `gather`.
beside() {
  local log="$work/${#besides[@]}"
  besides+=("$1" "$2" "$log")
  { within "${@:2}" > "$log" 2>&1; echo "$? $((SECONDS - started))" > "$log.status"; } &
}

gather() {
  wait
  local status took
  for ((i = 0; i < ${#besides[@]}; i += 3)); do
    printf '\n== %s\n' "${besides[i]}" | cat - "${besides[i + 2]}" | tee -a "$out/gpu.log"
    read -r status took < "${besides[i + 2]}.status"
    told "${besides[i]}" "${besides[i + 1]}" "$status" "$took"
  done
}

finish() {
  printf '\n== summary\n%s' "$summary" | tee -a "$out/gpu.log"
  exit "$1"
}

part "a GPU" 60 python3 -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False")' ||
  finish 1
install=(python3 -m pip install -q --no-deps --no-index --no-build-isolation -e .)
# Where nothing is built yet, what runs on the CPU is built for being built soon.
quick=()
[ -e fastseq/libfastseq.so ] || quick=(FASTSEQ_ISAS=scalar CXXFLAGS=-O1)
# Another compiler's warnings are no reason to stop; and the Triton kernels need none.
part "build" 180 env FASTSEQ_REQUIRE_NATIVE=1 FASTSEQ_WERROR=0 ${quick[@]+"${quick[@]}"} "${install[@]}" ||
  part "install without the native library" 60 env -u FASTSEQ_REQUIRE_NATIVE "${install[@]}" || finish 1
part "doctor" 60 python3 -m fastseq.cli doctor

# What is only to be right runs side by side; what is timed, after it and alone.
side_by_side=()
python3 -c 'import xdist' > /dev/null 2>&1 && side_by_side=(-n 5 --dist worksteal)
tests=(python3 -m pytest -q --durations=5 ${side_by_side[@]+"${side_by_side[@]}"})
started=$SECONDS
beside "tests" 180 "${tests[@]}" tests/test_gpu.py tests/kernels/test_attention_gpu.py \
  tests/decoding/test_on_a_gpu.py
beside "recurrent tests" 180 "${tests[@]}" tests/cuda/test_on_device.py
beside "resources" 60 python3 -m pytest -q tests/cuda/test_build.py
if command -v compute-sanitizer > /dev/null; then
  sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1)
  for tool in memcheck racecheck synccheck; do
    checks=("${sanitized[@]}" --tool "$tool")
    # torch asks the driver for what it may not have: not an error of ours, and seen by the tests.
    [ "$tool" = memcheck ] && checks+=(--report-api-errors no)
    beside "$tool" 180 "${checks[@]}" \
      python3 -m pytest -q tests/kernels/test_attention_gpu.py -k small
    beside "recurrent $tool" 180 "${checks[@]}" \
      python3 -m pytest -q tests/cuda/test_on_device.py -k sanitized
  done
else
  beside "sanitizers" 10 bash -c 'echo "compute-sanitizer is not on PATH"; exit 1'
fi
gather
# What fastseq chooses kernels by; a device comes into it once the kernels are right there.
table=()
[[ $summary == *"recurrent tests: ok"* ]] &&
  table=(--table "${OUT:-fastseq/ops}/measured_cuda.json")
part "recurrent" 120 python3 -m benchmarks.bench_recurrent_gpu --output "$out" \
  ${table[@]+"${table[@]}"}
part "decoder" 60 python3 -m benchmarks.bench_decoder --device cuda --output "$out"
part "attention" 150 python3 -m benchmarks.bench_attention --device cuda --output "$out"
part "loss" 40 python3 -m benchmarks.bench_loss --device cuda --output "$out"
part "decoding" 60 python3 -m benchmarks.bench_decoding --device cuda --quick --output "$out"
part "tiles" 60 python3 -m fastseq.kernels.tune --seconds 45
part "demo" 60 python3 -m fastseq.cli demo --steps 300 --device cuda --out "$work/demo"
finish $failed
