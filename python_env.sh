# Functions for the other scripts, which source this file. `use_python FILE` sets PYTHON to an interpreter with the
# packages that FILE pins. It takes the first of: $PYTHON, if set (not checked); the active environment, if it has the
# packages; .venv next to this file, which is created when needed.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[ -t 2 ] || export TQDM_MININTERVAL="${TQDM_MININTERVAL:-10}"     # seconds between progress lines in a log file

# help_for FILE [arguments]: if they include -h or --help, print the comment at the top of FILE and exit
help_for() {
    local argument
    for argument in "${@:2}"; do
        case "$argument" in
            -h | --help)
                sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$1"
                exit
                ;;
        esac
    done
}

fail() {
    echo "error: $1" >&2
    exit 2
}

# satisfies INTERPRETER FILE: succeed if it is Python 3.11 or newer and has every package that FILE pins
satisfies() {
    "$1" - "$2" <<'PYTHON' 2>/dev/null
import importlib.metadata
import pathlib
import sys

def pins(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from pins(path.parent / line[3:].strip())
        elif "==" in line and not line.startswith("#"):
            pin, _, marker = line.partition(";")
            if not marker or applies(marker):
                yield pin.strip().split("==")

def applies(marker):
    from packaging.markers import Marker    # a dependency of transformers, which every FILE pins
    return Marker(marker).evaluate()

assert sys.version_info >= (3, 11)
for name, version in pins(pathlib.Path(sys.argv[1])):
    assert importlib.metadata.version(name).split("+")[0] == version, name
PYTHON
}

# check_settings NAME ... [-- HOW SCRIPT.py arguments] ...: exit if these variables or arguments have errors
check_settings() {
    local settings=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        settings+=("$1=${!1:-}")
        shift
    done
    PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -P -m simplified_tinybert.checks.shell "${settings[@]}" "$@" ||
        exit
}

# is_yes VALUE: succeed for 1, yes or true. VALUE has passed check_settings.
is_yes() {
    case "$1" in
        1 | [yY]* | [tT]*) ;;
        *) return 1 ;;
    esac
}

# step FILE COMMAND ...: run the command unless FILE exists, the last file that a later step needs
step() {
    if [ ! -e "$1" ]; then
        echo "== ${*:2}" >&2
        "${@:2}"
    fi
}

# run SCRIPT [arguments]: run a Python script of the repository
run() { "$PYTHON" "$ROOT/$1" "${@:2}"; }

# launch SCRIPT [arguments]: run a Python script in $PROCESSES processes
launch() {
    if [ "${PROCESSES:-1}" = 1 ]; then
        "$PYTHON" "$@"
    else
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$PROCESSES" "$@"
    fi
}

find_python() {
    local candidate
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
           "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "cannot find Python 3.11 or newer; install it, or set PYTHON=/path/to/python"
}

use_python() {
    local requirements="$ROOT/$1" base
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not an interpreter"
        return
    fi
    base="$(find_python)"
    if satisfies "$base" "$requirements"; then
        PYTHON="$base"
        return
    fi
    PYTHON="$ROOT/.venv/bin/python"
    if ! { [ -x "$PYTHON" ] && satisfies "$PYTHON" "$requirements"; }; then
        echo "installing $1 into $ROOT/.venv (once) ..." >&2
        "$base" -m venv "$ROOT/.venv" ||
            fail "$base cannot create a virtual environment; install python3-venv (Debian), activate an environment with \
the packages of $1, or set PYTHON to its interpreter"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
            fail "the packages of $1 could not be installed; see the lines above, or run the command again"
    fi
}
