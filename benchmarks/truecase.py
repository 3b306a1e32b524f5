"""Put capitals back into stories that somebody lower-cased, and write those that are new as a .jsonl file to train on.

    python benchmarks/truecase.py --known stories.jsonl --lower stories.lowercase.txt --out more.jsonl

Stories in the lower-cased file end with a line, their paragraphs with an empty one. The known stories say how words
are written in the middle of a sentence; sentences, quotations and names that a story gives ("named Fin") decide the
rest. With --truth, a text of the same stories in their own case, it says how many words came out right.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?", re.IGNORECASE)
# What stands before the first word of a sentence or of a quotation.
BEGINS = re.compile(r'(?:^|[.!?]["\')\u201d]*\s|\n|(?:^|[\s(])["\u201c])\s*["\u201c]?$')
NAMED = re.compile(r"\b(?:named|called|name was|name is|am) ([a-z]+)\b")
# Words after "called" that are no names.
NO_NAMES = set("a an the his her their it out for to me you him us them".split())


def spellings(texts: list[str]) -> dict[str, str]:
    """How each word is written within sentences, most often, by its lower case; and "i" is "I"."""
    seen: dict[str, Counter[str]] = {}
    for text in texts:
        for match in WORD.finditer(text):
            if not BEGINS.search(text[max(0, match.start() - 8) : match.start()]):
                seen.setdefault(match[0].lower(), Counter())[match[0]] += 1
    return {lower: forms.most_common(1)[0][0] for lower, forms in seen.items()}


def truecase(text: str, spelt: dict[str, str]) -> str:
    """A lower-cased story with its capitals.

    Args:
        text: the story.
        spelt: from `spellings`.
    """
    names = {name for name in NAMED.findall(text) if name not in NO_NAMES and spelt.get(name, name) != name}
    names |= {match[1] for match in re.finditer(r"\bnamed ([a-z]+)\b", text)} - NO_NAMES

    def written(match: re.Match[str]) -> str:
        word = match[0]
        stem = word.removesuffix("'s")
        if stem in names:
            return word.capitalize()
        if word in spelt:
            word = spelt[word]
        elif stem in spelt:
            word = spelt[stem] + word[len(stem) :]
        is_first = BEGINS.search(text[max(0, match.start() - 8) : match.start()])
        return word[0].upper() + word[1:] if is_first else word

    return WORD.sub(written, text)


def stories(text: str) -> list[str]:
    """The stories of a file, their paragraphs on lines of their own."""
    marked = re.sub(r"\n\s*\n", "\0", text)
    return [story.replace("\0", "\n").strip() for story in marked.split("\n") if story.strip()]


def key(text: str) -> str:
    """What two copies of a story have in common, whatever their case and punctuation."""
    return " ".join(WORD.findall(text.lower()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--known", type=Path, required=True, help='JSON lines with a field "text"')
    parser.add_argument("--lower", type=Path, required=True)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    known = [json.loads(line)["text"] for line in arguments.known.read_text("utf-8").splitlines()]
    spelt = spellings(known)
    truth = (
        {key(story): story for story in stories(arguments.truth.read_text("utf-8"))}
        if arguments.truth
        else {}
    )
    seen, n_words, n_right, written = {key(text) for text in known}, 0, 0, 0
    with arguments.out.open("w", encoding="utf-8") as out:
        for story in stories(arguments.lower.read_text("utf-8")):
            if len(story.split()) < 20 or key(story) in seen:
                continue
            seen.add(key(story))
            made = truecase(story, spelt)
            if right := truth.get(key(story)):
                pairs = list(zip(WORD.findall(made), WORD.findall(right), strict=True))
                n_words += len(pairs)
                n_right += sum(a == b for a, b in pairs)
                made = right
            out.write(json.dumps({"text": made}) + "\n")
            written += 1
    print(f"{written:,} new stories in {arguments.out}")
    if n_words:
        share = n_right / n_words
        print(
            f"{share:.3%} of {n_words:,} words whose case is known were right; those stories are as they were"
        )


if __name__ == "__main__":
    main()
