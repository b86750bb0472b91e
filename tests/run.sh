#!/usr/bin/env bash
# Checks the style and runs the tests, in .venv, which it makes if it is missing.
#
#   bash tests/run.sh              tests/lint.sh, then everything that is not marked gpu or slow
#   bash tests/run.sh --setup      only make .venv
#   bash tests/run.sh ARGS...      any arguments go to pytest, such as -k kl or -m "slow"; no lint
#
# The long mode of the property tests: HYPOTHESIS_PROFILE=long bash tests/run.sh -k property
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup_env.sh
if [[ "${1:-}" == "--setup" ]]; then
    exit 0
fi
if [[ $# == 0 ]]; then
    bash tests/lint.sh
fi

marker=(-m "not gpu and not slow")
for argument in "$@"; do
    if [[ "$argument" == -m* || "$argument" == --markexpr* ]]; then
        marker=()
    fi
done
exec .venv/bin/python -m pytest "${marker[@]}" "$@"
