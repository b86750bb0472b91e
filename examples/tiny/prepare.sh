#!/usr/bin/env bash
# Makes the tiny task's data and its warmed-up model in the folder given, where they are missing.
#
#   examples/tiny/prepare.sh outputs/tiny

set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORK=${1:?usage: prepare.sh FOLDER}
PYTHON=${PYTHON:-$HERE/../../.venv/bin/python}
export HF_HUB_OFFLINE=1

if [[ ! -f $WORK/data/test.parquet ]]; then
    "$PYTHON" "$HERE/make_data.py" --out "$WORK/data"
fi
if [[ ! -f $WORK/model/tokenizer.json ]]; then
    "$PYTHON" "$HERE/make_model.py" --out "$WORK/model"
fi
