"""Message batches of the Anthropic API: half the price, within a day, and never submitted twice.

The API gives no idempotency key, so each batch is written down in the ledger before it is sent. A
send whose outcome is not known (a timeout, a killed process) is looked for in the API's own list of
batches; only when it is surely not there are its questions asked again. This file knows how batches
live and die; what a request or a reply looks like is `prefopt.judges.anthropic`'s.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from prefopt.errors import JudgeUnavailable, PrefoptError
from prefopt.judges.api_judge import (
    Asking,
    Job,
    Reply,
    Request,
    Unanswered,
    answered,
    failed,
    said_by,
)
from prefopt.judges.base import Asked
from prefopt.judges.ledger import Attempt, Batch, Ledger, Question
from prefopt.types import Verdict

if TYPE_CHECKING:
    from prefopt.judges.anthropic import AnthropicJudge

logger = logging.getLogger(__name__)

MAX_REQUESTS = 10_000
"""The API takes 100,000; a smaller batch ends sooner and loses less when it expires."""

MAX_BYTES = 100_000_000

_CLOCK_SKEW_S = 300.0
_WRITE_AT_ONCE = 500
_TRIES_TO_MAKE = 3
_TRIES_TO_READ = 20  # reading costs nothing, and giving up leaves paid answers lying


class BatchAsking:
    """One pass over some questions by message batches."""

    def __init__(
        self,
        judge: AnthropicJudge,
        client: Any,
        book: Ledger,
        told: Callable[[str, Verdict], Any],
    ) -> None:
        self.judge = judge
        # The SDK would send a batch again after a timeout, and both would be billed.
        self.client = client.with_options(max_retries=0, timeout=judge.timeout_s)
        self.book = book
        self.told = told
        self.fingerprint = judge.fingerprint
        self.n_told = 0

    async def finish(self, open_batches: list[Batch], asked: Iterator[Asked]) -> int:
        """Fetch the open batches, send the questions in new ones, and wait for all of them.

        Returns how many questions were left to other processes.

        Raises:
            BudgetExceeded: the next request could break `max_usd`.
            JudgeUnavailable: the trial request or a batch is refused.
        """
        under_way = list(open_batches)
        if under_way:
            logger.info("going on with %d open message batches", len(under_way))
        left_to_others = 0
        pending: list[tuple[Asked, Request]] = []
        tried = bool(under_way)
        out_of_money: float | None = None
        while True:
            while out_of_money is None:
                self._fill(pending, asked)
                if not pending:
                    break
                if not tried:
                    await self._trial(pending.pop(0))
                    tried = True
                    continue
                batch, left = await self._send(pending)
                left_to_others += left
                if batch is not None:
                    under_way.append(batch)
                elif pending:  # nothing of it fits the limit
                    out_of_money = pending[0][1].worst_usd * self._discount
            if not under_way:
                break
            ended = []
            for batch in under_way:
                fate = await self._collected(batch)
                if fate != "open":
                    ended.append(batch)
                if fate == "never_made":
                    left_to_others += batch.n  # to be asked in the next pass
            under_way = [batch for batch in under_way if batch not in ended]
            if ended:
                out_of_money = None  # real costs are far below what was set aside
            elif under_way:
                await self.judge.sleep(self.judge.batch_poll_s)
        if out_of_money is not None:
            raise self.judge.stopped_at_limit(self.book, out_of_money, self.n_told)
        return left_to_others

    @property
    def _discount(self) -> float:
        from prefopt.judges.anthropic import BATCH_DISCOUNT

        return BATCH_DISCOUNT

    # --- Sending ------------------------------------------------------------------------------

    def _fill(self, pending: list[tuple[Asked, Request]], asked: Iterator[Asked]) -> None:
        size = sum(_size(request) for _, request in pending)
        while len(pending) < MAX_REQUESTS and size < MAX_BYTES:
            item = next(asked, None)
            if item is None:
                return
            request = self.judge.request(item.comparison)
            size += _size(request)
            pending.append((item, request))

    async def _trial(self, first: tuple[Asked, Request]) -> None:
        """Ask the first question by itself: a batch is checked only when it is too late."""
        (key, comparison), request = first
        seen: list[Verdict] = []

        def told(key: str, verdict: Verdict) -> None:
            seen.append(verdict)
            self._tell(key, verdict)

        job = Job(key, comparison.comparison_id, request)
        await Asking(self.judge, self.client, iter([job]), self.book, told).finish()
        if seen and seen[0].failure == "api_error":
            raise JudgeUnavailable(
                f"{self.judge.name}: the trial request failed, so no batch was sent: "
                f"{seen[0].rationale}"
            )

    async def _send(self, pending: list[tuple[Asked, Request]]) -> tuple[Batch | None, int]:
        """Send one batch of what is pending; takes what it sent, or what needs no asking, off it."""
        name = secrets.token_hex(4)
        portion: list[tuple[Asked, Request]] = []
        size = 0
        for item, request in pending[:MAX_REQUESTS]:
            size += _size(request)
            if portion and size > MAX_BYTES:
                break
            portion.append((item, request))
        questions = [
            (Question(key, c.comparison_id, request.shown), request.worst_usd * self._discount)
            for (key, c), request in portion
        ]
        ours, seen, taken = self.book.intend_batch(
            name, self.fingerprint, questions, self.judge.name, max_usd=self.judge.max_usd
        )
        sent = {question.key for question in ours}
        requests = [
            {"custom_id": _custom_id(item.key, name), "params": request.params}
            for item, request in portion
            if item.key in sent
        ]
        del pending[:seen]
        if not requests:
            return None, taken
        batch = Batch(
            name, self.fingerprint, self.book.owner, None, "intended", len(requests), time.time()
        )
        return await self._create(batch, requests), taken

    async def _create(self, batch: Batch, requests: list[dict[str, Any]]) -> Batch | None:
        waits = itertools.count(1)
        while True:
            try:
                made = await self.client.messages.batches.create(requests=requests)
            except Exception as error:
                trouble = self.judge.trouble(error)
                if trouble is error:
                    raise
                if isinstance(trouble, JudgeUnavailable):
                    self.book.set_batch(batch.name, "abandoned", note=str(trouble))
                    raise trouble from None
                assert isinstance(trouble, Unanswered)
                status = getattr(error, "status_code", None)
                if status == 429 and next(waits) < self.judge.max_attempts:
                    await self.judge.sleep(max(trouble.retry_after_s or 0.0, 10.0))
                    continue
                if status is not None and status < 500:
                    self.book.set_batch(batch.name, "abandoned", note=str(trouble))
                    raise JudgeUnavailable(
                        f"{self.judge.name}: the message batch was refused: {trouble}"
                    ) from None
                logger.warning(
                    "it is not known whether a message batch was made (%s); looking for it", trouble
                )
                return batch  # stays intended, to be looked for
            self.book.set_batch(batch.name, "submitted", batch_id=made.id)
            logger.info(
                "message batch %s with %s requests is under way; most end within an hour, all "
                "within a day",
                made.id,
                f"{batch.n:,}",
            )
            return msgspec.structs.replace(batch, batch_id=made.id, state="submitted")

    # --- Finding again ------------------------------------------------------------------------

    async def _reconcile(self, batch: Batch) -> Any | None:
        """The API's batch that carries this one's name; None where there is none.

        Which requests a batch holds is told by its results only, so one of the right size and time
        that has not ended yet is waited for.
        """
        known = self.book.known_batch_ids()
        while True:
            waiting = False
            async for found in self.client.messages.batches.list(limit=100):
                created_at = _timestamp(found.created_at)
                if created_at < batch.intended_at - _CLOCK_SKEW_S:
                    break  # newest first
                if found.id in known or _n_requests(found) != batch.n:
                    continue
                if found.processing_status != "ended":
                    # Looked at by itself: a page of a list may be older than the batch.
                    found = await self.client.messages.batches.retrieve(found.id)
                if found.processing_status != "ended":
                    waiting = True
                elif await self._carries(found, batch.name):
                    return found
                else:
                    known.add(found.id)
            if not waiting and time.time() > batch.intended_at + self.judge.reconcile_s:
                return None
            await self.judge.sleep(self.judge.batch_poll_s if waiting else 5.0)

    async def _carries(self, found: Any, name: str) -> bool:
        if not found.results_url:
            return False
        async for result in await self.client.messages.batches.results(found.id):
            return str(result.custom_id).endswith(f"-{name}")
        return False

    # --- Collecting ---------------------------------------------------------------------------

    async def _collected(self, batch: Batch) -> Literal["open", "collected", "never_made"]:
        """Fetch a batch's results if it has ended; what became of it."""
        waits = itertools.count(1)
        while True:
            try:
                if batch.batch_id is None:
                    found = await self._reconcile(batch)
                    if found is None:
                        logger.info(
                            "the message batch was never made; its questions are free again"
                        )
                        self.book.set_batch(batch.name, "abandoned", note="never made")
                        self.judge.batches_never_made += 1
                        if self.judge.batches_never_made >= _TRIES_TO_MAKE:
                            raise JudgeUnavailable(
                                f"{self.judge.name}: {_TRIES_TO_MAKE} message batches could not be "
                                "made. Nothing was billed for them. Run again later, or use "
                                "transport='sync'."
                            )
                        return "never_made"
                    self.book.set_batch(batch.name, "submitted", batch_id=found.id)
                    batch = msgspec.structs.replace(batch, batch_id=found.id, state="submitted")
                found = await self.client.messages.batches.retrieve(batch.batch_id)
                if found.processing_status != "ended":
                    return "open"
                await self._collect(batch)
                return "collected"
            except PrefoptError:
                raise
            except Exception as error:
                trouble = self.judge.trouble(error)
                if trouble is error:
                    raise
                if getattr(error, "status_code", None) == 404 and batch.batch_id is not None:
                    self._lost(batch, "the API no longer has this batch or its results")
                    return "collected"
                if isinstance(trouble, JudgeUnavailable):
                    raise trouble from None
                if next(waits) >= _TRIES_TO_READ:
                    raise JudgeUnavailable(
                        f"{self.judge.name}: message batch {batch.batch_id} cannot be read "
                        f"({trouble}). It is paid for and kept by the API for 29 days: run again "
                        "later with the same ledger to fetch it."
                    ) from None
                asked_for_s = getattr(trouble, "retry_after_s", None)
                await self.judge.sleep(max(asked_for_s or 0.0, 5.0))

    async def _collect(self, batch: Batch) -> None:
        """Read the results into the ledger; read again after a break, what is there is skipped."""
        open_keys = {_custom_id(key, batch.name): key for key in self.book.batch_keys(batch.name)}
        again: list[str] = []
        results = await self.client.messages.batches.results(batch.batch_id)
        portion: list[tuple[str, Any]] = []
        async for result in results:
            key = open_keys.pop(result.custom_id, None)
            if key is None:
                continue
            portion.append((key, result))
            if len(portion) >= _WRITE_AT_ONCE:
                again += self._record(batch, portion)
                portion = []
        again += self._record(batch, portion)
        for key in open_keys.values():
            self._finish(
                key, failed("api_error", "The batch ended without a result for this."), batch
            )
        await self._ask_again(again)
        self.book.set_batch(batch.name, "collected")
        logger.info("message batch %s is collected", batch.batch_id)

    def _record(self, batch: Batch, portion: list[tuple[str, Any]]) -> list[str]:
        """Write down a portion of the results; returns the keys to ask again one by one."""
        shown = self.book.shown(key for key, _ in portion)
        again: list[str] = []
        outcomes: list[tuple[str, str, Verdict, list[Attempt]]] = []
        for key, item in portion:
            try:
                said, attempt, usage = self._read(item, shown[key], batch)
            except _AskAgain as once_more:
                self.book.leave_batch(key, once_more.attempt)
                again.append(key)
                continue
            fields = {} if usage is None else {"usage": usage}
            verdict = Verdict(judge=self.judge.name, **said, **fields)
            outcomes.append((key, self.judge.name, verdict, [attempt]))
        self.book.record_all(outcomes)
        for key, _, verdict, _ in outcomes:
            self._tell(key, verdict)
        return again

    def _read(self, item: Any, shown: str, batch: Batch) -> tuple[dict[str, Any], Attempt, Any]:
        """What one result says, as fields of a verdict, an attempt, and what it used.

        Raises _AskAgain for what may succeed by itself: a cut-off or empty reply, a passing error.
        """
        from prefopt.judges.anthropic import MAX_TOKENS, Message

        where: dict[str, Any] = {"transport": "batch", "batch": batch.batch_id}
        # The SDK builds a kind it does not know as a success, so only the word counts.
        kind = item.result.type
        if kind in ("canceled", "expired"):
            problem = f"The message batch was {kind} before this was asked."
            return failed(kind, problem), Attempt(outcome=kind, problem=problem, **where), None
        if kind == "errored":
            error = getattr(item.result.error, "error", None)
            name, text = getattr(error, "type", "unknown"), getattr(error, "message", "")
            problem = self.judge.hide_secrets(f"The API rejected the request ({name}: {text}).")
            attempt = Attempt(outcome="failed", problem=problem, **where)
            if name != "invalid_request_error":
                raise _AskAgain(attempt)
            return failed("api_error", problem), attempt, None
        worst_tokens = self.judge.worst_tokens(shown)
        reply: Reply | None = None
        if kind == "succeeded":
            try:
                plain = json.loads(item.result.message.model_dump_json(warnings=False))
                message = msgspec.convert(plain, Message)
                reply = self.judge.read_message(
                    message, worst_tokens, MAX_TOKENS, discount=self._discount
                )
            except (ValueError, AttributeError):
                reply = None
        if reply is None:
            worst_usd = self.judge.worst_usd(shown, MAX_TOKENS) * self._discount
            problem = f"The result ({str(kind)[:40]}) is no message."
            raise _AskAgain(
                Attempt(
                    outcome="lost", cost_usd=None, unknown_usd=worst_usd, problem=problem, **where
                )
            )
        if reply.end == "truncated":
            raise _AskAgain(answered(reply, "truncated", **where))
        if reply.end == "done" and not reply.text.strip():
            raise _AskAgain(answered(reply, "empty", **where))
        return said_by(reply), answered(reply, **where), reply.usage

    async def _ask_again(self, keys: list[str]) -> None:
        """Ask one by one what the batch could not settle, from what the ledger says was shown."""
        if not keys:
            return
        shown = self.book.shown(keys)
        jobs = [Job(key, "", self.judge.request_showing(shown[key]), claimed=True) for key in keys]
        await Asking(self.judge, self.client, iter(jobs), self.book, self._tell).finish()

    def _finish(self, key: str, said: dict[str, Any], batch: Batch) -> None:
        verdict = Verdict(judge=self.judge.name, **said)
        attempt = Attempt(
            outcome="failed", transport="batch", batch=batch.batch_id, problem=said["rationale"]
        )
        self.book.record(key, self.judge.name, verdict, [attempt])
        self._tell(key, verdict)

    def _lost(self, batch: Batch, why: str) -> None:
        """Every question of a batch that cannot be read: perhaps paid for, surely not answered."""
        from prefopt.judges.anthropic import MAX_TOKENS

        keys = self.book.batch_keys(batch.name)
        shown = self.book.shown(keys)
        for key in keys:
            worst_usd = self.judge.worst_usd(shown[key], MAX_TOKENS) * self._discount
            attempt = Attempt(
                outcome="lost",
                transport="batch",
                batch=batch.batch_id,
                cost_usd=None,
                unknown_usd=worst_usd,
                problem=why,
            )
            verdict = Verdict(judge=self.judge.name, **failed("api_error", f"Lost: {why}."))
            self.book.record(key, self.judge.name, verdict, [attempt])
            self._tell(key, verdict)
        self.book.set_batch(batch.name, "abandoned", note=why)

    def _tell(self, key: str, verdict: Verdict) -> None:
        self.n_told += 1
        self.told(key, verdict)


class _AskAgain(Exception):
    """A result that settles nothing; the attempt is what it cost."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self.attempt = attempt


def _custom_id(key: str, name: str) -> str:
    return f"{key[:48]}-{name}"


def _size(request: Request) -> int:
    # The shared part is sent with every request. A factor covers JSON's escapes.
    return int(1.2 * len(request.shown.encode())) + _size_of_shared(request)


def _size_of_shared(request: Request) -> int:
    return len(request.params["system"][0]["text"]) + 1_000


def _n_requests(found: Any) -> int:
    counts = found.request_counts
    return int(
        counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
    )


def _timestamp(moment: Any) -> float:
    if isinstance(moment, str):
        moment = datetime.datetime.fromisoformat(moment)
    return float(moment.timestamp())
