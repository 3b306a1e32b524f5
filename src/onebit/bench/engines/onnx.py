"""ONNX Runtime: one decoder as a graph, with or without past keys and values.

The names of inputs and outputs are those that optimum writes: input_ids, attention_mask, position_ids,
past_key_values.N.key and .value; logits first, then present.N.key and .value. A graph without past reads its whole
text for every token, and that is what is measured.
"""

import time
from typing import Any

import numpy as np
import onnxruntime

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Onnx:
    """One graph on the CPU.

    Args:
        path: the file.
        threads: of the loading.

    Raises:
        ValueError: a graph that is no decoder of token ids.
    """

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads
        started = time.perf_counter()
        self._session = self._open()
        self.load_s = time.perf_counter() - started
        inputs = {item.name: item for item in self._session.get_inputs()}
        outputs = self._session.get_outputs()
        known = ("input_ids", "attention_mask", "position_ids")
        self._past_inputs = {name: item for name, item in inputs.items() if name.startswith("past")}
        odd = [name for name in inputs if name not in known and name not in self._past_inputs]
        if "input_ids" not in inputs or odd or len(outputs[0].shape) != 3:
            raise ValueError(
                f"{path} takes {', '.join(inputs)} and gives {outputs[0].name} first; expected a decoder: input_ids "
                "and perhaps attention_mask, position_ids and past_key_values, logits [batch, tokens, vocabulary]"
            )
        self._names = [name for name in known if name in inputs]
        self._ids = np.zeros((1, 0), np.int64)
        self._past: list[Any] = []
        width = outputs[0].shape[2]
        self.vocab_size = width if isinstance(width, int) else 256
        past = "with past" if self._past_inputs else "without past: every token reads the whole text"
        self.info = {
            "version": f"onnxruntime {onnxruntime.__version__}",
            "settings": f"CPUExecutionProvider, {past}",
            "kv_cache": next((item.type for item in self._past_inputs.values()), "none"),
        }

    def use(self, threads: int) -> None:
        """Compute on so many threads from now on."""
        if threads != self._threads:
            self._threads = threads
            self._session = self._open()

    def begin(self, batch: int, positions: int) -> None:
        """Start empty texts."""
        self._ids = np.zeros((batch, 0), np.int64)
        self._past = [
            np.zeros(
                [batch if axis == 0 else n if isinstance(n, int) else 0 for axis, n in enumerate(item.shape)],
                DTYPES[item.type],
            )
            for item in self._past_inputs.values()
        ]

    def read(self, tokens: list[list[int]]) -> list[int]:
        """Append tokens to each text; returns the likeliest next one of each."""
        n_past = self._ids.shape[1]
        ids = np.array(tokens, np.int64)
        if len(self._ids) != len(ids):
            self.begin(len(ids), 0)
        self._ids = np.concatenate([self._ids, ids], axis=1)
        if not self._past_inputs:
            ids, n_past = self._ids, 0
        batch, length = self._ids.shape
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, length), np.int64),
            "position_ids": np.tile(np.arange(n_past, length, dtype=np.int64), (batch, 1)),
        }
        feeds = {name: feeds[name] for name in self._names}
        feeds |= dict(zip(self._past_inputs, self._past, strict=True))
        logits, *present = self._session.run(None, feeds)
        self._past = present[: len(self._past)]
        best: list[int] = logits[:, -1].argmax(-1).tolist()
        return best

    def rewind(self, n: int) -> None:
        """Keep only the first n tokens of each text."""
        self._ids = self._ids[:, :n]
        # [batch, heads, positions, width]
        self._past = [past[:, :, :n] for past in self._past]

    def _open(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        return onnxruntime.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
