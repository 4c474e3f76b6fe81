"""A training's checkpoints: whose they are, which is whole, and a result that is there or not.

What every training function does so that it can be killed at any moment and called again. Knows no
method and no model.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

# Every training function takes it from here, beside what makes it resumable.
from prefopt.data.records import whole_folder as whole_folder
from prefopt.data.records import write_bytes
from prefopt.types import content_hash

logger = logging.getLogger(__name__)


def claim_checkpoints(folder: Path, identity: Any) -> None:
    """Bind the folder to this very training; checkpoints of any other one in it are removed.

    Args:
        folder: where the checkpoints lie; made if it is not there.
        identity: everything that the result depends on, as plain data.
    """
    claim = folder / "training.json"
    content = json.dumps({"training": content_hash(identity)}).encode()
    if claim.exists() and claim.read_bytes() == content:
        return
    if folder.exists():
        if list(folder.glob("checkpoint-*")):
            logger.warning("removing checkpoints of a different training from %s", folder)
        shutil.rmtree(folder)
    write_bytes(claim, content)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; torn ones are removed.

    The trainer's state file is written last, so a checkpoint with a readable one is whole.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            whole.append((int(state["global_step"]), path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path, ignore_errors=True)
    return max(whole)[1] if whole else None


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
