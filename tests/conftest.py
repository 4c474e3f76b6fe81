"""Settings for every test: quiet hub, one thread, models small enough to make on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import gc

import pytest

from tests.tiny_models import save_tiny_model

# Collecting thousands of tests makes a great many objects and little garbage.
gc.disable()


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def light_collections():
    """What is in memory now is no longer looked through by every garbage collection.

    Every training begins with one, and walking over all imported modules takes longer than to train.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def locked_folder(tmp_path):
    """A folder that may be read only. Root may write anywhere, and is somebody else meanwhile."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o700)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a random Llama with 60,000 parameters."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
