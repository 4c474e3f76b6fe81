"""The whole flow under faults: ten in a row, and a campaign of as many as are asked for.

`PREFOPT_FAULTS=1000` sets how many faults the campaign makes, `PREFOPT_FAULT_SEED` which.
"""

import itertools
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from prefopt.testing.billing import read_bills
from tests.faults.faulty_calls import preloaded_environment
from tests.faults.flow_campaign import Campaign, World, finished_stages, read_ledger, stage_of

pytestmark = pytest.mark.skipif(
    preloaded_environment() is None, reason="needs a C compiler, and /proc to name a call's file"
)

# What a sample does to the flow in turn, and what the campaign calls it.
_SAMPLE = {
    "kill": "SIGKILL", "kill_torn": "SIGKILL", "full": "disk full", "terminate": "SIGTERM",
    "kill_after": "SIGKILL", "read_only": "read-only", "input_output": "I/O error",
}  # fmt: skip


# As the system, SQLite and torch say it; torch does not say which it was.
_FULL = r"No space left on device|database or disk is full|the disk is full, read-only or broken"
_RECORDS = r"/\.?(run|manifest)\.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("faults"), fault_share=0.3, seed=1) as made:
        yield made


@pytest.mark.slow
def test_ten_faults_one_after_another_change_nothing(world):
    """In each part of the flow, training too; and where it is through before, in a second one."""
    campaign = Campaign(world, seed=1)
    effects, tries = itertools.cycle(_SAMPLE.items()), Counter()
    for number in itertools.count():
        out = world.folder / f"sample{number}"
        bills_before = len(read_bills(world.log))
        while campaign.n_faults < 10:
            # At which of its calls that change something: a start needs about fifty. A part that was
            # hit goes further the next time.
            stage = stage_of(out)
            fault = {"call": {"nth": 60 + 60 * tries[stage], "effect": (one := next(effects))[0]}}
            tries[stage] += 1
            campaign.hits += campaign._harm(out, one[1], fault)
            if campaign.hits[-1].outcome == "done":
                break
        status, _, said = world.run(world.job(out))
        assert status == 0, said
        world.check_result(out)
        world.check_bills(out, read_bills(world.log)[bills_before:])
        if campaign.n_faults == 10:
            break
    assert {"candidates", "judged", "adapter"} <= {hit.stage for hit in campaign.hits}, (
        campaign.hits
    )


@pytest.mark.slow
def test_a_campaign_of_random_faults_loses_nothing_and_bills_nothing_twice(world):
    campaign = Campaign(world, seed=int(os.environ.get("PREFOPT_FAULT_SEED", "2")))
    campaign.run(int(os.environ.get("PREFOPT_FAULTS", "200")))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sync", "batch"])
def test_each_transport_survives_kills_of_the_whole_flow(world, transport):
    """A batch goes on without its process, and is fetched by the next."""
    out = world.folder / f"transport-{transport}"
    bills_before = len(read_bills(world.log))
    for nth in (60, 75, 90, 105, 120):
        job = world.job(out, transport=transport, call={"nth": nth, "effect": "kill"})
        status, _, said = world.run(job)
        assert status in (0, -signal.SIGKILL), said
    status, _, said = world.run(world.job(out, transport=transport))
    assert status == 0, said
    if transport == "sync":
        world.check_result(out)
    bills = read_bills(world.log)[bills_before:]
    if transport == "batch":
        in_batches = [b.request_hash for b in bills if b.batch_id]
        assert len(in_batches) == len(set(in_batches))
        assert len(in_batches) > 11  # one or two go by themselves, as trials of each process


@pytest.mark.slow
def test_a_real_disk_that_is_full_or_read_only(world):
    """A file system of its own with too little room, then with enough; then one that is read-only."""
    disk = world.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    out = disk / "run"
    bills_before = len(read_bills(world.log))

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)

    told = []
    try:
        for size in ("400k", "600k", "800k", "1200k", "64m"):
            remount(f"size={size}")
            status, _, said = world.run(world.job(out, said=str(world.folder / "disk.said")))
            if status == 0:
                break
            assert status == 1, said
            assert re.search(_FULL, said), said
            assert "prefopt: " in said
            told.append(stage_of(out))
        assert told
        world.check_result(out)
        world.check_bills(out, read_bills(world.log)[bills_before:])
        remount("ro")
        status, _, said = world.run(world.job(out, said=str(world.folder / "disk.said")))
        assert status == 1, said
        assert "Read-only file system" in said
        assert "writable" in said
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_two_processes_in_one_folder_do_the_work_once(world):
    out = world.folder / "two"
    bills_before = len(read_bills(world.log))
    said = [str(world.folder / f"two.said{i}") for i in (0, 1)]
    pids = [world.start(world.job(out, said=text)) for text in said]
    ends = sorted(world.wait(pid)[0] for pid in pids)
    assert ends[0] == 0
    if ends[1] == 1:
        assert any("another process is working in" in Path(text).read_text() for text in said)
    world.check_result(out)
    bills = read_bills(world.log)[bills_before:]
    assert world.check_bills(out, bills) == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_is_told_before_it_reaches_the_weights(world, what):
    out = world.folder / f"nan-{what}"
    status, _, said = world.run(world.job(out, not_a_number={"step": 3, "what": what}))
    assert status == 1
    assert f"the {what} is not finite at step 3" in said
    assert "after step 2" in said
    assert "Lower the learning rate" in said
    assert "adapter" not in finished_stages(out)
    status, _, said = world.run(world.job(out))
    assert status == 0, said
    world.check_result(out)


