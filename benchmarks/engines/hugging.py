"""PyTorch through transformers: the packed ternary checkpoint, or an ordinary bfloat16 Llama of the same shape."""

import json
import time
from pathlib import Path

import torch
import transformers

from engines.timing import per_second

# A token takes a fifth of a second and more.
TEXT = 4


class HuggingFace:
    """One model in eager mode, as `from_pretrained` gives it.

    Args:
        path: the folder of a packed checkpoint, or a config.json for random bfloat16 weights.
        threads: of the loading.
    """

    def __init__(self, path: str, threads: int) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        started = time.perf_counter()
        if Path(path).is_dir():
            self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        else:
            values = json.loads(Path(path).read_text())
            config = transformers.LlamaConfig(**values)
            self._model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.load_s = time.perf_counter() - started
        linear = next(m for n, m in self._model.named_modules() if n.endswith("mlp.up_proj"))
        self.info = {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "settings": f"{type(self._model).__name__}, {type(linear).__name__}, bfloat16, eager, default attention",
        }

    @torch.inference_mode()
    def decode(self, threads: int, seconds: float) -> float:
        """Tokens per second of a text that begins."""
        torch.set_num_threads(threads)

        def text() -> int:
            cache = None
            for _ in range(TEXT):
                out = self._model(torch.ones(1, 1, dtype=torch.long), cache=cache, use_cache=True)
                cache = out.past_key_values
            return TEXT

        return per_second(text, seconds)

    @torch.inference_mode()
    def prefill(self, threads: int, seconds: float, tokens: int = 512) -> float:
        """Tokens per second of a prompt, with the logits of its end."""
        torch.set_num_threads(threads)
        ids = torch.arange(tokens).reshape(1, -1)

        def prompt() -> int:
            self._model(ids, use_cache=True, logits_to_keep=1)
            return tokens

        return per_second(prompt, seconds)
