"""How many zeros squared ReLU leaves in a packed model, and what skipping them could save.

    python benchmarks/zeros.py --model relu2.onebit --text tinystories_val.txt.xz [--tokens 4096]

A gate <= 0 makes its row of `up` needless; a zero code at the input of `down` makes a column of it needless, and four
in a row a whole line of 64 bytes of the layout that `down` has today. All skips are exact. Counts them per layer over
real text, in torch's eval mode, which is the engine to the bit but for scales that do not survive a round trip through
float32 weights. Prints a table, then one JSON line.
"""

import argparse
import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import onebit
from onebit.checkpoint import Checkpoint, to_dense
from onebit.config import ModelConfig
from onebit.nn.transformer import Block, Transformer
from onebit.packing import UNIT_INPUTS, PackedTensor, packed_shape
from onebit.quant import quantize_a8

# The shape of BitNet b1.58 2B4T, whose decode step is what skipping would speed up.
LARGE = ModelConfig(128256, 2560, 30, 20, 5, 128, 6912)

# Time of a sparse product over that of a dense one at a share of zeros, from a prototype with rows (up) and columns
# (down) in layouts of their own at 2 bits a weight, out of memory, one thread.
MEASURED_ZEROS = (0.0, 0.5, 0.7, 0.8, 0.9)
MEASURED_TIME = {"up": (1.51, 1.03, 0.66, 0.45, 0.22), "down": (1.32, 1.62, 0.79, 0.46, 0.26)}


def master(packed: Checkpoint) -> Checkpoint:
    """Float32 weights that round to the codes of a packed model, with its scales but for the last bit."""
    tensors = {}
    for name, tensor in packed.tensors.items():
        dense = to_dense(tensor)
        if packed.config.is_linear(name):
            assert isinstance(tensor, PackedTensor) and tensor.scale.size == 1
            # The scale of ternary weights is their mean magnitude, zeros included.
            dense = dense / np.float32(np.mean(dense != 0))
        tensors[name] = dense
    return replace(packed, tensors=tensors)


class Counter:
    """Shares of zeros of one block, counted while it runs."""

    def __init__(self, block: Block) -> None:
        self.gate: list[float] = []
        self.down: list[float] = []
        self.lines: list[float] = []
        self._linear = block.linear
        block.linear = self.linear  # type: ignore[method-assign]

    def linear(self, x: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
        """Stand in for Block.linear."""
        if names == ("down",):
            codes, _ = quantize_a8(x)
            self.down += (codes == 0).float().mean(-1).flatten().tolist()
            lines = codes.unflatten(-1, (-1, UNIT_INPUTS)) == 0
            self.lines += lines.all(-1).float().mean(-1).flatten().tolist()
        y = self._linear(x, *names)
        if names[0] == "gate":
            self.gate += (y[0] <= 0).float().mean(-1).flatten().tolist()
        return y


def saving(gate: float, down: float, lines: float) -> dict[str, float]:
    """What the measured zeros would save of a decode step of the 2B shape, were its zeros the same."""
    shapes = LARGE.linear_shapes()
    mb = {name: np.prod(packed_shape("t80", shape)) * LARGE.n_layers / 1e6 for name, shape in shapes.items()}
    step = sum(mb.values()) + LARGE.vocab_size * LARGE.d_model / 1e6
    # Skipping needs 2 bits a weight where the dense layout has 1.6.
    read = mb["up"] * 1.25 * (1 - gate) + mb["down"] * 1.25 * (1 - down)
    dense = mb["up"] + mb["down"]
    time = mb["up"] * np.interp(gate, MEASURED_ZEROS, MEASURED_TIME["up"])
    time += mb["down"] * np.interp(down, MEASURED_ZEROS, MEASURED_TIME["down"])
    return {
        "step_mb": round(step, 1),
        "up_and_down_mb": round(dense, 1),
        "up_and_down_mb_sparse": round(read, 1),
        "step_saved_by_bytes": round((dense - read) / step, 4),
        "step_saved_by_prototype": round((dense - time) / step, 4),
        "step_saved_by_bytes_layout_of_today": round(mb["down"] * lines / step, 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="text, .txt or .txt.xz")
    parser.add_argument("--model", type=Path, required=True, help="a packed model with squared ReLU")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()

    llm = onebit.load(arguments.model)
    if llm.config.activation != "relu2":
        parser.error(f"--model has {llm.config.activation} as gate; expected one with relu2, squared ReLU")
    model = Transformer.from_checkpoint(master(llm.checkpoint)).eval()
    counters = [Counter(block) for block in model.layers]
    opener = lzma.open if arguments.text.suffix == ".xz" else open
    with opener(arguments.text, "rt", encoding="utf-8") as file:
        tokens = llm.tokenizer.encode(file.read())[: arguments.tokens]
    context = llm.config.max_seq_len
    same = 0
    for start in range(0, len(tokens), context):
        window = tokens[start : start + context]
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0].numpy()
        same += int(np.sum(logits.argmax(-1) == llm.logits(window).argmax(-1)))

    print("layer   gate <= 0   zeros at down   four zeros   least .. most zeros of a token (gate; down)")
    for i, c in enumerate(counters):
        spread = f"{min(c.gate):.2f} .. {max(c.gate):.2f}; {min(c.down):.2f} .. {max(c.down):.2f}"
        print(
            f"{i:>5}   {np.mean(c.gate):>9.3f}   {np.mean(c.down):>13.3f}   {np.mean(c.lines):>10.3f}   {spread}"
        )
    names = ("gate", "down", "lines")
    shares = {name: [round(float(np.mean(getattr(c, name))), 4) for c in counters] for name in names}
    means = {name: round(float(np.mean(shares[name])), 4) for name in names}
    result = {
        "model": arguments.model.name,
        "tokens": len(tokens),
        "same_best_token_as_engine": round(same / len(tokens), 4),
        **shares,
        "mean": means,
        "large_shape": saving(**means),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
