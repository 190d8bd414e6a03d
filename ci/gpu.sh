#!/usr/bin/env bash
# On a machine with a CUDA device: the tests that reach it, then the benchmarks.
#
#   bash ci/gpu.sh                      # everything, within ten minutes
#   bash ci/gpu.sh cuda steps scaling   # some parts, which share that time
#   bash ci/gpu.sh cpu                  # tries the script itself: small sizes, nothing is kept
#
# Parts: tests, kernels, steps, scaling, and three that are left out where no part is named:
# "compiled", which is steps of torch.compile, "forms", which is our own steps in each form that they
# can take (FASTSVI_CUDA_STEPS), and "sanitizer", which has NVIDIA's look for races and stray memory
# in generated kernels. LIMIT=seconds gives another time in all.
#
# Figures go to $OUT/<gpu>-{kernels,steps,scaling,compiled,block,...}.json, to bench/results without
# OUT, and are written after every row: what is stopped by its time limit loses nothing. Nothing is
# installed or downloaded. Needed: torch, triton, numpy, safetensors, tqdm, pytest, pytest-timeout, hypothesis
# and scipy; NumPyro is compared with, and pytest-xdist used, if it is there.
#
# By the device tool of this workplace (30 minutes in all, 10 for a call; a machine stays warm for
# 30 seconds, so make the next call at once), without wheels to carry:
#
#   run command="bash ci/gpu.sh cuda tests kernels 2>&1 | tee $OUT/log" timeout_s=600
#   run command="bash ci/gpu.sh cuda steps 2>&1 | tee $OUT/log" timeout_s=600
#   run command="LIMIT=400 bash ci/gpu.sh cuda scaling compiled 2>&1 | tee $OUT/log" timeout_s=450
#
# If the first call shows a fault, mend it here, and try the part of it first:
#
#   run command="LIMIT=120 bash ci/gpu.sh cuda tests 2>&1 | tee $OUT/log" timeout_s=150
#
# Then copy the JSON files from files_at to bench/results. Of the machine's image, pyro-ppl alone is
# missing: its oracles are tested without a GPU. (It would be carried as wheels of pyro-ppl and
# pyro-api, 0.8 MB; jax with its CUDA plugin is in the image, and would not fit the 64 MiB.)
set -uo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}
parts=${*:2}
parts=${parts:-tests kernels steps scaling}
limit=${LIMIT:-570}

# In a bare copy of the tree kernels/ is not fastsvi.kernels, as an installation makes it.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python3 -c 'import fastsvi.kernels' 2>/dev/null || ln -sfn ../kernels fastsvi/kernels
python3 - "$device" <<'PY' || exit 1
import sys, torch
import fastsvi.kernels.dispatch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    raise SystemExit("ci/gpu.sh: torch sees no CUDA device; nothing was run")
PY

if [ "$device" = cuda ]; then
    name=$(python3 -c 'from bench.machine import gpu, short_name; print(short_name(gpu()["gpu"]))')
    results=${OUT:-bench/results}
    kernels=(--compiled-at 10000000)
    steps=(--rounds 5)
    curves=(elements particles fits)
    # Not the slow ones, and not what has no use for a device.
    tests=(-m "not slow" --ignore tests/kernels/test_compile_kernels.py)
    python3 -c 'import xdist' 2>/dev/null && tests+=(-n 8)
else
    name=trial
    results=$(mktemp -d)
    kernels=(--elements 1000 --particles 1 --no-compile)
    steps=(--size tiny --rounds 2 --workloads eight_schools minibatch vae)
    curves=(elements)
    tests=(-m "not slow" -k "launches or graphed")
fi

export XLA_PYTHON_CLIENT_PREALLOCATE=false  # or JAX takes most of the memory at once
declare -A weight=([tests]=150 [kernels]=130 [steps]=220 [scaling]=70 [compiled]=150 [forms]=150 [sanitizer]=150)
sum=0
for part in $parts; do sum=$((sum + ${weight[$part]:?unknown part})); done

failed=0
for part in $parts; do
    share=$((limit * weight[$part] / sum))
    soft=$((share * 4 / 5))  # what was begun by then may end
    printf '\n== %s: up to %ss, %ss so far\n' "$part" "$share" "$SECONDS"
    case $part in
    tests)
        run=(python3 -m pytest -q -p no:cacheprovider -p no:benchmark -W default --tb=short
            --continue-on-collection-errors "${tests[@]}" tests/engine/test_launches.py
            tests/infer/test_graphed.py tests/infer/test_graphed_kernels.py
            tests/engine/cuda/test_forms.py tests/engine/cuda/test_nvrtc.py)
        if [ "$device" = cuda ]; then
            run+=(tests/params/test_cuda.py tests/infer/test_bad_calls.py tests/kernels)
        fi
        ;;
    kernels)
        run=(python3 -m bench.kernels --device "$device" --budget "$soft" "${kernels[@]}"
            --out "$results/$name-kernels.json")
        ;;
    steps)
        run=(python3 -m bench.step --device "$device" --budget "$soft" "${steps[@]}"
            --libraries fastsvi numpyro torch --json "$results/$name-steps.json")
        ;;
    compiled)
        run=(python3 -m bench.step --device "$device" --budget "$soft" "${steps[@]}"
            --libraries fastsvi torch-compiled --json "$results/$name-compiled.json")
        ;;
    forms)
        each=(python3 -m bench.step --device "$device" --budget $((soft / 3)) "${steps[@]}"
            --libraries fastsvi --json)
        run=(bash -c 'for form in block kernels graph; do
            echo "-- $form"; FASTSVI_CUDA_STEPS=$form "${@:2}" "$1-$form.json"; done'
            forms "$results/$name" "${each[@]}")
        ;;
    sanitizer)
        run=(bash -c 'for tool in memcheck racecheck; do
            echo "-- $tool"; compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" || exit; done'
            sanitizer python3 -m pytest -q -x -p no:cacheprovider -W default --tb=short
            tests/engine/cuda/test_forms.py -k "equals_eager and (schools or minibatch or rounds)")
        ;;
    scaling)
        run=(python3 -m bench.scaling --device "$device" --budget $((soft / ${#curves[@]}))
            --curves "${curves[@]}" --json "$results/$name-scaling.json")
        ;;
    esac
    # What fails is told, and keeps nothing else from running.
    timeout "$share" "${run[@]}" || { echo "FAILED or out of time: $part"; failed=1; }
done
printf '\n== done after %ss: %s\n' "$SECONDS" "$(ls "$results/$name"-*.json 2>/dev/null | tr '\n' ' ')"
exit "$failed"
