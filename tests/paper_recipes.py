"""The paper's recipes on tiny models of the same families, whole: every stage, to its end.

    python -m tests.paper_recipes                   # all of them, by megatron-cpo run; make recipes
    python -m tests.paper_recipes gpt2-xl-dolly

Paths and sizes are changed, and nothing else: weights are random, tokenizers are trained on the
example data, records come from there, cut short, and a judge is added, `tests.judge_server`.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from harness.ranks import ROOT
from tests.conversions import CONFIGS, write_model
from tests.exports import VOCAB, save_byte_level, train_sentencepiece

RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    if path.stem.startswith(("gpt2", "openllama"))
}
DATA = ROOT / "examples" / "data"


@dataclass(frozen=True)
class Sizes:
    """Of the records of a recipe.

    Attributes:
        length: most tokens.
        words: of a text, so that none is split, and of each part of a record.
    """

    source: str
    train: int
    test: int
    length: int
    words: int


WIKI = Sizes("tinystories-train", 6, 100, 48, 16)  # MAUVE needs 100 texts
DOLLY = Sizes("dolly-400", 6, 20, 160, 8)


def tiny(name: str, folder: Path, judge: str, variants: tuple[str, ...] = ()) -> Path:
    """A recipe with its paths and sizes changed, beside its model and records; returns its file.

    Args:
        judge: the address of a judge, to be added.
        variants: names of those to keep; by default all.
    """
    content = yaml.safe_load(RECIPES[name].read_text())
    sizes = WIKI if name.endswith("wiki") else DOLLY
    _write_model(folder / "model", gpt2=name.startswith("gpt2"))
    _write_records(folder, sizes)
    content["model"] = "model"
    content["data"] |= {"train": "train.jsonl", "test": "test.jsonl", "max_length": sizes.length}
    content["row_length"] = 12 * sizes.length
    if variants:
        content["variants"] = {each: content["variants"][each] for each in variants}
    for training in (content["mle"], *content["variants"].values()):
        training |= {"steps": 2, "batch": 1, "warmup": 1}
    content["alphas"] = [0, 0.5]
    content["evaluate"] |= {"max_new_tokens": 8, "judge": {"url": judge, "model": "longer"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def _write_model(folder: Path, gpt2: bool) -> None:
    sizes = {"vocab_size": VOCAB, "n_layer" if gpt2 else "num_hidden_layers": 2}
    write_model(folder, CONFIGS["gpt2" if gpt2 else "llama"] | sizes | {"eos_token_id": 2})
    if gpt2:
        end = "<|endoftext|>"
        save_byte_level(folder, (end,), eos_token=end, bos_token=end, unk_token=end)
    else:
        train_sentencepiece(folder / "tokenizer")


def _write_records(folder: Path, sizes: Sizes) -> None:
    lines = (DATA / f"{sizes.source}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [
        {name: " ".join(text.split()[: sizes.words]) for name, text in json.loads(line).items()}
        for line in lines[: sizes.train + sizes.test]
    ]
    for part, some in (("train", records[: sizes.train]), ("test", records[sizes.train :])):
        content = "".join(json.dumps(record) + "\n" for record in some)
        (folder / f"{part}.jsonl").write_text(content)


@contextlib.contextmanager
def judge() -> Iterator[str]:
    """The address of a judge that prefers the longer answer."""
    command = [sys.executable, "-m", "tests.judge_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def main() -> None:
    """Run the recipes that the command line names, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files stay")
    args = parser.parse_args()
    if unknown := set(args.names) - RECIPES.keys():
        parser.error(f"{', '.join(unknown)}: no such recipe; there are {', '.join(RECIPES)}")
    with tempfile.TemporaryDirectory() as scratch, judge() as url:
        for name in args.names or RECIPES:
            folder = (args.keep or Path(scratch)) / name
            folder.mkdir(parents=True)
            recipe = tiny(name, folder, url)
            print(f"{name}: all stages on a tiny model")
            command = [sys.executable, "-m", "megatron_cpo", "run", recipe, "--output"]
            subprocess.run([*command, folder / "run"], check=True)


if __name__ == "__main__":
    main()
