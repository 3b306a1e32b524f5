"""Programs of others ask the server, and get what the model gives alone. Kind: oracle (lm-evaluation-harness, curl)."""

import json
import logging
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from lm_eval.evaluator import evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI

import tiny
from onebit.eval import tasks
from onebit.eval.harness import OnebitLM
from serve.running import running, tiny_llm

GUIDE = Path(__file__).parent.parent.parent / "docs/guide/serve.md"
# Logits are the same bits. Evaluation takes exponentials in float32, the server in float64.
NATS = 1e-7


@pytest.fixture(scope="module", params=["one after another", "concurrent"])
def models(request, server, llm, tmp_path_factory):
    """The harness's client of the server, and the adapter that `onebit eval` asks the same model with."""
    folder = tmp_path_factory.mktemp("tokenizer")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tiny.tokenizer_json().decode()),
        eos_token="<|endoftext|>",
    ).save_pretrained(folder)
    client = LocalCompletionsAPI(
        base_url=server.url + "/v1/completions",
        model="tiny",
        tokenizer_backend="huggingface",
        tokenizer=str(folder),
        max_length=llm.config.max_seq_len,
        batch_size=4,
        num_concurrent=4 if request.param == "concurrent" else 1,
        max_retries=1,
    )
    return client, OnebitLM(llm)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(rng.choice(tiny.TEXT.split(), n))

    def write(name, lines):
        (folder / name).parent.mkdir()
        (folder / name).write_text("\n".join(lines) + "\n")

    lengths = range(2, 14)
    items = [[text(n), str(n % 4), *(text(1 + (n + k) % 5) for k in range(4))] for n in lengths]
    write("hellaswag/hellaswag_val_full.txt", [line for item in items for line in item])
    write("lambada/lambada_test.jsonl", [json.dumps({"text": text(n)}) for n in lengths])
    asked = [{"question": text(3), "answer": f"#### {n}"} for n in lengths]
    write("gsm8k/test.jsonl", map(json.dumps, asked))
    return folder


def choose(name, data):
    (chosen,) = tasks.choose([name], data, 1 if name == "gsm8k" else None)
    if name == "gsm8k":
        chosen.tasks[0].config.generation_kwargs["max_gen_toks"] = 12
    return chosen


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "gsm8k"])
def test_lm_eval_gets_the_scores_of_onebit_eval(name, models, data):
    client, ours = models
    (task,) = choose(name, data).tasks
    task.set_fewshot_seed(1234)
    name_of = task.config.task
    told = evaluate(client, {"tasks": {name_of: task}}, bootstrap_iters=0)["results"][name_of]
    expected = tasks.run(ours, choose(name, data), seeds=[1234])
    assert expected.metrics
    for key, figure in expected.metrics.items():
        # Theirs are called "acc,none" or "exact_match,strict-match".
        (value,) = [v for k, v in told.items() if k.replace(",none", "").replace(",", ", ") == key]
        assert value == pytest.approx(figure.value, rel=NATS)


@pytest.mark.parametrize("name", ["hellaswag", "lambada", "gsm8k"])
def test_lm_eval_gets_the_answers_of_onebit_eval(name, models, data):
    (task,) = choose(name, data).tasks
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    asked = task.instances
    told, expected = (getattr(lm, asked[0].request_type)(asked, disable_tqdm=True) for lm in models)
    if name == "gsm8k":
        assert told == expected and len(set(told)) > 1
        return
    assert [value for value, _ in told] == pytest.approx([value for value, _ in expected], abs=NATS)
    assert [greedy for _, greedy in told] == [greedy for _, greedy in expected]


def test_the_guides_curl_command_works():
    """The command of the guide, with this server's port."""
    if not (curl := shutil.which("curl")):
        pytest.skip("left out: curl is not here")
    (command,) = re.findall(r"^curl .*?'\n", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    with running({"stories": tiny_llm()}) as server:
        words = shlex.split(command.replace("\\\n", " ").replace("http://127.0.0.1:8000", server.url))
        done = subprocess.run([curl, *words[1:], "-sS"], capture_output=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["model"] == "stories" and answer["usage"]["completion_tokens"] > 0
