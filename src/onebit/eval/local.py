"""Items of public benchmarks from files in a folder, as their authors and others publish them.

Every reader gives the fields that the task's prompt (tasks.py) asks for. A file may also be plain, or packed in another
way: NAME, NAME.xz, NAME.bz2 and NAME.gz are the same.

    items("piqa", Path("data"))         # [{"goal": ..., "sol1": ..., "sol2": ..., "label": 0}, ...]
"""

import csv
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onebit.eval.texts import OPENERS, read_text

Item = dict[str, Any]
# Of a task, the items that are asked and those that may stand before them as examples.
Splits = dict[str, list[Item]]


def items(name: str, folder: Path) -> Splits:
    """Read the items of a task.

    Args:
        name: one of READERS, or mmlu_SUBJECT, or blimp_PHENOMENON.
        folder: where the files are.

    Raises:
        ValueError: a file that is missing, damaged, incomplete, or in another format.
        OSError: a file that cannot be read.
    """
    group, _, part = name.partition("_")
    with _explained(name, folder):
        found = PARTS[group](folder, part) if group in PARTS and part else {"test": READERS[name](folder)}
        if not found["test"]:
            raise ValueError(f"{folder}: has no items of {name}; it is not fully downloaded: fetch it again")
        return found


def parts(group: str, folder: Path) -> list[str]:
    """The tasks of a group, as its archive has them: mmlu_abstract_algebra, ...

    Raises:
        ValueError: an archive that is missing, damaged or incomplete.
    """
    names = set()
    with _explained(group, folder):
        for member in _archive(folder / f"{group}.tar"):
            found = re.fullmatch(r".*/(?:test/(\w+)_test\.csv|data/(\w+)\.jsonl)", member)
            if found:
                names.add(f"{group}_{found[1] or found[2]}")
        if not names:
            raise ValueError(f"{folder}: has no items of {group}; it is not fully downloaded: fetch it again")
    return sorted(names)


