"""From a .jsonl file of conversations to examples: token ids, and which of them are answers. Needs no torch.

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}]}
    {"prompt": "2 + 2 =", "completion": " 4"}

    chats = read(Path("chat.jsonl"), tokenizer, config, seq_len=512)
    tokens, targets, n_answer_tokens = batch(chats.train, step=0, batch_size=8, seed=1)

Only answers are learned: what the model itself will say, and the token that ends it. An answer begins where the chat
template with its generation prompt ends, so that training sees what `chat` will see. A batch is a pure function of the
seed and the step.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from onebit.config import ModelConfig
from onebit.engine.tokenizer import Tokenizer
from onebit.formats.tensors import shorten

ROLES = ("system", "user", "assistant")
TooLong = Literal["drop", "cut"]
# What a target is that is not learned.
IGNORED = -1
_MAX_BYTES = 2**32

Messages = list[dict[str, str]]
Int64 = npt.NDArray[np.int64]


class Example(NamedTuple):
    """One conversation.

    Args:
        tokens: int64 [n].
        is_answer: bool [n], the tokens that the model learns to say.
    """

    tokens: Int64
    is_answer: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Chats:
    """The examples of a file.

    Args:
        train: to learn from.
        held_out: never learned from; may be empty.
        n_dropped: conversations that were left out because they are too long.
        n_cut: conversations that were cut at the end.
        sha256: of all tokens and masks.
    """

    train: list[Example]
    held_out: list[Example]
    n_dropped: int
    n_cut: int
    sha256: str


class Batch(NamedTuple):
    """Padded examples.

    Args:
        tokens: int64 [B, T], padded on the right.
        targets: int64 [B, T], the token that follows each, IGNORED where it is not part of an answer.
        n_answer_tokens: targets that count.
    """

    tokens: Int64
    targets: Int64
    n_answer_tokens: int


def read(
    path: Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    seq_len: int,
    held_out: float = 0.0,
    too_long: TooLong = "drop",
) -> Chats:
    """Read and encode a file of conversations.

    Args:
        path: .jsonl, one object per line: "messages", or "prompt" and "completion".
        tokenizer: of the model; with a chat template, prompts are turns of the user and completions answers. Without
            one only plain prompts and completions can be read: text after text, and the end-of-text token.
        config: of the model, for its context and end tokens.
        seq_len: longest example, in tokens; at most the context.
        held_out: share of the conversations that is held out, by the hash of their tokens.
        too_long: what happens to longer ones: "drop", or "cut", which keeps the first seq_len tokens while there
            is an answer among them.

    Raises:
        ValueError: an empty or binary file, a line that is no conversation, a template that fails on one or does not
            begin with the conversation so far, or nothing that fits.
        OSError: the file cannot be read.
    """
    examples, n_dropped, n_cut = [], 0, 0
    limit = min(seq_len, config.max_seq_len)
    for number, line in _lines(path):
        try:
            example = encode(parse(line), tokenizer, config)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if len(example.tokens) > limit:
            example = Example(example.tokens[:limit], example.is_answer[:limit])
            if too_long == "drop" or not example.is_answer.any():
                n_dropped += 1
                continue
            n_cut += 1
        examples.append(example)
    if not examples:
        raise ValueError(
            f"{path}: none of {n_dropped} conversations fits into {limit} tokens; raise data.seq_len, or "
            "--set too_long=cut"
            if n_dropped
            else f"{path}: holds no conversation; expected a JSON object per line"
        )
    digests = [_digest(example) for example in examples]
    n_held_out = min(round(held_out * len(examples)), len(examples) - 1)
    held = set(sorted(range(len(examples)), key=lambda i: (digests[i], i))[:n_held_out])
    whole = hashlib.sha256(b"".join(digests)).hexdigest()
    return Chats(
        train=[e for i, e in enumerate(examples) if i not in held],
        held_out=[e for i, e in enumerate(examples) if i in held],
        n_dropped=n_dropped,
        n_cut=n_cut,
        sha256=whole,
    )


def parse(line: str) -> Messages | tuple[str, str]:
    """One line: messages, or prompt and completion.

    Raises:
        ValueError: something else; says what was found.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}); expected an object per line") from None
    if not isinstance(value, dict):
        raise ValueError(
            f'found {shorten(value)}; expected an object with "messages", or "prompt" and "completion"'
        )
    if "messages" in value:
        return _messages(value["messages"])
    if not {"prompt", "completion"} <= value.keys():
        raise ValueError(
            f'found the keys {shorten(sorted(value))}; expected "messages", or "prompt" and "completion"'
        )
    return _text("prompt", value["prompt"]), _text("completion", value["completion"])


