"""Small decoders as ONNX graphs, with and without past, and the same in numpy."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

VOCAB, WIDTH = 40, 6


def tables(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and head."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((VOCAB, WIDTH), (WIDTH, VOCAB)))


def next_token(ids: list[int]) -> int:
    """What the graphs say after a text: of the sum of all embeddings and the last one."""
    embed, head = tables()
    return int(np.argmax((embed[ids].sum(0) + embed[ids[-1]]) @ head))


def write(path, with_past: bool) -> None:
    """A decoder whose key of a token is its embedding."""
    embed, head = (
        numpy_helper.from_array(x, name) for x, name in zip(tables(), ("embed", "head"), strict=True)
    )
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "all"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCAB])
    one, two = (numpy_helper.from_array(np.array([n]), name) for n, name in ((1, "one"), (2, "two")))
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["key"]),
    ]
    inputs, outputs = [ids, mask], [logits]
    if with_past:
        shape = ["batch", 1, "past", WIDTH]
        for name in ("key", "value"):
            inputs.append(
                helper.make_tensor_value_info(f"past_key_values.0.{name}", TensorProto.FLOAT, shape)
            )
            outputs.append(helper.make_tensor_value_info(f"present.0.{name}", TensorProto.FLOAT, shape))
            nodes.append(
                helper.make_node(
                    "Concat", [f"past_key_values.0.{name}", "key"], [f"present.0.{name}"], axis=2
                )
            )
    seen = "present.0.key" if with_past else "key"
    nodes += [
        helper.make_node("ReduceSum", [seen, "two"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["h"]),
        helper.make_node("MatMul", ["h", "head"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, [embed, head, one, two])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    save(model, path)
