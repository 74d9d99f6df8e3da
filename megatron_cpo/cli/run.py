"""From a model and records to trained, evaluated models: all stages of a recipe.

  megatron-cpo run --output runs/mine recipe.yaml
  megatron-cpo run --output runs/mine recipe.yaml --print > mine.sh     # the commands, for bash
  megatron-cpo run --output runs/mine recipe.yaml --slurm               # as jobs of Slurm
  megatron-cpo run --output runs/mine recipe.yaml --variants mle mixn   # only these

A recipe, in YAML, with paths relative to its file:

  model: models/gpt2            # a Hugging Face folder, or a Megatron checkpoint
  data: {train: train.jsonl, test: test.jsonl, max_length: 512}
  row_length: 4096              # tokens of a row of groups
  layout: {ranks: 2, tp: 2}
  variants:
    mixn: {negatives: MixN, beta: 0.5, lr: 1.0e-4, steps: 80, batch: 8, seeds: [1, 2, 3]}
  alphas: [0, 0.3, 0.5]
  evaluate: {decode: greedy, external: hf:models/SmolLM2-135M}
  export: all                   # trained models as Hugging Face folders, too

Each stage is one of our commands; its output is in OUTPUT/logs. Killed? The same command goes on.
All keys and their defaults: docs/recipes.md.
A stage runs again when its command, its inputs, a stage before it or our code for it has changed.
"""

from pathlib import Path

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.cli.ranks import torchruns_ranks


def main() -> None:
    """Run or print the stages of a recipe."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    add("--output", required=True, type=output_path, metavar="FOLDER", help="where everything goes")
    add("--variants", nargs="+", default=[], metavar="NAME",
        help="only these of the recipe's (default: all)")  # fmt: skip
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", dest="show",
                      help="print a bash script, run nothing")  # fmt: skip
    only.add_argument("--slurm", action="store_true",
                      help="write jobs of Slurm into FOLDER/slurm, run nothing")  # fmt: skip
    args = parser.parse_args()
    if (ranks := torchruns_ranks()) > 1:
        raise ValueError(
            f"{ranks} ranks of torchrun: a recipe's stages start their own, as many as its "
            "layout says; run it without a launcher"
        )

    from megatron_cpo.cli.recipe_flags import check_flags
    from megatron_cpo.files import make_folder, write_whole
    from megatron_cpo.quiet import say
    from megatron_cpo.recipes.outcome import outcome
    from megatron_cpo.recipes.reading import check_plain, read_recipe
    from megatron_cpo.recipes.runner import run_stages
    from megatron_cpo.recipes.shell import script, slurm
    from megatron_cpo.recipes.stages import stages

    output = args.output.resolve()  # one folder is one run, however it is spelt
    check_plain(output, "--output")
    recipe = read_recipe(args.recipe)
    check_flags(recipe, args.recipe)
    plan = stages(recipe, output, args.variants)
    if args.show:
        print(script(plan, output), end="")
    elif args.slurm:
        make_folder(output / "slurm")
        for name, content in slurm(plan, output).items():
            write_whole(output / "slurm" / name, content.encode())
        say(f"submit them with: bash {output / 'slurm' / 'submit.sh'} [options of sbatch]")
    else:
        run_stages(plan, output, stages(recipe, output))
        say(outcome(plan, output))
