"""A process that holds one engine: sleeps until it is told, over a pipe, to make one measurement.

    python benchmarks/engines/worker.py '{"engine": "ours", "path": "2b4t.onebit", "threads": 2}'

Each line on stdin is a measurement in JSON, {"what": "decode", "threads": 1, "seconds": 0.5}; each line on stdout its
answer. The first answer tells that the engine is loaded. An error is an answer too.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

CLASSES = {
    "machine": ("engines.machine", "Machine"),
    "ours": ("engines.ours", "Ours"),
    "llama": ("engines.llama", "Llama"),
    "hugging": ("engines.hugging", "HuggingFace"),
}


def main() -> None:
    """Load, then answer until stdin ends."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    # Libraries print; what they print must not become an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = json.loads(sys.argv[1])
    module, name = CLASSES[arguments.pop("engine")]
    try:
        engine = getattr(importlib.import_module(module), name)(**arguments)
    except Exception as error:
        answer(answers, {"error": describe(error)})
        return
    answer(answers, {"info": engine.info, "load_s": engine.load_s})
    from engines.timing import resident_bytes

    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            value = getattr(engine, request.pop("what"))(**request)
            answer(answers, {"value": value, "peak_bytes": resident_bytes(peak=True)})
        except Exception as error:
            answer(answers, {"error": describe(error)})


def answer(answers: TextIO, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def describe(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error}; expected it in this environment: `make bench` makes one with all engines"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    main()
