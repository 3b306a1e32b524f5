"""Tasks have the scores that lm-evaluation-harness gives with its own model. Kind: oracle (lm_eval, transformers).

The same random Llama twice: in transformers, asked by the harness's `hf` model and counted by its evaluator, and here.
Keys and values are rounded to bfloat16 on both sides, the rest is float32. Sums over a text differ by 1e-6 nats, or by
up to 1e-3 where a key or value at a tie of bfloat16 rounds the other way.
"""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, processors
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import tiny
from onebit.eval import tasks
from onebit.eval.harness import OnebitLM
from onebit.formats import hf
from onebit.llm import LLM

NATS, NATS_AT_A_TIE = 1e-5, 2e-3
NAMES = ["lambada", "hellaswag", "winogrande", "gsm8k", "triviaqa"]
CONTEXT = 96


def bf16_cache(module, query, key, value, attention_mask, **kwargs):
    key, value = (x.to(torch.bfloat16).to(query.dtype) for x in (key, value))
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def quiet_and_eager():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    AttentionInterface.register("bf16_cache_of_tasks", bf16_cache)
    AttentionMaskInterface.register("bf16_cache_of_tasks", eager_mask)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "begin token"])
def models(request, tmp_path_factory):
    """The harness's model and ours, of one folder."""
    folder = tmp_path_factory.mktemp("llama")
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0 if request.param else None,
        eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        value = noise * parameter.shape[1] ** -0.5 if noise.ndim == 2 else 1 + 0.1 * noise
        parameter.copy_(value.to(torch.bfloat16))
    model.save_pretrained(folder)
    tokenizer = Tokenizer.from_str(tiny.tokenizer_json().decode())
    special = {"eos_token": "<|endoftext|>"}
    if request.param:
        special["bos_token"] = "<|endoftext|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="bf16_cache_of_tasks"
    ).eval()
    lm = HFLM(pretrained=theirs, tokenizer=fast, device="cpu", batch_size=4)
    return lm, OnebitLM(LLM(hf.read(folder), threads=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Items of words from a story, some of them longer than the context."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = tiny.TEXT.split()

    def text(n: int) -> str:
        return " ".join(rng.choice(words, n))

    def lines(name: str, items: list[dict]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))

    lengths = [*range(2, 22), 80]
    lines("lambada/lambada_test.jsonl", [{"text": text(n)} for n in lengths])
    items = [[text(n), str(n % 4), *(text(1 + (n + k) % 5) for k in range(4))] for n in lengths]
    (folder / "hellaswag").mkdir()
    (folder / "hellaswag/hellaswag_val_full.txt").write_text(
        "".join("\n".join(item) + "\n" for item in items)
    )
    pairs = [
        {"context_options": [f"{text(n)} Lily", f"{text(n)} dog"], "continuation": text(4), "gold": n % 2}
        for n in lengths
    ]
    lines("winogrande/winogrande_xl.dev.llm-foundry.jsonl", pairs)
    lines("gsm8k/test.jsonl", [{"question": text(3), "answer": f"#### {n}"} for n in range(8)])
    asked = [
        {"context": f"Question: {text(n)}\nAnswer:", "answer": "the", "aliases": ["the", "a"]}
        for n in lengths
    ]
    lines("triviaqa/triviaqa_sm_sub.llm-foundry.jsonl", asked)
    return folder


def choose(name, data):
    """A task, with few and short examples."""
    (chosen,) = tasks.choose([name], data, 1 if name == "gsm8k" else None)
    if name in ("gsm8k", "triviaqa"):
        chosen.tasks[0].config.generation_kwargs["max_gen_toks"] = 8
    return chosen


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_harness(name, models, data):
    theirs, ours = models
    (task,) = choose(name, data).tasks
    task.set_fewshot_seed(1234)
    name_of = task.config.task
    expected = evaluate(theirs, {"tasks": {name_of: task}}, bootstrap_iters=0)["results"][name_of]
    found = tasks.run(ours, choose(name, data), seeds=[1234])
    # Theirs are called "acc,none" or "exact_match,strict-match".
    keys = [
        key.replace(",none", "").replace(",", ", ").replace(", remove_whitespace", "") for key in expected
    ]
    for key, value in zip(keys, expected.values(), strict=True):
        if key in found.metrics:
            assert found.metrics[key].value == pytest.approx(value, rel=1e-4, abs=0)
    assert set(found.metrics) <= set(keys)
    assert name != "hellaswag" or found.n_cut == 4


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_harness(name, models, data):
    (task,) = choose(name, data).tasks
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    # An empty context is what BLiMP asks with.
    asked = task.instances
    if asked[0].request_type == "loglikelihood":
        asked = [
            *asked,
            *({**vars(r)} and type(r)("loglikelihood", {}, ("", r.args[1]), 0) for r in asked[:8]),
        ]
    expected, found = (getattr(lm, asked[0].request_type)(asked, disable_tqdm=True) for lm in models)
    if asked[0].request_type == "generate_until":
        assert found == expected
        return
    difference = np.abs(np.array([a for a, _ in found]) - np.array([a for a, _ in expected]))
    print(f"{name}: {difference.max():.1e} nats")
    assert np.median(difference) < NATS and difference.max() < NATS_AT_A_TIE
    assert [b for _, b in found] == [b for _, b in expected]


def test_whole_texts_are_those_of_the_harness(models):
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("Once", tiny.TEXT)]
    expected, found = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in models)
    # The longer one has about 400 tokens.
    assert found == pytest.approx(expected, abs=10 * NATS_AT_A_TIE)
