"""Models of huggingface.co by their id: fetched into the cache that all programs of the hub share.

is_hub_id("microsoft/bitnet-b1.58-2B-4T")                       # True, where no such path exists
download("tiiuae/Falcon-E-1B-Base@prequantized")                # the folder of a snapshot
download("owner/name:model.gguf")                               # a file
"""

import re
from pathlib import Path
from typing import NamedTuple

from onebit.formats.tensors import shorten

# What makes up a model; no weights that are pickles, and none a second time, as some keep in folders or in one file.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
_UNWANTED = ("*/*", "consolidated*")
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(
    rf"(?P<repo>{_WORD}/{_WORD})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,99}}))?"
    r"(:(?P<file>[A-Za-z0-9][A-Za-z0-9._/-]{0,199}\.gguf))?",
    re.ASCII,
)


class _Id(NamedTuple):
    repo: str
    revision: str | None
    file: str | None


def is_hub_id(text: str) -> bool:
    """Whether a text is "owner/name", with "@revision" or ":file.gguf" or neither, and no path of this machine."""
    return _ID.fullmatch(text) is not None and not Path(text).exists()


def download(text: str) -> Path:
    """Fetch a model, or what the cache lacks of it; bars on stderr show how far it is.

    Args:
        text: "owner/name", "owner/name@revision" or "owner/name:file.gguf".

    Returns:
        The folder of the snapshot, or the file.

    Raises:
        ValueError: no such id, repository, revision or file, or one that asks for permission.
        OSError: no connection and not in the cache, a full disk, ...
    """
    asked = _parse(text)
    # Here and not above: it is slow to import, and only what comes from the hub needs it.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        if asked.file:
            return Path(huggingface_hub.hf_hub_download(asked.repo, asked.file, revision=asked.revision))
        folder = huggingface_hub.snapshot_download(
            asked.repo,
            revision=asked.revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
        )
        return Path(folder)
    except errors.GatedRepoError:
        raise ValueError(
            f"{text}: it is gated: ask for access on huggingface.co/{asked.repo}, then run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{text}: the repository has no revision {asked.revision}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{text}: no such path here, and no such model on huggingface.co; if it is private, run `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise OSError(
            f"{text}: not in the cache, and huggingface.co cannot be reached ({_reason(error)}); connect, or give the "
            "path of a model"
        ) from None
    except errors.EntryNotFoundError:
        raise ValueError(
            f"{text}: the repository has no file {asked.file}; huggingface.co/{asked.repo}/tree/main lists them"
        ) from None
    except errors.HfHubHTTPError as error:
        raise OSError(f"{text}: huggingface.co answers {_reason(error)}; try again later") from None
    except OSError as error:
        raise OSError(f"{text}: cannot be fetched ({_reason(error)})") from None
    except Exception as error:
        # Of the libraries below the hub's: timeouts, broken connections, damaged caches.
        raise OSError(f"{text}: cannot be fetched ({_reason(error)}); try again") from None


def _parse(text: str) -> _Id:
    found = _ID.fullmatch(text)
    if not found or ".." in text:
        raise ValueError(
            f"{shorten(text)}: expected owner/name, owner/name@revision or owner/name:file.gguf of huggingface.co"
        )
    return _Id(found["repo"], found["revision"], found["file"])


def _reason(error: Exception) -> str:
    """The first line of an error, in ASCII."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0] if lines else type(error).__name__).strip("'\"")
