#!/usr/bin/env bash
# Build groups of negatives on a Slurm cluster: 8 jobs of one GPU, each a shard of the same store.
#   sbatch examples/slurm_build.sh data.jsonl out/groups path/to/hf-model
# All jobs must see the folder of the output. They may start at different times, be preempted and
# be requeued: finished blocks are kept, and the job that finishes last puts the store together.
# Should the file system show it the others' last blocks too late, run the command once more with
# --merge in place of --shard.
#SBATCH --job-name=negatives
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=negatives-%A-%a.log
set -euo pipefail

INPUT=${1:?JSON Lines} OUTPUT=${2:?output prefix} MODEL=${3:?folder of a Hugging Face causal LM}
MAX_LENGTH=1024

# Outside Slurm this is one shard that does everything.
megatron-cpo build \
    --input "$INPUT" --output-prefix "$OUTPUT" --max-length "$MAX_LENGTH" \
    --negatives MixN --policy "hf:$MODEL" --score --rank minilm \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$MODEL" \
    --shard "${SLURM_ARRAY_TASK_ID:-0}/${SLURM_ARRAY_TASK_COUNT:-1}"
