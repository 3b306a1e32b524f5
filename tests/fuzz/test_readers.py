"""Every reader gives a model that runs, or an error of one line, whatever is done to its files: some of `make fuzz`.

Kind: invariant.
"""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from fuzz.gguf_parts import put_gguf, take_gguf
from fuzz.mutations import dump, load, mutate, unbundle
from fuzz.readers import MAX_INPUT, READERS, outcome
from fuzz.seeds import seeds

# For all readers together some ten seconds.
MUTATIONS = 500


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    return {name: seeds(name, tmp_path_factory.mktemp(name)) for name in READERS}


@pytest.fixture
def scratch(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one: models are written safely, and disks take their time for that."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("name", READERS)
def test_a_seed_is_a_model_that_runs_and_converts(name, valid, scratch):
    refused = {seed: outcome(name, data, scratch, always=True) for seed, data in valid[name].items()}
    allowed = {"spaced": "cannot be expressed in GGUF"} if name == "vocabularies" else {}
    for seed, message in refused.items():
        assert message is None or allowed.get(seed, "?") in message, seed
    assert max(map(len, valid[name].values())) < MAX_INPUT


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_a_model_or_is_refused_in_one_line(name, valid, scratch):
    random = Random(f"{name}, 1")
    # Most of the time goes to the small ones.
    data = sorted(valid[name].values(), key=len)
    n_models = n_refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for i in range(MUTATIONS):
            damaged = mutate(random.choice(data if i % 4 == 0 else data[: len(data) // 2 + 1]), random)
            if outcome(name, damaged, scratch) is None:
                n_models += 1
            else:
                n_refused += 1
    # Changes that all readers refuse, or none, test nothing.
    assert min(n_models, n_refused) > MUTATIONS // 50


def test_taking_apart_and_putting_together_is_the_identity(valid):
    for seed, data in valid["gguf"].items():
        contents = unbundle(data)["model.gguf"]
        assert put_gguf(take_gguf(contents), relay=False) == contents, seed
    for data in valid["hf"].values():
        config = unbundle(data)["config.json"]
        assert load(dump(load(config))) == load(config)


def test_a_mutation_depends_on_its_seed_alone(valid):
    for name in READERS:
        for data in valid[name].values():
            assert mutate(data, Random(3)) == mutate(data, Random(3))


def test_no_file_leaves_the_folder():
    assert unbundle(b"\n--8<-- ../config.json\n{}\n--8<-- other.json\n{}") == {}
    assert unbundle(b"\n--8<-- config.json\n{}") == {"config.json": b"{}"}
