"""Files of benchmarks become the harness's items, and answers become figures. Kinds: exact, invariant."""

import bz2
import io
import json
import lzma
import math
import tarfile

import pytest

import tiny
from onebit.eval import local, tasks
from onebit.eval.harness import OnebitLM
from onebit.llm import LLM

STORY = "Once upon a time there was a little girl"
ARC = (
    "Please choose the correct answer to the question: Who ran?\n\n"
    "Answer1: the dog Answer2: a red ball Answer3: Lily\n\nAnswer format: answer1/answer2/answer3"
)
HELLASWAG = "Dog: The dog ran. it\n1\nslept.\nran home.\nwas red.\nplayed.\n"


def lines(*items) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def tar(**files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


FILES = {
    "lambada/lambada_test.jsonl": lines({"text": f"{STORY} named Lily"}, {"text": "The dog\u2028ran to the park"}),
    "hellaswag/hellaswag_val_full.txt": 3 * HELLASWAG,
    "piqa/valid.jsonl": lines({"goal": "play", "sol1": "run", "sol2": "sleep"}, {"goal": "", "sol1": "a", "sol2": "b"}),
    "piqa/valid-labels.lst": "1\n0\n",
    "boolq/boolq.llm-foundry.jsonl": lines(
        {"query": "Passage: A.\nQuestion: B?\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}
    ),
    "winogrande/winogrande_xl.dev.llm-foundry.jsonl": lines(
        {"context_options": ["Lily saw the dog so Lily", "Lily saw the dog so it"], "continuation": "ran.", "gold": 1}
    ),
    "arc/ARC-Easy.test.llm-adapters.json": json.dumps([{"instruction": ARC, "answer": "answer3"}]),
    "arc/ARC-Challenge.test.llm-adapters.json": json.dumps([{"instruction": ARC, "answer": "answer1"}]),
    "openbookqa/openbook_qa.test.llm-foundry.jsonl": lines({"query": "A dog", "choices": ["ran", "flew"], "gold": 0}),
    "gsm8k/test.jsonl": lines(*({"question": f"{i} and 1?", "answer": f"So\n#### {i + 1}"} for i in range(8))),
    "nq_open/NQ-open.dev.jsonl": lines({"question": "who ran", "answer": ["the dog", "Lily"]}),
    "triviaqa/triviaqa_sm_sub.llm-foundry.jsonl": lines(
        {"context": "Question: Who ran?\nAnswer:", "answer": "Lily", "aliases": ["Lily", "a girl"]}
    ),
}  # fmt: skip
HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    packs = {0: ("", bytes), 1: (".xz", lzma.compress), 2: (".bz2", bz2.compress)}
    for i, (name, text) in enumerate(FILES.items()):
        suffix, pack = packs[i % 3]
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pack(text.encode()))
    subjects = {}
    for subject in ("abstract_algebra", "anatomy"):
        subjects[f"mmlu/test/{subject}_test.csv"] = HEADER + '"Is it so,\nor so?",a,b,c,d,2\n' * 3
        subjects[f"mmlu/dev/{subject}_dev.csv"] = HEADER + "One?,a,b,c,d,0\n" * 5
    (folder / "mmlu.tar.xz").write_bytes(tar(**subjects))
    pair = {"sentence_good": "The dog runs.", "sentence_bad": "The dog run."}
    phenomena = {f"blimp/data/{name}.jsonl": lines(pair, pair) for name in ("drop_argument", "passive_1")}
    (folder / "blimp.tar.xz").write_bytes(tar(**phenomena))
    return folder


@pytest.fixture(scope="module")
def lm():
    return OnebitLM(LLM(tiny.master(tiny.config(max_seq_len=512)), threads=1))


def requests(name, data, shots=None):
    (task,) = tasks.choose([name], data, shots)[0].tasks
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    return [request.args for request in task.instances]


PROMPTS = {
    "lambada": (f"{STORY} named", " Lily"),
    "hellaswag": ("Dog: The dog ran. it", " slept."),
    "piqa": ("Question: play\nAnswer:", " run"),
    "boolq": ("A.\nQuestion: B?\nQuestion: is it?\nAnswer:", " no"),
    "winogrande": ("Lily saw the dog so Lily", " ran."),
    "arc_easy": ("Question: Who ran?\nAnswer:", " the dog"),
    "arc_challenge": ("Question: Who ran?\nAnswer:", " the dog"),
    "openbookqa": ("A dog", " ran"),
    "blimp_passive_1": ("", " The dog runs."),
    "mmlu_anatomy": (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Is it so,\nor so?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        " A",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_items_are_asked_as_the_harness_asks_them(name, data):
    assert requests(name, data)[0] == PROMPTS[name]


def test_generated_answers_are_asked_as_the_harness_asks_them(data):
    assert requests("nq_open", data)[0][0] == "Answer these questions:\n\nQ: who ran?\nA:"
    assert requests("triviaqa", data)[0][0] == "Question: Who ran??\nAnswer:"
    prompt, settings = requests("gsm8k", data)[0]
    assert prompt.count("#### ") == 5 and prompt.endswith("Question: 0 and 1?\nAnswer:")
    # The item itself is no example.
    assert "Answer: So\n#### 1\n" not in prompt
    assert settings["until"] == ["Question:", "</s>", "<|im_end|>"]
    assert requests("mmlu_anatomy", data, 2)[0][0].count("One?") == 2


@pytest.mark.parametrize("name", ["lambada", "hellaswag", "mmlu", "blimp", "gsm8k", "triviaqa"])
def test_every_kind_of_task_runs(name, data, lm):
    chosen = tasks.choose([name], data)[0]
    result = tasks.run(lm, chosen)
    assert result.n_items == result.n_all == sum(len(task.eval_docs) for task in chosen.tasks)
    assert all(figure.low <= figure.value <= figure.high for figure in result.metrics.values())
    assert (
        set(result.metrics)
        == {
            "lambada": {"perplexity", "acc"},
            "hellaswag": {"acc", "acc_norm"},
            "mmlu": {"acc"},
            "blimp": {"acc"},
            "gsm8k": {"exact_match, strict-match", "exact_match, flexible-extract"},
            "triviaqa": {"exact_match"},
        }[name]
    )
    assert len(result.tasks) == (2 if name in ("mmlu", "blimp") else 0)
    # Examples are drawn for one of them, as often as there are seeds.
    assert (len(result.seeds), len(result.by_seed)) == ((3, 3) if name == "gsm8k" else (0, 0))


def test_right_answers_count(data):
    class Knowing(OnebitLM):
        def loglikelihood(self, requests, disable_tqdm=True):
            return [(0.0 if request.args[1] == " ran home." else -9.0, True) for request in requests]

    result = tasks.run(Knowing(LLM(tiny.master(), threads=1)), tasks.choose(["hellaswag"], data)[0])
    assert result.metrics["acc"].value == 1 and 0.4 < result.metrics["acc"].low < 0.5


def test_requests_longer_than_the_context_are_counted(data):
    lm = OnebitLM(LLM(tiny.master(tiny.config(max_seq_len=8)), threads=1))
    result = tasks.run(lm, tasks.choose(["hellaswag"], data)[0])
    assert result.n_items == 3 and result.n_cut == result.n_requests == 12
    # A second task begins to count anew.
    assert tasks.run(lm, tasks.choose(["blimp"], data)[0]).n_cut < 12


def test_answers_that_are_kept_are_not_asked_again(data, monkeypatch):
    monkeypatch.setattr(tasks, "REQUESTS_AT_ONCE", 5)
    kept = {}

    class Crash(tasks.Forgotten):
        def answers(self, key):
            return json.loads(json.dumps(kept.get(key, [[], 0])))

        def keep(self, key, answers, n_cut):
            kept[key] = [list(answers), n_cut]
            if len(answers) == 10:
                raise KeyboardInterrupt

    # Every request is longer than this context.
    lm = OnebitLM(LLM(tiny.master(tiny.config(max_seq_len=8)), threads=1))
    (chosen,) = tasks.choose(["hellaswag"], data)
    with pytest.raises(KeyboardInterrupt):
        tasks.run(lm, chosen, kept=Crash())
    asked = []
    monkeypatch.setattr(lm, "loglikelihood", lambda r: (asked.extend(r), OnebitLM.loglikelihood(lm, r))[1])
    again = tasks.run(lm, chosen, kept=Crash())
    assert len(asked) == 2 and again.n_cut == 12 and again == tasks.run(lm, chosen)


def test_a_data_set_that_cannot_be_fetched_is_named(monkeypatch):
    class Offline:
        task_index = {"hellaswag": None}
        all_tasks = ["hellaswag", "hellaswag_de"]

        def load(self, names):
            raise ConnectionError("no route")

    monkeypatch.setattr(tasks, "TaskManager", Offline)
    with pytest.raises(
        ValueError, match=r"cannot be fetched \(ConnectionError: no route\); give local files with --data"
    ):
        tasks.choose(["hellaswag"])
    with pytest.raises(ValueError, match="did you mean 'hellaswag_de'"):
        tasks.choose(["hellaswag_d"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswagg", "there is no task 'hellaswagg'; did you mean 'hellaswag'"),
        ("mmlu_anatomi", "did you mean 'mmlu_anatomy'"),
    ],
)
def test_an_unknown_task_names_the_nearest(name, message, data):
    with pytest.raises(ValueError, match=message):
        tasks.choose([name], data)


@pytest.mark.parametrize("name", [name for name in FILES if name != "piqa/valid-labels.lst"])
def test_half_a_file_is_refused(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir()
    task = next(
        task
        for task in local.READERS
        if task.replace("_", "").startswith(name.partition("/")[0].replace("_", ""))
    )
    task = "arc_challenge" if "Challenge" in name else task
    (tmp_path / "piqa").mkdir(exist_ok=True)
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n0\n")
    whole = FILES[name].encode()
    for packed, broken in (("", whole[:-9]), (".xz", lzma.compress(whole)[:-9]), ("", b"")):
        cut = path.with_name(path.name + packed)
        cut.write_bytes(broken)
        with pytest.raises(ValueError, match=r"fetch .* again"):
            local.items(task, tmp_path)
        cut.unlink()
    with pytest.raises(ValueError, match="not found, neither plain nor as .xz"):
        local.items(task, tmp_path)


def test_half_an_archive_is_refused(data, tmp_path):
    for content in ((data / "mmlu.tar.xz").read_bytes()[:-60], tar(), b"no archive"):
        (tmp_path / "mmlu.tar.xz").write_bytes(content)
        local._archives.clear()
        with pytest.raises(ValueError, match="fetch it again"):
            tasks.choose(["mmlu"], tmp_path)


def test_a_rolling_text_is_the_sum_of_its_windows(lm):
    from lm_eval.api.instance import Instance

    text = tiny.TEXT * 3
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = lm.loglikelihood_rolling([request])
    tokens = lm.llm.tokenizer.encode(text)
    assert len(tokens) > lm.max_length and math.isfinite(found) and found < 0
