#!/usr/bin/env bash
# Everything there is to check on a GPU, in one go and in under eight minutes: run on a machine with
# a GPU whose python3 has a CUDA build of torch, triton, pytest, numpy, rich, typer, tqdm,
# matplotlib, sacrebleu, ninja and setuptools (with pytest-xdist, kernels compile side by side).
# Nothing is downloaded. Results and the log, gpu.log, go to $OUT where that is set, else to
# benchmarks/results/; so do the tables that fastseq chooses kernels and tiles by, which else go where
# it reads them, fastseq/ops and kernels/attention. A part that fails or takes too long does not keep
# the others from running; the exit status is 1 if one did.
set -uo pipefail
out="${OUT:+$(realpath -m "$OUT")}"
cd "$(dirname "$0")/.."
measured="${out:-fastseq/ops}/measured_cuda.json"
tuned="${out:-kernels/attention}/tuned.json"
# Whose kernels failed since must not be found there.
[ -z "$out" ] || rm -f "$measured"
out="${out:-benchmarks/results}"
budget="${SECONDS_IN_ALL:-465}"
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

# told NAME SECONDS STATUS TOOK: a line of the summary, there already should all of this be cut off.
told() {
  local line
  case $3 in
    0) line="$1: ok, $4 s" ;;
    124 | 137) line="$1: FAILED: more than $2 s, or than was left of all" ;;
    "$late") line="$1: FAILED: no time left" ;;
    *) line="$1: FAILED: $3, $4 s" ;;
  esac
  summary+="$line"$'\n'
  printf -- '-- %s\n' "$line" | tee -a "$out/gpu.log"
  [ "$3" = 0 ] || { failed=1 && return 1; }
}

# right NAME..: whether all of these parts went well.
right() {
  local name
  for name in "$@"; do
    [[ $'\n'"$summary" == *$'\n'"$name: ok"* ]] || return 1
  done
}

# share PERCENT: seconds, of what is left of all.
share() { echo $(((budget - SECONDS) * $1 / 100)); }

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

# benchmark NAME PERCENT MODULE ARGUMENT..: in its share of what is left of all, to which it keeps of
# itself: what it has no time for is left out with a line, the rest of its rows are there.
benchmark() {
  local seconds
  seconds=$(share "$2")
  part "$1" "$seconds" python3 -m "benchmarks.$3" --output "$out" \
    --within $((seconds > 40 ? seconds - 20 : seconds / 2)) "${@:4}"
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
part "doctor" 30 python3 -m fastseq.cli doctor

# What is only to be right runs side by side; what is timed, after it and alone.
side_by_side=()
python3 -c 'import xdist' > /dev/null 2>&1 && side_by_side=(-n 5 --dist worksteal)
tests=(python3 -m pytest -q --durations=5 ${side_by_side[@]+"${side_by_side[@]}"})
started=$SECONDS
beside "tests" 150 "${tests[@]}" tests/test_gpu.py tests/kernels/test_attention_gpu.py \
  tests/decoding/test_on_a_gpu.py
# The CPU's own, as far as they take a device.
beside "attention tests" 150 "${tests[@]}" -k cuda tests/test_functional_attention.py \
  tests/ops/test_attention.py tests/ops/test_attention_kernels.py tests/nn/test_attention.py
beside "recurrent tests" 150 "${tests[@]}" tests/cuda/test_on_device.py
beside "the CPU's recurrent tests" 150 "${tests[@]}" tests/test_functional_rnn.py \
  -k "cuda and not (thousand or random_calls or dropout or zoneout or splits)"
beside "resources" 60 python3 -m pytest -q tests/cuda/test_build.py
sanitizers=(memcheck racecheck synccheck)
says_so='"$@" 2>&1 | awk "{ print; fflush() } /SUMMARY: 0 / { found = 1 } END { exit !found }"
  ended=("${PIPESTATUS[@]}"); exit $((ended[0] ? ended[0] : ended[1]))'
if command -v compute-sanitizer > /dev/null; then
  for tool in "${sanitizers[@]}"; do
    # The tool's status is the program's unless told otherwise; it waits ten seconds for a program
    # to begin, which six at once may not keep; and it has looked at nothing if it does not say so.
    checks=(bash -c "$says_so" sanitized
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1
      --target-processes all --launch-timeout 0)
    # torch asks the driver for what it may not have: not an error of ours, and seen by the tests.
    [ "$tool" = memcheck ] && checks+=(--report-api-errors no)
    beside "$tool" 150 "${checks[@]}" \
      python3 -m pytest -q tests/kernels/test_attention_gpu.py -k small
    beside "recurrent $tool" 150 "${checks[@]}" \
      python3 -m pytest -q tests/cuda/test_on_device.py -k sanitized
  done
else
  beside "sanitizers" 10 bash -c 'echo "compute-sanitizer is not on PATH"; exit 1'
fi
gather
# A device comes into the table once the kernels are right there, by every check.
recurrent=() decoder=()
if right "recurrent tests" "the CPU's recurrent tests" "${sanitizers[@]/#/recurrent }"; then
  recurrent=(--table "$measured")
  right tests "attention tests" "${sanitizers[@]}" && decoder=(--table "$measured")
fi
# The most wanted first, and none so long that the next has no time.
benchmark "recurrent" 50 bench_recurrent_gpu ${recurrent[@]+"${recurrent[@]}"}
benchmark "attention" 45 bench_attention --device cuda
benchmark "decoder" 60 bench_decoder --device cuda ${decoder[@]+"${decoder[@]}"}
benchmark "loss" 40 bench_loss --device cuda
benchmark "decoding" 60 bench_decoding --device cuda --quick
part "tiles" 60 python3 -m fastseq.kernels.tune --seconds 45 --output "$tuned"
part "demo" 60 python3 -m fastseq.cli demo --steps 300 --device cuda --out "$work/demo"
said="the table was left as it is: a check of the kernels failed"
[ ${#recurrent[@]} = 0 ] || said="to be kept as fastseq/ops/measured_cuda.json: $measured"
printf '\n%s\n' "$said" | tee -a "$out/gpu.log"
finish $failed
