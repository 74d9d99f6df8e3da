"""The writer of a build, and where its answers are kept."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpo.building.config import BuildConfig
from megatron_cpo.extras import needs
from megatron_cpo.groups.store import is_there
from megatron_cpo.policies.writer import KIND
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.storage.copies import beside
from megatron_cpo.work.locking import only_process

if TYPE_CHECKING:  # needs httpx
    from megatron_cpo.negatives.from_writer import Written


def open_written(config: BuildConfig, tokenizer: Any) -> "Written | None":
    """The sampler of `written` negatives; None if there are none.

    Answers are kept in a folder a block. Builds may share them: who comes second waits for those of
    a block, and then finds them.

    Raises:
        ValueError: no server is named, one is not there (it need not be where the store is), or a
            package.
    """
    if config.writer is None:
        return None
    config.writer.check_named()
    try:
        from megatron_cpo.negatives.from_writer import ROW, Written
        from megatron_cpo.policies.chat import ReplyCache
    except ModuleNotFoundError as error:
        raise ValueError(f"--writer: {needs(error.name, 'server')}") from error
    folder = Path(config.writer.answers or f"{beside(config.output_prefix)}-{KIND}")

    @contextmanager
    def kept(first: int) -> "Iterator[ReplyCache]":
        block = folder / f"{first // config.block_records:08d}"
        with only_process(block), closing(ReplyCache(block / "answers.jsonl", ROW)) as cache:
            yield cache

    written = Written(config.writer, Encoder(tokenizer), kept)
    if not is_there(config.output_prefix):
        written.check()
    return written
