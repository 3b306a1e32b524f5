"""Every engine grows the texts that its model says, alone and together, and again after going back. Kind: oracle."""

import importlib
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

import tiny
from onebit import formats
from onebit.bench import measures
from onebit.bench.engines.ours import Ours
from onebit.bench.peers import PEERS
from onebit.checkpoint import quantize
from onebit.llm import load

from . import graphs

# What llama.cpp and transformers have a class for.
CONFIG = tiny.config(
    weights="dense",
    activations="none",
    sub_norm=False,
    activation="silu",
    d_model=64,
    d_ff=96,
    max_seq_len=512,
)
PROMPT = [7, 3, 250, 1, 1, 90, 12, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense model of numbers that bfloat16 holds, as a file of each engine."""
    folder = tmp_path_factory.mktemp("dense")
    checkpoint = quantize(tiny.bf16_exact(tiny.master(CONFIG)))
    formats.write(checkpoint, folder / "tiny.onebit")
    formats.write(checkpoint, folder / "tiny.gguf", "F32")
    formats.write(checkpoint, folder / "hf", "dense")
    return folder


def open_engine(name, folder):
    if name == "onebit":
        return Ours(str(folder / "tiny.onebit"), 1)
    module, _, cls = PEERS[name].engine.partition(":")
    file, more = ("tiny.gguf", {}) if name == "llama.cpp" else ("hf", {"dtype": "float32"})
    return getattr(importlib.import_module(module), cls)(str(folder / file), 1, **more)


def continue_text(engine, prompt, n, batch=1):
    """The n tokens after a prompt, of as many texts as asked for, of which the others end otherwise."""
    engine.begin(batch, len(prompt) + n)
    last = engine.read([[*prompt[:-1], (prompt[-1] + i) % CONFIG.vocab_size] for i in range(batch)])
    texts = [last]
    for _ in range(n - 1):
        texts.append(engine.read([[token] for token in texts[-1]]))
    return [list(text) for text in zip(*texts, strict=True)]


@pytest.mark.parametrize("name", ["onebit", "llama.cpp", "torch"])
def test_the_same_text_from_every_engine(name, model):
    llm = load(model / "tiny.onebit", threads=1)
    wanted = llm.generate(PROMPT, max_tokens=6, temperature=0, ignore_eos=True).tokens
    engine = open_engine(name, model)
    engine.use(1)
    assert engine.vocab_size == CONFIG.vocab_size and engine.load_s > 0
    assert {"version", "settings", "kv_cache"} <= set(engine.info)
    assert engine.info.get("label") == {"onebit": "W16A16KV16", "torch": "W32A32KV32"}.get(name)
    assert continue_text(engine, PROMPT, 6) == [wanted]
    # Back to the prompt, whose last token is read again.
    engine.rewind(len(PROMPT) - 1)
    assert engine.read([PROMPT[-1:]]) == wanted[:1]
    assert continue_text(engine, PROMPT, 6, batch=3)[0] == wanted
    # A prompt in several steps: 300 tokens of two texts are more than one step takes.
    long = [i * 7 % CONFIG.vocab_size for i in range(300)]
    last = int(np.argmax(llm.logits(long)[-1]))
    engine.begin(2, 310)
    assert engine.read([long, long]) == [last, last]
    for rate in (measures.decode(engine, 1, 0, context=4, batch=2), measures.prefill(engine, 1, 0, 16)):
        assert 1 < rate < 1e9


def test_a_packed_model_in_transformers(tmp_path):
    """Its layers unpack and round; numbers beside them keep the width that they have in the file."""
    from onebit.bench.engines.hugging import HuggingFace

    checkpoint = quantize(tiny.master(tiny.BITNET))
    formats.write(checkpoint, tmp_path / "packed", "packed")
    engine = HuggingFace(str(tmp_path / "packed"), 1, "auto")
    assert "AutoBitLinear, float32" in engine.info["settings"] and "label" not in engine.info
    text = continue_text(engine, PROMPT, 4, batch=2)
    engine.rewind(len(PROMPT))
    assert engine.read([[t[0]] for t in text]) == [t[1] for t in text]
    assert 1 < measures.decode(engine, 1, 0, context=4) < 1e9


@pytest.mark.parametrize("with_past", [True, False])
def test_graphs_of_onnx(with_past, tmp_path):
    from onebit.bench.engines.onnx import Onnx

    graphs.write(tmp_path / "model.onnx", with_past)
    engine = Onnx(str(tmp_path / "model.onnx"), 1)
    engine.use(2)
    assert engine.vocab_size == graphs.VOCAB
    assert engine.info["kv_cache"] == ("tensor(float)" if with_past else "none")
    texts = [[3, 8, 1], [3, 8, 2]]
    engine.begin(2, 8)
    last = engine.read(texts)
    for _ in range(3):
        assert last == [graphs.next_token(ids) for ids in texts]
        texts = [[*ids, token] for ids, token in zip(texts, last, strict=True)]
        last = engine.read([[token] for token in last])
    engine.rewind(1)
    assert engine.read([[8, 9]] * 2) == [graphs.next_token([3, 8, 9])] * 2
    assert 1 < measures.decode(engine, 2, 0, context=4) < 1e9
    assert 1 < measures.prefill(engine, 2, 0, 16) < 1e9


def test_a_graph_that_is_no_decoder(tmp_path):
    from onnx import TensorProto, helper, save

    from onebit.bench.engines.onnx import Onnx

    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Abs", ["pixels"], ["out"])], "other", [pixels], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="takes pixels and gives out first; expected a decoder"):
        Onnx(str(tmp_path / "other.onnx"), 1)
    assert onnxruntime.__version__


def test_other_activations_are_those_of_such_a_model(tmp_path):
    """The speed of a width is that of a model which was trained for it: the same codes, another config."""
    checkpoint = quantize(tiny.master())
    formats.write(checkpoint, tmp_path / "a8.onebit")
    formats.write(replace(checkpoint, config=tiny.config(activations="a4")), tmp_path / "a4.onebit")
    other = Ours(str(tmp_path / "a8.onebit"), 1, activations="a4")
    own = Ours(str(tmp_path / "a4.onebit"), 1)
    assert other.info["label"] == own.info["label"] == "W1.58A4KV16"
    assert continue_text(other, PROMPT, 12) == continue_text(own, PROMPT, 12)
    int8 = Ours(str(tmp_path / "a8.onebit"), 1, kv_cache="int8")
    assert int8.info["label"] == "W1.58A8KV8"
