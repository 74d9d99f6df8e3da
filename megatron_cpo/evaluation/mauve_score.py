"""MAUVE of files of texts: what `evaluate mauve` does, by the package mauve-text.

MAUVE (Pillutla et al., arXiv:2102.01454) is the area under the divergence curve of two sets of
texts, over the clusters of their features: 1 where both fall into the clusters alike, near 0 where
they share none. Clusters depend on the seed of k-means, so there are several, with their mean and
standard deviation; that is the noise of clustering and not of the texts. Compare figures of one
model of features and of like numbers of texts only.

It writes `mauve.json`, an object with

    mauve      a list: {"candidate", "baseline": path or "reference", "generator", "made",
               "digest": of the candidate's texts, "value", "sd": null of one seed, "values": one
               a seed, "seeds", "buckets": clusters, "texts", "baseline_texts": how many had a
               feature, "empty", "baseline_empty": how many had none, "mauve_star",
               "frontier_integral": means of JMLR 24 (2023)'s}
    features   the model: {"name", "digest" or "sha256", ...}
    definition what the figure is
    tool       this package and its version
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.evaluation.external import ExternalModel
from megatron_cpo.evaluation.mauve_size import check_size
from megatron_cpo.evaluation.results import Results, check_comparable, read_results
from megatron_cpo.evaluation.scores import REFERENCE, TOOL, is_report
from megatron_cpo.extras import needs
from megatron_cpo.files import make_folder, write_json
from megatron_cpo.progress import progress

FIRST_SEED = 25
"""Upstream's default, and those after it."""
LONGEST = 1024
"""Tokens of a text that are looked at, as upstream."""
DEFINITION = (
    "area under the divergence curve of both sets over k-means clusters of their features, scaling "
    "5, 0 to 1, higher is nearer: MAUVE, Pillutla et al. (arXiv:2102.01454), by mauve-text; mean "
    "and standard deviation over seeds of k-means"
)
Featurize = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to [texts, d] features."""


@dataclass(frozen=True)
class Features:
    """A model that texts are compared by."""

    featurize: Featurize
    identity: dict[str, Any]


@dataclass(frozen=True)
class Mauve:
    """MAUVE of a file of texts against a baseline, one value a seed."""

    candidate: Results
    baseline: str
    values: list[float]
    stars: list[float]
    frontiers: list[float]
    seeds: list[int]
    buckets: int
    texts: tuple[int, int]
    """Of both sides, that have a feature."""
    empty: tuple[int, int]

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        """The standard deviation over seeds."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


def open_features(name: str, pool: str = "last", batch: int = 16) -> Features:
    """The model of features.

    Args:
        name: `hf:PATH`, a causal LM; `minilm`, or another model of sentence-transformers.
        pool: of a causal LM: the last hidden state of the `last` token, as upstream, or the `mean`
            over tokens.
        batch: most texts that a causal LM works on at a time.

    Raises:
        ValueError: there is no such model, or a package is missing.
    """
    if name.startswith("hf:"):
        model = ExternalModel(name, "--features", batch)
        return Features(
            lambda texts: model.features(texts, pool, LONGEST), {**model.identity, "pool": pool}
        )
    from megatron_cpo.negatives.embeddings import TextEmbedder

    embedder = TextEmbedder(name, "--features")
    return Features(embedder.embed_texts, embedder.identity)


