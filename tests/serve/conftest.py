"""One server for all tests that do not harm it."""

import pytest

import onebit
from serve.running import running, tiny_llm


@pytest.fixture(scope="session")
def log_path(tmp_path_factory):
    return tmp_path_factory.mktemp("serve") / "requests.jsonl"


@pytest.fixture(scope="session")
def server(log_path):
    """A tiny model with chat template and adapters, and the shipped one."""
    with running({"tiny": tiny_llm(), "stories": onebit.load(threads=1)}, log_file=log_path) as here:
        yield here


@pytest.fixture(scope="session")
def llm():
    """The tiny model once more, alone: what the server's answers are compared with."""
    return tiny_llm()
