#!/usr/bin/env bash
# On a machine with a CUDA device: the tests that reach it, then the benchmarks, in one go.
# Figures go to bench/results/, and to $OUT as well if that is set. Nothing is downloaded: torch,
# triton, numpy, safetensors, tqdm, pytest, hypothesis and scipy must be there.
set -euo pipefail
cd "$(dirname "$0")/.."

python3 - <<'PY'
import torch
if not torch.cuda.is_available():
    raise SystemExit("ci/gpu.sh: torch sees no CUDA device; nothing was run")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
PY
python3 -m pip install -q --no-deps --no-build-isolation -e .

step() { printf '\n== %s (%ss so far)\n' "$1" "$SECONDS"; }

step "kernels and engine on the device"
python3 -m pytest -q tests/kernels tests/engine -p no:cacheprovider
step "examples on the device"
python3 -m fastsvi.examples.eight_schools
python3 -m fastsvi.examples.breast_cancer --device cuda
step "kernel benchmark"
python3 -m bench.kernels
if [ -n "${OUT:-}" ]; then cp bench/results/*.json "$OUT"/; fi
step "done"
