#!/usr/bin/env bash
# Run all tests: bash test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python_env.sh"
use_python requirements-dev.txt

cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
