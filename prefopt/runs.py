"""A run is a folder that can be killed at any moment and continued.

    run.json        the configuration the folder was made with
    manifest.json   one entry a finished stage: what it depended on, its content hash, time, count;
                    and the versions, platform and seed, and which files grow with the run
    <stage>.jsonl   a data stage             <stage>/   a stage that makes a folder
    .partial/       unfinished work that the next call goes on with

A stage is finished when the manifest says so; its file was complete and on the disk before that. It is
reused only when everything it depends on is unchanged and its content is what was written. What was
damaged or lost is named, and made again where that is asked for. This module knows no stage by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from prefopt.data.records import (
    disk_errors_told,
    read_records,
    write_bytes,
    write_records,
)
from prefopt.errors import RunError
from prefopt.folder_lock import lock_folder
from prefopt.types import content_hash

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)
K = TypeVar("K")

_REDO = "on_change=redo (on the command line --on_change redo)"

_VERSIONS_OF = ("prefopt", "torch", "transformers", "trl", "peft", "datasets", "anthropic")


class StageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifest keeps about a finished stage."""

    depends_on: dict[str, str]
    sha256: str
    seconds: float
    n_records: int | None = None


class Manifest(msgspec.Struct, kw_only=True):
    """The run's record of what was made, by what, from what."""

    versions: dict[str, str]
    platform: str
    seed: int | None
    stages: dict[str, StageEntry] = {}
    growing: list[str] = []
    """Files that were begun and have no hash of their own, such as a ledger."""