@contextmanager
def _explained(name: str, folder: Path) -> Iterator[None]:
    """What a file lacks, in words."""
    try:
        yield
    except (json.JSONDecodeError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{folder}: the file of {name} is cut short or of another format ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from None


def _find(path: Path) -> Path:
    """The file, or what it is packed in."""
    ways = [path, *(path.with_name(path.name + suffix) for suffix in OPENERS)]
    for way in ways:
        if way.is_file():
            return way
    raise ValueError(
        f"{path}: not found, neither plain nor as {', '.join(OPENERS)}; see docs/guide/eval.md for names"
    )


def _json_lines(path: Path) -> list[Item]:
    return [json.loads(line) for line in read_text(_find(path)).split("\n") if line.strip()]


# Archives are read once: a group asks for each of its tasks.
_archives: dict[Path, dict[str, str]] = {}


def _archive(path: Path) -> dict[str, str]:
    """The texts in a tar file, by their names."""
    path = _find(path)
    if path not in _archives:
        try:
            with tarfile.open(path) as archive:
                files = ((member, archive.extractfile(member)) for member in archive)
                _archives[path] = {member.name: f.read().decode("utf-8") for member, f in files if f}
        except (tarfile.TarError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path}: damaged or not fully downloaded ({error}); fetch it again") from None
    return _archives[path]


def _lambada(folder: Path) -> list[Item]:
    return _json_lines(folder / "lambada/lambada_test.jsonl")


def _hellaswag(folder: Path) -> list[Item]:
    """Six lines for each item: context, number of the right ending, four endings."""
    lines = read_text(_find(folder / "hellaswag/hellaswag_val_full.txt")).rstrip("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(
            f"{folder}/hellaswag: has {len(lines)} lines, expected six for each item; fetch the file again"
        )
    pieces = (lines[i : i + 6] for i in range(0, len(lines), 6))
    return [{"query": p[0], "choices": p[2:], "label": int(p[1])} for p in pieces]


def _piqa(folder: Path) -> list[Item]:
    found = _json_lines(folder / "piqa/valid.jsonl")
    labels = read_text(_find(folder / "piqa/valid-labels.lst")).split()
    if len(found) != len(labels):
        raise ValueError(f"{folder}/piqa: has {len(found)} items and {len(labels)} labels; fetch both again")
    return [{**item, "label": int(label)} for item, label in zip(found, labels, strict=True)]


def _boolq(folder: Path) -> list[Item]:
    found = []
    for item in _json_lines(folder / "boolq/boolq.llm-foundry.jsonl"):
        passage, _, question = item["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
        label = ["no", "yes"].index(item["choices"][item["gold"]])
        found.append({"passage": passage, "question": question.removesuffix("?"), "label": label})
    return found


def _winogrande(folder: Path) -> list[Item]:
    found = _json_lines(folder / "winogrande/winogrande_xl.dev.llm-foundry.jsonl")
    return [{"contexts": i["context_options"], "rest": i["continuation"], "label": i["gold"]} for i in found]


def _arc(name: str) -> Callable[[Path], list[Item]]:
    pattern = re.compile(
        r"Please choose the correct answer to the question: (.*?)\n\nAnswer1: (.*)\n\nAnswer format:.*", re.S
    )

    def read(folder: Path) -> list[Item]:
        found = []
        for item in json.loads(read_text(_find(folder / f"arc/{name}.test.llm-adapters.json"))):
            question, choices = pattern.fullmatch(item["instruction"]).groups()  # type: ignore[union-attr]
            label = int(item["answer"].removeprefix("answer")) - 1
            found.append(
                {"question": question, "choices": re.split(r"\s+Answer\d: ", choices), "label": label}
            )
        return found

    return read


def _openbookqa(folder: Path) -> list[Item]:
    found = _json_lines(folder / "openbookqa/openbook_qa.test.llm-foundry.jsonl")
    return [{"question": i["query"], "choices": i["choices"], "label": i["gold"]} for i in found]


def _triviaqa(folder: Path) -> list[Item]:
    found = _json_lines(folder / "triviaqa/triviaqa_sm_sub.llm-foundry.jsonl")
    return [
        {
            "question": i["context"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "answers": list(dict.fromkeys([i["answer"], *i["aliases"]])),
        }
        for i in found
    ]


def _nq_open(folder: Path) -> list[Item]:
    return _json_lines(folder / "nq_open/NQ-open.dev.jsonl")


def _gsm8k(folder: Path) -> list[Item]:
    return _json_lines(folder / "gsm8k/test.jsonl")


def _mmlu(folder: Path, subject: str) -> Splits:
    files = _archive(folder / "mmlu.tar")
    splits = {}
    for split in ("test", "dev"):
        rows = csv.DictReader(io.StringIO(files[f"mmlu/{split}/{subject}_{split}.csv"]))
        splits[split] = [
            {
                "question": row["question"],
                "choices": [row[f"choice{k}"] for k in range(4)],
                "label": int(row["answer"]),
                "subject": subject.replace("_", " "),
            }
            for row in rows
        ]
    return splits


def _blimp(folder: Path, phenomenon: str) -> Splits:
    lines = _archive(folder / "blimp.tar")[f"blimp/data/{phenomenon}.jsonl"].split("\n")
    found = [json.loads(line) for line in lines if line]
    return {"test": [{"good": i["sentence_good"], "bad": i["sentence_bad"]} for i in found]}


READERS: dict[str, Callable[[Path], list[Item]]] = {
    "lambada_openai": _lambada,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "boolq": _boolq,
    "winogrande": _winogrande,
    "arc_easy": _arc("ARC-Easy"),
    "arc_challenge": _arc("ARC-Challenge"),
    "openbookqa": _openbookqa,
    "gsm8k": _gsm8k,
    "nq_open": _nq_open,
    "triviaqa": _triviaqa,
}
# Groups whose tasks are files of one archive.
PARTS: dict[str, Callable[[Path, str], Splits]] = {"mmlu": _mmlu, "blimp": _blimp}
