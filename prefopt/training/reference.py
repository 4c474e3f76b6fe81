"""What DPO compares the policy with, and its log-probabilities, computed once for each answer.

A reference is the model with its adapter off, a frozen copy of an adapter, a copy of the whole
model, or a model that was given. Its log-probabilities are kept token by token under the ids of
prompt and answer, so no choice of loss, beta, pairs or truncation can make them stale: a changed
sequence is another key, and changed weights are another fingerprint.

Knows nothing of losses or the training loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import numpy as np
import torch
from torch import Tensor

from prefopt.errors import TrainingError
from prefopt.training.fused_model import NOTHING_FUSED
from prefopt.training.tree_model import Scoring, base_model, score_answers, tree_attention
from prefopt.trees import AnswerTree

ReferenceKind = Literal[
    "adapter off", "base model", "adapter copy", "model copy", "given model", "none"
]
"""With "base model" too the adapter is off, but the policy starts from another adapter's weights."""

COPY_NAME = "ref"


class Reference(NamedTuple):
    """Which model is the reference.

    `model` is the module to run: the policy itself for the two adapter kinds, None for "none".
    """

    kind: ReferenceKind
    model: Any

    @property
    def is_initial_policy(self) -> bool:
        """Whether policy and reference must agree before the first step."""
        return self.kind in ("adapter off", "adapter copy", "model copy")

    @property
    def shares_weights(self) -> bool:
        """Whether it lives inside the policy, so that it is always at hand."""
        return self.kind in ("adapter off", "base model", "adapter copy")

    def __str__(self) -> str:
        said = {
            "adapter off": "the base model (adapter off)",
            "base model": "the base model, from which the continued adapter has moved already",
            "adapter copy": "a frozen copy of the adapter as it is now",
            "model copy": "a frozen copy of the model as it is now",
            "given model": "the model given as ref_model",
            "none": "not used by these losses",
        }
        return said[self.kind]

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """Within the block the reference's weights are in force, without gradient or dropout."""
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), _adapter(self.model, self.kind):
                yield self.model
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def _adapter(model: Any, kind: ReferenceKind) -> Iterator[None]:
    # PEFT's switches also decide which parameters train, which is put back as it was before anything
    # runs: a weight that is gathered for the reference may be the one that the policy goes on with.
    trains = [(p, p.requires_grad) for p in model.parameters()]

    def restored() -> None:
        for parameter, flag in trains:
            parameter.requires_grad_(flag)

    if kind in ("adapter off", "base model"):
        try:
            with model.disable_adapter():
                restored()
                yield
        finally:
            restored()
    elif kind == "adapter copy":
        before = model.active_adapter
        model.set_adapter(COPY_NAME)
        restored()
        try:
            yield
        finally:
            model.set_adapter(before)
            restored()
    else:
        yield


def copy_adapter(model: Any) -> None:
    """Add a frozen copy of a PEFT model's adapter under the name "ref"."""
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    active = model.active_adapter
    model.add_adapter(COPY_NAME, model.peft_config[active])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if f".{active}." in name:
            parameters[name.replace(f".{active}.", f".{COPY_NAME}.")].data.copy_(parameter.data)
    model.set_adapter(active)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trains)


