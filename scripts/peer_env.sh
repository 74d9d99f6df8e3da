#!/usr/bin/env bash
# Creates .venv-peer-NAME from benchmarks/peers/NAME.txt, what the benchmarks compare us with, and
# prints the path of its Python. Apart from .venv, because peers pin versions of their own.
#   scripts/peer_env.sh mergekit
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE

name=${1:?usage: scripts/peer_env.sh NAME}
pins=benchmarks/peers/$name.txt
folder=.venv-peer-$name
stamp=$folder/.installed

if [[ ! -f $stamp || $pins -nt $stamp ]]; then
    source scripts/uv.sh
    uv=$(find_uv)
    adopt_pip_settings .venv/bin/python
    "$uv" venv --quiet --clear --python .venv/bin/python "$folder" >&2
    "$uv" pip install --quiet --compile-bytecode --python "$folder/bin/python" -r "$pins" >&2
    touch "$stamp"
fi
printf '%s\n' "$PWD/$folder/bin/python"
