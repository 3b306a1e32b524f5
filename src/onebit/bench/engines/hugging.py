"""PyTorch through transformers: the model of a folder, or an ordinary bfloat16 Llama of random weights."""

import inspect
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers


class HuggingFace:
    """One model in eager mode, as `from_pretrained` gives it.

    Args:
        path: the folder of a model, or a config.json for random bfloat16 weights.
        threads: of the loading.
        dtype: of all that is not packed; "auto": as it is in the folder.
    """

    def __init__(self, path: str, threads: int, dtype: str = "bfloat16") -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._model: Any
        started = time.perf_counter()
        if Path(path).is_dir():
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True
            ).eval()
        else:
            config = transformers.LlamaConfig(**json.loads(Path(path).read_text()))
            self._model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.load_s = time.perf_counter() - started
        # Later versions have the shorter name.
        names = inspect.signature(self._model.forward).parameters
        self._past = "cache" if "cache" in names else "past_key_values"
        self._cache: Any = None
        self._n = 0
        self.vocab_size = int(self._model.config.vocab_size)
        dtype = str(self._model.dtype).removeprefix("torch.")
        linear = next(m for n, m in self._model.named_modules() if n.endswith("mlp.up_proj"))
        self.info = {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "settings": f"{type(self._model).__name__}, {type(linear).__name__}, {dtype}, eager, default attention",
            "kv_cache": dtype,
        }
        if type(linear) is torch.nn.Linear:
            # Whatever the numbers stand for, they are computed with as they are.
            bits = torch.finfo(getattr(torch, dtype)).bits
            self.info["label"] = f"W{bits}A{bits}KV{bits}"

    def use(self, threads: int) -> None:
        """Compute on so many threads from now on."""
        torch.set_num_threads(threads)

    def begin(self, batch: int, positions: int) -> None:
        """Start empty texts."""
        self.rewind(0)

    @torch.inference_mode()
    def read(self, tokens: list[list[int]]) -> list[int]:
        """Append tokens to each text; returns the likeliest next one of each."""
        out = self._model(torch.tensor(tokens), use_cache=True, logits_to_keep=1, **{self._past: self._cache})
        self._cache = out.past_key_values
        self._n += len(tokens[0])
        best: list[int] = out.logits[:, -1].argmax(-1).tolist()
        return best

    def rewind(self, n: int) -> None:
        """Keep only the first n tokens of each text."""
        if n == 0:
            self._cache = None
        elif n < self._n:
            # Negative: how many to remove.
            self._cache.crop(n - self._n)
        self._n = n
