"""Requests to the dashboard that no page of it makes, and texts that no model should write."""

import time

import pytest
from starlette.testclient import TestClient

from prefopt.evaluation.dashboard import dashboard, word_changes
from prefopt.evaluation.history import History
from tests.evaluation.test_history import evaluation, judged


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    with History(folder / "h.sqlite") as history:
        for name in ("first", "second"):
            history.add(evaluation(folder / name, [judged(i, 1) for i in range(3)]), series=name)
        app = dashboard(history, hosts=("testserver",))
        yield TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    "path",
    [
        "/evaluations/" + "9" * 30, "/evaluations/1/pairs/" + "9" * 30, "/changes/1/" + "9" * 30,
        "/evaluations/" + "9" * 5000, "/evaluations/1?page=" + "9" * 30,
        "/evaluations/1?page=" + "9" * 5000, "/evaluations/1?text=%00%ff%ed%a0%80",
        "/evaluations/1?text=" + "%25_" * 2000, "/evaluations/1?result=%27%3B--&category=%00",
        "/changes/1/2?which=%3Cscript%3E&page=" + "9" * 25, "/../../etc/passwd", "/%2e%2e/h.sqlite",
        "/evaluations/-1", "/evaluations/1e3", "/changes/1/1",
    ],
    ids=lambda path: path[:40],
)  # fmt: skip
def test_no_request_breaks_the_dashboard(client, path):
    answer = client.get(path)
    assert answer.status_code in (200, 404)
    assert "<script" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_another_name_of_this_machine_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/").status_code == 405


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("a b " * 20_000, "b a " * 20_000),
        ("x" * 10**6, "y" * 10**6),
        ("!?" * 50_000, "?!" * 50_000),
    ],
)
def test_texts_without_end_are_compared_in_time(earlier, later):
    start = time.process_time()
    pieces = word_changes(earlier, later)
    assert time.process_time() - start < 2
    assert "".join(p.text for p in pieces if p.change != "added") == earlier
    assert "".join(p.text for p in pieces if p.change != "removed") == later