def sequence_key(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bytes:
    """SHA-256 of the ids of a prompt and an answer, and of where one ends and the other begins."""
    digest = hashlib.sha256(len(prompt_ids).to_bytes(8, "little"))
    digest.update(np.asarray((*prompt_ids, *answer_ids), dtype="<i8").tobytes())
    return digest.digest()


def weights_fingerprint(reference: Reference, *, autocast: str = "no") -> str:
    """A hash of every number that makes the reference: its weights, their types and the precision.

    Names and paths do not enter, so a checkpoint that was overwritten has another fingerprint.
    """
    skip = "lora_" if reference.kind in ("adapter off", "base model") else None
    # The policy's own adapter is not part of its reference; that of a given model is.
    given = reference.kind == "given model"
    digest = hashlib.sha256(f"prefopt reference 1, autocast {autocast}".encode())
    with reference.active() as model:
        base = base_model(model)
        digest.update(type(base).__name__.encode())
        digest.update(_settings(base.config).encode())
        adapters = getattr(model, "peft_config", {})
        for name in sorted(adapters) if given else {COPY_NAME} & set(adapters):
            digest.update(f"{name} {_settings(adapters[name])}".encode())
        if given and adapters:
            digest.update(repr(model.active_adapters).encode())
        for name, tensor in _state(model, set() if given else set(adapters) - {COPY_NAME}):
            if skip is not None and skip in name:
                continue
            # Only the copy's weights count, under the name they have in the adapter they copy.
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            data = tensor.detach().cpu().contiguous()
            digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(config: Any) -> str:
    """What a configuration sets, the same in every process and for every name of the model."""
    settings = config.to_dict()
    for name in (
        "_name_or_path",
        "base_model_name_or_path",
        "transformers_version",
        "peft_version",
    ):
        settings.pop(name, None)
    # The order of a set differs from one process to the next.
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    return repr(sorted(plain.items()))


def _state(model: Any, adapters: set[str]) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers but those of the adapters."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not any(f".{adapter}." in name for adapter in adapters):
            yield name, tensor


class ReferenceCache:
    """Reference log-probabilities of answers, in memory and, with a folder, on disk.

    The file is one SQLite database that any number of runs share, also at the same time; a killed
    run keeps what it had written.

    Args:
        folder: where `reference.sqlite` lies or shall be made; None keeps nothing on disk.
        fingerprint: of the reference's weights.
        in_memory: whether to keep log-probabilities in memory.
    """

    def __init__(
        self, folder: str | Path | None, fingerprint: str, *, in_memory: bool = True
    ) -> None:
        self._memory: dict[bytes, np.ndarray[Any, Any]] = {}
        self._in_memory = in_memory
        self._fingerprint = fingerprint
        self._path = None if folder is None else Path(folder) / "reference.sqlite"
        self._database: sqlite3.Connection | None = None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite does not wait for its turn while another process makes the file.
            with filelock.FileLock(self._path.with_suffix(".lock")):
                self._open(self._path)

    def _open(self, path: Path) -> None:
        try:
            database = sqlite3.connect(path, timeout=60.0)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = NORMAL")
                with database:
                    database.execute(
                        "CREATE TABLE IF NOT EXISTS token_logps (fingerprint TEXT, key BLOB, "
                        "logps BLOB, PRIMARY KEY (fingerprint, key)) WITHOUT ROWID"
                    )
                database.execute("SELECT fingerprint, key, logps FROM token_logps LIMIT 0")
            except BaseException:
                database.close()
                raise
        except sqlite3.DatabaseError as error:
            raise TrainingError(
                f"the reference cache {path} cannot be used ({error}). It holds only what can be "
                "computed again: delete it, or give another reference_cache folder."
            ) from error
        self._database = database
        weakref.finalize(self, _close, database)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Tensor]:
        """What is known, (R,) float32 an answer; keys that are not known are left out."""
        found = {}
        for key in keys:
            values = self._memory.get(key)
            if values is None and self._database is not None:
                row = self._database.execute(
                    "SELECT logps FROM token_logps WHERE fingerprint = ? AND key = ?",
                    (self._fingerprint, key),
                ).fetchone()
                values = None if row is None else np.frombuffer(row[0], dtype="<f4")
                if values is not None and self._in_memory:
                    self._memory[key] = values
            if values is not None:
                found[key] = torch.from_numpy(values.copy())
        return found

    def put(self, values: Mapping[bytes, Tensor]) -> None:
        """Keep the log-probabilities (R,) of some answers."""
        if not self._in_memory and self._database is None:
            return
        arrays = {
            key: value.detach().float().cpu().numpy().astype("<f4") for key, value in values.items()
        }
        if self._in_memory:
            self._memory.update(arrays)
        if self._database is not None:
            with self._database:
                self._database.executemany(
                    "INSERT OR REPLACE INTO token_logps VALUES (?, ?, ?)",
                    ((self._fingerprint, key, value.tobytes()) for key, value in arrays.items()),
                )


def _close(database: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.ProgrammingError):  # of another thread, which ends it itself
        database.close()


