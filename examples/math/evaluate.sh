#!/usr/bin/env bash
# Accuracy of a checkpoint or a model on the math sets: avg@k, pass@k, majority@k with intervals, as JSON and a table.
#
#   examples/math/evaluate.sh outputs/math/vimpo-Qwen3-4B-Base-8gpu-seed1              # a run: its last checkpoint
#   examples/math/evaluate.sh outputs/math/.../checkpoints/global_step_100
#   examples/math/evaluate.sh Qwen/Qwen3-4B-Base                                       # a model as it is, the starting point
#   examples/math/evaluate.sh outputs/math/... --self-rank          # the policy ranks its own answers, beside its reference
#
# Everything after the first argument goes to evaluate.py (--help), after the settings below, so it wins.

set -euo pipefail

#################### settings of the user, by environment variable ####################
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
PYTHON=${PYTHON:-python3}
DATA=${DATA:-$ROOT/outputs/data}
SETS=${SETS:-math500 aime2024 aime2025 olympiadbench}
N=${N:-32}                              # samples a question
GPUS=${GPUS:-1}                         # tensor parallelism of vLLM
OUT=${OUT:-}                            # empty: evaluation/ in the checkpoint, or outputs/evaluation/MODEL
########################################################################################

fail() { echo "evaluate.sh: $*" >&2; exit 2; }
(($# > 0)) || fail "give a run's folder, a checkpoint (.../global_step_N) or a model"
model=$1
shift

if [[ -e $model || $model == */global_step_* ]]; then    # else the name of a model on the hub
    model=$("$PYTHON" -m vimpo_verl.checkpoint "$model")   # verl's FSDP shards are merged, unless that is done
    [[ $model != */actor/merged ]] || OUT=${OUT:-${model%/actor/merged}/evaluation}
fi
OUT=${OUT:-$ROOT/outputs/evaluation/$(basename "$model")}

files=()
for name in $SETS; do files+=("$DATA/$name.parquet"); done
exec "$PYTHON" "$HERE/evaluate.py" --model "$model" --data "${files[@]}" --out "$OUT" --n "$N" --tensor-parallel "$GPUS" "$@"
