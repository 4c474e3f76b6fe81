"""Which checkpoint a training goes on from: the newest whose content is what was written."""

import json

import pytest

from prefopt.errors import DataError
from prefopt.training.checkpoints import (
    checkpoint_written,
    claim_checkpoints,
    last_whole_checkpoint,
    seal_checkpoint,
)


def checkpoint(folder, step, *, sealed=True):
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(bytes(range(200)))
    (path / "inner" / "optimizer.pt").write_bytes(b"moments" * 9)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if sealed:
        seal_checkpoint(path)
    return path


def test_the_newest_sealed_checkpoint_is_gone_on_from(tmp_path):
    old, new = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert last_whole_checkpoint(tmp_path) == new
    assert old.exists()


def test_one_that_a_kill_left_unsealed_is_removed(tmp_path, caplog):
    old, torn = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10, sealed=False)
    assert last_whole_checkpoint(tmp_path) == old
    assert not torn.exists()
    assert "checkpoint-10 was not written to its end" in caplog.text


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "optimizer.pt was edited or damaged"),
        (lambda p: p.write_bytes(b"m0ments" + p.read_bytes()[7:]), "optimizer.pt was edited"),
        (lambda p: p.unlink(), "optimizer.pt is gone"),
        (lambda p: p.with_name("sha256.json").write_text("{"), None),
        (lambda p: (p.parents[1] / "sha256.json").write_text("{"), "sha256.json cannot be read"),
        (lambda p: (p.parents[1] / "sha256.json").write_text("[]"), "sha256.json cannot be read"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_it_taken(tmp_path, caplog, damage, says):
    old, new = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    damage(new / "inner" / "optimizer.pt")
    assert last_whole_checkpoint(tmp_path) == (old if says else new)
    if says:
        assert says in caplog.text
        assert not new.exists()


def test_with_none_left_training_begins_anew(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 1, sealed=False)
    assert last_whole_checkpoint(tmp_path) is None


def test_other_trainings_checkpoints_are_removed_and_own_ones_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    claim_checkpoints(folder, {"lr": 1})
    kept = checkpoint(folder, 1)
    claim_checkpoints(folder, {"lr": 1})
    assert kept.exists()
    claim_checkpoints(folder, {"lr": 2})
    assert not kept.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors' words
    ],
)
def test_a_full_disk_is_told_in_the_same_words_by_whichever_library(tmp_path, error):
    with pytest.raises(DataError, match="free space") as told, checkpoint_written(tmp_path):
        raise error
    assert str(tmp_path) in str(told.value)
    with pytest.raises(RuntimeError, match="other"), checkpoint_written(tmp_path):
        raise RuntimeError("other")
