"""Names in other people's files are names: nothing is read or written outside of what was given."""

import json
import os

import pytest

from prefopt.data.export import export_preferences
from prefopt.data.preference_data import save_preferences
from prefopt.data.rows import read_rows
from prefopt.data.shards import read_manifest
from prefopt.errors import DataError
from prefopt.evaluation.evaluate import evaluate_answers
from prefopt.judges import load_judge
from prefopt.serving.hub_push import plan_push
from prefopt.serving.model_card import shown
from prefopt.types import Candidate, Preference, PreferenceGroup, Prompt

EVIL = "../../outside"
NAMES = (
    EVIL, "/etc/passwd", "..", "a/../../b.parquet", "x.parquet/../../y.parquet", ".hidden.parquet",
    "a\\..\\b.parquet", "x.parquet\n", "\x00.parquet", "",
)  # fmt: skip


def files(folder):
    return {
        os.path.relpath(os.path.join(at, n), folder) for at, _, ns in os.walk(folder) for n in ns
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_shards_names_only_files_in_itself(tmp_path, name):
    (tmp_path / "outside").write_text("secret")
    folder = tmp_path / "a" / "shards"
    folder.mkdir(parents=True)
    shard = {"name": name, "rows": 1, "sha256": "0" * 64}
    manifest = {"schema": "prefopt.shards/1", "kind": "x", "complete": True, "shards": [shard]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="manifest"):
        read_manifest(folder)
    with pytest.raises(DataError, match="manifest"):
        read_rows(str(folder))


def group(number):
    prompt = Prompt.from_text(f"{EVIL} {number}", category=EVIL)
    answers = tuple(Candidate(prompt=prompt, text=f"{EVIL} {x}", model=EVIL + x) for x in "ab")
    preference = Preference(chosen=0, rejected=1, p_chosen=1.0)
    return PreferenceGroup(prompt=prompt, answers=answers, preferences=(preference,))


def test_names_in_preferences_and_answers_become_no_paths(tmp_path):
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    groups = [group(i) for i in range(3)]
    save_preferences(groups, inner / "p.jsonl")
    export_preferences(inner / "p.jsonl", inner / "e.jsonl", format="llama-factory")
    sides = [[g.answers[i] for g in groups] for i in (0, 1)]
    evaluate_answers(*sides, judge=load_judge("rules:house_style"), out=inner / "report")
    assert {path.split(os.sep)[:3] == ["a", "b", "c"] for path in files(tmp_path)} == {True}
    assert json.loads((inner / "dataset_info.json").read_text()).keys() == {"e"}


def test_a_model_index_that_points_outside_is_not_pushed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    index = {"weight_map": {"w": EVIL}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is missing"):
        plan_push("owner/name", folder)
    (folder / "model.safetensors.index.json").write_text("[" * 5000)
    with pytest.raises(DataError, match="cannot be read"):
        plan_push("owner/name", folder)


@pytest.mark.parametrize("name", [EVIL, "..", "a/b/c", "/etc/x", "owner/../name", "o/n\n", "-o/n"])
def test_a_repository_has_a_name_and_no_path(tmp_path, name):
    with pytest.raises(DataError, match="no name on the Hub"):
        plan_push(name, tmp_path)


def test_folders_of_this_machine_are_named_by_their_last_part():
    assert shown("/home/someone/secret/model") == "model"
    assert shown("C:\\someone\\model") == "model"
