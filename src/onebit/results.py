"""The file of measurements: what was measured, on what, how; and answers that wait for the rest of their task.

results = Results(Path("results.json"), model_facts(llm, "model.gguf", path))
results.add("text", "wiki.test.raw.xz", {...}, {...})
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebit import __version__
from onebit.engine.model import choose_isa
from onebit.formats import cache
from onebit.formats.files import write_file

if TYPE_CHECKING:
    from onebit.llm import LLM

EVAL = "onebit eval 1"
BENCH = "onebit bench 1"
# Seconds between two times that unfinished answers go to the disk.
KEEP_SECONDS = 10.0


class Results:
    """Results of one model, in memory and, where a path is given, on disk after every one.

    Args:
        path: the file, or None.
        model: facts about the model; results of another are refused.
        kind: what measured: EVAL or BENCH.

    Raises:
        ValueError: the file is no such file, or holds results of another model.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None, model: dict[str, Any], kind: str = EVAL) -> None:
        self.path = path
        self._last_kept = time.monotonic()
        self.data: dict[str, Any] = {
            "format": kind,
            "model": model,
            "machine": machine_facts(),
            "versions": versions(),
            "results": [],
            "unfinished": {},
        }
        if path is None:
            return
        if path.exists():
            self._continue(path, model)
        # Says now, not after an hour, if there is no such folder.
        self.write()

    def _continue(self, path: Path, model: dict[str, Any]) -> None:
        try:
            found = json.loads(path.read_text("utf-8"))
            if found["format"] != self.data["format"]:
                raise ValueError
            old, results, unfinished = found["model"], found["results"], found["unfinished"]
        except (ValueError, KeyError, TypeError):
            verb = self.data["format"].rpartition(" ")[0]
            raise ValueError(f"{path}: is no file of results of {verb}; choose another --out") from None
        for name in ("sha256", "label", "kernels"):
            if old.get(name) != model[name]:
                raise ValueError(
                    f"{path}: holds results of another model ({name} {old.get(name)}, now {model[name]}); "
                    "choose another --out"
                )
        self.data |= {"results": results, "unfinished": unfinished}

    def find(
        self, kind: str, name: str, settings: dict[str, Any], engine: str | None = None
    ) -> dict[str, Any] | None:
        """A result that is there already, measured with the same settings and, of a benchmark, the same engine."""
        for result in self.data["results"]:
            of = result["kind"], result["name"], result["settings"], result.get("engine")
            if of == (kind, name, settings, engine):
                found: dict[str, Any] = result
                return found
        return None

    def add(self, kind: str, name: str, settings: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Add a result, in place of one of the same settings, and write the file."""
        old = self.find(kind, name, settings, found.get("engine"))
        if old is not None:
            self.data["results"].remove(old)
        result = {"kind": kind, "name": name, "settings": settings, **found, "command": command()}
        self.data["results"].append(result)
        if kind == "task":
            self.data["unfinished"] = {}
        self.write()
        return result

    def answers(self, key: str) -> tuple[list[Any], int]:
        """Answers to a task that was not finished, and how many of its requests lost their beginning."""
        kept = self.data["unfinished"].get(key, {"answers": [], "n_cut": 0})
        return list(kept["answers"]), kept["n_cut"]

    def keep(self, key: str, answers: list[Any], n_cut: int) -> None:
        """Keep the answers to a task, on disk now and then."""
        self.data["unfinished"][key] = {"answers": answers, "n_cut": n_cut}
        if self.path and time.monotonic() - self._last_kept > KEEP_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            write_file(self.path, [json.dumps(self.data, indent=1, allow_nan=False).encode()])
            self._last_kept = time.monotonic()


def model_facts(llm: "LLM", name: str, path: Path) -> dict[str, Any]:
    """What a model is: name, hash, size in bytes, label, cache and kernels."""
    return {
        "name": name,
        "sha256": cache.sha256(path),
        "bytes": cache.n_bytes(path),
        "label": llm.label,
        "kernels": llm.model.isa,
        "threads": llm.model.threads,
    }


def machine_facts() -> dict[str, Any]:
    """What this machine is."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "system": platform.platform(),
        "cpu": cpu,
        "hardware_threads": os.cpu_count(),
        "isa": choose_isa(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on, and the commit where onebit runs from a repository."""
    found: dict[str, str | None] = {"onebit": __version__, "python": platform.python_version()}
    for package in ("numpy", "tokenizers", "lm_eval", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["commit"] = _commit()
    return found


def _commit() -> str | None:
    """The commit of the repository that this file is part of, and does not only lie in."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        commands = ([*git, "ls-files", here.name], [*git, "rev-parse", "HEAD"])
        tracked, commit = (
            subprocess.run(c, capture_output=True, text=True, timeout=5).stdout for c in commands
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.strip() if tracked else None


def command() -> str:
    """The command that is running."""
    return shlex.join(["onebit", *sys.argv[1:]])
