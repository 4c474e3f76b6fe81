"""Workers on Ray, some of them killed in the middle of a shard: the bytes are those of a local run."""

import contextlib
import os
import socket
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
N_PROMPTS = 40
ON_RAY = ScaleSettings(shard_size=4, engine="ray")


@pytest.fixture
def cluster(monkeypatch):
    """A machine without CPUs, which the test is on; `add_machine` adds others."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else anything else on the machine comes first
    ray = pytest.importorskip("ray", reason="needs prefopt[ray]")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        add_machine(cluster, num_cpus=0, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_machine(cluster, *, num_cpus=1, env=None, **more):
    """A machine; where one of its processes is too slow to start for Ray, another is tried."""
    for left in range(19, -1, -1):
        # Ray waits 15 seconds for its agents to say which ports they took, if it does not know.
        names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in names]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            ports = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
        try:
            return cluster.add_node(
                num_cpus=num_cpus, object_store_memory=STORE, env_vars={**os.environ, **(env or {})},
                **ports, **more,
            )  # fmt: skip
        except Exception as error:  # Ray has no class of its own for it
            if not left or "timed out during startup" not in str(error):
                raise
    return None


def stumble(monkeypatch, tmp_path, by_machine, before=lambda inside: None, after=lambda: None):
    """Let every stage stumble once; returns the names of the stages that did."""
    from prefopt.scale.ray_engine import RayEngine

    real, stumbled = RayEngine.run, []

    def run(self, work, tasks):
        inside = tmp_path / f"inside-{type(work).__name__}"
        before(inside)
        try:
            yield from real(self, StumblingWork(work, inside, by_machine), tasks)
        finally:
            after()
        if inside.exists():
            stumbled.append(type(work).__name__)

    monkeypatch.setattr(RayEngine, "run", run)
    return stumbled


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "labels.json"  # which names its folder
    }


def whole_job(folder, model, scale):
    sample_shards(
        load_prompts("everyday")[:N_PROMPTS], folder / "answers", model, k=3, scale=scale,
        sampling=SamplingSettings(max_new_tokens=6, batch_size=8), progress=False,
    )  # fmt: skip
    config = LabelConfig(
        candidates=str(folder / "answers"), out=str(folder / "labels"), rule="inferred",
        canaries=0,
    )  # fmt: skip
    labels = label_shards(config, scale=scale, progress=False)
    assert labels.n_comparisons == N_PROMPTS * 3


def compare_with_local(tmp_path, model):
    torch.set_num_threads(1)  # as Ray's workers have, since rounding depends on it
    whole_job(tmp_path / "local", model, ScaleSettings(shard_size=4))
    whole_job(tmp_path / "ray", model, ON_RAY)
    local, ray = files(tmp_path / "local"), files(tmp_path / "ray")
    assert sorted(local) == sorted(ray)
    assert len([name for name in local if name.endswith(".parquet")]) == 5 * N_PROMPTS // 4
    assert [name for name in local if local[name] != ray[name]] == []


def test_a_worker_killed_in_every_stage_changes_no_byte(cluster, tiny_model, tmp_path, monkeypatch):
    add_machine(cluster, num_cpus=2)
    stumbled = stumble(monkeypatch, tmp_path, by_machine=False)
    compare_with_local(tmp_path, tiny_model)
    assert stumbled == ["SampleWork", "JudgeWork", "BuildWork"]


def test_a_machine_killed_in_every_stage_changes_no_byte(
    cluster, tiny_model, tmp_path, monkeypatch
):
    add_machine(cluster)
    over, killed, killers = threading.Event(), [], []

    def before(inside):
        victim = add_machine(cluster, env={VICTIM: "1"})
        over.clear()

        def kill():
            while not inside.exists():
                if over.wait(0.05):
                    return
            cluster.remove_node(victim, allow_graceful=False)
            killed.append(inside.name)

        killers.append(threading.Thread(target=kill))
        killers[-1].start()

    def after():
        over.set()
        killers[-1].join()

    stumble(monkeypatch, tmp_path, by_machine=True, before=before, after=after)
    compare_with_local(tmp_path, tiny_model)
    assert killed == ["inside-SampleWork", "inside-JudgeWork", "inside-BuildWork"]


def test_what_goes_wrong_on_a_worker_is_told_as_it_is_told_here(cluster, tiny_model, tmp_path):
    add_machine(cluster)
    long = [f"Why is it {i}? " + "And why? " * 60 for i in range(4)]
    with pytest.raises(DataError, match="do not fit") as told:
        sample_shards(long, tmp_path / "out", tiny_model, k=2, scale=ON_RAY, progress=False)
    assert told.value.problems
