"""A small part of the fuzzing, the same inputs each time, and a check that it sees faults."""

import pytest

from prefopt.errors import DataError
from tests.fuzz import targets
from tests.fuzz.run import Outcome, by_changes, main
from tests.fuzz.targets import TARGETS, Target

SLOW = {"command line", "services", "rows .parquet", "chat template", "ledger", "history"}


@pytest.fixture(scope="module", autouse=True)
def files():
    yield
    targets.clean_up()
    targets._folder.cache_clear()


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in SLOW])
def test_a_parser_takes_an_input_or_refuses_it_with_an_error_of_ours(name):
    outcome = Outcome()
    by_changes(name, 25, seed=1, outcome=outcome)
    assert not outcome.faults
    assert outcome.n == 25


@pytest.mark.slow
def test_all_parsers_with_all_engines():
    assert main(["--inputs", "20000", "--seed", "2"]) == 0


def test_faults_are_seen(monkeypatch):
    def parse(data):
        if data == b"key":
            {}["key"]
        if data == b"text":
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "x")
        if data == b"deep":
            parse(data)
        raise DataError("as documented")

    target = Target(parse, (b"key", b"text", b"deep", b"else"), (DataError, ValueError))
    monkeypatch.setitem(TARGETS, "x", target)
    outcome = Outcome()
    by_changes("x", 4, seed=0, outcome=outcome)
    kinds = sorted(kind.split(" in ")[0] for kind in outcome.faults)
    assert kinds == ["KeyError", "RecursionError", "UnicodeDecodeError"]
    assert outcome.refused["DataError"] == 1
