"""A small recipe that is in order, for tests that change it."""

import yaml


def recipe_writer(folder):
    """A function that writes a good recipe with changes to its top level, and gives its path."""
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    for part in ("train", "test"):
        (folder / f"{part}.jsonl").write_text('{"text": "one two three"}\n')

    def write(**changes):
        variant = {"negatives": "bn=3", "lr": 1e-4, "steps": 20, "batch": 1, "seeds": [1, 2]}
        content = {
            "model": "hf",
            "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 64},
            "row_length": 256,
            "variants": {"a": variant, "b": variant | {"beta": 0.5, "rounds": 2, "seeds": [1]}},
            "alphas": [0, 0.5],
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


def variant(**changes):
    fast = {"steps": 2, "warmup": 1, "batch": 1}
    return {"v": {"negatives": "bn=3", "lr": 1e-4} | fast | changes}