class ReferenceScorer:
    """Token log-probabilities of answers under a reference; each sequence is computed once.

    Args:
        reference: which model it is.
        scoring: how it is scored, as `choose_scoring` found for it.
        cache: where what was computed is kept.
        pad_token_id: for ways that pad.
        autocast: makes the context in which the reference runs.
        most: the largest of a number that each process has, where all must run the reference together
            because its weights are parted; then `prepare` comes before `token_logps`.
    """

    def __init__(
        self,
        reference: Reference,
        scoring: Scoring | None,
        cache: ReferenceCache,
        *,
        pad_token_id: int,
        autocast: Any = contextlib.nullcontext,
        most: Callable[[int], int] | None = None,
    ) -> None:
        self.reference, self.cache, self.scoring = reference, cache, scoring
        self._pad, self._autocast, self._most = pad_token_id, autocast, most
        self._prepared: dict[bytes, Tensor] = {}
        self.n_computed = 0

    def release_model(self) -> None:
        """Forget the model, so that its memory can be used; what is cached stays."""
        self.reference = Reference(self.reference.kind, None)
        if self.scoring is not None:  # it names the model's modules
            self.scoring = replace(self.scoring, fused=NOTHING_FUSED)

    def prepare(self, batches: Sequence[Sequence[AnswerTree]], device: torch.device) -> None:
        """Compute what is not known of some batches, as often as the process with the most to do.

        Does nothing where no process needs another one for it.
        """
        if self._most is None:
            return
        self._prepared = {}
        lacking = []
        for trees in batches:
            missing = self._missing(trees, self._known(trees))
            if missing:
                lacking.append(missing)
        for index in range(self._most(len(lacking))):
            mine = index < len(lacking)
            computed = self._compute(lacking[index] if mine else batches[0][:1], device)
            if mine:
                self.cache.put(computed)
                self._prepared |= computed

    def _known(self, trees: Sequence[AnswerTree]) -> dict[bytes, Tensor]:
        keys = {sequence_key(tree.prompt_ids, a) for tree in trees for a in tree.answers}
        found = {key: self._prepared[key] for key in keys & self._prepared.keys()}
        return found | self.cache.get(keys - found.keys())

    @staticmethod
    def _missing(trees: Sequence[AnswerTree], known: Collection[bytes]) -> list[AnswerTree]:
        lacking = (
            AnswerTree(
                tree.prompt_ids,
                tuple(a for a in tree.answers if sequence_key(tree.prompt_ids, a) not in known),
            )
            for tree in trees
        )
        return [tree for tree in lacking if tree.answers]

    def token_logps(self, trees: Sequence[AnswerTree], device: torch.device) -> Tensor:
        """Log-probabilities (R,) of the answers' tokens, answer after answer, on `device`.

        Raises:
            TrainingError: an answer is not in the cache and the model was released.
        """
        known = self._known(trees)
        missing = self._missing(trees, known)
        if missing:
            computed = self._compute(missing, device)
            self.cache.put(computed)
            known |= computed
        keys = (sequence_key(tree.prompt_ids, a) for tree in trees for a in tree.answers)
        return torch.cat([known[key].to(device) for key in keys])

    def _compute(self, trees: Sequence[AnswerTree], device: torch.device) -> dict[bytes, Tensor]:
        if self.reference.model is None:
            raise TrainingError(
                f"{len(trees)} prompts have answers whose reference log-probabilities were not "
                "precomputed, and the reference model is no longer in memory. Give their dataset "
                "when the trainer is made, or give ref_model."
            )
        scoring = self.scoring
        if scoring is None:
            raise RuntimeError("it is not known yet how the reference is scored.")
        batch = scoring.batch(trees, self._pad).to(device)
        with (
            self.reference.active() as model,
            tree_attention(model, scoring),
            self._autocast(),
        ):
            scores = score_answers(model, batch, scoring, statistics=False)
        self.n_computed += batch.n_answers
        parts = scores.tokens.logprobs.float().split(batch.lengths.tolist())
        names = (sequence_key(t.prompt_ids, a) for t in trees for a in t.answers)
        return dict(zip(names, parts, strict=True))