class Run:
    """An opened run folder; use it as a context manager, so that no second process writes to it."""

    def __init__(
        self,
        folder: str | Path,
        config: dict[str, Any],
        *,
        on_change: Literal["refuse", "redo"] = "refuse",
    ) -> None:
        """Open or create the folder.

        Args:
            folder: where the run lives.
            config: everything the user chose, as plain data.
            on_change: what to do when the folder was made with another configuration, or when a
                file of it was damaged or lost: "refuse" raises RunError naming what differs; "redo"
                makes the stages again that this concerns and moves their old results to
                `superseded/`.
        """
        self.folder = Path(folder)
        self.on_change = on_change
        self._config = json.loads(msgspec.json.encode(config))
        self._lock = lock_folder(self.folder)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):  # of a process killed while it wrote
            leftover.unlink(missing_ok=True)
        config_path, manifest_path = self.folder / "run.json", self.folder / "manifest.json"
        stored = self._read(config_path, dict[str, Any])
        manifest = self._read(manifest_path, Manifest)
        # What is there without a manifest is not ours to remove.
        self._lost = manifest is None and self._has_results()
        if self._lost and stored is not None and self.on_change == "refuse":
            raise RunError(
                f"{manifest_path} is gone, and with it what the files in the folder are. Restore it, "
                f"or pass {_REDO} to make them again; the old ones are then kept in superseded/, and "
                "no verdict is paid for twice."
            )
        gone = [name for name in (manifest.growing if manifest else []) if not self._is_there(name)]
        if gone and self.on_change == "refuse":
            raise RunError(
                f"{self.folder / gone[0]} is gone or empty, though the manifest says that it was "
                f"begun. Restore it, or pass {_REDO} to begin it anew: what it alone holds, such as "
                "verdicts of an unfinished stage, is then asked, and paid for, again."
            )
        for name in gone:
            logger.warning("%s is gone and begins anew", self.folder / name)
        changes = [] if stored is None else _differences(stored, self._config)
        if changes and self.on_change == "refuse":
            raise RunError(
                f"{self.folder} was made with another configuration:\n"
                + "\n".join(f"  - {line}" for line in changes)
                + f"\nChoose another folder, restore the values, or pass {_REDO} to make "
                "the stages that depend on them again."
            )
        for line in changes:
            logger.warning("changed: %s", line)
        write_bytes(config_path, json.dumps(self._config, indent=2, ensure_ascii=False).encode())
        self.manifest = manifest or Manifest(
            versions={}, platform=platform.platform(), seed=self._config.get("seed")
        )
        self.manifest.versions = _versions()
        self.manifest.growing = [n for n in self.manifest.growing if n not in gone]
        self._write_manifest()

    def _is_there(self, name: str) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size > 0

    def _has_results(self) -> bool:
        own = ("run.json", "manifest.json", "superseded")
        return any(p.name not in own and p.name[0] != "." for p in self.folder.iterdir())

    def _read(self, path: Path, kind: type[K]) -> K | None:
        """A file of the run's own; None where there is none, or none that can be read any more."""
        if not path.exists():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (msgspec.MsgspecError, ValueError, OSError) as error:
            if self.on_change == "redo":
                logger.warning("%s cannot be read (%s) and begins anew", path, error)
                return None
            raise RunError(
                f"{path} cannot be read ({error}). It is written whole or not at all, so it was "
                f"changed from outside or the disk damaged it. Restore it, or pass {_REDO} to write "
                "it anew; stages that it no longer vouches for are made again, their old results "
                "are kept in superseded/, and no verdict is paid for twice."
            ) from error

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def records(
        self,
        stage: str,
        record_type: type[T],
        make: Callable[[Path], Sequence[T]],
        *,
        depends_on: dict[str, Any],
    ) -> list[T]:
        """The records of a data stage: read back when it is finished, else made and written.

        Args:
            stage: its name; the file is `<stage>.jsonl`.
            record_type: type of each record.
            make: called with a path for partial results that survives a kill; returns the records.
            depends_on: everything that can change the result: settings, and `run.sha256_of(...)` of
                the stages it reads.
        """
        path = self.folder / f"{stage}.jsonl"
        fingerprint = _fingerprint(depends_on)
        with disk_errors_told(path):
            partial = self.partial_path(stage, fingerprint)
            if self._is_finished(stage, path, fingerprint):
                partial.unlink(missing_ok=True)  # of a process killed before it could
                return read_records(path, record_type)
            started = time.monotonic()
            made = make(partial)
            count = write_records(path, made)
            self._finish(stage, path, fingerprint, started, count)
            partial.unlink(missing_ok=True)
            return list(made)

    def path(
        self, stage: str, name: str, make: Callable[[Path], object], *, depends_on: dict[str, Any]
    ) -> Path:
        """The path of a stage that makes one file or folder called `name`.

        `make` is called with the path; it must create it whole or not at all.
        """
        path = self.folder / name
        fingerprint = _fingerprint(depends_on)
        with disk_errors_told(path):
            if not self._is_finished(stage, path, fingerprint):
                started = time.monotonic()
                make(path)
                self._finish(stage, path, fingerprint, started, None)
        return path

    def begun(self, name: str) -> Path:
        """The path of a file that is there and grows from now on; that it goes missing is told."""
        if name not in self.manifest.growing:
            self.manifest.growing.append(name)
            self._write_manifest()
        return self.folder / name

    def partial_path(self, stage: str, depends_on: dict[str, str]) -> Path:
        """Where unfinished work of a stage is kept; bound to what the stage depends on."""
        folder = self.folder / ".partial"
        with disk_errors_told(folder):
            folder.mkdir(exist_ok=True)
        return folder / f"{stage}-{content_hash(depends_on)[:12]}"

    def sha256_of(self, stage: str) -> str:
        """The content hash of a finished stage."""
        return self.manifest.stages[stage].sha256

    def _is_finished(self, stage: str, path: Path, fingerprint: dict[str, str]) -> bool:
        entry = self.manifest.stages.get(stage)
        if entry is None:
            if path.exists() and self._lost:
                self._set_aside(path)
            elif path.exists():  # finished on disk, but killed before the manifest said so
                _remove(path)
            return False
        changed = sorted(
            key
            for key in {*entry.depends_on, *fingerprint}
            if entry.depends_on.get(key) != fingerprint.get(key)
        )
        if changed:
            if self.on_change == "refuse":
                raise RunError(
                    f"stage {stage!r} in {self.folder} was made from something else: "
                    f"{', '.join(changed)} changed since. Choose another folder, or pass "
                    f"{_REDO} to make it again (the old result is kept in superseded/)."
                )
            self._supersede(stage, path)
            return False
        problem = self._damage(stage, path, entry)
        if problem is None:
            logger.info("stage %s: reused", stage)
            return True
        if self.on_change == "refuse":
            raise RunError(
                f"{problem} Restore it, or pass {_REDO} to make it again: what is there now is then "
                "kept in superseded/, stages that do not change are reused, and no verdict is paid "
                "for twice."
            )
        logger.warning("%s", problem)
        self._supersede(stage, path)
        return False

    @staticmethod
    def _damage(stage: str, path: Path, entry: StageEntry) -> str | None:
        """What is wrong with a finished stage's result."""
        if not path.exists():
            return f"{path} is gone, though the manifest says that stage {stage!r} is finished."
        try:
            if _sha256(path) == entry.sha256:
                return None
        except OSError as error:
            return f"{path} of stage {stage!r} cannot be read: {error.strerror or error}."
        return (
            f"{path} is not what stage {stage!r} wrote: its content hash differs. It was edited or "
            "damaged."
        )

    def _supersede(self, stage: str, path: Path) -> None:
        logger.warning("stage %s is made again; the old result goes to superseded/", stage)
        entry = self.manifest.stages.pop(stage)
        if path.exists():
            self._set_aside(path, entry.sha256[:8])
        self._write_manifest()

    def _set_aside(self, path: Path, mark: str = "") -> None:
        target = self.folder / "superseded" / f"{path.name}.{mark or _sha256(path)[:8]}"
        target.parent.mkdir(exist_ok=True)
        _remove(target)
        path.rename(target)

    def _finish(
        self,
        stage: str,
        path: Path,
        fingerprint: dict[str, str],
        started: float,
        count: int | None,
    ) -> None:
        self.manifest.stages[stage] = StageEntry(
            depends_on=fingerprint,
            sha256=_sha256(path),
            seconds=round(time.monotonic() - started, 2),
            n_records=count,
        )
        self._write_manifest()

    def _write_manifest(self) -> None:
        encoded = msgspec.json.format(msgspec.json.encode(self.manifest), indent=2)
        write_bytes(self.folder / "manifest.json", encoded + b"\n")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _fingerprint(depends_on: dict[str, Any]) -> dict[str, str]:
    """One short hash for each thing a stage depends on, so that a difference can be named."""
    return {key: content_hash(value)[:16] for key, value in depends_on.items()}


def _sha256(path: Path) -> str:
    """The content hash of a file, or of a folder's file names and contents."""
    if path.is_file():
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_sha256(file)}\n".encode())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The leaves in which two configurations differ, as readable lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            path = f"{where}.{key}" if where else key
            if key not in old or key not in new:
                lines.append(f"{path}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}")
            else:
                lines += _differences(old[key], new[key], path)
        return lines
    return [] if old == new else [f"{where}: {old} -> {new}"]
