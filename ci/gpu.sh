#!/usr/bin/env bash
# On a machine with a CUDA device: the tests that reach it, then the benchmarks, in one go and within
# eight minutes. Figures go to bench/results/<gpu>-{kernels,steps}.json, and to $OUT as well if that
# is set. Nothing is downloaded: torch, triton, numpy, safetensors, tqdm, pytest, pytest-timeout,
# hypothesis and scipy must be there; NumPyro is compared with if it is.
#
#   bash ci/gpu.sh         # on a GPU
#   bash ci/gpu.sh cpu     # tries the script itself: small sizes, results to a temporary folder
set -uo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}

python3 - "$device" <<'PY' || exit 1
import sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    raise SystemExit("ci/gpu.sh: torch sees no CUDA device; nothing was run")
PY
if [ "$device" = cuda ]; then
    python3 -m pip install -q --no-deps --no-build-isolation -e . || exit 1
    name=$(python3 -c 'from bench.machine import gpu, short_name; print(short_name(gpu()["gpu"]))')
    results=bench/results
    kernels=(--budget 130 --compiled-at 10000000)
    steps=(--budget 120 --rounds 5)
else
    name=trial
    results=$(mktemp -d)
    kernels=(--elements 1000 --particles 1 --budget 20 --no-compile)
    steps=(--size tiny --rounds 2 --budget 60 --workloads eight_schools minibatch vae)
fi

export XLA_PYTHON_CLIENT_PREALLOCATE=false  # or JAX takes most of the memory at once
failed=0
step() { printf '\n== %s (%ss so far)\n' "$1" "$SECONDS"; }
# What fails is told at the end, and keeps nothing else from running.
try() { timeout "$1" "${@:2}" || { echo "FAILED or out of time: ${*:2}"; failed=1; }; }

step "tests that reach the device"
try 150 python3 -m pytest -q -k cuda -p no:cacheprovider \
    tests/kernels tests/params tests/engine tests/optim tests/infer
step "kernels beside their floors, eager torch and torch.compile"
try 170 python3 -m bench.kernels --device "$device" "${kernels[@]}" \
    --out "$results/$name-kernels.json"
step "steps beside hand-written torch and NumPyro"
try 170 python3 -m bench.step --device "$device" "${steps[@]}" \
    --libraries fastsvi numpyro torch-compiled torch fastsvi-eager \
    --json "$results/$name-steps.json"
if [ -n "${OUT:-}" ]; then cp "$results/$name"-*.json "$OUT"/; fi
step "done: $(ls "$results/$name"-*.json | tr '\n' ' ')"
exit "$failed"
