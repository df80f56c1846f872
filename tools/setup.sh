#!/usr/bin/env bash
# Make .venv with everything that the CPU build needs. Running it again does nothing until the
# requirements, the Python version or the folder change.
#   PYTHON         the interpreter to build on (default python3; 3.11 or newer)
#   RPP_PIP_ARGS   more arguments for every `pip install`, such as another package index
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
MIN_FREE_GB=${RPP_MIN_FREE_GB:-6}
VENV=.venv
STAMP=$VENV/.rpp-setup
LOG=$VENV/setup.log

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: error: %s\n' "$*" >&2
    exit 2
}

check_python() {
    command -v "$PYTHON" >/dev/null || fail "no $PYTHON on PATH; install Python 3.11 or newer, or pass PYTHON=..."
    version=$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') || fail "$PYTHON does not run"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$PYTHON is Python $version; 3.11 or newer is needed: pass PYTHON=python3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make virtual environments; install its venv package (python3-venv)"
}

check_disk() {
    local free_gb
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1024 / 1024))
    [ "$free_gb" -ge "$MIN_FREE_GB" ] ||
        fail "$free_gb GB are free in $PWD; $MIN_FREE_GB GB are needed: free some, or clone on another disk"
}

# What the environment was made from; an editable install also holds the folder's path.
key() {
    {
        cat requirements/*.txt setup.py tools/setup.sh
        echo "$version $PWD"
    } | "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

install() {
    say "pip install $*"
    # RPP_PIP_ARGS is split into words on purpose.
    # shellcheck disable=SC2086
    if ! "$VENV/bin/python" -m pip install --progress-bar off ${RPP_PIP_ARGS:-} "$@" >>"$LOG" 2>&1; then
        tail -n 15 "$LOG" >&2
        fail "pip could not install ($*); the whole log is $LOG. Without network, or where the package" \
            "index lacks a version, point pip at another index: RPP_PIP_ARGS='--index-url URL'"
    fi
}

make_venv() {
    if [ -d "$VENV" ] && ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        fail "$VENV does not run, or is older than Python 3.11; remove it (rm -r $VENV) and try again"
    fi
    if [ ! -d "$VENV" ]; then
        say "making $VENV with Python $version"
        "$PYTHON" -m venv "$VENV" || fail "$PYTHON could not make $VENV"
    fi
    rm -f "$STAMP"
    : >"$LOG"
}

check_imports() {
    "$VENV/bin/python" - <<'PY' || fail "the installation is not complete; the log is $LOG"
import importlib.util
import sys

needed = ("torch", "megatron.core", "sglang", "transformers", "mpi4py", "sentencepiece", "megatron_rpp")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("setup: cannot import: " + ", ".join(missing))
PY
}

check_python
wanted=$(key)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
    say "$VENV is up to date"
    exit 0
fi
check_disk
make_venv
say "installing about 2 GB; this takes a few minutes after the downloads"
install --upgrade pip 'setuptools>=77'
install -r requirements/cpu.txt
install --no-deps -r requirements/no-deps.txt
install --no-deps --upgrade --target "$VENV/te-python" -r requirements/te-python.txt
install --no-deps --no-build-isolation -e .
check_imports
echo "$wanted" >"$STAMP"
say "done: $VENV/bin/rpp --help"
