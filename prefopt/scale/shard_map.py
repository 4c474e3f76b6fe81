"""A folder of shards -> other folders of shards, a shard at a time, resumable.

Whatever is done, is done to one shard by itself: its records are read, go through `Work`, and the
results are written as shards of the same name. So it does not matter where a shard is worked on, in
which order, or how often: the bytes are the same. The manifests name what is finished. This module
knows no stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from prefopt.data.shards import (
    Manifest,
    Shard,
    Shards,
    is_whole,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
    write_table,
)
from prefopt.errors import DataError, RunError
from prefopt.folder_lock import locked_folder
from prefopt.progress import progress_bar
from prefopt.scale.settings import ScaleSettings
from prefopt.types import content_hash

T = TypeVar("T", bound=msgspec.Struct)


class Made(NamedTuple):
    """What came of a shard: records or a `pyarrow.Table`, and what was counted on the way."""

    content: Any
    counts: dict[str, int] = {}  # noqa: RUF012  never written to


class Work(Protocol):
    """What is done to a shard. It is sent to where it is done, so it must pickle."""

    def open(self) -> Callable[[list[Any]], Mapping[str, Made]]:
        """Load what is needed, once a process; the function makes each output of a shard's records."""


class Output(NamedTuple):
    """A folder of shards to be made: `record_type` None stands for `pyarrow.Table`s of `kind`."""

    folder: Path
    kind: str
    record_type: type[msgspec.Struct] | None


class ShardTask(NamedTuple):
    """One shard to work on."""

    source: Path
    shard: Shard
    record_type: type[Any]
    outputs: dict[str, Output]


def map_shards(
    source: Shards[T],
    outputs: Mapping[str, Output],
    work: Work,
    *,
    made_from: Mapping[str, Any],
    engine: Engine,
    unit: str,
    description: str,
    progress: bool = True,
) -> dict[str, Manifest]:
    """Put every shard through `work`; what is finished already is left as it is.

    Args:
        source: where from.
        outputs: the folders to make, by the names that `work` calls them.
        work: what is done.
        made_from: everything beside the source that can change the result.
        engine: where it is done.
        unit: what a record of the source is called on the bar.
        description: the bar's label.
        progress: show a bar with records a second and time left.

    Returns:
        The manifest of each output, complete.

    Raises:
        RunError: a folder was made from something else, or another process is working in it.
        DataError: a shard of the source or of what is finished is damaged, and which; or a folder
            cannot be written. What was finished before is kept.
    """
    asked = {key: content_hash(value)[:16] for key, value in made_from.items()}
    asked["source"] = source.fingerprint[:16]
    with contextlib.ExitStack() as stack:
        for output in outputs.values():
            stack.enter_context(locked_folder(output.folder))
        done = _finished(outputs, asked)
        left = [shard for shard in source.shards if shard.name not in done]
        bar = stack.enter_context(
            progress_bar(
                total=source.n_rows,
                initial=source.n_rows - sum(shard.rows for shard in left),
                description=description,
                unit=unit,
                show=progress and bool(left),
            )
        )
        rows = {shard.name: shard.rows for shard in left}
        tasks = [
            ShardTask(source.folder, shard, source.record_type, dict(outputs)) for shard in left
        ]
        # Closed at once on any error, so that whatever runs behind it stops.
        with contextlib.closing(engine.run(work, tasks)) as results:
            for made in results:
                name = next(iter(made.values())).name
                done[name] = made
                _note(outputs, asked, done, complete=False)
                bar.update(rows[name])
        for output in outputs.values():
            for leftover in output.folder.glob(".part-*.tmp"):  # of workers that were killed
                leftover.unlink(missing_ok=True)
        return _note(outputs, asked, done, complete=True)


def do_task(opened: Callable[[list[Any]], Mapping[str, Made]], task: ShardTask) -> dict[str, Shard]:
    """Read a shard, work on it and write what came of it."""
    made = opened(read_shard(task.source, task.shard, task.record_type))
    found = {}
    for key, output in task.outputs.items():
        if output.record_type is None:
            shard = write_table(output.folder, task.shard.name, made[key].content)
        else:
            shard = write_shard(
                output.folder, task.shard.name, made[key].content, output.record_type
            )
        found[key] = msgspec.structs.replace(shard, counts=made[key].counts)
    return found


Results = Generator[dict[str, Shard], None, None]


class Engine(Protocol):
    """Where shards are worked on."""

    def run(self, work: Work, tasks: Sequence[ShardTask]) -> Results:
        """Yield what came of each shard as it is finished, in any order."""


@contextlib.contextmanager
def opened_engine(settings: ScaleSettings) -> Iterator[Engine]:
    """The engine that `settings` name, for a block.

    Raises:
        ModelError: Ray is not installed.
    """
    if settings.engine == "local":
        yield _Here()
        return
    from prefopt.scale.ray_engine import RayEngine

    engine = RayEngine(settings)
    try:
        yield engine
    finally:
        engine.close()


class _Here:
    """One shard after another in this process."""

    def run(self, work: Work, tasks: Sequence[ShardTask]) -> Results:
        if tasks:
            opened = work.open()
            for task in tasks:
                yield do_task(opened, task)


def _finished(outputs: Mapping[str, Output], asked: dict[str, str]) -> dict[str, dict[str, Shard]]:
    """The shards that are finished in all outputs, by name. A file that was removed is made again."""
    found: list[dict[str, Shard]] = []
    problems: list[str] = []
    for output in outputs.values():
        manifest = read_manifest(output.folder) or Manifest(kind=output.kind, made_from=asked)
        changed = sorted(
            key
            for key in {*manifest.made_from, *asked}
            if manifest.made_from.get(key) != asked.get(key)
        )
        if changed or manifest.kind != output.kind:
            raise RunError(
                f"{output.folder} was made from something else: "
                f"{', '.join(changed) or manifest.kind} changed since. Choose another folder, or "
                "remove this one to make it again."
            )
        whole: dict[str, Shard] = {}
        for shard in manifest.shards:
            try:
                if is_whole(output.folder, shard):
                    whole[shard.name] = shard
            except DataError as error:
                problems.append(str(error))
        found.append(whole)
    if problems:
        raise DataError(
            f"{len(problems)} finished shard(s) cannot be used; nothing was changed.", problems
        )
    names = set.intersection(*(set(whole) for whole in found))
    return {
        name: {key: whole[name] for key, whole in zip(outputs, found, strict=True)}
        for name in names
    }


def _note(
    outputs: Mapping[str, Output],
    asked: dict[str, str],
    done: Mapping[str, Mapping[str, Shard]],
    *,
    complete: bool,
) -> dict[str, Manifest]:
    manifests = {}
    for key, output in outputs.items():
        manifests[key] = Manifest(
            kind=output.kind,
            made_from=asked,
            complete=complete,
            shards=tuple(done[name][key] for name in sorted(done)),
        )
        write_manifest(output.folder, manifests[key])
    return manifests
