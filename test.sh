#!/usr/bin/env bash
# Run the tests: bash test.sh [arguments of pytest]
#
# Tests marked `slow` are left out. Run them with `bash test.sh -m slow`, or all tests with `bash test.sh -m ""`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"
use_python requirements-dev.txt

cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -m "not slow" "$@"
[ $# -gt 0 ] || echo "Tests marked slow were left out; bash test.sh -m slow runs them."
