"""A run folder: reuse, change, damage, two processes, bad places."""

import json
import os

import pytest

from prefopt.errors import DataError, RunError
from prefopt.runs import Run
from prefopt.types import Prompt

CONFIG = {"seed": 3, "model": "m", "dpo": {"beta": 0.1}}


def prompts(n=3):
    return [Prompt.from_text(f"prompt {i}") for i in range(n)]


def one_stage(folder, made, config=CONFIG, depends_on=None, **options):
    with Run(folder, config, **options) as run:

        def make(partial):
            made.append(partial)
            return prompts()

        return run.records("prompts", Prompt, make, depends_on=depends_on or {"n": 3})


def test_a_finished_stage_is_read_back_and_not_made_again(tmp_path):
    made = []
    assert one_stage(tmp_path, made) == one_stage(tmp_path, made) == prompts()
    assert len(made) == 1
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stages"]["prompts"]["n_records"] == 3
    assert manifest["seed"] == 3
    assert manifest["versions"]["prefopt"]


def test_a_changed_configuration_is_refused_and_named(tmp_path):
    one_stage(tmp_path, [])
    with pytest.raises(RunError, match=r"dpo\.beta: 0\.1 -> 0\.5") as error:
        one_stage(tmp_path, [], config={**CONFIG, "dpo": {"beta": 0.5}})
    assert "on_change=redo" in str(error.value)


def test_redo_makes_only_the_stages_that_depend_on_the_change_and_keeps_the_old(tmp_path):
    made = []
    changed = {**CONFIG, "model": "other"}
    one_stage(tmp_path, made)
    one_stage(tmp_path, made, config=changed, on_change="redo")
    assert len(made) == 1  # the stage does not depend on the model
    one_stage(tmp_path, made, config=changed, on_change="redo", depends_on={"n": 4})
    assert len(made) == 2
    assert [p.name.startswith("prompts.jsonl") for p in (tmp_path / "superseded").iterdir()]


def test_a_stage_made_from_something_else_is_never_reused_silently(tmp_path):
    one_stage(tmp_path, [])
    with pytest.raises(RunError, match="n changed since"):
        one_stage(tmp_path, [], depends_on={"n": 4})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_text(p.read_text()[:-20]), "edited or damaged"),
        (lambda p: p.unlink(), "is gone"),
    ],
)
def test_a_damaged_or_missing_file_is_told(tmp_path, damage, says):
    one_stage(tmp_path, [])
    damage(tmp_path / "prompts.jsonl")
    with pytest.raises(RunError, match=says):
        one_stage(tmp_path, [])


@pytest.mark.parametrize("damage", [lambda p: p.write_text("{"), lambda p: p.unlink()])
def test_what_was_damaged_is_made_again_when_that_is_asked_for(tmp_path, damage):
    made = []
    one_stage(tmp_path, made)
    damage(tmp_path / "prompts.jsonl")
    assert one_stage(tmp_path, made, on_change="redo") == prompts()
    assert len(made) == 2
    assert one_stage(tmp_path, made) == prompts()
    assert len(made) == 2


@pytest.mark.parametrize("name", ["manifest.json", "run.json"])
@pytest.mark.parametrize("content", ["{", "", '{"stages": 3}', "\0" * 40])
def test_a_torn_record_of_the_run_is_told_and_written_anew_on_request(tmp_path, name, content):
    one_stage(tmp_path, [])
    before = (tmp_path / "prompts.jsonl").read_bytes()
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=r"cannot be read|another configuration") as error:
        one_stage(tmp_path, [])
    assert name in str(error.value) or "stages" in str(error.value)
    assert "on_change=redo" in str(error.value)
    assert one_stage(tmp_path, [], on_change="redo") == prompts()
    assert one_stage(tmp_path, []) == prompts()
    kept = [p.read_bytes() for p in (tmp_path / "superseded").glob("*")]
    assert kept == ([before] if name == "manifest.json" else [])


def test_a_manifest_that_is_gone_removes_no_results(tmp_path):
    one_stage(tmp_path, [])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"manifest\.json is gone"):
        one_stage(tmp_path, [])
    assert (tmp_path / "prompts.jsonl").exists()
    assert one_stage(tmp_path, [], on_change="redo") == prompts()
    assert len(list((tmp_path / "superseded").iterdir())) == 1


def test_what_was_there_before_the_run_is_set_aside_and_never_removed(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("somebody's own")
    assert one_stage(tmp_path, []) == prompts()
    (kept,) = (tmp_path / "superseded").iterdir()
    assert kept.read_text() == "somebody's own"


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: p.unlink()])
def test_a_growing_file_that_goes_missing_is_told(tmp_path, damage):
    ledger = tmp_path / "ledger"
    with Run(tmp_path, CONFIG) as run:
        ledger.write_text("verdicts")
        assert run.begun("ledger") == ledger
    damage(ledger)
    with pytest.raises(RunError, match="ledger is gone or empty") as error:
        Run(tmp_path, CONFIG)
    assert "on_change=redo" in str(error.value)
    with Run(tmp_path, CONFIG, on_change="redo"):
        pass
    with Run(tmp_path, CONFIG):
        pass


def test_what_a_kill_left_of_a_write_is_cleared_away(tmp_path):
    one_stage(tmp_path, [])
    (tmp_path / ".manifest.json.abc.tmp").write_text("half")
    (tmp_path / ".partial").mkdir(exist_ok=True)
    with Run(tmp_path, CONFIG) as run:
        partial = run.partial_path("prompts", run.manifest.stages["prompts"].depends_on)
        partial.write_text("all of it")
    one_stage(tmp_path, [])
    assert not list(tmp_path.glob(".*.tmp"))
    assert not partial.exists()


def test_a_file_without_a_manifest_entry_is_made_again(tmp_path):
    """The kill fell between the file and the manifest."""
    with Run(tmp_path, CONFIG):
        pass
    (tmp_path / "prompts.jsonl").write_text("anything")
    made = []
    assert one_stage(tmp_path, made) == prompts()
    assert len(made) == 1


def test_two_processes_cannot_use_one_folder(tmp_path):
    with (
        Run(tmp_path, CONFIG),
        pytest.raises(RunError, match="another process"),
        Run(tmp_path, CONFIG),
    ):
        pass
    with Run(tmp_path, CONFIG):
        pass  # free again


def test_the_lock_is_released_when_opening_fails(tmp_path):
    one_stage(tmp_path, [])
    for _ in range(2):
        with pytest.raises(RunError, match="another configuration"):
            Run(tmp_path, {"seed": 4})


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        Run(tmp_path / "file" / "run", CONFIG)


def test_a_read_only_folder_is_a_clear_error(locked_folder):
    with pytest.raises(DataError, match=r"cannot write .*: Permission denied"):
        Run(locked_folder / "run", CONFIG)


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with Run(tmp_path, CONFIG) as run:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device"):
            run.records("prompts", Prompt, lambda _: prompts(), depends_on={})
        monkeypatch.undo()
    assert not (tmp_path / "prompts.jsonl").exists()
    assert not list(tmp_path.glob(".prompts*"))
    assert one_stage(tmp_path, []) == prompts()
