"""Which checkpoint is it? An identity that survives moving it, and covers every byte of it.

An identity has the checkpoint's name and a `digest`. What was written before the digest covered
every byte has `sha256` instead, over the ends of its files; it is recognised by that.
"""

from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.digest import digest_of, digest_of_ends, whole_file
from megatron_cpo.checkpoints.folders import TRACKER, checkpoint_folder, damage_named
from megatron_cpo.checkpoints.formats.torch_dist import weights_digest
from megatron_cpo.checkpoints.formats.usable import refuse_unusable
from megatron_cpo.checkpoints.tokens import KEPT


def checkpoint_identity(
    load: str | None, step: int | None = None, like: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """What a Megatron checkpoint is, wherever it lies: its iteration and a digest of its weights.

    None without a checkpoint. Every byte is read: `host.waiting.on_first_rank` asks once for all.

    Args:
        load: Megatron's `--load`: a folder with a tracker file.
        step: Megatron's `--ckpt-step`: this iteration instead of the latest.
        like: an identity to compare with; if it is an old one, so is the result.
    """
    folder = checkpoint_folder(load, step)
    if load is None or folder is None:
        return None
    iteration = folder.name.removeprefix("iter_").lstrip("0") or "0"
    found = {"name": Path(load).name, "iteration": iteration}
    with damage_named(folder):
        if like and "sha256" in like:
            return {**found, "sha256": digest_of_ends(folder)}
        return {**found, "digest": iteration_digest(folder)}


def iteration_digest(folder: Path) -> str:
    """Of the weights of one iteration, without training state where the format tells them apart."""
    if (folder / ".metadata").exists():
        return weights_digest(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return digest_of(
        whole_file(path, folder)
        for path in files
        if not any(part == KEPT or part[0] == "." for part in path.relative_to(folder).parts)
    )


def same_checkpoint(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of the same weights, in terms that both have."""
    name = "digest" if "digest" in one else "sha256"
    return name in one and bool(one[name] == other.get(name))


def short_digest(identity: dict[str, Any]) -> str:
    """Enough of it for a message."""
    return str(identity.get("digest") or identity.get("sha256", ""))[:12]


def require_folder(args: Any) -> Path:
    """The folder of the iteration that Megatron will load from `args.load`; quick.

    Raises:
        ValueError: there is none.
    """
    folder = checkpoint_folder(args.load, args.ckpt_step)
    if folder is not None:
        return folder
    refuse_other_models(args.load)
    raise ValueError(
        f"--load {args.load}: no Megatron checkpoint there (no {TRACKER}); give the folder that "
        "--save wrote"
    )


def refuse_other_models(load: str) -> None:
    """ValueError for a folder that has no Megatron checkpoint, but another program's model.

    Megatron itself would start from random weights. A folder that is empty, or not there, may be
    where a run will save.
    """
    refuse_unusable(Path(load))
    if (Path(load) / "config.json").exists():
        raise ValueError(
            f"--load {load}: no Megatron checkpoint there (no {TRACKER}): it is a Hugging Face "
            "model; convert it with megatron-cpo convert, or, to draw and score, give "
            f"--policy hf:{load} in place of --load"
        )


def require_checkpoint(args: Any) -> dict[str, Any]:
    """The identity of the checkpoint `args.load`.

    Raises:
        ValueError: there is none.
    """
    require_folder(args)
    identity = checkpoint_identity(args.load, args.ckpt_step)
    assert identity is not None
    return identity