def encode(conversation: Messages | tuple[str, str], tokenizer: Tokenizer, config: ModelConfig) -> Example:
    """Token ids of a conversation, and which of them are answers.

    Each answer begins where the conversation before it, with the generation prompt, ends, and goes on to the model's
    end token, which is added after the last one if the template does not write it.

    Args:
        conversation: from `parse`.
        tokenizer: of the model.
        config: of the model, for its end tokens.

    Raises:
        ValueError: messages for a model without a template, a template whose text of a whole conversation does not
            begin with the text of its beginning, or a tokenizer that is not the model's.
    """
    if tokenizer.chat_template is None:
        if not isinstance(conversation, tuple):
            raise ValueError(
                'this model has no chat template; expected lines with "prompt" and "completion", plain texts'
            )
        prompt, completion = conversation
        parts = [(prompt, False), (completion, True)]
    else:
        if isinstance(conversation, tuple):
            prompt, completion = conversation
            conversation = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            ]
        parts = _parts(conversation, tokenizer)
    ids, is_answer = _encode_parts(parts, tokenizer)
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives the token {max(ids)}, and the model knows {config.vocab_size}; "
            "expected the tokenizer that it was trained with"
        )
    if not config.eos_tokens:
        return Example(np.array(ids, np.int64), np.array(is_answer))
    # What the template writes after the end of an answer, often a line break, is for the model to read, not to say.
    goes_on = True
    for i, token in enumerate(ids):
        goes_on = goes_on or not is_answer[i]
        is_end = is_answer[i] and token in config.eos_tokens
        is_answer[i] = is_answer[i] and goes_on
        goes_on = goes_on and not is_end
    if goes_on:
        ids.append(config.eos_tokens[0])
        is_answer.append(True)
    return Example(np.array(ids, np.int64), np.array(is_answer))


def batch(examples: Sequence[Example], step: int, batch_size: int, seed: int) -> Batch:
    """The examples of one optimiser step, a pure function of its arguments; each epoch has an order of its own.

    Args:
        examples: at least one.
        step: from 0.
        batch_size: examples in a batch.
        seed: of the order.
    """
    chosen, orders = [], {}
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(index, len(examples))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(len(examples))
        chosen.append(examples[int(orders[epoch][place])])
    return pad(chosen)


def pad(examples: Sequence[Example]) -> Batch:
    """Examples side by side, as inputs and targets."""
    width = max(len(example.tokens) for example in examples) - 1
    tokens = np.zeros((len(examples), width), np.int64)
    targets = np.full((len(examples), width), IGNORED, np.int64)
    for row, (ids, is_answer) in enumerate(examples):
        n = len(ids) - 1
        tokens[row, :n] = ids[:-1]
        targets[row, :n] = np.where(is_answer[1:], ids[1:], IGNORED)
    return Batch(tokens, targets, int((targets != IGNORED).sum()))


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; --data expects a .jsonl file")
    with open(path, "rb") as file:
        contents = file.read(_MAX_BYTES + 1)
    if len(contents) > _MAX_BYTES:
        raise ValueError(f"{path}: holds more than {_MAX_BYTES} bytes; split it")
    if b"\0" in contents:
        raise ValueError(f"{path}: is binary; --data expects a .jsonl file, one JSON object per line")
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); re-encode it") from None
    # Not splitlines: JSON strings may hold the other characters that end a line.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages are {shorten(value)}; expected a list of objects with role and content")
    for message in value:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"message {shorten(message)}: expected exactly role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"role {shorten(message['role'])}: expected {', '.join(ROLES)}")
        _text(f"content of the {message['role']}", message["content"])
    if value[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message is of the {value[-1]['role']}; expected an answer of the assistant"
        )
    if value[0]["role"] == "assistant":
        raise ValueError("the first message is of the assistant; expected a question before the answer")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {shorten(value)}; expected a text that is not empty")
    try:
        # An escape may stand for half a character.
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode") from None
    return value


def _parts(messages: Messages, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of a conversation, cut where answers begin and end; with each piece whether it is an answer."""
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    parts, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(messages[:i], add_generation_prompt=True)
        upto = tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False)
        if not (whole.startswith(before) and whole.startswith(upto) and done <= len(before) < len(upto)):
            raise ValueError(
                f"the chat template writes message {i + 1} otherwise when the conversation goes on, so it cannot be "
                "told where the answer begins; give conversations with one answer"
            )
        parts += [(whole[done : len(before)], False), (whole[len(before) : len(upto)], True)]
        done = len(upto)
    return parts


def _encode_parts(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of consecutive pieces of a text; each prompt is encoded as it will be when the model is asked."""
    has_template = tokenizer.chat_template is not None
    ids: list[int] = []
    is_answer: list[bool] = []
    text = ""
    for piece, answers in parts:
        text += piece
        known = tokenizer.encode(text, begin=not has_template)
        if known[: len(ids)] != ids:
            # A token reaches over the border: what was read is what it was, and the rest is encoded by itself.
            rest = tokenizer.encode(piece, begin=False)
            if tokenizer.decode(ids + rest) != tokenizer.decode(known):
                raise ValueError(
                    f"the tokenizer joins {shorten(piece[:20])} with what comes before it, and cannot be split there"
                )
            known = ids + rest
        is_answer += [answers] * (len(known) - len(ids))
        ids = known
    if not any(is_answer):
        raise ValueError("the answer has no tokens")
    return ids, is_answer


def _digest(example: Example) -> bytes:
    return hashlib.sha256(example.tokens.tobytes() + example.is_answer.tobytes()).digest()
