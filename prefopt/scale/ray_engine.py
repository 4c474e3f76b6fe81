"""Shards on many machines: Ray Data hands each to a free worker, and to another when one dies.

A worker writes its result beside the others' and answers with the file's hash; only names and hashes
go through Ray. A shard that is done twice, because a worker was thought dead, is written twice with
the same bytes. The only module that knows Ray.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from prefopt.data.shards import Shard
from prefopt.errors import ModelError, PrefoptError

if TYPE_CHECKING:
    from prefopt.scale.settings import ScaleSettings
    from prefopt.scale.shard_map import Made, Results, ShardTask, Work

_OBJECT_STORE_BYTES = 200_000_000
"""Of a Ray that is started here; nothing but names and hashes goes through it."""


class RayEngine:
    """Works on shards on a Ray cluster. A Ray that is running in this process is used as it is.

    Otherwise one is joined or started when the first shard is to be worked on, and left by `close`.

    Raises:
        ModelError: Ray is not installed.
    """

    def __init__(self, settings: ScaleSettings) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ModelError(
                "Ray is not installed: pip install 'prefopt[ray]'. Without it, engine local works on "
                "one shard after another."
            ) from error
        # It announces every stage; what it warns of may be that the cluster is too small.
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        self._ray: Any = ray
        self._settings = settings
        self._is_ours = False

    def run(self, work: Work, tasks: Sequence[ShardTask]) -> Results:
        """Yield what came of each shard as it is finished, in any order.

        Raises:
            ModelError: the cluster cannot be joined.
            PrefoptError: what was raised by the work on a shard.
        """
        if not tasks:
            return
        ray, settings = self._ray, self._settings
        if not ray.is_initialized():
            self._join()
        context = ray.data.DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False
        try:
            # A block each, so that a free worker takes the next shard and a dead one loses only one.
            shards = ray.data.from_items(
                [{"task": pickle.dumps(task)} for task in tasks], override_num_blocks=len(tasks)
            )
            answers = shards.map(
                _Worker(ray.cloudpickle.dumps(work)),
                num_cpus=settings.cpus,
                num_gpus=settings.gpus or None,
                concurrency=settings.workers,
                # A process keeps its model from shard to shard; a GPU's would end by default.
                max_calls=0 if settings.gpus else None,
            )
            for answer in answers.iter_rows():
                if answer["error"]:
                    raise pickle.loads(answer["error"])
                yield msgspec.json.decode(answer["made"], type=dict[str, Shard])
        finally:
            context.enable_progress_bars = bars

    def _join(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = self._settings.address
        quiet = {"log_to_driver": False, "configure_logging": False}
        self._is_ours = True
        if address is None:
            # Said outright: with no address Ray would join any cluster that it finds.
            self._ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
            return
        try:
            self._ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"cannot join the Ray cluster at {address!r}: {error}. `ray status` says whether it "
                "runs; without an address Ray starts on this machine."
            ) from error

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._is_ours:
            self._ray.shutdown()


class _Worker:
    """What a Ray task runs; the work is opened once a process."""

    def __init__(self, work: bytes) -> None:
        self._work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from prefopt.scale.shard_map import do_task

        try:
            made = do_task(_opened(self._work), pickle.loads(row["task"]))
        except PrefoptError as error:
            # Ray would try again what cannot succeed, and wrap it out of recognition.
            return {"made": b"", "error": pickle.dumps(error)}
        return {"made": msgspec.json.encode(made), "error": b""}


_OPEN: dict[bytes, Callable[[list[Any]], Mapping[str, Made]]] = {}


def _opened(work: bytes) -> Callable[[list[Any]], Mapping[str, Made]]:
    if work not in _OPEN:
        _OPEN.clear()  # one model at a time
        loaded: Work = pickle.loads(work)
        _OPEN[work] = loaded.open()
    return _OPEN[work]
