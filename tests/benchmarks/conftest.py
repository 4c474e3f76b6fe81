"""Benchmarks quieten the libraries for a process of their own; here other tests come after them."""

import logging

import pytest
import transformers


@pytest.fixture(autouse=True)
def _as_loud_as_before():
    prefopt, said = logging.getLogger("prefopt"), logging.root.manager.disable
    level, verbosity = prefopt.level, transformers.logging.get_verbosity()
    yield
    prefopt.setLevel(level)
    logging.disable(said)
    transformers.logging.set_verbosity(verbosity)
