"""Tasks of lm-evaluation-harness: which there are, how they are asked, and what the answers are worth.

Prompts and metrics of the tasks whose files onebit reads are those of the harness.

    chosen = choose(["hellaswag", "mmlu"], Path("data"))
    run(OnebitLM(llm), chosen[0], limit=100)
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datasets import Dataset
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from onebit.eval import local
from onebit.eval.figures import Figure, bootstrap, mean, over_seeds, proportion
from onebit.eval.harness import OnebitLM
from onebit.eval.texts import exp

# Few-shot examples are drawn once for each; the first is the harness's own.
SEEDS = (1234, 1235, 1236)
# Requests between two times that the answers are kept.
REQUESTS_AT_ONCE = 128

Progress = Callable[[str, float], None]

SHORT_NAMES = {"lambada": "lambada_openai"}
LETTERS = ["A", "B", "C", "D"]
_ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
_NORM = [*_ACC, {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]
_EXACT = {
    "metric": "exact_match",
    "aggregation": "mean",
    "higher_is_better": True,
    "ignore_case": True,
    "ignore_punctuation": True,
}
_SHORT_ANSWER = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "temperature": 0.0},
    "filter_list": [
        {
            "name": "remove_whitespace",
            "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
        }
    ],
}


def _choice(text: Any, choices: Any, metrics: list[dict[str, Any]] = _NORM, **more: Any) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_target": "label",
        "doc_to_choice": choices,
        "metric_list": metrics,
        **more,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "lambada_openai": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            *_ACC,
        ],
    },
    "hellaswag": _choice("{{query}}", "choices"),
    "piqa": _choice("Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}"),
    "boolq": _choice("{{passage}}\nQuestion: {{question}}?\nAnswer:", ["no", "yes"], _ACC),
    # The choice stands before the text that is scored.
    "winogrande": {**_choice("label", "contexts", _ACC), "doc_to_target": "rest"},
    "arc_easy": _choice("Question: {{question}}\nAnswer:", "choices"),
    "arc_challenge": _choice("Question: {{question}}\nAnswer:", "choices"),
    "openbookqa": _choice("question", "choices"),
    "gsm8k": {
        "output_type": "generate_until",
        "num_fewshot": 5,
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                **_EXACT,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
        },
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {
                        "function": "regex",
                        "group_select": -1,
                        "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                    },
                    {"function": "take_first"},
                ],
            },
        ],
    },
    "nq_open": {
        **_SHORT_ANSWER,
        "description": "Answer these questions:\n\n",
        "doc_to_text": "Q: {{question}}?\nA:",
        "doc_to_target": "{{answer}}",
        "fewshot_delimiter": "\n",
        "metric_list": [{**_EXACT, "regexes_to_ignore": ["\\b(?:The |the |An |A |The |a |an )"]}],
    },
    "triviaqa": {
        **_SHORT_ANSWER,
        "doc_to_text": "Question: {{question}}?\nAnswer:",
        "doc_to_target": "{{answers}}",
        "metric_list": [_EXACT],
    },
    "mmlu": _choice(
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        LETTERS,
        _ACC,
        description="The following are multiple choice questions (with answers) about {{subject}}.\n\n",
        fewshot_split="dev",
        fewshot_config={"sampler": "first_n"},
    ),
    "blimp": {**_choice("", "{{[good, bad]}}", _ACC), "doc_to_target": 0},
}
# How many items there are, to say where a file has fewer.
N_ITEMS = {
    "lambada_openai": 5153,
    "hellaswag": 10042,
    "piqa": 1838,
    "boolq": 3270,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "gsm8k": 1319,
    "nq_open": 3610,
    "triviaqa": 17944,
    "mmlu": 14042,
    "blimp": 67000,
}


class Kept(Protocol):
    """Where answers, and how many requests lost their beginning, are kept between a crash and the next start."""

    def answers(self, key: str) -> tuple[list[Any], int]:
        """Those that are there."""

    def keep(self, key: str, answers: list[Any], n_cut: int) -> None:
        """Keep them."""


class Forgotten:
    """Keeps nothing."""

    def answers(self, key: str) -> tuple[list[Any], int]:
        """None."""
        return [], 0

    def keep(self, key: str, answers: list[Any], n_cut: int) -> None:
        """Forget them."""


@dataclass(frozen=True)
class Chosen:
    """A task that was asked for.

    Args:
        name: of the task, or of the group.
        tasks: the task, or those of the group.
        data: where the items come from.
    """

    name: str
    tasks: list[Task]
    data: str

    @property
    def shots(self) -> int:
        """Examples before every item."""
        return self.tasks[0].config.num_fewshot or 0


@dataclass(frozen=True)
class Result:
    """What a model reached in a task.

    Args:
        name: of the task or group.
        metrics: by their names; with several filters of the answers "metric, filter".
        n_items: items that were asked, of n_all that there are.
        n_all: see n_items; n_published is how many the published task has, None where that is not known.
        n_published: see n_all.
        n_cut: requests that were longer than the context, and lost their beginning.
        n_requests: requests in all.
        shots: examples before every item.
        seeds: that they were drawn with.
        by_seed: the metrics for each seed, where there are several.
        tasks: of a group, the metrics of its tasks.
    """

    name: str
    metrics: dict[str, Figure]
    n_items: int
    n_all: int
    n_published: int | None
    n_cut: int
    n_requests: int
    shots: int
    seeds: list[int]
    by_seed: list[dict[str, float]] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def choose(names: Sequence[str], data: Path | None = None, shots: int | None = None) -> list[Chosen]:
    """Find tasks and read their items.

    Args:
        names: of tasks or groups.
        data: folder with their files (see `onebit.eval.local`); None fetches the harness's own data sets.
        shots: examples before every item; None takes what the task has.

    Raises:
        ValueError: an unknown task, or data that is missing, damaged or incomplete.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [SHORT_NAMES.get(name, name) for name in names]
    if shots is not None and shots < 0:
        raise ValueError(f"shots is {shots}; expected 0 or more")
    if data is None:
        return _of_harness(names, shots)
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder; --data names one with the files of the tasks")
    known = [*local.READERS, *local.PARTS]
    chosen = []
    for name in names:
        group = name.partition("_")[0]
        leaves = [name]
        if name in local.PARTS:
            leaves = local.parts(name, data)
        elif group in local.PARTS and name in (parts := local.parts(group, data)):
            pass
        elif name not in local.READERS:
            raise _unknown(name, [*known, *(parts if group in local.PARTS else [])], known)
        chosen.append(Chosen(name, [_local_task(leaf, data, shots) for leaf in leaves], str(data)))
    return chosen


