"""The life of message batches: made, in progress, perhaps canceled, ended, archived or deleted.

In: the requests of batches, and a function that answers one request. Out: batches and their results
as the API shows them. It knows no HTTP and not what makes an answer right.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from prefopt.testing.rate_limits import rfc3339
from prefopt.testing.validation import Rejected

BatchResult = Callable[[str, dict[str, Any]], str]
"""From custom_id and params to "succeeded", "errored", "canceled", "expired", or any other word
for a type of result that clients do not know yet."""

AnswerItem = Callable[[str, str, dict[str, Any]], dict[str, Any]]
"""From batch id, custom_id and params to a result of type "succeeded" or "errored"."""

EXPIRES_AFTER_S = 24 * 3600.0
ARCHIVED_AFTER_S = 29 * 24 * 3600.0
_COUNTED = ("processing", "succeeded", "errored", "canceled", "expired")


class Batch(msgspec.Struct, kw_only=True):
    """One batch. Times are Unix seconds; `results` is empty until it has ended."""

    id: str
    requests: list[dict[str, Any]]
    created_s: float
    retrievals: int = 0
    retrievals_at_cancel: int = 0
    cancel_s: float | None = None
    ended_s: float | None = None
    deleted: bool = False
    results: list[dict[str, Any]] = msgspec.field(default_factory=list)

    @property
    def processing_status(self) -> str:
        """ "in_progress", "canceling" or "ended"."""
        if self.ended_s is not None:
            return "ended"
        return "in_progress" if self.cancel_s is None else "canceling"

    @property
    def request_counts(self) -> dict[str, int]:
        """How many requests have which outcome; all are in "processing" until the whole ends.

        Results of an unknown type are counted as errored, so that the sum is right.
        """
        counts = dict.fromkeys(_COUNTED, 0)
        if self.ended_s is None:
            counts["processing"] = len(self.requests)
            return counts
        for kind, n in Counter(line["result"]["type"] for line in self.results).items():
            counts[kind if kind in _COUNTED[1:] else "errored"] += n
        return counts


class BatchStore:
    """All batches of one fake.

    A batch ends at its `polls`-th retrieval, or `time_s` after it was made where that is given. A
    canceled batch ends at the retrieval after that; `finished_at_cancel` is the share of its
    requests that were done by then. A batch that is not over after 24 hours expires.
    """

    def __init__(
        self,
        answer_item: AnswerItem,
        *,
        clock: Callable[[], float],
        polls: int,
        time_s: float | None,
        result: BatchResult | None,
        finished_at_cancel: float,
        seed: int,
    ) -> None:
        if not 0 <= finished_at_cancel <= 1:
            raise ValueError(f"finished_at_cancel is a share, 0 to 1; got {finished_at_cancel}.")
        self._answer_item = answer_item
        self._clock = clock
        self._polls = polls
        self._time_s = time_s
        self._result = result
        self._finished_at_cancel = finished_at_cancel
        self._seed = seed
        self._numbers = itertools.count(1)
        self.by_id: dict[str, Batch] = {}

    def create(self, requests: list[dict[str, Any]]) -> Batch:
        """Make a batch of requests that passed `check_batch`."""
        batch = Batch(
            id=f"msgbatch_fake{next(self._numbers)}", requests=requests, created_s=self._clock()
        )
        self.by_id[batch.id] = batch
        return batch

    def retrieve(self, batch_id: str) -> Batch:
        """Look at a batch, which brings it nearer to its end."""
        batch = self._find(batch_id)
        batch.retrievals += 1
        self._advance(batch)
        return batch

    def cancel(self, batch_id: str) -> Batch:
        """Ask for an early end. Asking twice is the same as asking once."""
        batch = self._find(batch_id)
        self._advance(batch)
        if batch.ended_s is not None:
            raise Rejected(400, f"Batch {batch_id} cannot be canceled: it has already ended.")
        if batch.cancel_s is None:
            batch.cancel_s = self._clock()
            batch.retrievals_at_cancel = batch.retrievals
        return batch

    def delete(self, batch_id: str) -> Batch:
        """Remove an ended batch and its results from the API."""
        batch = self._find(batch_id)
        self._advance(batch)
        if batch.ended_s is None:
            raise Rejected(
                400, f"Batch {batch_id} cannot be deleted while it is in progress; cancel it first."
            )
        batch.deleted = True
        return batch

    def results(self, batch_id: str) -> list[dict[str, Any]]:
        """The results of an ended batch, in an order of their own."""
        batch = self._find(batch_id)
        self._advance(batch)
        if batch.ended_s is None:
            raise Rejected(404, f"Batch {batch_id} has no results until processing has ended.")
        if self._archived(batch):
            raise Rejected(404, f"The results of batch {batch_id} are no longer available.")
        return batch.results

    def page(self, query: Mapping[str, str]) -> tuple[list[Batch], bool]:
        """One page of the list, newest first, and whether there are more in that direction."""
        try:
            limit = int(query.get("limit", "20"))
        except ValueError:
            raise Rejected(400, "limit: Input should be a valid integer") from None
        if not 1 <= limit <= 1_000:
            raise Rejected(400, "limit: Input should be from 1 to 1000")
        before, after = query.get("before_id"), query.get("after_id")
        if before and after:
            raise Rejected(400, "Only one of before_id and after_id may be given.")
        listed = [batch for batch in reversed(self.by_id.values()) if not batch.deleted]
        ids = [batch.id for batch in listed]
        for cursor in (before, after):
            if cursor and cursor not in ids:
                raise Rejected(400, f"{cursor!r} is not the id of a batch.")
        if before:
            rest = listed[: ids.index(before)]
            page = rest[-limit:]
        else:
            rest = listed[ids.index(after) + 1 :] if after else listed
            page = rest[:limit]
        for batch in page:
            self._advance(batch)
        return page, len(rest) > len(page)

    def end_all(self) -> None:
        """End every batch that is still open, as if the time for it had come."""
        for batch in list(self.by_id.values()):
            if batch.ended_s is None:
                self._end(batch, self._clock())

    def view(self, batch: Batch, base_url: str) -> dict[str, Any]:
        """A batch as the API shows it."""

        def at(time_s: float | None) -> str | None:
            return None if time_s is None else rfc3339(time_s)

        archived = self._archived(batch)
        there = batch.ended_s is not None and not archived
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": batch.processing_status,
            "request_counts": batch.request_counts,
            "created_at": at(batch.created_s),
            "expires_at": at(batch.created_s + EXPIRES_AFTER_S),
            "ended_at": at(batch.ended_s),
            "cancel_initiated_at": at(batch.cancel_s),
            "archived_at": at(batch.created_s + ARCHIVED_AFTER_S) if archived else None,
            "results_url": f"{base_url}/v1/messages/batches/{batch.id}/results" if there else None,
        }

    def _find(self, batch_id: str) -> Batch:
        batch = self.by_id.get(batch_id)
        if batch is None or batch.deleted:
            raise Rejected(404, f"Message batch {batch_id} not found.")
        return batch

    def _archived(self, batch: Batch) -> bool:
        return self._clock() >= batch.created_s + ARCHIVED_AFTER_S

    def _advance(self, batch: Batch) -> None:
        if batch.ended_s is not None:
            return
        now = self._clock()
        if batch.cancel_s is not None:
            over_s = now if batch.retrievals > batch.retrievals_at_cancel else None
        elif self._time_s is not None:
            over_s = batch.created_s + self._time_s
        else:
            over_s = now if batch.retrievals >= self._polls else None
        expires_s = batch.created_s + EXPIRES_AFTER_S
        if over_s is not None and over_s <= min(now, expires_s):
            self._end(batch, over_s)
        elif now >= expires_s:
            self._end(batch, expires_s, all_expired=True)

    def _end(self, batch: Batch, ended_s: float, all_expired: bool = False) -> None:
        # In an order of its own, as the API promises none; the same one for the same seed.
        items = list(batch.requests)
        random.Random(f"{self._seed} {batch.id}").shuffle(items)
        n_finished = len(items)
        if batch.cancel_s is not None:
            n_finished = round(self._finished_at_cancel * len(items))
        for index, item in enumerate(items):
            if all_expired:
                result = {"type": "expired"}
            elif index >= n_finished:
                result = {"type": "canceled"}
            else:
                result = self._finish(batch.id, item)
            batch.results.append({"custom_id": item["custom_id"], "result": result})
        batch.ended_s = ended_s

    def _finish(self, batch_id: str, item: dict[str, Any]) -> dict[str, Any]:
        custom_id, params = item["custom_id"], item["params"]
        try:
            kind = self._result(custom_id, params) if self._result else "succeeded"
        except Exception as error:
            said = f"the fake's batch_result raised {type(error).__name__}: {error}"
            return errored("api_error", said)
        if kind == "succeeded":
            return self._answer_item(batch_id, custom_id, params)
        if kind == "errored":
            return errored("api_error", "Internal server error")
        return {"type": kind}


def errored(error_type: str, message: str) -> dict[str, Any]:
    """A result of type "errored"."""
    error = {"type": error_type, "message": message}
    return {"type": "errored", "error": {"type": "error", "error": error, "request_id": None}}
