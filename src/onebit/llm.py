"""What a user imports: load a model, and have it continue texts, answer chats or give its logits.

Everything below it is joined here: a format, a tokenizer, the compiled model, and an engine for each call.

    llm = load()                                   # the shipped model
    print(llm.generate("Once upon a time", seed=7).text)
    for piece in llm.stream("Once upon a time"):
        print(piece.text, end="", flush=True)
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from onebit import formats
from onebit.checkpoint import Checkpoint, quantize
from onebit.engine.engine import (
    MAX_STEP_TOKENS,
    NO_ADAPTER,
    Engine,
    Generation,
    check_tokens,
    count_positions,
)
from onebit.engine.memory import KV_FORMATS, available_bytes, in_huge_pages, position_bytes
from onebit.engine.model import BLOCK_TOKENS, Float32, Int32, KvCache, Model
from onebit.engine.sampling import SamplingParams, TokenLogprobs
from onebit.engine.speculation import Speculation
from onebit.engine.tokenizer import Tokenizer
from onebit.formats import adapter as adapter_format
from onebit.formats import cache
from onebit.formats.adapter import Adapter

SHIPPED_MODEL = Path(__file__).parent / "assets" / "stories.onebit"

# Texts of one call share a cache of at most this size; more wait for each other.
MAX_CACHE_BYTES = 2**30

Prompt = str | Sequence[int]


class Usage(NamedTuple):
    """Tokens of a text.

    Args:
        prompt_tokens: read.
        completion_tokens: generated, the end-of-text token and those of a stop string included.
    """

    prompt_tokens: int
    completion_tokens: int


class Timings(NamedTuple):
    """How fast a text came, and what was guessed of it.

    Args:
        first_token_s: seconds from the call to the first token.
        total_s: seconds from the call to the last token.
        prompt_tok_per_s: prompt tokens per second until the first token.
        tok_per_s: tokens per second after the first one; 0 for a text of one token.
        drafted: tokens guessed ahead and computed; 0 without speculation.
        accepted: those of them that were right: each spared a step.
    """

    first_token_s: float
    total_s: float
    prompt_tok_per_s: float
    tok_per_s: float
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Output:
    """A finished text.

    Args:
        text: what was generated, without the prompt, the end-of-text token and the stop string.
        tokens: every token that was generated, the end-of-text token included.
        finish_reason: "stop" for an end-of-text token or a stop string, "length" for max_tokens or a full context.
        usage: tokens read and generated.
        timings: of this text; those of one list run together.
        seed: repeats the text.
        logprobs: how likely each token of the text was, if asked for; else empty.
        prompt_logprobs: the same for the prompt, with None for its first token.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timings: Timings
    seed: int
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs | None]


class Piece(NamedTuple):
    """The next token of a streamed text.

    Args:
        text: empty while a character or a stop string may be incomplete.
        token: its id.
        output: the whole text, with the last piece only.
    """

    text: str
    token: int
    output: Output | None


