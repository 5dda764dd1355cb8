#!/usr/bin/env bash
# Run the tests: bash test.sh [arguments of pytest]
#
# Tests marked `slow` are left out. Run them with `bash test.sh -m slow`, or all tests with `bash test.sh -m ""`. The
# tests run in as many processes as there are CPU cores, at most 4 (`-n 0` runs them in one).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"
use_python requirements-dev.txt

cd "$ROOT"
"$PYTHON" -m ruff check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"             # the processes share the cores
"$PYTHON" -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
[ $# -gt 0 ] || echo "Tests marked slow were left out; bash test.sh -m slow runs them."
