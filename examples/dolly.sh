#!/usr/bin/env bash
# From text alone, without a trained model, to one trained with CPO, on this machine: two CPU ranks, or the GPUs it has.
# About four minutes on two cores. Look for "step-0 gate: ... ok", a rank-1 accuracy that leaves
# 0 far behind, and a held-out one above 1/12, which is chance.
# With megatron_cpo installed (make setup, then . .venv/bin/activate): bash examples/dolly.sh
# Flags given here go to the CPO run: bash examples/dolly.sh --cpo-objective ranked
set -euo pipefail
cd "$(dirname "$0")/.."

RECORDS=examples/data/dolly-400.jsonl
TRAIN_RECORDS=360  # the other 40 are for validation only
VOCABULARY=2000
MAX_LENGTH=512     # most tokens of prefix + candidate
ROW_LENGTH=2048    # a row holds several groups and may be longer than any sequence
MLE_ITERATIONS=60
CPO_ITERATIONS=20
OUT=runs/dolly

# Without byte code every process compiles Megatron anew: 11 s, not 4 s.
unset PYTHONDONTWRITEBYTECODE
if ! command -v megatron-cpo >/dev/null ||
    ! gpus=$(python -c 'import megatron_cpo, torch; print(torch.cuda.device_count())'); then
    echo "dolly: megatron_cpo is not installed for $(command -v python); run make setup and activate .venv" >&2
    exit 1
fi
ranks=2
host=()            # without a GPU, install() sets what a CPU needs
if ((gpus > 0)); then
    ((gpus >= 2)) || ranks=1
    host=(--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
        --no-masked-softmax-fusion --no-rope-fusion)  # no Transformer Engine, no Apex
    export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron insists, with tensor parallelism before Blackwell
fi
train=(torchrun --standalone --nproc-per-node "$ranks")
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$OUT/tokenizer.model")
model=(--num-layers 4 --hidden-size 128 --num-attention-heads 4
    --max-position-embeddings "$MAX_LENGTH" --attention-dropout 0 --hidden-dropout 0
    "${tokenizer[@]}" "${host[@]}")

title() { printf '\n[%3d s] %s\n' "$SECONDS" "$1"; }

# run LOG FILTER COMMAND...: all output goes to LOG; lines that the sed FILTER prints are shown.
run() {
    local log=$OUT/$1 filter=$2
    shift 2
    if ! "$@" 2>&1 | tee "$log" | sed -u -nE "$filter"; then
        printf '\n%s\n' "--- the end of $log:" >&2
        # torchrun's own report of the failure would hide the reason.
        sed -E '/failed \(exitcode|closing signal/,$d' "$log" | tail -n 40 >&2
        printf '%s\n' "--- dolly: this failed (all of its output: $PWD/$log):" "$*" >&2
        exit 1
    fi
}
# Logged numbers such as 1.234567e-01, as 0.12.
PLAIN='s/([0-9])\.([0-9]{2})[0-9]*[eE]\+00/\1.\2/g
    s/([0-9])\.([0-9])([0-9]{2})[0-9]*[eE]\+01/\1\2.\3/g
    s/([0-9])\.([0-9])[0-9]*[eE]-01/0.\1\2/g; s/([0-9])\.[0-9]*[eE]-02/0.0\1/g
    s/-?[0-9]\.[0-9]*[eE]-[0-9]+/0.00/g'
LM_LINES="s/^.* iteration +([0-9]+)\/.* (lm loss): ([^ ]+) .*/  iteration \1: \2 \3/; T; $PLAIN; p"
CPO_LINES="/step-0 gate/ { s/.*(step-0 gate)/  \1/p; d; }
    s/.*\[cpo\] (iteration (1|[0-9]*[05]): .* margin=[^ ]+).*/  \1/; T; $PLAIN; p"
GROUP_LINES='/^(groups |tokens: token trees|negatives: [abmt]n)/s/^/  /p; s/^scored/  scored/p'

