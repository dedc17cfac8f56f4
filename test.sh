#!/usr/bin/env bash
# Makes or reuses .venv, then checks everything: ruff, mypy, pytest.
#
#   ./test.sh [--all] [pytest arguments…]     --all includes the tests marked slow (minutes)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch/setup_env.sh

selection=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    selection=()
    export HYPOTHESIS_PROFILE=nightly
    shift
fi

# One thread per process: the launch tests start several, and threads that outnumber the cores slow each other down.
export OMP_NUM_THREADS=1

echo "== environment"
check_python
ensure_venv
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
# Two at a time, a file each: one launches ranks and waits while the other computes.
pytest -n 2 --dist loadfile "${selection[@]}" "$@"