def _unknown(name: str, near: Sequence[str], shown: Sequence[str]) -> ValueError:
    found = get_close_matches(name, near, 1)
    hint = f"; did you mean {found[0]!r}?" if found else ""
    return ValueError(f"there is no task {name!r}{hint}; tasks: {', '.join(shown)}")


def _local_task(name: str, data: Path, shots: int | None) -> Task:
    group = name.partition("_")[0]
    splits = {split: Dataset.from_list(docs) for split, docs in local.items(name, data).items()}
    config = {
        "num_fewshot": 0,
        "test_split": "test",
        "fewshot_split": "test",
        **CONFIGS[group if group in local.PARTS else name],
        "task": name,
        "custom_dataset": lambda **settings: splits,
    }
    if shots is not None:
        config["num_fewshot"] = shots
    return ConfigurableTask(config=config)


def _of_harness(names: Sequence[str], shots: int | None) -> list[Chosen]:
    """Tasks with the data sets that the harness fetches."""
    manager = TaskManager()
    chosen = []
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, manager.all_tasks, [*CONFIGS, "and those of lm-evaluation-harness"])
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                tasks = list(manager.load([name])["tasks"].values())
        except Exception as error:  # whatever a data set on another machine provokes
            raise ValueError(
                f"{name}: its data set cannot be fetched ({type(error).__name__}: {error}); "
                "give local files with --data"
            ) from None
        if shots is not None:
            for task in tasks:
                task.set_config("num_fewshot", shots)
        chosen.append(Chosen(name, tasks, str(tasks[0].config.dataset_path)))
    return chosen


