#!/usr/bin/env bash
# SmolLM2-135M-Instruct, a real model, learns by CPO from short answers of Dolly on two cores, and its
# answers are compared with those before, and with MLE's for the same steps. Half an hour; `make setup`
# first.
# The same command goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 # two ranks, one core each
command -v megatron-cpo >/dev/null || {
    echo "smollm2: megatron_cpo is not installed; run: make setup && source .venv/bin/activate" >&2
    exit 1
}
mkdir -p runs/smollm2
bash scripts/smollm2_model.sh runs/smollm2/model
megatron-cpo run examples/recipes/smollm2-dolly.yaml --output runs/smollm2/run
echo "It took $SECONDS s."
