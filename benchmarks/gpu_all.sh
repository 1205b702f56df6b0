#!/usr/bin/env bash
# Every GPU test and benchmark within nine minutes, from a plain checkout and the wheels in .whl:
#
#     bash benchmarks/gpu_all.sh [tests] [kernels] [train] [shared] [training-tests] [layouts]
#
# Without arguments the first five. shared trains with several ranks on one GPU, one layout after the other, against float64.
# layouts calibrates the planner and sets a model of Qwen3-30B's shape beside its prediction:
# eight minutes of its own. Goes on past failures and exits with 1 at the end if there was one. JSON and logs go to
# ${OUT:-benchmarks/results}; PYTHON names the interpreter, TOTAL_SECONDS another limit.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

total=${TOTAL_SECONDS:-540}
python=${PYTHON:-python3}
out=${OUT:-$PWD/benchmarks/results}
wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=(tests kernels train shared training-tests)
steps=$(mktemp)
site=$(mktemp -d)
failed=0
trap 'rm -rf "$steps" "$site"' EXIT

export PYTHONPATH=$PWD/kernels:$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 MEGALORA_TEST_GPU=1 HF_HUB_OFFLINE=1
unset MEGALORA_BACKEND TRITON_INTERPRET

note() { # NAME RESULT SECONDS
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$steps"
}

step() { # NAME LIMIT LOG COMMAND...: at most LIMIT seconds, and no more than are left of all; @budget@ is 20 less
    local name=$1 limit=$2 log=$3 begun=$SECONDS left=$((total - SECONDS - 5)) code
    shift 3
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 30 ]; then
        echo "== $name: not reached, $left s are left"
        note "$name" "not reached" 0
        return
    fi
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "${@//@budget@/$((limit - 20))}" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) note "$name" ok $((SECONDS - begun)) ;;
        124 | 137) note "$name" "FAILED: stopped after $limit s" $((SECONDS - begun)) ;;
        *) note "$name" "FAILED: exit code $code" $((SECONDS - begun)) ;;
    esac
    [ "$code" -eq 0 ] || failed=1
}

asked() { # NAME
    [[ " ${wanted[*]} " == *" $1 "* ]]
}

for name in "${wanted[@]}"; do
    case $name in
        tests | kernels | train | shared | training-tests | layouts) ;;
        *)
            echo "gpu_all.sh: no step is called '$name'; there are tests, kernels, train, shared, training-tests, layouts" >&2
            exit 2
            ;;
    esac
done
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
    echo "gpu_all.sh: $python has no torch, or torch finds no CUDA device (PYTHON names another)" >&2
    exit 2
}
mkdir -p "$out" || exit 1
rm -f "$out"/{tests,kernels,train,shared,summary}.txt "$out"/{grouped_lora,train_gpu,shared_gpu}.json
if compgen -G '.whl/*.whl' >/dev/null; then
    install=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site")
    "${install[@]}" .whl/*.whl || {
        note "wheels" "FAILED: pip" "$SECONDS"
        failed=1
    }
fi

# Compiling kernels is most of what these tests do: four processes where pytest can. What fills the memory goes alone.
pytest=("$python" -m pytest -q -p no:cacheprovider)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 4)
if asked tests; then
    alone=("${pytest[@]}" --noconftest tests/gpu/test_kernels_on_gpu.py)
    step "kernel tests" 110 "$out/tests.txt" "${alone[@]}" ${parallel[@]+"${parallel[@]}"} -k "not int32"
    step "kernel tests beyond int32" 40 "$out/tests.txt" "${alone[@]}" -k int32
fi
if asked kernels; then
    step "kernel benchmark" 210 "$out/kernels.txt" "$python" -m benchmarks.bench_grouped_lora \
        --quick --budget-seconds @budget@ --out "$out/grouped_lora.json"
fi
if asked train; then
    step "training benchmark" 150 "$out/train.txt" "$python" -m benchmarks.bench_train_gpu \
        --budget-seconds @budget@ --out "$out/train_gpu.json"
fi
if asked shared; then
    if why=$("$python" -c 'import megalora.bridge.base, tests.conftest' 2>&1); then
        step "layouts on one GPU" 200 "$out/shared.txt" "$python" -m benchmarks.shared_gpu \
            --budget-seconds @budget@ --out "$out/shared_gpu.json"
    else
        note "layouts on one GPU" "not run: ${why##*$'\n'}" 0
    fi
fi
if asked training-tests; then
    if why=$("$python" -c 'import megalora.bridge.base' 2>&1); then
        step "training tests" 300 "$out/tests.txt" "${pytest[@]}" tests/gpu/test_train_on_gpu.py
    else
        note "training tests" "not run: ${why##*$'\n'}" 0
    fi
fi
if asked layouts; then
    step "calibration" 200 "$out/layouts.txt" "$python" -m megalora.bench.calibrate "$out/calibration.json" --budget-seconds 120
    # The second does not fit 80 GB: a row, not the end.
    step "layouts" 330 "$out/layouts.txt" "$python" -m megalora bench configs/sft/qwen3_30b_a3b_1xh100_4k.yaml \
        train.global_batch_size=4 --gpu "$out/calibration.json" --layouts recompute=full recompute=selective,micro=2 \
        --steps 3 --weights random --timeout-minutes 4 --out "$out/layouts"
fi

echo
"$python" -m benchmarks.gpu_summary "$out" "$steps" | tee "$out/summary.txt"
exit $failed
