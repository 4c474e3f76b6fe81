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


def test_a_torn_manifest_is_told(tmp_path):
    one_stage(tmp_path, [])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        one_stage(tmp_path, [])


def test_a_file_without_a_manifest_entry_is_made_again(tmp_path):
    """The kill fell between the file and the manifest."""
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