rm -rf "$OUT"
mkdir -p "$OUT"
head -n "$TRAIN_RECORDS" "$RECORDS" >"$OUT/train.jsonl"
tail -n +$((TRAIN_RECORDS + 1)) "$RECORDS" >"$OUT/valid.jsonl"
echo "dolly: $ranks ranks, $gpus GPUs; everything goes to $OUT"

title "1/5 A tokenizer of $VOCABULARY pieces, and the training records as tokens"
run tokenizer.log 's/^/  /p' megatron-cpo train-tokenizer \
    --input "$OUT/train.jsonl" --output "$OUT/tokenizer.model" --vocab-size "$VOCABULARY"
run tokenize.log 's/^(.* documents;)/  \1/p' megatron-cpo tokenize \
    --input "$OUT/train.jsonl" --output-prefix "$OUT/text" --max-length "$MAX_LENGTH" \
    "${tokenizer[@]}"

title "2/5 The reference: a small GPT, $MLE_ITERATIONS iterations of plain MLE"
run mle.log "$LM_LINES" "${train[@]}" -m megatron_cpo.pretrain_gpt "${model[@]}" \
    --data-path "$OUT/text" --data-cache-path "$OUT/cache" --split 100,0,0 --eval-iters 0 \
    --seq-length "$MAX_LENGTH" --micro-batch-size 4 --global-batch-size 8 \
    --train-iters "$MLE_ITERATIONS" --lr 3e-3 --lr-decay-style cosine --lr-warmup-iters 5 \
    --log-interval 10 --save "$OUT/mle" --save-interval "$MLE_ITERATIONS"

title "3/5 Groups of K=12: the paper's MixN, drawn from the reference and scored under it"
for part in train valid; do
    run "groups-$part.log" "$GROUP_LINES" megatron-cpo --nproc-per-node "$ranks" build \
        --input "$OUT/$part.jsonl" --output-prefix "$OUT/groups-$part" --negatives MixN \
        --k 12 --max-length "$MAX_LENGTH" --load "$OUT/mle" "${model[@]}" \
        --tensor-model-parallel-size "$ranks" --seq-length "$ROW_LENGTH"
done

# Nobody should train on negatives that nobody has looked at.
run inspect.log 's/^/  to look at in a browser: /p' megatron-cpo inspect \
    "$OUT/groups-train" "${tokenizer[@]}" --html "$OUT/groups-train.html"

title "4/5 CPO from the reference, tensor parallel over $ranks, $CPO_ITERATIONS iterations"
run cpo.log "$CPO_LINES" "${train[@]}" -m megatron_cpo.pretrain_gpt "${model[@]}" \
    --cpo-aux-loss --cpo-k 12 \
    --cpo-data-path "$OUT/groups-train" --cpo-valid-data-path "$OUT/groups-valid" \
    --load "$OUT/mle" --finetune --tensor-model-parallel-size "$ranks" \
    --seq-length "$ROW_LENGTH" --micro-batch-size 1 --global-batch-size 12 \
    --train-iters "$CPO_ITERATIONS" --lr 7e-6 --lr-decay-style cosine --lr-warmup-iters 5 \
    --weight-decay 0.05 --eval-interval 10 --eval-iters 1 --log-interval 1 \
    --tensorboard-dir "$OUT/tensorboard" \
    --save "$OUT/cpo" --save-interval "$CPO_ITERATIONS" "$@"

title "5/5 What happened"
megatron-cpo summarize --log "$OUT/cpo.log"
cat <<END

Try next
  bash examples/dolly.sh --cpo-objective ranked   # eq. 2: the whole order, not only the best
  bash examples/dolly.sh --cpo-mle-weight 0       # the paper's own runs: CPO without MLE
  megatron-cpo merge --mle $OUT/mle --cpo $OUT/cpo --alpha 0.3 \\
      --output $OUT/merged               # the paper's last step: average the weights
  tensorboard --logdir $OUT/tensorboard
END
