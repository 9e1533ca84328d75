#!/usr/bin/env bash
# All that needs a GPU, in under 9 minutes: builds, tests the kernels on the device, measures them on
# the stages of ResNet-50, looks for bad memory accesses.
#
#     bench/gpu_check.sh [FOLDER]       # default: gpu-check; PYTHON names another python3
#     STEPS="build layer_bfloat16 dispatch" bench/gpu_check.sh     # these alone, each for as long
#                                                                  # as is left of the 9 minutes
#     DEADLINE=1700 bench/gpu_check.sh                             # of 1700 seconds
#
# FOLDER then holds the logs of all steps, of the benchmark JSON and PNG, and the dispatch.json that
# follows (bench/README.md says how to adopt it); FOLDER.tar.gz has all of it in one file, whatever
# failed. The exit status is 0 if every step passed. Needs torch, triton, cmake, ninja and pybind11 in
# the environment, and what the extras 'test' and 'bench' name; pytest-xdist makes the tests faster.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$(realpath -m "${1:-gpu-check}")
deadline=${DEADLINE:-520} # seconds; the last step gets what is left

"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
  echo "gpu_check: torch finds no GPU here, and every check in this script needs one" >&2
  exit 1
}
mkdir -p "$out"
trap 'tar czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this checkout, installed or not
export PYTHONUNBUFFERED=1
# For this GPU alone: the build is serial in the number of targets.
export DLA_CUDA_ARCHS=${DLA_CUDA_ARCHS:-$("$python" -c \
  'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
failed=()

# step NAME SECONDS COMMAND...: runs it for so long at most, keeps what it says, shows the end.
step() {
  local name=$1 limit=${STEPS:+$deadline} left=$((deadline - SECONDS))
  limit=${limit:-$2}
  shift 2
  [[ " ${STEPS:-$name} " == *" $name "* ]] || return 0
  printf '\n==== %s (%d s)\n' "$name" "$SECONDS"
  ((left >= 10)) || {
    failed+=("$name (no time left; run it by STEPS=$name)")
    return
  }
  # Interrupted, pytest still says what it has found.
  timeout -s INT -k 15 $((left < limit ? left : limit)) "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 25 "$out/$name.log"
  ((status == 0)) || failed+=("$name (exit status $status)")
}

build() {
  cmake -S csrc -B build -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" && ninja -C build
}
# Both formats, all backends that have kernels for the device.
dla() {
  "$python" bench/bench_dla.py --device cuda --backends all "$@"
}
# Fills the caches of compiled kernels, all shapes and dtypes at once: one after the other they would
# take most of the time. Settings chosen meanwhile are thrown away, since the runs disturb each other.
# Bound, the processes would share one core. By xargs, since what `&` starts outlives an interrupt.
compile() {
  trap 'find "$TRITON_CACHE_DIR" -name dla_kernels.json -delete' EXIT
  export OMP_PROC_BIND=false TORCHINDUCTOR_COMPILE_THREADS=1
  for run in "$layer_bfloat16" "$ops_bfloat16" "$float32"; do
    printf -- "$run --repeats 1 --threads 1 --shapes %s\n" $shapes
  done | xargs -L 1 -P "$(nproc)" bash -c 'dla "$@"' dla
}
# bench NAME OPTIONS...
bench() {
  step "$1" 100 bash -c 'dla "$@"' dla --shapes $shapes --json "$out/$1.json" --plot "$out/$1.png" \
    "${@:2}"
}
dispatch() {
  local name results=()
  for name in layer_bfloat16 ops_bfloat16 float32; do
    [[ ! -s $out/$name.json ]] || results+=("$out/$name.json") # one that was cut may have left none
  done
  "$python" bench/dispatch.py --output "$out/dispatch.json" "${results[@]}"
}
shapes="128x256x56x56 128x512x28x28 128x1024x14x14 128x2048x7x7"
# torch.compile takes seconds for each case, from its cache too: only the layer is compared with it.
layer_bfloat16="--suite layer --dtype bfloat16 --repeats 20"
ops_bfloat16="--suite ops --dtype bfloat16 --no-compile --repeats 10"
float32="--suite layer,ops --dtype float32 --no-compile --repeats 10"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TRITON_HOME:-$HOME}/.triton/cache}
export -f build dla compile dispatch
export python out shapes layer_bfloat16 ops_bfloat16 float32

# What is compiled only, for three generations of GPUs, is tested without a GPU as well.
tests=(-q -p no:cacheprovider tests/ops --ignore tests/ops/test_triton_compile.py
  --ignore tests/ops/test_cuda_compile.py)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(nproc)")
"$python" -c 'import expecttest' 2>/dev/null || {
  echo "expecttest is not installed: the schemas go untested (pip install expecttest)"
  tests+=(--deselect tests/ops/test_every_op.py::test_schema_fake_and_autograd)
}

step build 120 bash -c build
step tests_cuda 120 "$python" -m pytest "${tests[@]}" "${parallel[@]}" \
  -k "cuda and not triton and not 32_bits"
step compile 150 bash -c compile
bench layer_bfloat16 $layer_bfloat16
bench ops_bfloat16 $ops_bfloat16
bench float32 $float32
step dispatch 30 bash -c dispatch
step report 60 "$python" -m dla_kernels
step tests_large 90 "$python" -m pytest "${tests[@]}" -k "32_bits and (cuda or triton)"
step tests_triton 300 "$python" -m pytest "${tests[@]}" "${parallel[@]}" \
  -k "triton and not 32_bits" # thousands of kernels to compile
bench first --suite first --dtype bfloat16 # compiles everything anew
if command -v compute-sanitizer >/dev/null; then
  # The report's self-check is one small call of every op. Without torch's cache of memory, every
  # tensor is an allocation of its own, whose bounds are seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # torch itself asks CUDA for things that fail, harmlessly.
  for tool in memcheck racecheck; do
    step $tool 90 compute-sanitizer --tool $tool --error-exitcode 1 --report-api-errors no \
      "$python" -m dla_kernels
  done
else
  echo "no compute-sanitizer here: memory accesses go unchecked"
fi

printf '\n==== %d s; results in %s\n' "$SECONDS" "$out"
((${#failed[@]} == 0)) || {
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
}