def run(
    lm: OnebitLM,
    chosen: Chosen,
    limit: int | None = None,
    seeds: Sequence[int] = SEEDS,
    kept: Kept | None = None,
    progress: Progress = lambda what, share: None,
) -> Result:
    """Ask a model all items of a task.

    Args:
        lm: the model.
        chosen: the task.
        limit: ask only so many items of every task.
        seeds: of the draws of examples; where none are drawn, one is enough.
        kept: where answers are kept.
        progress: called with what is asked and the share that is done.

    Raises:
        ValueError: more examples than there are.
    """
    is_drawn = any(_draws(task) for task in chosen.tasks)
    seeds = list(seeds) if is_drawn else list(seeds)[:1]
    # Of each seed and metric, all items of all tasks.
    values: list[dict[str, list[Any]]] = [{} for _ in seeds]
    tasks: dict[str, dict[str, float]] = {}
    n_requests = n_cut = n_done = 0
    for pooled, seed in zip(values, seeds, strict=True):
        what = f"{chosen.name}, seed {seed}" if len(seeds) > 1 else chosen.name
        for task in chosen.tasks:

            def show(share: float, n_done: int = n_done, what: str = what) -> None:
                progress(what, (n_done + share) / (len(seeds) * len(chosen.tasks)))

            answered = _ask(lm, task, limit, seed, kept or Forgotten(), show)
            n_requests, n_cut, n_done = n_requests + answered.n_requests, n_cut + answered.n_cut, n_done + 1
            tasks[task.config.task if len(seeds) == 1 else f"{task.config.task}, seed {seed}"] = {
                metric: _figure(task, metric, [items]).value for metric, items in answered.values.items()
            }
            for metric, items in answered.values.items():
                pooled.setdefault(metric, []).extend(items)
    first = chosen.tasks[0]
    by_seed = [
        {metric: _figure(first, metric, [items]).value for metric, items in one.items()} for one in values
    ]
    return Result(
        chosen.name,
        {metric: _figure(first, metric, [one[metric] for one in values]) for metric in values[0]},
        len(next(iter(values[0].values()))),
        sum(len(task.eval_docs) for task in chosen.tasks),
        N_ITEMS.get(chosen.name),
        n_cut,
        n_requests,
        chosen.shots,
        seeds if is_drawn else [],
        by_seed if len(seeds) > 1 else [],
        tasks if len(chosen.tasks) > 1 else {},
    )


def _draws(task: Task) -> bool:
    """Whether examples are drawn by chance."""
    return bool(task.config.num_fewshot) and not isinstance(task.sampler, FirstNSampler)


class _Answered(NamedTuple):
    """Values of every metric for every item, in order, and how many requests that took."""

    values: dict[str, list[Any]]
    n_requests: int
    n_cut: int


def _ask(
    lm: OnebitLM, task: Task, limit: int | None, seed: int, kept: Kept, progress: Callable[[float], None]
) -> _Answered:
    task.set_fewshot_seed(seed)
    with contextlib.redirect_stderr(io.StringIO()):
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    requests = task.instances
    asked = json.dumps([request.args for request in requests], default=str)
    key = f"{task.config.task} {seed} {hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    kind = requests[0].request_type
    answers, lm.n_cut = kept.answers(key)
    for begin in range(len(answers), len(requests), REQUESTS_AT_ONCE):
        answers += getattr(lm, kind)(requests[begin : begin + REQUESTS_AT_ONCE])
        kept.keep(key, answers, lm.n_cut)
        progress(len(answers) / len(requests))
    by_item: dict[int, list[Any]] = {}
    for request, answer in zip(requests, answers, strict=True):
        request.resps = [tuple(answer) if isinstance(answer, list) else answer]
        by_item.setdefault(request.doc_id, []).append(request)
    task.apply_filters()
    values: dict[str, list[Any]] = {}
    filters = list(requests[0].filtered_resps)
    for name in filters:
        for of_item in by_item.values():
            found = task.process_results(
                of_item[0].doc, [request.filtered_resps[name] for request in of_item]
            )
            for metric, value in found.items():
                values.setdefault(metric if len(filters) == 1 else f"{metric}, {name}", []).append(value)
    return _Answered(values, len(requests), lm.n_cut)


def _figure(task: Task, metric: str, values_SN: list[list[Any]]) -> Figure:
    """The figure of a metric, from the values of all items for each seed."""
    name = metric.partition(",")[0]
    aggregate = task.aggregation()[name]
    if name == "perplexity":
        return mean([-x for of_seed in values_SN for x in of_seed]).through(exp)
    if getattr(aggregate, "__name__", "") != "mean":
        return bootstrap([x for of_seed in values_SN for x in of_seed], aggregate)
    if len(values_SN) > 1:
        return over_seeds(values_SN)
    return proportion(values_SN[0]) if set(values_SN[0]) <= {0, 1} else mean(values_SN[0])