@pytest.mark.slow
@pytest.mark.parametrize("effect", ["kill", "kill_torn"])
def test_a_kill_at_every_single_write_of_the_run_s_own_records(world, effect):
    """Not at random: the calls that change run.json or manifest.json are each once the last.

    They alone are counted: how many the ledger makes depends on the clock.
    """
    trace = world.folder / f"trace-{effect}"
    first = world.folder / f"traced-{effect}"
    assert world.run(world.job(first, trace=str(trace)))[0] == 0
    places = [
        int(line.split()[0]) for line in trace.read_text().splitlines() if re.search(_RECORDS, line)
    ]
    shutil.rmtree(first)
    assert len(places) > 50
    out = world.folder / f"each-{effect}"
    for number in range(1, len(places) + 1, len(places) // 12):
        shutil.rmtree(out, ignore_errors=True)
        fault = {"nth": number, "effect": effect, "only": _RECORDS}
        status, _, said = world.run(world.job(out, call=fault))
        assert status == -signal.SIGKILL, said
        status, _, said = world.run(
            world.job(out, call={"nth": places[number - 1] + 20, "effect": "kill"})
        )  # whatever it left is read again
        assert status in (0, -signal.SIGKILL), said


@pytest.mark.slow
def test_what_the_manifest_vouches_for_is_on_the_disk_by_then(world):
    """For a power cut, which takes what was written and not flushed: every file's last call before it
    counts as whole is a flush."""
    trace, out = world.folder / "trace", world.folder / "traced"
    assert world.run(world.job(out, trace=str(trace)))[0] == 0
    last: dict[str, str] = {}
    names = 0
    for line in trace.read_text().splitlines():
        _, call, path = line.split(" ", 2)
        # safetensors writes under a passing name, and renames it by a call of its own.
        path = re.sub(r"/\.tmp\w+$", "/adapter_model.safetensors", path)
        if call in ("write", "truncate") or (call == "fsync" and path in last):
            last[path] = call
        if call == "rename":
            whole = path.removesuffix("/sha256.json")
            folder, name = path.rsplit("/", 1)
            parts = (f"{whole}/", f"{whole}.tmp/", f"{folder}/.{name}.")
            at_risk = {p: c for p, c in last.items() if c != "fsync" and p.startswith(parts)}
            assert not at_risk, (path, at_risk)
            names += 1
    assert names > 30
    assert any("checkpoint-" in p for p in last)
    assert last["/adapter.tmp/adapter_model.safetensors"] == "fsync"


@pytest.mark.slow  # as the campaign is: it needs the same server, process and undisturbed run
def test_the_campaign_notices_what_it_is_there_to_notice(world):
    """A lost verdict, another byte, a second bill and an untold error are all found."""
    from tests.faults.flow_campaign import Broken

    out = world.folder / "mutated"
    bills_before = len(read_bills(world.log))
    shutil.copytree(world.undisturbed, out)
    world.check_result(out)
    (out / "candidates.jsonl").write_bytes((out / "candidates.jsonl").read_bytes() + b" ")
    with pytest.raises(Broken, match=r"candidates\.jsonl"):
        world.check_result(out)
    bills = read_bills(world.log)[:22]
    assert len({b.request_hash for b in bills}) == len(bills)
    assert world.check_bills(world.undisturbed, bills) == 0
    with pytest.raises(Broken, match="billed again"):
        world.check_bills(world.undisturbed, [*bills, bills[0]])
    with pytest.raises(Broken, match="questions billed"):
        world.check_bills(world.undisturbed, bills[1:])
    with read_ledger(world.undisturbed) as book:
        assert book.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0] == len(bills)
    assert len(read_bills(world.log)) == bills_before
    campaign = Campaign(world, seed=1)
    with pytest.raises(Broken, match="was not told"):
        campaign._must_be_told(out, "disk full", {}, 70, "Traceback: OSError")
    with pytest.raises(Broken, match="does not tell"):
        campaign._must_be_told(out, "disk full", {}, 1, "prefopt: it did not work")
