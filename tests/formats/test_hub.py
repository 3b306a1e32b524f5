"""Ids of the hub; nothing is fetched here. Kind: exact (which ids, what is asked for, the words of an error)."""

from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from onebit.formats.hf import hub


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("microsoft/bitnet-b1.58-2B-4T", True),
        ("tiiuae/Falcon-E-1B-Base@prequantized", True),
        ("owner/name:model.gguf", True),
        ("owner/name@main:folder/model.gguf", True),
        ("stories.onebit", False),
        ("runs/mine/deep", False),
        ("/owner/name", False),
        ("../name", False),
        ("./owner", False),
        ("owner/name:model.bin", False),
        ("owner/na me", False),
        ("owner/name\n", False),
        ("öwner/name", False),
        ("", False),
    ],
)
def test_ids(text, is_id):
    assert hub.is_hub_id(text) == is_id


def test_a_path_that_exists_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not hub.is_hub_id("runs/mine") and hub.is_hub_id("runs/yours")


def test_what_is_asked_for(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **named: calls.append((args, named)) or str(tmp_path),
    )
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *args, **named: calls.append((args, named)) or str(tmp_path),
    )
    assert hub.download("owner/name@dev") == tmp_path
    assert hub.download("owner/name:x.gguf") == tmp_path
    (args, named), file = calls
    assert args == ("owner/name",) and named["revision"] == "dev"
    listed = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja",
        "tokenizer.model", "tokenizer.json", "merges.txt", "vocab.json", "README.md", "pytorch_model.bin", "model.py",
        "original/consolidated.00.pth", "original/params.json", "onnx/model.safetensors", "consolidated.safetensors",
    ]  # fmt: skip
    patterns = {name: named[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(listed, **patterns)) == listed[:8]
    assert file == (("owner/name", "x.gguf"), {"revision": None})
    for text in ("nonsense", "owner/..", "owner/name@../x", "owner/name:../x.gguf"):
        with pytest.raises(ValueError, match="expected owner/name"):
            hub.download(text)
    assert len(calls) == 2


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (errors.RepositoryNotFoundError("401\n\nlong", response=answer(401)), ValueError, "no such model on hugg"),
        (errors.GatedRepoError("403", response=answer(403)), ValueError, "ask for access on huggingface.co/owner/"),
        (errors.RevisionNotFoundError("404", response=answer(404)), ValueError, "has no revision dev"),
        (errors.RemoteEntryNotFoundError("404", response=answer(404)), ValueError, "has no file x.gguf"),
        (errors.LocalEntryNotFoundError("no\nconnection"), OSError, "cannot be reached (no); connect, or give the"),
        (errors.OfflineModeIsEnabled("offline"), OSError, "not in the cache, and huggingface.co cannot be reached"),
        (errors.HfHubHTTPError("500 busy", response=answer(500)), OSError, "answers 500 busy; try again later"),
        (OSError(28, "No space left on device"), OSError, "No space left on device"),
        (RuntimeError("böse"), OSError, r"cannot be fetched (b\xf6se); try again"),
    ],
)  # fmt: skip
def test_failures_are_one_line(error, kind, words, monkeypatch):
    def fail(*args, **named):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(kind) as caught:
        hub.download("owner/name@dev:x.gguf")
    message = str(caught.value)
    assert words in message and "owner/name@dev" in message
    assert "\n" not in message and message.isascii() and type(caught.value) in (kind, FileNotFoundError)


def test_without_a_network_nothing_else_happens(monkeypatch, tmp_path):
    """The library itself, told to stay offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for text in ("owner/name", "owner/name:x.gguf"):
        with pytest.raises(OSError, match="not in the cache, and huggingface.co cannot be reached"):
            hub.download(text)
    assert Path(tmp_path).is_dir()
