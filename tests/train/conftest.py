"""What the tests of training read."""

import pytest

import tiny


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of forty short texts."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Story {i}. {tiny.TEXT}{i * i}")
    return folder
