"""A training's checkpoints: whose they are, which is undamaged, and a result that is there or not.

What every training function does so that it can be killed at any moment and called again. Knows no
method and no model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.data.records import disk_trouble, keep_files, unwritable, write_bytes

# Every training function takes it from here, beside what makes it resumable.
from prefopt.data.records import whole_folder as whole_folder
from prefopt.types import content_hash

logger = logging.getLogger(__name__)

_SEAL = "sha256.json"


def claim_checkpoints(folder: Path, identity: Any) -> None:
    """Bind the folder to this very training; checkpoints of any other one in it are removed.

    Args:
        folder: where the checkpoints lie; made if it is not there.
        identity: everything that the result depends on, as plain data.
    """
    claim = folder / "training.json"
    content = json.dumps({"training": content_hash(identity)}).encode()
    with checkpoint_written(folder):
        if claim.exists() and claim.read_bytes() == content:
            return
        if folder.exists():
            if list(folder.glob("checkpoint-*")):
                logger.warning("removing checkpoints of a different training from %s", folder)
            shutil.rmtree(folder)
        write_bytes(claim, content)


@contextlib.contextmanager
def checkpoint_written(folder: Path) -> Iterator[None]:
    """Say in a block that writes a checkpoint what went wrong with the disk.

    Raises:
        DataError: the disk is full, read-only or broken, whichever library met that.
    """
    try:
        yield
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        raise unwritable(trouble.filename or folder, trouble) from error


def seal_checkpoint(folder: Path) -> None:
    """Write down what is in a checkpoint, once all of it is there and on the disk.

    Raises:
        OSError: the disk is full, or gives way.
    """
    keep_files(folder)
    files = {str(p.relative_to(folder)): _sha256(p) for p in folder.rglob("*") if p.is_file()}
    write_bytes(folder / _SEAL, json.dumps(files, indent=1, sort_keys=True).encode())


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose content is what was written; torn and damaged ones are removed.

    One is sealed last, with the hashes of all its files. What is damaged is named in the log.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    for path in sorted((p for p, n in steps.items() if n.isdigit()), key=lambda p: -int(steps[p])):
        problem = _damage(path)
        if problem is None:
            return path
        logger.warning("%s; training goes on from the checkpoint before it", problem)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being gone on from."""
    try:
        files = json.loads((checkpoint / _SEAL).read_bytes())
        for name, sha256 in files.items():
            if _sha256(checkpoint / name) != sha256:
                return f"{checkpoint / name} was edited or damaged (its content hash differs)"
    except FileNotFoundError as error:
        if Path(error.filename).name == _SEAL:
            return f"{checkpoint} was not written to its end"
        return f"{error.filename} is gone"
    except (OSError, ValueError, AttributeError) as error:
        return f"{checkpoint / _SEAL} cannot be read ({error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resume_point(accelerator: Any, folder: Path, identity: Any) -> Path | None:
    """Claim the folder and find the checkpoint to go on from, once for all processes.

    Args:
        accelerator: of the trainer.
        folder: where the checkpoints lie.
        identity: as for `claim_checkpoints`.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        claim_checkpoints(folder, identity)
        found = [last_whole_checkpoint(folder)]
    broadcast_object_list(found)
    if found[0] is not None and accelerator.is_main_process:
        logger.warning("continuing from %s", found[0].name)
    return found[0]
