"""How byte-level tokenizers cut a text into words before merging, by the names that GGUF files use.

The expressions are those of the models' own tokenizer.json files; the names, whether a word that is a token is taken
whole, and whether a text begins with the begin-of-sequence token are those of llama.cpp, src/llama-vocab.cpp.
"""

from typing import Any, NamedTuple

from onebit.formats.tensors import Json

# Steps that are no expression.
BYTES = "bytes"
PUNCTUATION = "punctuation"
NUMBERS = "numbers"

DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _SIGNS + _SPACES
_QWEN2 = _WORDS + r"\p{N}" + _SIGNS + _SPACES

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_PATHS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_TEKKEN = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|" + r"\p{N}" + _PATHS + _SPACES
_GPT4O = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_SUFFIXES}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SUFFIXES}?|"
    r"\p{N}{1,3}" + _PATHS + _SPACES
)

# Letters of alphabets with upper and lower case.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    "[\r\n]",
    r"\s?[" + _CASED + "]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    DIGIT,
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"
    "\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+",
)
# What llama.cpp does for files that name nothing.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]", BYTES)


class Presplit(NamedTuple):
    """What one name means.

    Args:
        steps: what cuts a text, each the pieces that the one before left: expressions, whose matches and what is
            between them become pieces, or the named steps of this module.
        nfc: the text is brought into Unicode's composed form first.
        ignore_merges: a word that is a token is taken whole.
        bos: a text begins with the begin-of-sequence token where the file does not say.
    """

    steps: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False


_GPT2 = Presplit((GPT2, BYTES))
_LLAMA3 = Presplit((LLAMA3, BYTES), ignore_merges=True, bos=True)
_DBRX = Presplit((LLAMA3, BYTES))
_DIGITS = Presplit((DIGIT, GPT2, BYTES))
_FOUR_O = Presplit((_GPT4O, BYTES))

# Where two mean the same, the first is written.
PRESPLITS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": Presplit((GPT2, BYTES), nfc=True),
    "mpt": Presplit((GPT2, BYTES), nfc=True),
    "default": Presplit(_DEFAULT),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "dbrx": _DBRX,
    "smaug-bpe": _DBRX,
    "qwen2": Presplit((_QWEN2, BYTES), nfc=True),
    "deepseek-r1-qwen": Presplit((_QWEN2, BYTES), nfc=True),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "falcon": Presplit((PUNCTUATION, GPT2, BYTES, NUMBERS, "[0-9][0-9][0-9]")),
    "deepseek-llm": Presplit((*_DEEPSEEK_LLM, BYTES)),
    "deepseek-coder": Presplit((*_DEEPSEEK_CODER, BYTES)),
    "deepseek-v3": Presplit((*_DEEPSEEK_V3, BYTES)),
    "gpt-4o": _FOUR_O,
    "llama4": _FOUR_O,
    "tekken": Presplit((_TEKKEN, BYTES), ignore_merges=True, bos=True),
}


def to_json(steps: tuple[str, ...]) -> Json:
    """The pre-tokenizer of a tokenizer.json that takes these steps."""
    nodes: list[Json] = []
    for i, step in enumerate(steps):
        if step == BYTES:
            with_gpt2 = i > 0 and steps[i - 1] == GPT2
            plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
            nodes.append(plain | {"use_regex": with_gpt2})
        elif step == PUNCTUATION:
            nodes.append({"type": "Punctuation", "behavior": "Contiguous"})
        elif step in (DIGIT, NUMBERS):
            nodes.append({"type": "Digits", "individual_digits": step == DIGIT})
        elif step != GPT2 or steps[i + 1 : i + 2] != (BYTES,):
            split = {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
            nodes.append(split)
    return nodes[0] if len(nodes) == 1 else {"type": "Sequence", "pretokenizers": nodes}


def from_json(node: Any) -> tuple[str, ...] | None:
    """The steps of a pre-tokenizer; None if it does something else than steps can say."""
    kind = node.get("type") if isinstance(node, dict) else None
    if kind == "Sequence" and isinstance(node.get("pretokenizers"), list):
        parts = [from_json(part) for part in node["pretokenizers"]]
        return None if None in parts else tuple(step for part in parts for step in part or ())
    if kind == "ByteLevel" and node.get("add_prefix_space", True) is False:
        return (GPT2, BYTES) if node.get("use_regex", True) else (BYTES,)
    if kind == "Digits":
        return (DIGIT,) if node.get("individual_digits") else (NUMBERS,)
    if kind == "Punctuation" and node.get("behavior") == "Contiguous":
        return (PUNCTUATION,)
    pattern = node.get("pattern") if kind == "Split" else None
    if isinstance(pattern, dict) and node.get("behavior") == "Isolated" and not node.get("invert"):
        expression = pattern.get("Regex")
        return (expression,) if isinstance(expression, str) else None
    return None
