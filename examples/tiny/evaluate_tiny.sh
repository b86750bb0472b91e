#!/usr/bin/env bash
# Accuracy of a tiny run's checkpoint on the task's 256 validation prompts, by examples/math/evaluate.sh. It needs no GPU.
#
#   examples/tiny/evaluate_tiny.sh outputs/tiny/vimpo          # a run with a checkpoint: trainer.save_freq=...
#
# Everything after the first argument goes to examples/math/evaluate.py, after the settings below, so it wins.

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
model=${1:?usage: evaluate_tiny.sh RUN, CHECKPOINT or MODEL}
shift

export PYTHON=${PYTHON:-$ROOT/.venv/bin/python} DATA=${DATA:-$ROOT/outputs/tiny/data} SETS=${SETS:-test} N=${N:-8}
export TORCHDYNAMO_DISABLE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_CPU_OMP_THREADS_BIND=nobind  # where there is no GPU

exec bash "$ROOT/examples/math/evaluate.sh" "$model" --reward "$HERE/reward.py" --max-prompt-tokens 16 --max-tokens 12 \
    --engine '{"enforce_eager": true, "dtype": "float32", "gpu_memory_utilization": 0.2}' "$@"