class LLM:
    """A model ready to run. Calls do not influence each other: each has its own key-value cache.

    Args:
        checkpoint: packed, or a float32 master, which is packed in memory.
        threads: None takes one for each core.
        kv_cache: number format of keys and values: "bf16"; "int8" takes half the memory and reads faster; "fp8" takes
            half too, and is slower and less exact than "int8".
        speculation: guess tokens from the text itself and compute several in one step where that pays; the
            texts are the same, to the token.
        shortlist: "int4" finds the best tokens through 4-bit rows of the head, half the memory to read. Their scores
            stay exact; that none is missed is only very probable. None misses none.
        huge_pages: move a large model from the mapped file to huge pages, where there is memory for both: faster by up
            to a third, for 0.2 s per gigabyte, or more where the system has to find the memory first. Without them
            processes share the pages of the file.
        adapters: low-rank changes by name, which a text can ask for; see `onebit.formats.adapter.read`.
        normalize: prompts lose soft hyphens, zero-width characters and runs of white space; see
            `onebit.engine.tokenizer.normalize`.

    Raises:
        ValueError: an unknown kv_cache or shortlist, an adapter of another model, a shortlist for a head of weight
            codes, or heads too wide for "int8".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        kv_cache: str = "bf16",
        speculation: bool = True,
        shortlist: str | None = None,
        huge_pages: bool = True,
        adapters: Mapping[str, Adapter] | None = None,
        normalize: bool = False,
    ) -> None:
        if shortlist not in (None, "int4"):
            raise ValueError(f"shortlist is {shortlist!r}; expected 'int4' or None")
        if kv_cache not in KV_FORMATS:
            raise ValueError(f"kv_cache is {kv_cache!r}; expected {', '.join(KV_FORMATS)}")
        self.checkpoint = quantize(checkpoint)
        if huge_pages:
            self.checkpoint = in_huge_pages(self.checkpoint, available_bytes())
        self.config = checkpoint.config
        self.shortlist = shortlist
        self.kv_cache = kv_cache
        self.adapters = tuple(adapters or ())
        added = list((adapters or {}).values())
        self.model = Model(self.checkpoint, threads, int4_shortlist=shortlist == "int4", adapters=added)
        # Says now, not with the first text, if this model cannot have such a cache.
        self.model.new_cache(1, kv_cache)
        # Of all calls: what a row costs is learned once.
        self._speculation = Speculation() if speculation else None
        self._start = next(
            (t for t in (self.config.bos_token, *self.config.eos_tokens) if t is not None), None
        )
        self._tokenizer = None
        if checkpoint.tokenizer is not None:
            eos_token = next(iter(self.config.eos_tokens), None)
            self._tokenizer = Tokenizer(
                checkpoint.tokenizer, self.config.bos_token, checkpoint.chat_template, eos_token, normalize
            )

    @property
    def label(self) -> str:
        """The checkpoint's label with the cache in use, as in "W1.58A8KV8", and a shortlist that is only probable."""
        bits = {"bf16": "16", "int8": "8", "fp8": "fp8"}[self.kv_cache]
        label = self.checkpoint.label.replace("KV16", f"KV{bits}")
        return label + (f" + {self.shortlist} shortlist" if self.shortlist else "")

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model.

        Raises:
            ValueError: the model has none.
        """
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer; give token ids instead of texts")
        return self._tokenizer

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        params: SamplingParams | None = None,
        adapter: str | Sequence[str | None] | None = None,
        **sampling: Any,
    ) -> list[Output]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        adapter: str | Sequence[str | None] | None = None,
        **sampling: Any,
    ) -> Output | list[Output]:
        """Continue one text or several at once.

        Each text of a list is the same, to the token, as if it were alone. A seed is used for every text of the list;
        without one, each draws its own.

        Args:
            prompt: a text, token ids, or a list of either. An empty one starts from the model's begin- or
                end-of-text token.
            params: how tokens are chosen.
            adapter: name of the adapter that the texts run with, or for a list one for each, None being none. The
                same text comes whatever adapters its company has.
            **sampling: the fields of SamplingParams, instead of params.

        Returns:
            The text, or a list of them for a list.

        Raises:
            ValueError: a prompt that is too long or holds unknown ids, an unknown adapter, or a parameter out of range.
            MemoryError: a text whose keys and values would not fit into the memory that is available.
        """
        is_list = not isinstance(prompt, str) and any(not isinstance(i, Integral) for i in _items(prompt))
        prompts: Sequence[Any] = prompt if is_list else [prompt]
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        engine, requests = self._begin(prompts, _params(params, sampling), names)
        for _ in engine.run():
            pass
        outputs = [_output(request) for request in requests]
        return outputs if is_list else outputs[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Continue one text, token by token; arguments and text are those of `generate`."""
        engine, (request,) = self._begin([prompt], _params(params, sampling), [adapter])
        return _pieces(engine, request)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Output:
        """Answer a conversation; to stream the answer, use `stream(llm.tokenizer.encode_chat(messages))`.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first.
            params: how tokens are chosen.
            adapter: name of the adapter that answers, or None.
            **sampling: the fields of SamplingParams, instead of params.

        Raises:
            ValueError: a model without chat template, or see `generate`.
        """
        return self.generate(self.tokenizer.encode_chat(messages), params, adapter, **sampling)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the model gets it: an empty one is the model's begin- or end-of-text token.

        Args:
            prompt: a text or token ids.

        Raises:
            ValueError: neither of the two, or a text for a model without tokenizer.
        """
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(self.tokenizer.prepare(prompt))
        else:
            for token in _items(prompt):
                if not isinstance(token, Integral):
                    raise ValueError(f"prompt holds {token!r}; expected a text or a list of token ids")
            tokens = [int(token) for token in prompt]
        return tokens or ([] if self._start is None else [self._start])

    def logits(self, prompt: Prompt, adapter: str | None = None) -> Float32:
        """Scores of every possible next token after each token.

        Args:
            prompt: a text or token ids.
            adapter: name of the adapter to run with, or None.

        Returns:
            float32 [T, V].

        Raises:
            ValueError: a prompt that is too long or holds unknown ids.
        """
        which = np.array([self._adapter(adapter)], np.int32)
        return np.concatenate(
            [self.model.forward(*call, adapters=which) for call in self._read(self.encode(prompt))]
        )

    def embed(self, prompt: Prompt, adapter: str | None = None) -> Float32:
        """A direction that stands for a text: the mean of the hidden states that the head would read, of length 1.

            h = mean over tokens of norm(x)         embedding = h / |h|

        The same text gives the same bits, whatever runs beside it.

        Args:
            prompt: a text or token ids.
            adapter: name of the adapter to run with, or None.

        Returns:
            float32 [D].

        Raises:
            ValueError: a prompt that is too long or holds unknown ids.
        """
        which = np.array([self._adapter(adapter)], np.int32)
        total_D = np.zeros(self.config.d_model)
        for call in self._read(self.encode(prompt)):
            total_D += self.model.forward_hidden(*call, which).sum(axis=0, dtype=np.float64)
        # The mean has the direction of the sum.
        return (total_D / (np.linalg.norm(total_D) or 1.0)).astype(np.float32)

    def engine(
        self,
        n_blocks: int,
        prefix_cache: bool = True,
        max_num_seqs: int | None = None,
        max_step_tokens: int = MAX_STEP_TOKENS,
    ) -> Engine:
        """An engine of one's own, to which texts can be added at any time.

        Args:
            n_blocks: of BLOCK_TOKENS tokens, in its cache.
            prefix_cache: compute the first tokens that texts have in common once.
            max_num_seqs: most texts at once; None: as many as the cache holds.
            max_step_tokens: most tokens in one step: with fewer, prompts are read more slowly, and texts that grow wait
                less for them.
        """
        return Engine(
            self.model,
            self._tokenizer,
            n_blocks,
            max_step_tokens,
            speculation=self._speculation,
            kv_cache=self.kv_cache,
            prefix_cache=prefix_cache,
            max_num_seqs=max_num_seqs,
        )

    def _read(self, tokens: list[int]) -> Iterator[tuple[Int32, Int32, Int32, Int32, Int32, KvCache]]:
        """The calls of the model that read a text alone, with a row for every token."""
        check_tokens(self.config, tokens)
        n_blocks = -(-len(tokens) // BLOCK_TOKENS)
        cache = self.model.new_cache(n_blocks, self.kv_cache)
        table = np.arange(n_blocks, dtype=np.int32).reshape(1, -1)
        for start in range(0, len(tokens), MAX_STEP_TOKENS):
            ids = np.array(tokens[start : start + MAX_STEP_TOKENS], np.int32)
            rows = np.arange(len(ids), dtype=np.int32)
            yield ids, rows + np.int32(start), np.array([0, len(ids)], np.int32), table, rows, cache

    def _begin(
        self, prompts: Sequence[Prompt], params: SamplingParams, adapters: Sequence[str | None]
    ) -> tuple[Engine, list[Generation]]:
        which = [self._adapter(name) for name in adapters]
        if len(which) != len(prompts):
            raise ValueError(
                f"adapter has {len(which)} names for {len(prompts)} prompts; expected one for each"
            )
        if params.grammar is not None and len(prompts) > 1:
            raise ValueError(
                f"a grammar follows one text, and there are {len(prompts)} prompts; give them one by one"
            )
        encoded = [self.encode(prompt) for prompt in prompts]
        needs = [-(-count_positions(self.config, tokens, params) // BLOCK_TOKENS) for tokens in encoded]
        available = available_bytes()
        if available is not None and (most := max(needs, default=0) * self._block_bytes()) > available:
            raise MemoryError(
                f"a text of up to {max(needs) * BLOCK_TOKENS:,} tokens needs {most / 1e9:.1f} GB of keys and values; "
                f"{available / 1e9:.1f} GB of memory are available: lower max_tokens or shorten the prompt"
            )
        n_blocks = min(sum(needs), max(MAX_CACHE_BYTES // self._block_bytes(), *needs, 1))
        engine = self.engine(max(n_blocks, 1))
        pairs = zip(encoded, which, strict=True)
        return engine, [engine.add(tokens, params, adapter) for tokens, adapter in pairs]

    def _adapter(self, name: str | None) -> int:
        if name is None:
            return NO_ADAPTER
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none: give them to load"
            raise ValueError(f"adapter {name!r} is unknown; this model has {known}")
        return self.adapters.index(name)

    def _block_bytes(self) -> int:
        return BLOCK_TOKENS * position_bytes(self.config, self.kv_cache)


def load(
    path: str | PathLike[str] | None = None,
    threads: int | None = None,
    kv_cache: str = "bf16",
    speculation: bool = True,
    shortlist: str | None = None,
    huge_pages: bool = True,
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    normalize: bool = False,
) -> LLM:
    """Load a model.

    Args:
        path: a .onebit file or a run folder; a GGUF file, a Hugging Face folder, or owner/name there, which are
            converted once into ~/.cache/onebit; None takes the model that ships with onebit.
        threads: None takes one for each core.
        kv_cache: number format of keys and values: "bf16", "int8" or "fp8"; see LLM.
        speculation: see LLM.
        shortlist: None or "int4"; see LLM.
        huge_pages: see LLM.
        adapters: folders of adapters, by names to ask for them with.
        normalize: see LLM.

    Raises:
        ValueError: a damaged file, an adapter of another model, or an unknown kv_cache or shortlist.
        OSError: a file that cannot be read.
    """
    ready, report = (SHIPPED_MODEL, None) if path is None else cache.ready(path)
    for change in report.losses if report else ():
        # As many as the engine needs to be changed to run it.
        warnings.warn(f"{path}: {change.describe()}", UserWarning, stacklevel=2)
    checkpoint = formats.read(ready)
    added = {
        name: adapter_format.read(folder, checkpoint.config) for name, folder in (adapters or {}).items()
    }
    return LLM(checkpoint, threads, kv_cache, speculation, shortlist, huge_pages, added, normalize)


def _items(prompt: Any) -> Sequence[Any]:
    """The items of a prompt that is no text, if it is what can be read twice and in order."""
    # Arrays of numpy are no Sequence, and bytes are one.
    is_array = isinstance(prompt, np.ndarray) and prompt.ndim > 0
    if isinstance(prompt, (bytes, bytearray, memoryview)) or not (is_array or isinstance(prompt, Sequence)):
        raise ValueError(f"prompt is {prompt!r}; expected a text or a list of token ids")
    items: Sequence[Any] = prompt
    return items


def _params(params: SamplingParams | None, sampling: dict[str, Any]) -> SamplingParams:
    if params is None:
        return SamplingParams(**sampling)
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params is {params!r}; expected SamplingParams, or its fields by their names")
    if sampling:
        raise ValueError(f"give either params or {', '.join(sampling)}, not both")
    return params


def _pieces(engine: Engine, request: Generation) -> Iterator[Piece]:
    for step in engine.run():
        yield Piece(step.text, step.token, _output(request) if step.is_last else None)


def _output(request: Generation) -> Output:
    if request.error:
        raise request.error
    assert request.finish_reason and request.finish_reason != "error"
    tokens = request.generated
    first = request.first_token_s - request.started_s
    total = request.last_token_s - request.started_s
    tok_per_s = (len(tokens) - 1) / (total - first) if total > first else 0.0
    return Output(
        text=request.text,
        tokens=tokens,
        finish_reason=request.finish_reason,
        usage=Usage(request.n_prompt, len(tokens)),
        timings=Timings(
            first_token_s=first,
            total_s=total,
            prompt_tok_per_s=request.n_prompt / first if first > 0 else 0.0,
            tok_per_s=tok_per_s,
            drafted=request.drafted,
            accepted=request.accepted,
        ),
        seed=request.seed,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )
