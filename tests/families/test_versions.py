"""The versions that the project says it runs with, and the lists that the tests are run with."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
# Extras that CPU tests run with; the others need a GPU or a cluster.
OPTIONAL = [
    Requirement(text)
    for extra in ("demo", "qlora", "gguf", "openai", "bedrock", "dashboard", "forgetting")
    for text in PROJECT["optional-dependencies"][extra]
]


def pins(name):
    lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): Version(version) for package, version in pairs}


def lower_bound(requirement):
    (bound,) = [s.version for s in requirement.specifier if s.operator == ">="]
    return Version(bound)


def test_the_lowest_versions_are_the_projects_own_bounds():
    bounds = {r.name.lower(): lower_bound(r) for r in (*CORE, *OPTIONAL)}
    assert pins("lowest") == bounds


@pytest.mark.parametrize("name", ["lowest", "tested", "highest"])
def test_every_list_names_all_requirements_within_their_bounds(name):
    found = pins(name)
    for requirement in (*CORE, *OPTIONAL):
        assert found[requirement.name.lower()] in requirement.specifier, requirement


def test_the_lists_rise():
    lowest, tested, highest = pins("lowest"), pins("tested"), pins("highest")
    assert lowest.keys() == highest.keys()
    for package in lowest:
        assert lowest[package] <= tested[package] <= highest[package], package


def test_every_python_that_is_named_is_in_the_table():
    table = (ROOT / "docs" / "compatibility.md").read_text()
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python :: 3." in c]
    assert named == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={named[0]}"
    for version in named:
        assert re.search(rf"^\| {re.escape(version)}[. ]", table, re.MULTILINE), version
