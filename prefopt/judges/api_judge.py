"""What every judge behind a paid or remote API does: many requests at once, retries, a money limit.

In: questions from `prefopt.judges.asking`. Out: outcomes in the ledger, as they come. A subclass
says how one request is made, sent and priced; this file decides when to send, when to try again,
when to wait, and when to stop. It knows no SDK and no wording.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import inspect
import itertools
import logging
import math
import queue
import secrets
import threading
import time
import weakref
from collections.abc import (
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from prefopt.errors import BudgetExceeded, JudgeUnavailable
from prefopt.judges.base import Asked, Judge, Told
from prefopt.judges.concurrency import AdaptiveLimit
from prefopt.judges.ledger import Attempt, Claimed, Ledger, Question
from prefopt.judges.rubric import Rubric
from prefopt.judges.wording import parse_verdict
from prefopt.types import Comparison, Usage, Verdict, VerdictFailure

logger = logging.getLogger(__name__)

T = TypeVar("T")
ReplyEnd = Literal["done", "refused", "truncated", "too_long"]


class Request(NamedTuple):
    """One request: its arguments, what the judge is shown, and the most it can cost."""

    params: dict[str, Any]
    shown: str
    worst_usd: float


class Job(NamedTuple):
    """A question on its way: `claimed` when it is ours already, at no money set aside."""

    key: str
    comparison_id: str
    request: Request
    claimed: bool = False


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What came back, as far as a judge needs it. `usage` has the cost at this judge's prices."""

    text: str
    end: ReplyEnd = "done"
    usage: Usage
    detail: str = ""
    stop_reason: str | None = None
    request_id: str | None = None
    model: str | None = None
    """Which model the service says has answered."""
    remaining: int | None = None
    """How many more requests the service says it takes for now."""


class Unanswered(Exception):
    """One try brought no usable answer.

    `billed` is False where the API surely charged nothing, None where that cannot be known.
    `bill` is what a reply that says nothing cost.
    """

    def __init__(
        self,
        message: str,
        *,
        failure: VerdictFailure = "api_error",
        passing: bool = True,
        billed: bool | None = False,
        retry_after_s: float | None = None,
        congestion: bool = False,
        bill: Usage | None = None,
    ) -> None:
        # A service's JSON may hold halves of surrogate pairs, which no file here takes.
        super().__init__(message.encode("utf-8", "replace").decode())
        self.failure = failure
        self.passing = passing
        self.billed = billed
        self.retry_after_s = retry_after_s
        self.congestion = congestion
        self.bill = bill


class OutOfBudget(Exception):
    """The worst case of the next request does not fit what is left of the limit."""

    def __init__(self, needed_usd: float) -> None:
        super().__init__()
        self.needed_usd = needed_usd


class Halted(Exception):
    """The run was stopped by another request; this one must not send any more."""


class Asker(Protocol):
    """What `Asking` needs of whoever asks over a network: a judge, or a model that answers prompts."""

    name: str
    concurrency: int
    max_attempts: int
    max_usd: float | None
    sleep: Callable[[float], Awaitable[None]]
    spent_usd: float

    def larger(self, request: Request) -> Request | None:
        """The same request with room for a longer reply; None where there is no second try."""

    async def send(self, client: Any, request: Request) -> Reply:
        """Send once, without retries. Raises Unanswered or JudgeUnavailable."""

    def said_by(self, reply: Reply) -> dict[str, Any]:
        """What a reply says, as fields of an outcome."""

    def outcome(self, usage: Usage, said: dict[str, Any]) -> Any:
        """The outcome that the ledger keeps; `said` is `said_by`'s or `failed`'s."""

    def stopped_at_limit(self, book: Ledger, needed_usd: float, finished: int) -> BudgetExceeded:
        """The error that says what was spent, what is kept, and how to go on."""


