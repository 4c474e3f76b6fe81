"""A `History` in the browser: trends, what changed, and every judged pair.

    /                                  series, their trends, and a flag at each change
    /evaluations/3                     one evaluation; its pairs by text, result, category, flip
    /evaluations/3/pairs/17            a pair with the verdicts of both orders
    /changes/2/3                       answers of two evaluations side by side, differences marked

Pages are made on the server, a screenful at a time, so a hundred thousand pairs are no more work than
ten. There is no script; whatever a model or a judge wrote is escaped, and the pages may load nothing.
It serves this machine only, unless told otherwise.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from urllib.parse import urlencode

from prefopt.errors import DataError, PrefoptError
from prefopt.evaluation.advice import interval, percent, signed_percent, task_value
from prefopt.evaluation.figure import task_trend_svg, trend_svg
from prefopt.evaluation.history import Evaluation, History, PairFilter
from prefopt.evaluation.history_changes import SURE_P, CapabilityChange, Change
from prefopt.evaluation.history_trends import TaskTrend, p_said, task_trends
from prefopt.evaluation.report_tables import task_rows
from prefopt.evaluation.win_rate import Result
from prefopt.page_template import page_environment
from prefopt.types import Verdict

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_PAIRS_A_PAGE = 50
_CHANGES_A_PAGE = 20
_MANY_WORDS = 600
_MOST_DIGITS = 19
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_STRENGTHS = {2: "much better", 1: "better", 0: "tie"}


class Piece(NamedTuple):
    """A part of a text that both versions have, or only one of them."""

    text: str
    change: Literal["same", "added", "removed"]


def dashboard(
    history: History, *, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
) -> Starlette:
    """The web application.

    Args:
        history: what to show.
        hosts: names under which it may be asked; another name in a request is refused, so that no
            web page elsewhere can read the history through a name of its own.

    Raises:
        PrefoptError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.convertors import IntegerConvertor, register_url_convertor
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route
    except ImportError as error:
        raise PrefoptError(
            "the dashboard needs Starlette and uvicorn: pip install 'prefopt[dashboard]'"
        ) from error

    class Number(IntegerConvertor):
        """A number that can be read; what has none of it says so itself."""

        regex = "[0-9]{1,4000}"  # as many as Python reads

    register_url_convertor("number", Number())
    pages = _Pages(history)
    return Starlette(
        routes=[
            Route("/", pages.overview),
            Route("/evaluations/{number:number}", pages.evaluation),
            Route("/evaluations/{number:number}/pairs/{place:number}", pages.pair),
            Route("/changes/{earlier:number}/{later:number}", pages.changes),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={DataError: pages.missing, 404: pages.missing},
    )


def serve_dashboard(history: History, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until stopped.

    Raises:
        ValueError: no such port.
        PrefoptError: uvicorn is not installed, or the address cannot be had.
    """
    if not 0 < port < 2**16:  # the system would take another one, and say nothing
        raise ValueError(f"a port is a number from 1 to 65535, got {port}.")
    app = dashboard(history, hosts=("127.0.0.1", "localhost", host))
    import scipy.stats  # noqa: F401  the first page that tests a change would wait for it
    import uvicorn

    print(f"http://{host}:{port}   (stop with Ctrl-C)", flush=True)
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning")
    except SystemExit as error:  # uvicorn's way of saying that it cannot have the port
        raise PrefoptError(
            f"cannot serve at {host}:{port}; is the port taken? Choose another with --port, and as "
            "--host an address that this machine has."
        ) from error


def word_changes(earlier: str, later: str) -> list[Piece]:
    """Two texts as one, with the words that only one of them has marked.

    A word and the space before it are one: spaces alone match everywhere, and long answers would take
    seconds.
    """
    a, b = (re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text) for text in (earlier, later))
    pieces: list[Piece] = []
    # Where a word is everywhere in a long text, as in one that repeats itself, matching from it on
    # takes minutes and says nothing.
    long = len(a) * len(b) > _MANY_WORDS**2
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=long).get_opcodes():
        if tag == "equal":
            pieces.append(Piece("".join(a[i1:i2]), "same"))
            continue
        if i2 > i1:
            pieces.append(Piece("".join(a[i1:i2]), "removed"))
        if j2 > j1:
            pieces.append(Piece("".join(b[j1:j2]), "added"))
    return pieces


@functools.lru_cache(maxsize=64)
def _trend(rates: tuple[tuple[float, float, float], ...]) -> str:
    return trend_svg(rates)


def _task_trend(trend: TaskTrend) -> str:
    """The drawing of a task that was measured more than once."""
    if len(trend.measured) < 2:
        return ""
    return _drawn_task(
        tuple((number, task.tuned) for number, task in trend.measured),
        tuple((number, task.base) for number, task in trend.measured),
        trend.dropped_at,
    )


_drawn_task = functools.lru_cache(maxsize=512)(task_trend_svg)


_Page = Callable[["Request"], Awaitable["Response"]]


class _Pages:
    """One method a page."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.environment = page_environment("evaluation", "judges")
        self.environment.filters.update(percent=percent, signed_percent=signed_percent)
        self.environment.globals.update(
            interval=interval, sure_p=SURE_P, results=get_args(Result), verdict_line=_verdict_line,
            task_rows=task_rows, task_value=task_value,
        )  # fmt: skip

    def overview(self, request: Request) -> Response:
        """All series with their trends."""
        history = self.history
        shown = []
        for name in history.series():
            evaluations = history.evaluations(name)
            changes = history.changes(name)
            shown.append(
                {
                    "name": name,
                    "evaluations": list(reversed(evaluations)),
                    "changes": changes,
                    "trend": _trend(tuple((e.win_rate, e.low, e.high) for e in evaluations)),
                    "tasks": [(t, _task_trend(t)) for t in task_trends(history, name)],
                    "before": {b.number: a.number for a, b in itertools.pairwise(evaluations)},
                }
            )
        return self._page("dashboard.html.j2", series=shown, path=history.path.name)

    def evaluation(self, request: Request) -> Response:
        """One evaluation with a page of its pairs."""
        number = request.path_params["number"]
        found = self.history.evaluation(number)
        query = request.query_params
        wanted = PairFilter(
            text=query.get("text", "").strip(),
            result=query.get("result", ""),
            category=query.get("category") or None,
            flipped=query.get("flipped") == "on",
        )
        page = _number(query.get("page"))
        pairs, total = self.history.pairs(
            number, wanted, offset=(page - 1) * _PAIRS_A_PAGE, limit=_PAIRS_A_PAGE
        )
        report = self.history.report(number)
        compared = self.history.capability_changes(found.series) if report.capabilities else {}
        return self._page(
            "dashboard_evaluation.html.j2",
            evaluation=found,
            report=report,
            since=next(((a, change) for (a, b), change in compared.items() if b == number), None),
            others=[e for e in self.history.evaluations(found.series) if e.number != number],
            categories=[c for c in self.history.categories(number) if c],
            wanted=wanted,
            back=_filter_of(query),
            pairs=pairs,
            total=total,
            pages=_paging(query, page, total, _PAIRS_A_PAGE),
        )

    def pair(self, request: Request) -> Response:
        """One pair with everything that was said about it."""
        number, place = request.path_params["number"], request.path_params["place"]
        found = self.history.evaluation(number)
        pair, judged = self.history.pair(number, place)
        return self._page(
            "dashboard_pair.html.j2",
            evaluation=found,
            back=_filter_of(request.query_params),
            place=place,
            last=self.history.pairs(number, limit=0)[1],
            pair=pair,
            judged=judged,
        )

    def changes(self, request: Request) -> Response:
        """Two evaluations, answer by answer."""
        earlier, later = request.path_params["earlier"], request.path_params["later"]
        query = request.query_params
        page = _number(query.get("page"))
        which: Literal["worse", "better", "all"] = "all"
        if query.get("which") in ("worse", "better"):
            which = "worse" if query["which"] == "worse" else "better"
        answers, total = self.history.answer_changes(
            earlier, later, which=which, offset=(page - 1) * _CHANGES_A_PAGE, limit=_CHANGES_A_PAGE
        )
        return self._page(
            "dashboard_changes.html.j2",
            earlier=self.history.evaluation(earlier),
            later=self.history.evaluation(later),
            change=self.history.change(earlier, later),
            which=which,
            answers=[(answer, word_changes(answer.earlier, answer.later)) for answer in answers],
            total=total,
            pages=_paging(query, page, total, _CHANGES_A_PAGE),
        )

    def missing(self, request: Request, error: Exception) -> Response:
        """What is not there, in words."""
        words = str(error) if isinstance(error, DataError) else "There is no such page."
        return self._page("dashboard_missing.html.j2", status=404, words=words)

    def _page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        from starlette.responses import HTMLResponse

        text = self.environment.get_template(template).render(**values)
        return HTMLResponse(text, status_code=status, headers=_HEADERS)


def _verdict_line(verdict: Verdict) -> str:
    """What a verdict said, in words; a is the tuned model's answer."""
    if verdict.failure is not None:
        return f"no verdict: {verdict.failure.replace('_', ' ')}"
    if verdict.preferred == "tie":
        return "a tie"
    side = "after" if verdict.preferred == "a" else "before"
    return f"{side} is {_STRENGTHS[max(verdict.strength, 1)]}"


def _number(text: str | None) -> int:
    fits = text is not None and text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS
    return max(1, int(text)) if text is not None and fits else 1


def _filter_of(query: Any) -> str:
    """The filter and page of a list of pairs, as its links carry them on and back."""
    names = ("text", "result", "category", "flipped", "page")
    given = {name: query[name] for name in names if query.get(name)}
    return f"?{urlencode(given)}" if given else ""


class _Paging(NamedTuple):
    page: int
    n_pages: int
    previous: str
    following: str


def _paging(query: Any, page: int, total: int, size: int) -> _Paging:
    n_pages = max(1, -(-total // size))

    def link(to: int) -> str:
        kept = {name: value for name, value in query.items() if name != "page" and value}
        return "?" + urlencode({**kept, "page": to}) if 1 <= to <= n_pages else ""

    return _Paging(page, n_pages, link(page - 1), link(page + 1))


def evaluation_line(evaluation: Evaluation) -> str:
    """One evaluation in a line of text, for a terminal."""
    e = evaluation
    return (
        f"{e.number:>4}  {e.added_at[:10]}  {e.series or '-':<16} {e.tuned_model[:28]:<28} "
        f"{percent(e.win_rate):>7}  {interval(e.low, e.high):<11} {e.n_prompts:>7,} prompts  "
        f"{e.judge}"
    )


def change_line(change: Change) -> str:
    """One change in a line of text, for a terminal."""
    if change.verdict == "not comparable":
        return f"not compared with the one before: {change.reason}"
    words = {"better": "BETTER than the one before", "worse": "WORSE than the one before"}
    return (
        f"{words.get(change.verdict, 'no change shown')}: {change.n_better} of {change.n_shared:,} "
        f"shared prompts better, {change.n_worse} worse (p = {change.p_value:.2g})"
    )


def capability_lines(earlier: int, change: CapabilityChange) -> list[str]:
    """What got worse since an earlier evaluation, a line of text a task, for a terminal."""
    return [
        f"DROPPED since {earlier}: {task.title}, {task_value(task, task.base)} to "
        f"{task_value(task, task.tuned)} ({task.n_worse} of {task.n:,} items worse, {task.n_better} "
        f"better, {p_said(task.p_value)})"
        for task in change.dropped
    ]
