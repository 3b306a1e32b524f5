"""What stands between a model and its texts: tokenizer, special tokens, chat template.

for check in CHECKS: check(checkpoint, "model.onebit")
"""

import json
import re
from collections.abc import Callable

from onebit.checkpoint import Checkpoint
from onebit.conversion import PROBE
from onebit.doctor.finding import Finding, command, listed
from onebit.engine.tokenizer import Tokenizer

# Rows without a token that a vocabulary may be padded by.
PADDING = 512
_ANSWER = "Fine, and you?"
_TALK = [{"role": "user", "content": "Hello, how are you?"}, {"role": "assistant", "content": _ANSWER}]
_MARKER = re.compile(r"<\|[^<>|\s]+\|>")


def tokens_of(tokenizer: bytes) -> dict[int, str]:
    """The tokens of a tokenizer.json by their ids."""
    found = json.loads(tokenizer)
    words = found["model"].get("vocab", {})
    # A list of (text, score) for unigrams.
    pairs = words.items() if isinstance(words, dict) else ((word[0], i) for i, word in enumerate(words))
    return {i: word for word, i in pairs} | {token["id"]: token["content"] for token in found["added_tokens"]}


def has_tokenizer(checkpoint: Checkpoint, name: str) -> Finding | None:
    """Whether there is a tokenizer, and texts come back from it as they were."""
    confirm = command("onebit", "info", name)
    if checkpoint.tokenizer is None:
        return Finding(
            "warning",
            "tokenizer",
            "The model has no tokenizer",
            "no tokenizer.json, no vocabulary",
            "It runs on token ids alone; a tokenizer of another model makes other tokens, and nonsense of them.",
            confirm,
            "Put the tokenizer.json of the original beside it, and convert again.",
        )
    try:
        tokenizer = _tokenizer(checkpoint)
        back = tokenizer.decode(tokenizer.encode(PROBE, begin=False))
    except ValueError as error:
        advice = "Fetch the original again, with its tokenizer."
        why = "Without it a text cannot be read or written."
        return Finding("error", "tokenizer", "The tokenizer does not work", str(error), why, confirm, advice)
    if back.strip() != PROBE:
        return Finding(
            "warning",
            "tokenizer",
            "An English text does not come back from the tokenizer as it was",
            f"it reads {back[:60]!r}... of {PROBE[:60]!r}...",
            "Characters that are lost before the model sees them cannot be learned or written; some small vocabularies "
            "have no others than their corpus.",
            confirm,
            "Compare with the tokenizer of the original.",
        )
    why = "The same characters before and after: nothing is lost between text and tokens."
    n = len(tokenizer.encode(PROBE, begin=False))
    evidence = f"{len(PROBE)} characters are {n} tokens, and back"
    return Finding("ok", "tokenizer", "The tokenizer gives texts back", evidence, why, confirm)


def vocabulary(checkpoint: Checkpoint, name: str) -> Finding | None:
    """Whether every token has a row of the embedding, and every row a token."""
    if checkpoint.tokenizer is None:
        return None
    ids, n_rows = tokens_of(checkpoint.tokenizer), checkpoint.config.vocab_size
    beyond = [f"{word!r} is {i}" for i, word in ids.items() if i >= n_rows]
    n_empty = n_rows - len(ids.keys() & set(range(n_rows)))
    evidence = f"{len(ids):,} tokens, {n_rows:,} rows"
    confirm = command("onebit", "info", name)
    if beyond:
        return Finding(
            "error",
            "vocabulary",
            f"{len(beyond)} tokens have no row of the embedding",
            f"{evidence}; {listed(beyond)}",
            "A text with such a token is refused: tokenizer and weights are of different models, or tokens were added "
            "without their rows.",
            confirm,
            "Take the tokenizer that the weights were trained with.",
        )
    why = "Rows without a token pad the matrix; nobody trained them, and drawn by chance they are empty text."
    if n_empty > PADDING:
        return Finding(
            "note", "vocabulary", f"{n_empty:,} rows of the embedding have no token", evidence, why, confirm
        )
    return Finding("ok", "vocabulary", "Tokens and rows of the embedding agree", evidence, why, confirm)


