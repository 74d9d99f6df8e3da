#!/usr/bin/env bash
# A trained model of 260,000 parameters learns by CPO to tell true continuations of stories from
# false ones, and its stories before and after are compared. A few minutes on two cores.
# Run by `make quickstart`, or in an environment of your own: bash examples/quickstart.sh
# The same command goes on where it was; after a change of the recipe only what depends on it runs.
set -euo pipefail
cd "$(dirname "$0")/.."

RECIPE=examples/recipes/quickstart.yaml
OUT=runs/quickstart
MODEL=$OUT/stories260k  # the recipe's model

# Without byte code every process compiles Megatron anew: 11 s, not 4 s.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1     # two ranks, one core each
export CUDA_VISIBLE_DEVICES= # a model this small is no faster on a GPU
command -v megatron-cpo >/dev/null || {
    echo "quickstart: megatron_cpo is not installed for $(command -v python); run make quickstart" >&2
    exit 1
}
[[ -d $MODEL ]] || python examples/stories260k.py "$MODEL"
echo "quickstart: $RECIPE; everything goes to $OUT/run"
megatron-cpo run "$RECIPE" --output "$OUT/run"
cat <<END_OF_TEXT

It took $SECONDS s. Try next
  $RECIPE              # change a line, run this again
  megatron-cpo run $RECIPE --output $OUT/run --print   # the commands
  megatron-cpo inspect $OUT/run/groups/cpo-train \\
      --tokenizer-model $MODEL --html $OUT/groups.html
  bash examples/dolly.sh                               # from text alone, with tensor parallelism
END_OF_TEXT
