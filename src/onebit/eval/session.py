"""One evaluation of a model: measures what its file of results does not have yet, and adds it there.

session = Session(llm, Results(Path("results.json"), model_facts(llm, "model.gguf", path)))
session.text("wiki.test.raw", text, Windows.of(llm, 512))["figures"]["perplexity"]
"""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebit.engine.sampling import SamplingParams
from onebit.eval import divergence as distances
from onebit.eval.divergence import Answers
from onebit.eval.figures import Figure
from onebit.eval.samples import NAMES, samples
from onebit.eval.scoring import Scorer
from onebit.eval.texts import Perplexity, Windows, perplexity
from onebit.formats import Progress, cache
from onebit.llm import LLM, load
from onebit.results import Results

if TYPE_CHECKING:
    from onebit.eval.tasks import Chosen

Result = dict[str, Any]


class Session:
    """Measures a model.

    Args:
        llm: the model.
        results: where results go, and those that are there come from.
        progress: called with what is measured and the share that is done.
    """

    def __init__(self, llm: LLM, results: Results, progress: Progress = lambda what, share: None) -> None:
        self.llm = llm
        self.results = results
        self.progress = progress
        self._n_tokens = 0
        self._judge: LLM | None = None

    def text(self, name: str, text: str, windows: Windows, limit: int | None = None) -> Result:
        """Perplexity and bits per byte of a text; arguments are those of `onebit.eval.texts.perplexity`.

        Args:
            name: what the text is called.
            text: the text.
            windows: how it is cut.
            limit: read only so many of its first tokens.
        """
        settings = _of_text(text, windows, limit)
        if (known := self.results.find("text", name, settings)) is not None:
            return known
        with self._timed() as facts:
            found = perplexity(
                self._scorer(self.llm), text, windows, limit, lambda share: self.progress(name, share)
            )
        return self.results.add("text", name, settings, _facts(found) | facts)

    def against(
        self,
        name: str,
        text: str,
        windows: Windows,
        reference: str,
        path: Path,
        keep: int = distances.KEEP,
        limit: int | None = None,
    ) -> Result:
        """Distance from a reference on a text; its answers are kept in ~/.cache/onebit.

        Args:
            name: what the text is called.
            text: the text.
            windows: how it is cut.
            reference: what the reference is called.
            path: its file or folder, which runs as it is.
            keep: see `onebit.eval.divergence.answers`.
            limit: read only so many of its first tokens.

        Raises:
            ValueError: models that make other tokens of the text.
        """
        sha256 = cache.sha256(path)
        settings = _of_text(text, windows, limit) | {
            "reference": reference,
            "reference_sha256": sha256,
            "keep": keep,
        }
        if (known := self.results.find("distance", name, settings)) is not None:
            return known
        with self._timed() as facts:
            answers = self._answers(text, windows, path, sha256, keep, limit)
            found = distances.divergence(
                self._scorer(self.llm),
                text,
                windows,
                answers,
                limit,
                lambda share: self.progress(name, share),
            )
        figures = {"kl": found.kl, "top1": found.top1, "nll_difference": found.nll_difference}
        return self.results.add(
            "distance",
            name,
            settings,
            _facts(found.own)
            | {"distance": _json(figures), "reference_figures": _facts(found.reference)["figures"]}
            | facts,
        )

    def samples(
        self,
        name: str,
        prompts: list[str],
        params: SamplingParams,
        n_seeds: int,
        judge: str | None = None,
        path: Path | None = None,
    ) -> Result:
        """Measure texts that the model writes; see `onebit.eval.samples.samples`.

        Args:
            name: what the prompts are called.
            prompts: what texts begin with.
            params: how tokens are chosen.
            n_seeds: texts of each prompt, with seeds from 0 on.
            judge: what the model that reads them is called, or None.
            path: its file or folder, which runs as it is.
        """
        settings = {field: getattr(params, field) for field in ("max_tokens", *NAMES)} | {
            "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            "seeds": n_seeds,
            "judge": judge,
            "judge_sha256": path and cache.sha256(path),
        }
        if (known := self.results.find("samples", name, settings)) is not None:
            return known
        if path is not None and self._judge is None:
            self._judge = load(path, self.llm.model.threads)
        with self._timed() as facts:
            found = samples(
                self.llm,
                prompts,
                params,
                range(n_seeds),
                self._judge if path else None,
                self._count,
                lambda share: self.progress(name, share),
            )
        rest = {"figures": _json(found.figures), "n_texts": found.n_texts, "n_tokens": found.n_tokens}
        return self.results.add("samples", name, settings, rest | facts)

    def task(self, chosen: "Chosen", limit: int | None, n_seeds: int) -> Result:
        """Ask all items of a task; arguments are those of `onebit.eval.tasks.run`.

        Args:
            chosen: the task.
            limit: ask only so many items.
            n_seeds: how often examples are drawn.

        Raises:
            ValueError: a model without tokenizer, or more examples than there are.
        """
        from onebit.eval import tasks
        from onebit.eval.harness import OnebitLM

        seeds = [tasks.SEEDS[0] + i for i in range(n_seeds)]
        settings = {"limit": limit, "shots": chosen.shots, "seeds": seeds, "data": chosen.data}
        if (known := self.results.find("task", chosen.name, settings)) is not None:
            return known
        with self._timed() as facts:
            lm = OnebitLM(self.llm, self._count)
            found = tasks.run(lm, chosen, limit, seeds, self.results, self.progress)
        metrics = _json(found.metrics)
        rest = {key: value for key, value in asdict(found).items() if key not in ("name", "metrics")}
        return self.results.add("task", chosen.name, settings, {"figures": metrics} | rest | facts)

    def _answers(
        self,
        text: str,
        windows: Windows,
        path: Path,
        sha256: str,
        keep: int,
        limit: int | None,
    ) -> Answers:
        key = hashlib.sha256(repr((sha256, self.llm.kv_cache, _of_text(text, windows, limit), keep)).encode())
        kept = cache.folder() / "answers" / f"{key.hexdigest()}.npz"
        found = distances.read(kept)
        if found is None:
            scorer = self._scorer(load(path, self.llm.model.threads, self.llm.kv_cache))
            found = distances.answers(
                scorer, text, windows, keep, limit, lambda share: self.progress("reference", share)
            )
            distances.write(found, kept)
        return found

    def _scorer(self, llm: LLM) -> Scorer:
        return Scorer(llm, self._count)

    def _count(self, n_tokens: int) -> None:
        self._n_tokens += n_tokens

    @contextmanager
    def _timed(self) -> Iterator[Result]:
        """How long it took and how many tokens were computed, known afterwards."""
        facts: Result = {}
        begun, n_before = time.perf_counter(), self._n_tokens
        yield facts
        facts["seconds"] = round(time.perf_counter() - begun, 2)
        facts["computed_tokens"] = self._n_tokens - n_before


def _of_text(text: str, windows: Windows, limit: int | None) -> Result:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "max_tokens": limit, **asdict(windows)}


def _facts(found: Perplexity) -> Result:
    return {
        "figures": _json({"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}),
        "n_scored": len(found.nll),
        "n_tokens": found.n_tokens,
        "n_bytes": found.n_bytes,
        "n_windows": found.n_windows,
    }


def _json(figures: dict[str, Figure]) -> dict[str, Result]:
    """Figures as JSON has them, which knows no infinity and no missing number but null."""
    return {
        name: {key: x if math.isfinite(x) else None for key, x in figure._asdict().items()}
        for name, figure in figures.items()
    }