def end_of_text(checkpoint: Checkpoint, name: str) -> Finding:
    """Whether texts can end, and begin, with tokens that exist."""
    config = checkpoint.config
    confirm = command("onebit", "run", "Once upon a time", "-m", name, "--max-tokens", 500)
    why = "A model ends a text by a token that the program has to know; without it every text runs to --max-tokens."
    if not config.eos_tokens:
        return Finding(
            "warning",
            "end of text",
            "No token ends a text",
            "the config names none",
            why,
            confirm,
            "Set eos_token_id in config.json (GGUF: tokenizer.ggml.eos_token_id), and convert again; or use --stop.",
        )
    known = tokens_of(checkpoint.tokenizer) if checkpoint.tokenizer else {}
    special = {"begins": (config.bos_token,), "ends": config.eos_tokens}
    missing = [f"{i}, which {verb} a text" for verb, ids in special.items() for i in ids if i not in known]
    missing = [text for text in missing if not text.startswith("None")]
    if checkpoint.tokenizer and missing:
        return Finding(
            "error",
            "end of text",
            "The tokenizer does not know a token that begins or ends texts",
            listed(missing),
            "Config and tokenizer are of different models.",
            command("onebit", "info", name),
            "Take both from the same place, and convert again.",
        )
    shown = [f"{i} {known[i]!r}" if i in known else str(i) for i in config.eos_tokens]
    begin = config.bos_token
    starts = "nothing" if begin is None else f"{begin} {known.get(begin, '')!r}"
    evidence = f"texts end with {listed(shown, 6)}, and begin with {starts}"
    return Finding("ok", "end of text", "Texts can end", evidence, why, confirm)


def chat(checkpoint: Checkpoint, name: str) -> Finding | None:
    """Whether the chat template works, its markers are tokens, and an answer ends with one that stops it."""
    if checkpoint.tokenizer is None:
        return None
    confirm = command("onebit", "run", "--chat", "Hello", "-m", name, "--max-tokens", 60)
    if checkpoint.chat_template is None:
        return Finding(
            "note",
            "chat",
            "The model has no chat template: it continues texts",
            "no chat_template",
            "A model that was taught to answer expects the marks of its conversations; without a template it does not "
            "see them.",
            command("onebit", "run", "Once upon a time", "-m", name),
            "Where the original has one (chat_template.jinja, tokenizer_config.json), convert again with it beside.",
        )
    try:
        tokenizer = _tokenizer(checkpoint)
        text = tokenizer.render_chat(_TALK, add_generation_prompt=False)
        if _ANSWER not in text:
            raise ValueError("it leaves the answer out of a conversation")
    except ValueError as error:
        why = "Every question passes through the template."
        advice = "Take the template of the original; some want a system message first."
        return Finding(
            "warning", "chat", "The chat template fails on a short talk", str(error), why, confirm, advice
        )
    markers = sorted(set(_MARKER.findall(text)))
    cut = [marker for marker in markers if len(tokenizer.encode(marker, begin=False)) != 1]
    if cut:
        return Finding(
            "warning",
            "chat",
            "The tokenizer takes the marks of the chat template apart",
            f"{listed(cut)}: no tokens of their own",
            "The model was taught with one token for each mark; letters in their place mean nothing to it.",
            confirm,
            "Take tokenizer and template from the same place.",
        )
    rest = text[text.rindex(_ANSWER) + len(_ANSWER) :]
    after = tokenizer.encode(rest, begin=False)
    if not set(after) & set(checkpoint.config.eos_tokens):
        return Finding(
            "warning",
            "chat",
            "An answer does not end with a token that ends a text",
            f"the template puts {rest[:40]!r} after an answer; texts end with {list(checkpoint.config.eos_tokens)}",
            "The model was taught to write this mark and will go on after it, often in the user's role.",
            confirm,
            "Add the id of the mark to eos_token_id, and convert again; --stop helps meanwhile.",
        )
    evidence = f"marks {listed(markers)}" if markers else "no marks"
    why = "The marks are single tokens, and the one after an answer ends the text."
    return Finding("ok", "chat", "The chat template works", evidence, why, confirm)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    assert checkpoint.tokenizer is not None
    config = checkpoint.config
    eos = next(iter(config.eos_tokens), None)
    return Tokenizer(checkpoint.tokenizer, config.bos_token, checkpoint.chat_template, eos)


CHECKS: tuple[Callable[[Checkpoint, str], Finding | None], ...] = (
    has_tokenizer,
    vocabulary,
    end_of_text,
    chat,
)
