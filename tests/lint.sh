#!/usr/bin/env bash
# Style and likely bugs of all Python files (ruff.toml) and shell scripts (.shellcheckrc), in a second.
#
#   bash tests/lint.sh          says what is wrong
#   bash tests/lint.sh --fix    formats, and mends what ruff can mend, first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PWD/.venv/bin:$PATH

for tool in ruff shellcheck; do
    command -v "$tool" >/dev/null || { echo "lint.sh: no $tool; bash tests/run.sh --setup installs it in .venv" >&2; exit 2; }
done

shell_scripts() {  # by their first line, wherever they lie
    find . \( -name .git -o -name .venv -o -name outputs \) -prune -o -type f -size -200k -print0 |
        xargs -0 awk 'FNR == 1 && /^#!.*[\/ ](ba)?sh( |$)/ { print FILENAME } { nextfile }'
}

if [[ "${1:-}" == "--fix" ]]; then
    ruff check --quiet --fix-only .
    ruff format --quiet .
fi
mapfile -t scripts < <(shell_scripts)
status=0
ruff check --quiet . || status=1
ruff format --quiet --check --diff . || status=1
shellcheck "${scripts[@]}" || status=1
if [[ $status != 0 ]]; then
    echo "lint.sh: mend what is named above; bash tests/lint.sh --fix does what ruff can" >&2
fi
exit "$status"
