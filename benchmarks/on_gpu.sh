#!/usr/bin/env bash
# What docs/performance.md shows of a GPU, in one command and within ten minutes, also on a machine without a network.
#
#   bash benchmarks/on_gpu.sh [OUT]                       writes OUT/*.json (default: benchmarks/results; with SMALL=1 outputs/on_gpu)
#   BUNDLE=FOLDER bash benchmarks/on_gpu.sh OUT           with the wheels of benchmarks/gpu_bundle.sh
#   SMALL=1 bash benchmarks/on_gpu.sh OUT                 shapes for a CPU, to see that it runs
#   ALLOWED=SECONDS bash benchmarks/on_gpu.sh OUT         another time for the whole than 590 s
#
# In turn: the GPU's tests; token statistics against the copy bandwidth of the same run; a step on verl's FSDP engine for GRPO, GRPO with a
# reference, VIMPO in two passes and in one, at Qwen3's shapes with random weights, with and without fused kernels; and if a minute is left,
# the token statistics with other launch settings.
# Needs torch, Triton, transformers, pandas, pyarrow, and what is in the bundle: verl's engine, rich, pytest and hypothesis; no vLLM
# and no Ray cluster. A part that fails does not end the others. Exit status 1 where one failed or was not done in time.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

SMALL=${SMALL:-0}
wrong() {
    echo "on_gpu.sh: $1" >&2
    exit 2
}
if [[ $SMALL == 1 ]]; then OUT=$ROOT/outputs/on_gpu; else OUT=$ROOT/benchmarks/results; fi
OUT=$(realpath -m "${1:-$OUT}")
PYTHON=${PYTHON:-python3}
found=$(type -P "$PYTHON") || wrong "PYTHON=$PYTHON is not there"
PYTHON=$(realpath --no-symlinks "$found")  # of an environment the link, not what it points to
[[ $SMALL == [01] ]] || wrong "SMALL=$SMALL is neither 1 nor 0"
[[ -z ${ALLOWED:-} || $ALLOWED =~ ^[1-9][0-9]*$ ]] || wrong "ALLOWED=$ALLOWED is not a number of seconds; without it, ten minutes"
"$PYTHON" -c "import torch" || wrong "PYTHON=$PYTHON has no torch"
[[ $SMALL == 1 ]] || "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
    wrong "torch sees no GPU; SMALL=1 shows on a CPU that the script runs"
if [[ -n ${BUNDLE:-} ]]; then
    [[ -n $(compgen -G "$BUNDLE/*.whl") ]] || wrong "no wheels in BUNDLE=$BUNDLE; bash benchmarks/gpu_bundle.sh FOLDER collects them"
    BUNDLE=$(realpath "$BUNDLE")
    version=$("$PYTHON" -c "import sys; print(*sys.version_info[:2], sep='.')")
    [[ -n $(compgen -G "$BUNDLE/ray-*-cp${version/./}-*.whl") ]] ||
        wrong "the wheels in BUNDLE=$BUNDLE are not for Python $version; bash benchmarks/gpu_bundle.sh FOLDER $version collects those"
fi
mkdir -p "$OUT" || wrong "$OUT cannot be made"
cd "$ROOT" || exit

export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 HF_HUB_OFFLINE=1 VERL_USE_EXTERNAL_MODULES=vimpo_verl.plugin,verl_patches.cpu
if [[ -n ${BUNDLE:-} ]]; then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    for wheel in "$BUNDLE"/*.whl; do
        if [[ $SMALL == 1 && $wheel == */flash_attn-* ]]; then continue; fi  # verl would take it, and it asks for a GPU
        "$PYTHON" -m zipfile -e "$wheel" "$SITE"
    done
    PYTHONPATH+=:$SITE
fi

for module in triton transformers pandas pyarrow pytest hypothesis; do
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
        echo "on_gpu.sh: $PYTHON has no $module: what needs it will fail" >&2
done

failed=()
part() { # NAME COMMAND...
    local name=$1 left=$((ALLOWED - SECONDS)) status=0
    shift
    if ((left <= 0)); then
        failed+=("$name: not begun, $ALLOWED seconds are over")
        return
    fi
    echo "== $name, at $SECONDS s"
    timeout --signal=ABRT --kill-after=10 "$left" "$@" || status=$?  # with PYTHONFAULTHANDLER it says where it was
    case $status in
        0) ;;
        124 | 137)
            if ((SECONDS < ALLOWED)); then
                failed+=("$name: killed, out of memory perhaps (exit status 137)")
                return
            fi
            echo "== $name: ended at $SECONDS s, where its stack above says"
            failed+=("$name: not done when $ALLOWED seconds were over")
            ;;
        *) failed+=("$name: exit status $status") ;;
    esac
}

if [[ $SMALL == 1 ]]; then
    ALLOWED=${ALLOWED:-3600}  # a CPU may be busy
    statistics=(--vocabulary 32000 --tokens 256 --dtype bfloat16 float32 --repeats 1 --compiled 0)
    step=(--shape tiny --vocabulary 2000 --tokens 1024 --length 256 --micro-batch 2 --dtype bf16 --repeats 1)
    shapes=(tiny)
else
    ALLOWED=${ALLOWED:-590}
    statistics=(--vocabulary 32000 128000 151936 256000 --tokens 8192 32768 --dtype bfloat16 float16 float32 --repeats 9 --compiled 0)
    step=(--vocabulary 151936 --tokens 16384 --length 2048 --micro-batch 4 --dtype bf16 --repeats 3)
    shapes=(qwen3-0.6b qwen3-1.7b)
    part "tests" "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" \
        tests/test_triton_kernel.py tests/test_token_statistics.py tests/test_exact_kl.py tests/test_engine_on_gpu.py
fi
part "token statistics" "$PYTHON" benchmarks/kl_function.py "${statistics[@]}" --json "$OUT/kl_function_gpu.json"
for fused in 0 1; do  # outside, so that what time may run out for is the fused kernels of the larger model
    for shape in "${shapes[@]}"; do
        part "a step, $shape, fused $fused" "$PYTHON" benchmarks/engine_step.py "${step[@]}" --shape "$shape" --fused "$fused" \
            --json "$OUT/engine_step_gpu_${shape}_fused_$fused.json"
    done
done
if [[ $SMALL != 1 ]]; then  # Triton's interpreter has no launch settings
    if ((ALLOWED - SECONDS >= 60)); then
        part "launch settings" "$PYTHON" benchmarks/kernel_settings.py --json "$OUT/kernel_settings_gpu.json"
    else
        echo "== launch settings: left out, at $SECONDS s of $ALLOWED"
    fi
fi
if ((${#failed[@]})); then
    printf 'on_gpu.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "== done, at $SECONDS s"
