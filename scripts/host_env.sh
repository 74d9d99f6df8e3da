#!/usr/bin/env bash
# Creates .venv-host-VERSION: this checkout with another Megatron-Core than .venv's, everything else
# as constraints.txt pins it; prints the path of its Python.
#   "$(scripts/host_env.sh 0.18.2)" -m tests.parity --core
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE

version=${1:?usage: scripts/host_env.sh VERSION of megatron-core, for example 0.18.2}
folder=.venv-host-$version
stamp=$folder/.installed

if [[ ! -f $stamp || constraints.txt -nt $stamp || pyproject.toml -nt $stamp ]]; then
    source scripts/uv.sh
    uv=$(find_uv)
    adopt_pip_settings .venv/bin/python
    pins=$(mktemp)
    trap 'rm -f "$pins"' EXIT
    grep -v '^megatron-core==' constraints.txt >"$pins"
    printf 'megatron-core==%s\n' "$version" >>"$pins"
    "$uv" venv --quiet --clear --python .venv/bin/python "$folder" >&2
    "$uv" pip install --quiet --compile-bytecode --python "$folder/bin/python" \
        --constraint "$pins" --build-constraint "$pins" --editable '.[dev]' >&2
    touch "$stamp"
fi
printf '%s\n' "$PWD/$folder/bin/python"
