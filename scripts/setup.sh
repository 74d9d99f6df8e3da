#!/usr/bin/env bash
# Creates .venv and installs megatron_cpo with its tools into it. Called by `make setup`.
#   PYTHON=/path/to/python scripts/setup.sh   # when the search below finds the wrong one
# Package indexes, proxies and certificates are the user's own pip or uv settings.
set -euo pipefail
cd "$(dirname "$0")/.."

# Without byte code every import of Megatron compiles it anew: 11 s instead of 4 s (2 cores).
unset PYTHONDONTWRITEBYTECODE

source scripts/uv.sh

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$@" >&2; exit 1; }

# Runs it rather than trusting its name: a pyenv shim called python3.12 exists even when no 3.12 is
# active, and some builds lack ssl or ctypes.
usable() {
    "$1" -c 'import ctypes, ssl, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# Prints the interpreter, or nothing. 3.12 comes first: it is the version most of our runs use.
find_python() {
    local candidate
    for candidate in python3.12 python3.13 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
        if usable "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

# uv is a binary, so any Python that has pip can fetch it, also one too old for us.
install_uv() {
    local candidate
    for candidate in "$@" python3 python; do
        rm -rf .venv-uv
        "$candidate" -m venv .venv-uv &&
            .venv-uv/bin/python -m pip install --quiet --constraint constraints.txt uv && return
        rm -rf .venv-uv  # Debian splits ensurepip from python3; its pip can still unpack a wheel
        "$candidate" -m pip install --quiet --target .venv-uv --constraint constraints.txt uv && return
    done 2>.uv-errors
    return 1
}

python=""
if [[ -n ${PYTHON:-} ]]; then
    usable "$PYTHON" || die \
        "PYTHON=$PYTHON is not a working Python 3.12 or newer with ctypes, ssl and venv" \
        "(it answers: $({ "$PYTHON" --version || true; } 2>&1 | tail -n 1))." \
        "Give another one, or leave PYTHON unset to search for one."
    python=$("$PYTHON" -c 'import sys; print(sys.executable)')
else
    python=$(find_python)
fi

uv=$(find_uv)
if [[ -z $uv ]]; then
    say "no uv found, installing it into .venv-uv"
    install_uv ${python:+"$python"} || die \
        "could not install uv with the pip of any of: ${python:+$python, }python3, python." \
        "What they said is in .uv-errors; the first: $(grep -m 1 -i error .uv-errors || true)" \
        "Check pip's index and proxy settings, or install uv yourself and put it in PATH."
    rm -f .uv-errors
    uv=$(find_uv)
fi
adopt_pip_settings "${python:-python3}"

if usable .venv/bin/python; then
    say "updating .venv ($(.venv/bin/python --version))"
else
    rm -rf .venv
    if [[ -z $python ]]; then
        say "no Python 3.12 or 3.13 in PATH or in ${PYENV_ROOT:-$HOME/.pyenv}/versions; asking uv for one"
    else
        say "creating .venv with $python"
    fi
    "$uv" venv --quiet --python "${python:-3.12}" .venv || die \
        "uv could not create .venv${python:+ with $python}." \
        "Looked for: \$PYTHON, python3.12 and python3.13 in PATH, pyenv's 3.12* and 3.13*, uv's own." \
        "Install Python 3.12 or 3.13, or run: make setup PYTHON=/path/to/python" \
        "(uv downloads its own from the web; UV_PYTHON_INSTALL_MIRROR names another source)."
fi

say "installing megatron_cpo, torch and Megatron (about 5 GB on disk; minutes when not cached)"
"$uv" pip install --python .venv/bin/python --compile-bytecode \
    --constraint constraints.txt --build-constraint constraints.txt \
    --editable '.[dev]' || die \
    "the install failed; uv's message above says where." \
    "No connection or a certificate error: set uv's or pip's index, proxy and certificate variables." \
    "Out of space: it needs 6 GB here and as much again in uv's cache (UV_CACHE_DIR moves it)." \
    "A version not found: the mirror lacks what constraints.txt pins."

.venv/bin/python - <<'PY' || die "the packages are there but do not import; remove .venv and try again."
from importlib.metadata import version

import megatron_cpo  # noqa: F401
import torch  # noqa: F401

print("setup: ready:", ", ".join(f"{p} {version(p)}" for p in ("megatron-cpo", "megatron-core", "torch")))
PY
