"""Two machines on Ray, one killed in the middle of a shard: the bytes are those of a local run."""

import os
import threading
from pathlib import Path

import pytest
import torch

from prefopt.data.prompts import load_prompts
from prefopt.errors import DataError
from prefopt.label_job import LabelConfig
from prefopt.sampling.candidates import SamplingSettings
from prefopt.scale.candidates import sample_shards
from prefopt.scale.labels import label_shards
from prefopt.scale.settings import ScaleSettings
from tests.scale.stumbling_work import VICTIM, StumblingWork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.enable_socket,
    # Ray leaves files and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STORE = 100_000_000


@pytest.fixture
def cluster(monkeypatch):
    """A head without CPUs and one machine with one; the test adds another, and kills it."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Read when Ray is imported: a busy machine takes more than its 30 seconds.
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def kills(cluster, monkeypatch, tmp_path):
    """Adds a machine for each stage and kills it in the middle of its second shard."""
    from prefopt.scale.ray_engine import RayEngine

    real, killed = RayEngine.run, []

    def run(self, work, tasks):
        if len(tasks) < 4:  # the canaries are one shard
            yield from real(self, work, tasks)
            return
        inside = tmp_path / f"inside-{type(work).__name__}"
        victim = cluster.add_node(
            num_cpus=1, object_store_memory=STORE, env_vars={**os.environ, VICTIM: "1"}
        )
        over = threading.Event()

        def kill():
            while not inside.exists():
                if over.wait(0.05):
                    return
            cluster.remove_node(victim, allow_graceful=False)
            killed.append(type(work).__name__)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            yield from real(self, StumblingWork(work, inside), tasks)
        finally:
            over.set()
            killer.join()

    monkeypatch.setattr(RayEngine, "run", run)
    return killed


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "labels.json"  # which names its folder
    }


def test_two_machines_one_killed_in_every_stage_give_the_bytes_of_a_local_run(
    tiny_model, tmp_path, kills
):
    torch.set_num_threads(1)  # as Ray's workers have, since rounding depends on it
    prompts = load_prompts("everyday")[:48]
    for name, scale in (
        ("local", ScaleSettings(shard_size=4)),
        ("ray", ScaleSettings(shard_size=4, engine="ray")),
    ):
        folder = tmp_path / name
        sample_shards(
            prompts, folder / "answers", tiny_model, k=3, scale=scale, progress=False,
            sampling=SamplingSettings(max_new_tokens=6, batch_size=8),
        )  # fmt: skip
        config = LabelConfig(
            candidates=str(folder / "answers"), out=str(folder / "labels"), rule="inferred"
        )
        labels = label_shards(config, scale=scale, progress=False)
        assert labels.n_comparisons == 48 * 3
    assert kills == ["SampleWork", "JudgeWork", "BuildWork"]
    local, ray = files(tmp_path / "local"), files(tmp_path / "ray")
    assert sorted(local) == sorted(ray)
    assert len([name for name in local if name.endswith(".parquet")]) == 5 * 12 + 2
    assert [name for name in local if local[name] != ray[name]] == []


def test_what_goes_wrong_on_a_machine_is_told_as_it_is_told_here(cluster, tiny_model, tmp_path):
    scale = ScaleSettings(shard_size=2, engine="ray")
    long = [f"Why is it {i}? " + "And why? " * 60 for i in range(4)]
    with pytest.raises(DataError, match="do not fit") as told:
        sample_shards(long, tmp_path / "out", tiny_model, k=2, scale=scale, progress=False)
    assert told.value.problems
