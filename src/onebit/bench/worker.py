"""A process that holds one engine: sleeps until it is told, over a pipe, to make one measurement.

    python -m onebit.bench.worker '{"engine": "onebit.bench.engines.ours:Ours", "path": "2b4t.onebit", "threads": 2}'

Each line on stdin is a measurement in JSON, {"what": "decode", "threads": 1, "seconds": 0.5}: a method of the engine,
or a function of `onebit.bench.measures`. Each line on stdout is its answer. The first answer tells that the engine is
loaded. An error is an answer too.
"""

import importlib
import json
import os
import sys
from functools import partial
from typing import Any, TextIO


def main() -> None:
    """Load, then answer until stdin ends."""
    # Libraries print; what they print must not become an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = json.loads(sys.argv[1])
    # Of engines that are no part of the package.
    sys.path += arguments.pop("folders", [])
    if cpus := arguments.pop("cpus", None):
        os.sched_setaffinity(0, cpus)
    if (limit := arguments.pop("memory_limit", None)) is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    module, _, name = arguments.pop("engine").partition(":")
    try:
        engine = getattr(importlib.import_module(module), name)(**arguments)
        from onebit.bench import measures
        from onebit.bench.timing import memory_bytes

        answer(answers, {"info": engine.info, "load_s": engine.load_s})
    except Exception as error:
        answer(answers, {"error": describe(error)})
        return
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        what = request.pop("what")
        try:
            measure = getattr(engine, what, None) or partial(getattr(measures, what), engine)
            answer(answers, {"value": measure(**request), **memory_bytes()})
        except Exception as error:
            answer(answers, {"error": describe(error)})


def answer(answers: TextIO, values: dict[str, Any]) -> None:
    """Write one line."""
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def describe(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")


if __name__ == "__main__":
    main()