class ApiJudge(Judge):
    """A judge that asks over a network.

    Subclasses implement `request`, `open_client` and `send`. Arguments that all of them share:

    Args:
        max_usd: the most that all questions of a ledger may cost together, in US dollars; None for
            a service that costs nothing. No request is sent whose worst case could break it. A
            request that was sent but never answered counts in full, since it may be on the bill.
            Without a ledger it is the most this judge object may ever spend.
        concurrency: the most requests under way at once. It begins at 8 and follows what the
            service allows.
        timeout_s: how long one request may take.
        max_attempts: tries per request where the API is busy, breaks off or answers nonsense.
        retry_after_cap_s: the longest wait the API may ask for; beyond it judging stops.
        sleep: waits a number of seconds between tries; `asyncio.sleep` by default.
    """

    def __init__(
        self,
        name: str,
        model: str,
        *,
        rubric: Rubric,
        max_usd: float | None,
        concurrency: int,
        timeout_s: float,
        max_attempts: int,
        retry_after_cap_s: float,
        sleep: Callable[[float], Awaitable[None]] | None,
        problems: Iterable[str] = (),
    ) -> None:
        found = list(problems)
        if max_usd is not None and not max_usd > 0:
            found.append(f"max_usd must be above 0, got {max_usd}.")
        if concurrency < 1:
            found.append(f"concurrency must be 1 or more, got {concurrency}.")
        if max_attempts < 1:
            found.append(f"max_attempts must be 1 or more, got {max_attempts}.")
        if not timeout_s > 0:
            found.append(f"timeout_s must be above 0, got {timeout_s}.")
        if found:
            raise ValueError("\n".join(found))
        self.name = name
        self.model = model
        self.rubric = rubric
        self.max_usd = max_usd
        self.timeout_s = timeout_s
        self.concurrency = concurrency
        self.max_attempts = max_attempts
        self.retry_after_cap_s = retry_after_cap_s
        self.sleep = sleep or asyncio.sleep
        self.spent_usd = 0.0
        self._salt = secrets.token_hex(16)
        self._own_book: Ledger | None = None
        self._serial = itertools.count()

    @abc.abstractmethod
    def request(self, comparison: Comparison) -> Request:
        """The request that shows answer a first."""

    def larger(self, request: Request) -> Request | None:
        """The same request with room for a longer reply; None where there is no second try."""
        return None

    @abc.abstractmethod
    def open_client(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """The client that `send` is given."""

    @abc.abstractmethod
    async def send(self, client: Any, request: Request) -> Reply:
        """Send once, without retries. Raises Unanswered or JudgeUnavailable."""

    def settings(self) -> dict[str, Any]:
        """What all requests share, for the ledger's records."""
        return {"model": self.model, "rubric": self.rubric.text}

    def said_by(self, reply: Reply) -> dict[str, Any]:
        """The verdict in a reply, as fields of a `Verdict`."""
        return said_by(reply)

    def outcome(self, usage: Usage, said: dict[str, Any]) -> Verdict:
        """A verdict, or the failure that came instead."""
        return Verdict(judge=self.name, usage=usage, **said)

    def answer(self, asked: Iterator[Asked], book: Ledger, told: Told) -> int:
        """Ask everything that is not answered or claimed by others, into the ledger.

        Raises:
            BudgetExceeded: the next request could break `max_usd`.
            JudgeUnavailable: credentials, model or account are refused, the API asks for too long
                a wait, the first three requests are all rejected, or ten in a row go unanswered.
        """
        first = next(asked, None)
        if first is None:
            return 0
        self.check_ready()
        book.describe_judge(self.fingerprint, self.name, self.settings())
        left_to_others = 0

        async def ask_all() -> None:
            nonlocal left_to_others
            async with self.open_client() as client:
                left_to_others = await self.ask(client, itertools.chain([first], asked), book, told)

        run_async(ask_all)
        return left_to_others

    def check_ready(self) -> None:
        """Raise JudgeUnavailable where asking cannot succeed, before anything is sent."""

    async def ask(
        self,
        client: Any,
        asked: Iterator[Asked],
        book: Ledger,
        told: Callable[[str, Verdict], Any],
    ) -> int:
        """Ask over an open client; returns how many questions were left to other processes."""
        return await Asking(self, client, self.jobs(asked), book, told).finish()

    def jobs(self, asked: Iterable[Asked]) -> Iterator[Job]:
        """The questions with their requests, made as they are needed."""
        return (Job(key, c.comparison_id, self.request(c)) for key, c in asked)

    def verdicts(
        self, comparisons: Sequence[Comparison]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """Yield (index, verdict) as answers arrive; see `Judge.verdicts` and `answer`.

        Requests run in a thread of their own, so this works inside a running event loop too. At
        most `concurrency` verdicts wait to be taken: whoever stops taking them stops the spending.
        """
        if not comparisons:
            return
        self.check_ready()
        if self._own_book is None:
            self._own_book = Ledger(None)
            # It counts for as long as this judge may be asked again, and nobody closes a judge.
            weakref.finalize(self, self._own_book.close)
        book = self._own_book
        # Nothing is looked up here, so that every key is a new one.
        index_of = {f"{next(self._serial)}": index for index in range(len(comparisons))}
        asked = iter([Asked(k, comparisons[i]) for k, i in index_of.items()])

        async def ask_all(emit: Callable[[tuple[int, Verdict]], Awaitable[None]]) -> None:
            async with self.open_client() as client:
                await self.ask(client, asked, book, lambda key, v: emit((index_of[key], v)))

        yield from _streamed(ask_all)

    def stopped_at_limit(self, book: Ledger, needed_usd: float, finished: int) -> BudgetExceeded:
        """The error that says what was spent, what is kept, and how to go on."""
        spent, unknown, _ = book.money()
        lost = f" and up to ${unknown:.4f} on requests never answered" if unknown else ""
        return BudgetExceeded(
            f"{self.name} stopped at its limit: ${spent:.4f} spent{lost}, of max_usd "
            f"${self.max_usd:.4f}; the next request may cost up to ${needed_usd:.4f}. "
            f"{finished:,} asked just now. Verdicts so far are kept: run again "
            "with a higher max_usd and the same ledger to ask only for the rest."
        )

    def hide_secrets(self, text: str) -> str:
        """`text` without any key that a service may have quoted."""
        return text


class Desk:
    """Writes to a ledger for many at once: what comes in one turn of the loop is one transaction."""

    def __init__(self, book: Ledger) -> None:
        self._book = book
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []

    async def write(self, change: Callable[[], T]) -> T:
        """Make a change and return what it returns, once it is on disk."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        if not self._waiting:
            # Not later: waiting would bunch requests up, and with them their answers.
            loop.call_soon(self.write_all)
        self._waiting.append((change, done))
        # A change once handed in is made, even if the one who asked is cancelled meanwhile.
        return await done

    def write_all(self) -> None:
        """Write what waits, now."""
        changes, self._waiting = self._waiting, []
        if not changes:
            return
        try:
            with self._book.together():
                results = [change() for change, _ in changes]
        except Exception as error:
            for _, done in changes:
                if not done.done():
                    done.set_exception(error)
            return
        for result, (_, done) in zip(results, changes, strict=True):
            if not done.done():
                done.set_result(result)


class Asking:
    """One pass over some questions: workers, retries, and when to stop."""

    _FIRST_REJECTIONS = 3
    _OUTAGE = 10
    _TURN_S = 0.5
    _TELL_EVERY_S = 5.0

    def __init__(
        self,
        judge: Asker,
        client: Any,
        jobs: Iterator[Job],
        book: Ledger,
        told: Callable[[str, Any], Any],
    ) -> None:
        self.judge = judge
        self.client = client
        self.jobs = jobs
        self.book = book
        self.desk = Desk(book)
        self.told = told
        self.finished = 0
        self.left_to_others = 0
        self.rejected_at_first = 0
        self.unanswered_in_a_row = 0
        self.stop: JudgeUnavailable | OutOfBudget | None = None
        self.spending = 0  # requests of ours with money set aside
        self.halted = asyncio.Event()
        self.changed = asyncio.Event()
        self.limit = AdaptiveLimit(judge.concurrency, sleep=judge.sleep)
        self._told_of_wait = -math.inf

    async def finish(self) -> int:
        """Ask until all is answered or asking must stop; then raise the reason."""
        workers = [asyncio.create_task(self._work()) for _ in range(self.judge.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            self.desk.write_all()
            self.limit.open_gates()
        if isinstance(self.stop, OutOfBudget):
            raise self.judge.stopped_at_limit(self.book, self.stop.needed_usd, self.finished)
        if self.stop is not None:
            raise JudgeUnavailable(
                f"{self.judge.name}: {self.stop} {self.finished:,} asked just now; what they brought "
                "is kept."
            )
        return self.left_to_others

    async def _work(self) -> None:
        while self.stop is None:
            epoch = await self.limit.acquire()
            try:
                if self.stop is not None or (job := next(self.jobs, None)) is None:
                    self.jobs = iter(())
                    # The others need not wait for a place to learn that nothing is left.
                    self.limit.open_gates()
                    return
                await self._ask(job, epoch)
            finally:
                self.limit.release()

    async def _ask(self, job: Job, epoch: int) -> None:
        key = job.key
        bills: list[Usage] = []
        problem: Unanswered | None = None
        try:
            if not job.claimed and not await self._claim(job):
                return
            said = await self._answer(job, bills, epoch)
        except Unanswered as error:
            problem = error
            said = failed(error.failure, str(error))
        except (JudgeUnavailable, OutOfBudget, Halted) as error:
            self._stop(error)
            if bills:  # paid for, so it must show up in the records
                message = "Asking stopped before there was a whole answer."
                await self._tell(key, failed("unavailable", message), bills, ())
            else:
                self.book.unclaim(key)
            return
        self.finished += 1
        self._watch(problem)
        await self._tell(key, said, bills, self._last_attempt(said))

    @staticmethod
    def _last_attempt(said: dict[str, Any]) -> tuple[Attempt, ...]:
        attempt: Attempt | None = said.pop("attempt", None)
        return () if attempt is None else (attempt,)

    async def _tell(
        self, key: str, said: dict[str, Any], bills: list[Usage], attempts: tuple[Attempt, ...]
    ) -> None:
        usage = bills[0] if len(bills) == 1 else total_usage(bills)
        verdict = self.judge.outcome(usage, said)
        await self.desk.write(lambda: self.book.record(key, self.judge.name, verdict, attempts))
        self.changed.set()
        told = self.told(key, verdict)
        if inspect.isawaitable(told):
            await told

    def _watch(self, problem: Unanswered | None) -> None:
        """Stop a run that is going nowhere: a wrong setting, or an API that is down."""
        rejected = problem is not None and not problem.passing and problem.failure == "api_error"
        self.rejected_at_first += rejected and self.finished == self.rejected_at_first + 1
        lost = problem is not None and problem.passing and problem.failure == "api_error"
        self.unanswered_in_a_row = self.unanswered_in_a_row + 1 if lost else 0
        if rejected and self.rejected_at_first == self.finished == self._FIRST_REJECTIONS:
            self._stop(
                JudgeUnavailable(
                    f"the first {self.finished} requests were all rejected, so the rest would be: "
                    f"{problem} Check the settings."
                )
            )
        elif self.unanswered_in_a_row == self._OUTAGE:
            self._stop(
                JudgeUnavailable(
                    f"{self._OUTAGE} questions in a row had no answer after "
                    f"{self.judge.max_attempts} tries each, the last: {problem} Run again later."
                )
            )

    def _stop(self, reason: JudgeUnavailable | OutOfBudget | Halted) -> None:
        if isinstance(reason, JudgeUnavailable):
            # Nothing more will succeed, so requests waiting for their next try give up as well.
            self.halted.set()
        self.changed.set()
        if self.stop is None and not isinstance(reason, Halted):
            self.stop = reason
        self.limit.open_gates()

    async def _answer(self, job: Job, bills: list[Usage], epoch: int) -> dict[str, Any]:
        key, request = job.key, job.request
        larger = self.judge.larger(request)
        if larger is not None and self.book.was_truncated(key):
            # The small try was made, by a process that ended then or by a batch.
            if not job.claimed:
                self.spending -= 1
            reply = await self._persist(key, larger, bills, epoch, reserved=False)
        else:
            reply = await self._persist(key, request, bills, epoch, reserved=not job.claimed)
            if reply.end == "truncated" and larger is not None:
                self._count_attempt(key, answered(reply, "truncated", request=request.shown))
                reply = await self._persist(key, larger, bills, epoch, reserved=False)
        self.spending -= 1
        return {**self.judge.said_by(reply), "attempt": answered(reply, request=request.shown)}

    async def _persist(
        self, key: str, request: Request, bills: list[Usage], epoch: int, *, reserved: bool
    ) -> Reply:
        """Try until there is a reply, within the number of attempts; the last error otherwise."""
        try:
            return await self._try(key, request, bills, epoch, reserved=reserved)
        except Unanswered as first:
            if not first.passing or self.judge.max_attempts == 1:
                raise
            problem = first
        return await self._retry(key, request, bills, epoch, problem)

    async def _retry(
        self, key: str, request: Request, bills: list[Usage], epoch: int, first: Unanswered
    ) -> Reply:
        import tenacity

        backoff = tenacity.wait_exponential_jitter(initial=1, max=30, jitter=1)

        def wait_s(state: Any) -> float:
            asked_for_s: float | None = state.outcome.exception().retry_after_s
            own_s: float = backoff(state)
            return max(asked_for_s or 0.0, own_s)

        tries = 0

        async def again() -> Reply:
            nonlocal tries
            tries += 1
            if tries == 1:  # the one that failed already, so that waiting and counting start there
                raise first
            return await self._try(key, request, bills, epoch, reserved=False)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, Unanswered) and error.passing
            ),
            wait=wait_s,
            stop=tenacity.stop_after_attempt(self.judge.max_attempts),
            sleep=self._nap,
            before_sleep=self._tell_of_wait,
            reraise=True,
        )
        reply: Reply = await retrying(again)
        return reply

    def _tell_of_wait(self, state: Any) -> None:
        """Say why nothing moves, but not once for each of many requests that wait together."""
        now = time.monotonic()
        level = logging.DEBUG
        if now >= self._told_of_wait + self._TELL_EVERY_S:
            self._told_of_wait, level = now, logging.INFO
        logger.log(
            level,
            "%s: try %d of %d in %.0f s. %s",
            self.judge.name,
            state.attempt_number + 1,
            self.judge.max_attempts,
            state.next_action.sleep,
            state.outcome.exception(),
        )

    async def _try(
        self, key: str, request: Request, bills: list[Usage], epoch: int, *, reserved: bool
    ) -> Reply:
        """Send one request within the budget and check that a reply came back."""
        if not reserved:
            await self._reserve(key, request.worst_usd)
        try:
            reply = await self.judge.send(self.client, request)
        except JudgeUnavailable as error:
            self._count_attempt(key, Attempt(outcome="refused", problem=str(error)))
            raise
        except Unanswered as error:
            self._note(key, request, bills, epoch, error)
            raise
        except BaseException as error:
            # Cancelled, or a bug: the request may be on the bill.
            self._count_attempt(
                key,
                Attempt(
                    outcome="lost",
                    cost_usd=None,
                    unknown_usd=request.worst_usd,
                    problem=type(error).__name__,
                ),
            )
            raise
        bills.append(reply.usage)
        self.judge.spent_usd += reply.usage.cost_usd
        if reply.remaining is not None:
            self.limit.at_most(reply.remaining)
        if reply.end == "done" and not reply.text.strip():
            empty = Unanswered(
                "The model's reply was empty.", failure="malformed", billed=True, bill=reply.usage
            )
            self._count_attempt(key, answered(reply, "empty", request=request.shown))
            raise empty
        self.limit.succeeded()
        return reply

    def _note(
        self, key: str, request: Request, bills: list[Usage], epoch: int, error: Unanswered
    ) -> None:
        if error.congestion:
            self.limit.congested(epoch, error.retry_after_s or 0.0)
        self._count_attempt(
            key,
            Attempt(
                outcome="failed",
                cost_usd=None if error.billed is None else 0.0,
                unknown_usd=request.worst_usd if error.billed is None else 0.0,
                problem=str(error),
                request=request.shown,
            ),
        )

    def _count_attempt(self, key: str, attempt: Attempt) -> None:
        self.spending -= 1
        self.book.attempt(key, attempt)
        self.changed.set()

    async def _claim(self, job: Job) -> bool:
        question = Question(job.key, job.comparison_id, job.request.shown)

        def claim() -> Claimed:
            return self.book.claim(
                question,
                self.judge.name,
                worst_usd=job.request.worst_usd,
                max_usd=self.judge.max_usd,
            )

        while not self.halted.is_set():
            outcome = await self.desk.write(claim)
            if outcome == "claimed":
                self.spending += 1
                return True
            if outcome == "taken":
                self.left_to_others += 1
            if outcome != "no_money":
                return False
            await self._wait_for_money(job.request.worst_usd)
        raise Halted

    async def _reserve(self, key: str, usd: float) -> None:
        while not self.halted.is_set():
            if self.book.reserve(key, usd, self.judge.max_usd):
                self.spending += 1
                return
            await self._wait_for_money(usd)
        raise Halted

    async def _wait_for_money(self, usd: float) -> None:
        """Worst cases are far above real costs: what is under way frees the rest when it ends."""
        if self.spending:
            self.changed.clear()
            await self.changed.wait()
            return
        if self.stop is not None:
            raise OutOfBudget(usd)
        assert self.judge.max_usd is not None, "only a limit can be in the way"
        if self.book.fits(usd, self.judge.max_usd):
            return  # freed in the same moment
        if self.book.money().reserved_usd < 1e-9:
            raise OutOfBudget(usd)
        # It is another process that has money set aside.
        await asyncio.sleep(self._TURN_S)
        self.book.bury_the_dead()

    async def _nap(self, seconds: float) -> None:
        nap = asyncio.ensure_future(self.judge.sleep(seconds))
        halt = asyncio.ensure_future(self.halted.wait())
        try:
            await asyncio.wait({nap, halt}, return_when=asyncio.FIRST_COMPLETED)
            if nap.done():
                nap.result()
        finally:
            nap.cancel()
            halt.cancel()


def total_usage(bills: Iterable[Usage]) -> Usage:
    """What several replies used together."""
    bills = list(bills)
    return Usage(
        input_tokens=sum(bill.input_tokens for bill in bills),
        output_tokens=sum(bill.output_tokens for bill in bills),
        cost_usd=math.fsum(bill.cost_usd for bill in bills),
    )


def answered(reply: Reply, outcome: str = "answered", **fields: Any) -> Attempt:
    """The ledger's record of a reply."""
    return Attempt(
        outcome=outcome,
        request_id=reply.request_id,
        model=reply.model,
        stop_reason=reply.stop_reason,
        reply=reply.text,
        input_tokens=reply.usage.input_tokens,
        output_tokens=reply.usage.output_tokens,
        cost_usd=reply.usage.cost_usd,
        **fields,
    )


def model_name(said: Any) -> str | None:
    """A model's name as a service tells it, without what no file takes; None where it tells none."""
    return said.encode("utf-8", "replace").decode()[:200] if isinstance(said, str) else None


def said_by(reply: Reply) -> dict[str, Any]:
    """What a reply says, as the fields of a `Verdict`."""
    if reply.end == "refused":
        return failed("refused", f"The model refused; category: {reply.detail}.", reply.text)
    if reply.end == "too_long":
        return failed("too_long", "The answers do not fit the context window.", reply.text)
    if reply.end == "truncated":
        return failed("truncated", f"No verdict within {reply.detail}.", reply.text)
    try:
        preferred, strength, rationale = parse_verdict(reply.text)
    except ValueError as error:
        return failed("malformed", f"Unusable reply: {error}", reply.text)
    return {
        "preferred": preferred,
        "strength": strength,
        "rationale": rationale,
        "reply": reply.text,
    }


def failed(failure: VerdictFailure, message: str, reply: str = "") -> dict[str, Any]:
    """The fields of a `Verdict` that is none."""
    return {"failure": failure, "rationale": message, "reply": reply}


# --- Coroutines from ordinary code --------------------------------------------------------------


def run_async(main: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine to its end, in a thread of its own where a loop is running already."""

    async def run() -> None:
        await main()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(run())
        return

    async def produce(emit: Callable[[None], Awaitable[None]]) -> None:
        await main()

    for _ in _streamed(produce):
        pass


class _End(msgspec.Struct):
    error: BaseException | None = None


def _streamed(
    produce: Callable[[Callable[[T], Awaitable[None]]], Awaitable[None]],
) -> Generator[T, None, None]:
    """Yield what `produce(emit)` emits, running it on an event loop in a thread of its own.

    `emit` returns when the consumer asks for the next value. Closing the generator cancels
    `produce` and waits for its thread.
    """
    results: queue.SimpleQueue[tuple[T, concurrent.futures.Future[None]] | _End]
    results = queue.SimpleQueue()
    started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]]
    started = concurrent.futures.Future()

    async def emit(value: T) -> None:
        taken: concurrent.futures.Future[None] = concurrent.futures.Future()
        results.put((value, taken))
        await asyncio.wrap_future(taken)

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        await produce(emit)

    def work() -> None:
        coroutine = main()
        end = _End()
        try:
            asyncio.run(coroutine)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            end = _End(error)
        finally:
            coroutine.close()
            started.cancel()  # where there was no event loop to be had; else without effect
            results.put(end)

    thread = threading.Thread(target=work, name="prefopt-judge", daemon=True)
    thread.start()
    try:
        while True:
            result = results.get()
            if isinstance(result, _End):
                if result.error is not None:
                    raise result.error
                return
            value, taken = result
            yield value
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # already cancelled
                taken.set_result(None)
    finally:
        with contextlib.suppress(concurrent.futures.CancelledError):
            loop, task = started.result()
            with contextlib.suppress(RuntimeError):  # the loop is closed when all is done
                loop.call_soon_threadsafe(task.cancel)
        thread.join()
