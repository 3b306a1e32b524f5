"""The model as EleutherAI's lm-evaluation-harness asks for it: log-likelihoods and greedy texts.

Token boundaries, truncation and the token before an empty context are those of the harness's own `hf` model.

    lm = OnebitLM(llm)
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from onebit.eval.scoring import Scorer

if TYPE_CHECKING:
    from onebit.llm import LLM

# As the harness's own models have it.
MAX_GENERATED = 256


class OnebitLM(TemplateLM):  # type: ignore[misc]
    """A model for lm-evaluation-harness.

    Args:
        llm: with a tokenizer.
        on_tokens: called with the number of tokens of every pass that was computed.

    Raises:
        ValueError: a model without tokenizer, or without a token to begin a text with.
    """

    def __init__(self, llm: "LLM", on_tokens: Callable[[int], None] = lambda n: None) -> None:
        super().__init__()
        config = llm.config
        self.llm = llm
        self.scorer = Scorer(llm, on_tokens)
        self.max_length = config.max_seq_len
        # Requests that were longer than the context and lost their beginning.
        self.n_cut = 0
        self._encode = llm.tokenizer.encode
        start = next((t for t in (config.bos_token, *config.eos_tokens) if t is not None), None)
        if start is None:
            raise ValueError(
                "this model has no begin- or end-of-text token, which tasks without a context need"
            )
        self._start = start
        self._eos = next(iter(config.eos_tokens), start)

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before an empty context."""
        return self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, by default as the model's tokenizer begins texts that do not begin so already."""
        tokens = self._encode(string, begin=False)
        bos = self.llm.tokenizer.bos_token
        has_it = add_special_tokens is None and tokens[:1] == [bos]
        return tokens if bos is None or has_it or add_special_tokens is False else [bos, *tokens]

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability of the continuation in nats, and if it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            # The last token is only predicted.
            whole = [*context, *continuation][-self.max_length - 1 :]
            self.n_cut += len(whole) < len(context) + len(continuation)
            n_scored = min(len(continuation), len(whole) - 1)
            texts.append((whole[: len(whole) - n_scored], whole[len(whole) - n_scored :]))
        scores = self.scorer.score(texts)
        return [(float(s.log_probabilities.sum()), bool(s.is_best.all())) for s in scores]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text, in nats, in windows of the whole context."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continuations of each (context, settings), up to one of the strings in its settings `until`."""
        found = []
        for request in requests:
            context, settings = request.args
            until = settings.get("until") or ()
            max_tokens = min(int(settings.get("max_gen_toks", MAX_GENERATED)), self.max_length - 1)
            tokens = self.tok_encode(context)
            prompt = tokens[-(self.max_length - max_tokens) :]
            self.n_cut += len(prompt) < len(tokens)
            samples = bool(settings.get("do_sample", False))
            found.append(
                {
                    "prompt": prompt,
                    "max_tokens": max_tokens,
                    "temperature": float(settings.get("temperature", 1.0)) if samples else 0.0,
                    "stop": tuple([until] if isinstance(until, str) else until),
                }
            )
        return self._generate(found)

    def _generate(self, wanted: list[dict[str, Any]]) -> list[str]:
        """Texts with the same settings as one batch."""
        texts = [""] * len(wanted)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, one in enumerate(wanted):
            groups.setdefault((one["max_tokens"], one["temperature"], one["stop"]), []).append(i)
        for (max_tokens, temperature, stop), members in groups.items():
            prompts = [wanted[i]["prompt"] for i in members]
            outputs = self.llm.generate(
                prompts, max_tokens=max_tokens, temperature=temperature, top_k=0, top_p=1.0, seed=0, stop=stop
            )
            for i, output in zip(members, outputs, strict=True):
                texts[i] = output.text
        return texts
