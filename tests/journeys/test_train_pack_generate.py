"""Oracle and exact: text -> training -> run folder -> .onebit -> engine, and the engine against torch all along."""

import json

import numpy as np
import pytest
import torch

import onebit
from onebit import formats
from onebit.formats import run
from onebit.nn.transformer import Transformer
from onebit.packing import unpack
from onebit.quant import quantize_weights
from onebit.train import build, train

NAMES = ["Ann", "Ben", "Cat", "Dan", "Eve"]
THINGS = ["ball", "kite", "boat", "drum"]
PROMPTS = [f"{name} had a {thing}" for name in NAMES for thing in THINGS]
GREEDY_TOKENS = 100


@pytest.fixture(scope="module", params=["b1.58", "b1"])
def journey(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journey")
    (folder / "texts").mkdir()
    lines = [
        {
            "text": f"{a} had a {x}. {b} had a {y}. They played with the {x} and the {y} "
            f"all day {'and night ' * n}long."
        }
        for a in NAMES
        for b in NAMES
        for x in THINGS
        for y in THINGS
        for n in (1, 2)
    ]
    (folder / "texts" / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = build("tiny", ["data.vocab_size=300", f"model.weights={request.param}", "steps=150"])
    train(recipe, folder / "texts", folder / "run")
    onebit.convert(folder / "run", folder / "model.onebit")
    return folder


def test_codes_of_the_file_are_those_that_were_trained(journey):
    model = Transformer.from_checkpoint(run.read(journey / "run"))
    packed = formats.read(journey / "model.onebit")
    for name, parameter in model.named_parameters():
        if packed.config.is_linear(name):
            codes, scale = quantize_weights(parameter.detach(), packed.config.weights, packed.config.scale)
            tensor = packed.tensors[name]
            assert np.array_equal(unpack(tensor.data, tensor.encoding, tensor.shape), codes.numpy())
            assert np.array_equal(tensor.scale, scale.numpy())


def test_greedy_text_of_the_engine_is_that_of_torch(journey):
    model = Transformer.from_checkpoint(run.read(journey / "run")).eval()
    llm = onebit.load(journey / "model.onebit")
    texts = set()
    for prompt in PROMPTS:
        ids = llm.tokenizer.encode(prompt)
        output = llm.generate(prompt, temperature=0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
        assert len(output.tokens) == GREEDY_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *output.tokens[:-1]]]))[0, len(ids) - 1 :]
        assert logits.argmax(-1).tolist() == output.tokens
        texts.add(output.text)
    assert len(texts) > 1


def test_the_file_and_the_run_folder_are_the_same_model(journey):
    a, b = onebit.load(journey / "model.onebit"), onebit.load(journey / "run")
    assert np.array_equal(a.logits("Ben had a boat"), b.logits("Ben had a boat"))
    texts = [llm.generate("Eve", seed=5, max_tokens=20).text for llm in (a, b)]
    assert texts[0] == texts[1]


def test_it_learned_the_stories(journey):
    llm = onebit.load(journey / "model.onebit")
    assert (
        "They played with the" in llm.generate("Ann had a kite. Ben had", temperature=0, max_tokens=60).text
    )