def mauve_files(
    paths: Sequence[Path],
    features: Callable[[], Features],
    baseline: str = REFERENCE,
    seeds: int = 5,
    few: bool = False,
) -> tuple[list[Mauve], Features]:
    """MAUVE of each file against a baseline.

    Args:
        paths: files of the same records, decoded alike; reports among them are left out.
        features: opens the model, once the files are known to be usable.
        baseline: a file, or `reference`: the records' own continuations.
        seeds: of k-means, how many.
        few: accept few texts, see `check_size`.

    Raises:
        ValueError: a file cannot be read, they cannot be compared, or have too few texts; a model
            or a package is not there.
    """
    mauve = _library()
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: needs at least 1")
    candidates = [read_results(path) for path in paths if not is_report(path)]
    if not candidates:
        raise ValueError(f"{', '.join(map(str, paths))}: no file of texts among them")
    named = None if baseline == REFERENCE else read_results(Path(baseline))
    check_comparable([*candidates, *([named] if named else [])])
    sides = [(_outputs(each), _outputs(named) if named else _truths(each)) for each in candidates]
    for each, side in zip(candidates, sides, strict=True):
        check_size(each.path, min(len(texts) for texts, _ in side), few)
    model = features()
    distinct = list(dict.fromkeys(t for side in sides for texts, _ in side for t in texts))
    vectors = dict(zip(distinct, model.featurize(distinct), strict=True))
    used = list(range(FIRST_SEED, FIRST_SEED + seeds))
    found = []
    with progress(None, "mauve", "clusterings", len(candidates) * seeds) as bar:
        for each, ((ours, empty), (theirs, missing)) in zip(candidates, sides, strict=True):
            p, q = (np.stack([vectors[text] for text in texts]) for texts in (theirs, ours))
            results = []
            for seed in used:
                with _without_warnings():
                    results.append(mauve.compute_mauve(p_features=p, q_features=q, seed=seed))
                bar.update(1)
            found.append(
                Mauve(
                    each,
                    baseline,
                    [float(result.mauve) for result in results],
                    [float(result.mauve_star) for result in results],
                    [float(result.frontier_integral) for result in results],
                    used,
                    int(results[0].num_buckets),
                    (len(ours), len(theirs)),
                    (empty, missing),
                )
            )
    return found, model


def write_mauve(path: Path, found: Sequence[Mauve], features: Features) -> None:
    """Write `mauve.json`, whole or not at all; see this module."""
    make_folder(path.parent)
    rows = [
        {
            "candidate": str(each.candidate.path),
            "baseline": each.baseline,
            "generator": each.candidate.generator,
            "made": asdict(each.candidate.made),
            "digest": each.candidate.digest,
            "value": each.value,
            "sd": each.sd,
            "values": each.values,
            "seeds": each.seeds,
            "buckets": each.buckets,
            "texts": each.texts[0],
            "baseline_texts": each.texts[1],
            "empty": each.empty[0],
            "baseline_empty": each.empty[1],
            "mauve_star": float(np.mean(each.stars)),
            "frontier_integral": float(np.mean(each.frontiers)),
        }
        for each in found
    ]
    content = {"mauve": rows, "features": features.identity, "definition": DEFINITION, "tool": TOOL}
    write_json(path, content)


def describe_mauve(found: Sequence[Mauve], features: Features) -> str:
    """The figures for people."""
    lines = [f"MAUVE by the features of {features.identity['name']}"]
    for each in found:
        spread = "" if each.sd is None else f" ± {each.sd:.4f} over {len(each.seeds)} seeds"
        left = sum(each.empty)
        lines.append(
            f"  {each.candidate.generator} against {each.baseline}: {each.value:.4f}{spread}, "
            f"{each.texts[0]} texts against {each.texts[1]} in {each.buckets} clusters"
            + (f", {left} empty ones left out" if left else "")
        )
    return "\n".join(lines)


def _outputs(results: Results) -> tuple[list[str], int]:
    """The texts that are not empty, and how many are: there is no feature of nothing."""
    texts = [text.output for text in results.texts if text.output.strip()]
    return texts, len(results.texts) - len(texts)


def _truths(results: Results) -> tuple[list[str], int]:
    """The truth of each record, once whatever the number of its samples."""
    results.truths()  # says which text has none
    truths = list({text.id: str(text.truth) for text in results.texts}.values())
    texts = [truth for truth in truths if truth.strip()]
    return texts, len(truths) - len(texts)


def _library() -> Any:
    try:
        import mauve
    except ImportError as error:
        raise ValueError(f"MAUVE {needs(error.name, 'eval')}") from error
    return mauve


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide what faiss, in C++, prints of fewer than 39 texts a cluster: MAUVE's default is 10."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
