"""What `evaluate generate` says while it runs and at its end, and in the file of what made it."""

import json
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpo.evaluation.results import Text
from megatron_cpo.records.chats import template_digest
from megatron_cpo.records.tokenizing import tokenizer_identity


@dataclass(frozen=True)
class Generated:
    """What became of it."""

    path: Path
    texts: list[Text]
    dropped: dict[str, int]
    """Records that were left out, by reason."""
    seconds: float
    """Of all processes together; 0: the file was there already."""

    def __str__(self) -> str:
        ended = sum(text.finish == "stop" for text in self.texts) / len(self.texts)
        tokens = sum(text.tokens or 0 for text in self.texts)
        speed = f", {tokens / self.seconds:,.0f} tokens/s a process" if self.seconds else ""
        empty = sum(not text.output.strip() for text in self.texts)
        lines = [
            f"{self.path}: {len(self.texts):,} texts of {self.texts[0].generator}, "
            f"{ended:.0%} ended by themselves, mean {tokens / len(self.texts):.0f} tokens{speed}"
        ]
        if not self.seconds:
            lines[0] += "; it was there already"
        if empty:
            lines.append(f"empty: {empty:,} texts, which a judge counts as lost")
        lines += [f"left out: {n:,} records: {why}" for why, n in self.dropped.items()]
        return "\n".join(lines)


class Speed:
    """Tokens a second of all blocks that are finished while this runs.

    Args:
        path_of: where a finished block lies.
    """

    def __init__(self, path_of: Callable[[int], Path]) -> None:
        self._path_of, self._tokens, self._start = path_of, 0, time.monotonic()

    def __call__(self, block: int) -> str:
        """What the bar says once a block is finished."""
        with suppress(FileNotFoundError):  # another share was the last, and put all together
            content = self._path_of(block).read_text(encoding="utf-8")
            self._tokens += sum(row["tokens"] for row in json.loads(content)["rows"])
        return f"{self._tokens / (time.monotonic() - self._start):,.0f} tokens/s"


def reading(max_length: int | None, ends: Collection[int], tokenizer: Any) -> str:
    """How records are read, and where texts end."""
    digest, template = tokenizer_identity(tokenizer)["sha256"][:16], template_digest(tokenizer)
    return (
        f"records of at most {max_length} tokens, ends {sorted(ends)}, tokenizer {digest}, "
        f"chat template {template[:16] if template else 'none'}"
    )


def describe_model(identity: dict[str, Any]) -> str:
    """Name and digest of a model, and the type it computes in."""
    where = f" iteration {identity['iteration']}" if "iteration" in identity else ""
    digest = str(identity.get("digest", identity.get("sha256", "")))
    kind = identity.get("dtype", identity["backend"])
    return f"{identity['name']}{where} {digest.rpartition(':')[2][:16]} {kind}".replace("  ", " ")
