"""What prefopt needs is what it says it needs: no more, no less, under licences that are listed."""

import ast
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.security.licences import NOT_STATED, PAGE, licence_of, needed_by, rows_of

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTED = {
    canonicalize_name(name): pinned
    for name, _, pinned in (
        line.partition("==")
        for line in (ROOT / "constraints" / "tested.txt").read_text(encoding="utf-8").splitlines()
    )
}
# Parts of another package that is declared, and used only where that one is.
BROUGHT_BY = {"botocore": "boto3", "h11": "httpx2"}
# Where it is not installed, its module's name tells nothing of its package.
NOT_IN_A_WHEEL = {"vllm": "vllm"}


def names(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = {extra: names(items) for extra, items in PROJECT["optional-dependencies"].items()}
USERS = {extra: items for extra, items in EXTRAS.items() if extra not in ("dev", "docs", "fuzz")}


@cache
def imported():
    """Distribution: the files of prefopt that import it, lazily or not."""
    of_module = packages_distributions()
    found = {}
    for path in (ROOT / "prefopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top == "prefopt":
                    continue
                for name in of_module.get(top) or [NOT_IN_A_WHEEL.get(top, top)]:
                    found.setdefault(canonicalize_name(name), set()).add(path.name)
    return found


def test_everything_that_is_imported_is_declared():
    declared = REQUIRED.union(*USERS.values())
    undeclared = {
        name: files
        for name, files in imported().items()
        if name not in declared and BROUGHT_BY.get(name) not in declared
    }
    assert not undeclared


def test_everything_that_is_required_is_imported():
    assert not REQUIRED - set(imported())


def test_nothing_is_required_that_an_extra_is_for():
    """Only what every user needs; a service or a tool for some is an extra."""
    for extra, items in USERS.items():
        assert not items & REQUIRED, extra


def test_what_an_extra_brings_is_imported_somewhere():
    # bitsandbytes and deepspeed are imported by transformers, sentencepiece by llama.cpp's converter,
    # and a browser is for the tests of the pages.
    elsewhere = {"bitsandbytes", "deepspeed", "sentencepiece", "playwright"}
    for extra, items in USERS.items():
        assert items <= set(imported()) | elsewhere, extra


def test_all_licences_are_listed_and_none_asks_to_open_the_users_code():
    listed = rows_of(PAGE.read_text(encoding="utf-8"))
    direct = {canonicalize_name(item.name) for item in needed_by("prefopt")}
    assert direct <= set(listed), "run python tests/security/licences.py"
    for name, licence in listed.items():
        assert licence != NOT_STATED, name
        assert "GPL" not in licence.replace("LGPL", ""), name
    # The page is about the tested versions; others may say theirs in another way.
    same = {name for name in direct if version(name).partition("+")[0] == TESTED.get(name)}
    assert {name: licence_of(name) for name in same} == {name: listed[name] for name in same}
