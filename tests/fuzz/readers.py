"""Fuzzes the readers of models: `make fuzz`. Allowed is a model, or a ValueError or OSError; nothing else, and soon.

    python tests/fuzz/readers.py --minutes 10 [--only gguf]

Each reader is a process of its own, with limits on time and memory. It starts from small models of every kind; what
it finds is kept in build/fuzz/READER/crash-*, and is repeated by giving that file instead of a time.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "fuzz"
SECONDS_PER_INPUT = 10
MEMORY_MB = 2048
MAX_INPUT = 1 << 16
# Between the parts of an input that stands for several files.
SEPARATOR = b"\n--8<--\n"

sys.path.insert(0, str(ROOT / "tests"))


def touch(checkpoint) -> None:
    """Read what a checkpoint holds, as a conversion would, if it is small."""
    from onebit.checkpoint import codes, holds_codes, rows

    for name, tensor in list(checkpoint.tensors.items())[:32]:
        if tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) > 1 else 1) > 1 << 20:
            continue
        if holds_codes(tensor):
            codes(name, tensor, checkpoint.config)
        rows(name, tensor)


def gguf(data: bytes, folder: Path) -> None:
    from onebit.formats import gguf

    (folder / "x.gguf").write_bytes(data)
    touch(gguf.read(folder / "x.gguf"))


def hf(data: bytes, folder: Path) -> None:
    from onebit.formats import hf

    config, *rest = data.split(SEPARATOR, 2)
    (folder / "config.json").write_bytes(config)
    for name, contents in zip(("model.safetensors", "tokenizer.json"), rest, strict=False):
        (folder / name).write_bytes(contents)
    touch(hf.read(folder))


def native(data: bytes, folder: Path) -> None:
    from onebit.formats import native, tensors

    # A damaged header fails its digest at once: sign it again, to get behind that door.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        n = int.from_bytes(data[:8], "little")
        header = tensors.parse_json(data[8 : 8 + n], "header")
        header["__metadata__"]["digest"] = native._digest(header)
        data = tensors.header_bytes(header) + data[8 + n :]
    (folder / "x.onebit").write_bytes(data)
    touch(native.read(folder / "x.onebit"))
    native.verify(folder / "x.onebit")


def vocabularies(data: bytes, folder: Path) -> None:
    from onebit.formats import vocabulary

    kind, data = data[:1], data[1:]
    if kind == b"s":
        vocabulary.from_sentencepiece(data)
    elif kind == b"t":
        vocabulary.from_tiktoken(data, vocabulary.LLAMA3_SPECIAL_TOKENS, vocabulary.LLAMA3_PATTERN)
    elif kind == b"c":
        vocabulary.from_llama2c(data, 300)
    elif kind == b"j":
        vocabulary.to_gguf(data, 400, 1, [2], None)
    else:
        vocabulary.from_gpt2(*([*data.split(SEPARATOR, 1), b""][:2]))


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "gguf": gguf,
    "hf": hf,
    "native": native,
    "vocabularies": vocabularies,
}


def seeds(name: str, folder: Path) -> None:
    """Small valid inputs to start from."""
    import tiny
    from onebit.checkpoint import quantize
    from onebit.formats import gguf, hf, native

    plain = {
        "sub_norm": False,
        "activation": "silu",
        "n_layers": 1,
        "d_model": 256,
        "d_ff": 256,
        "d_head": 64,
    }
    small = tiny.master(tiny.config(n_layers=1))
    models = {
        "llama": tiny.master(tiny.config(**plain)),
        "bitnet": small,
        "qwen3": tiny.master(tiny.config(**plain, qk_norm=True, weights="dense", activations="none")),
        "binary": tiny.master(tiny.config(**plain, weights="b1", scale=128)),
    }
    for kind, master in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch)
            if name == "native":
                native.write(
                    quantize(small if kind == "bitnet" else replace(master, tokenizer=None)), path / "x"
                )
                (folder / kind).write_bytes((path / "x").read_bytes())
            if name == "gguf":
                for encoding in gguf.KINDS:
                    if gguf.refusals(master)[encoding] is None:
                        gguf.write(master, path / "x.gguf", encoding)
                        (folder / f"{kind}-{encoding}").write_bytes((path / "x.gguf").read_bytes())
            if name == "hf":
                for encoding in hf.KINDS:
                    if hf.refusals(master)[encoding] is None:
                        hf.write(master, path / "model", encoding)
                        files = ("config.json", "model.safetensors", "tokenizer.json")
                        contents = [(path / "model" / file).read_bytes() for file in files]
                        (folder / f"{kind}-{encoding}").write_bytes(SEPARATOR.join(contents))
    if name == "vocabularies":
        parsed = json.loads(tiny.tokenizer_json())
        merges = "\n".join(" ".join(pair) for pair in parsed["model"]["merges"])
        vocab = json.dumps(parsed["model"]["vocab"])
        (folder / "gpt2").write_bytes(b"g" + vocab.encode() + SEPARATOR + merges.encode())
        (folder / "json").write_bytes(b"j" + tiny.tokenizer_json())
        pieces = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x08\n\x01a\x15\x00\x00\x80\xbf"
        (folder / "sentencepiece").write_bytes(b"s" + pieces)
        (folder / "tiktoken").write_bytes(b"tIQ== 0\nIg== 1\nISI= 2\n")
        (folder / "llama2c").write_bytes(b"c\x08\x00\x00\x00" + b"\x00\x00\x80\xbf\x01\x00\x00\x00a" * 8)


def fuzz(name: str, arguments: list[str]) -> None:
    """Run one reader in this process until time is up or something is found."""
    import atheris

    with atheris.instrument_imports(include=["onebit"]):
        import onebit.formats  # noqa: F401

    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))

    def once(data: bytes) -> None:
        with contextlib.suppress(ValueError, OSError):
            READERS[name](data, scratch)

    try:
        atheris.Setup([sys.argv[0], *arguments], once)
        atheris.Fuzz()
    finally:
        shutil.rmtree(scratch)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of all readers together")
    parser.add_argument("--only", choices=READERS)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("inputs", nargs="*", help="inputs to repeat, with --only")
    asked = parser.parse_args()
    if asked.child is not None:
        fuzz(asked.only, asked.child)
        return 0
    names = [asked.only] if asked.only else list(READERS)
    n_failed = 0
    for name in names:
        corpus = BUILD / name / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        seeds(name, corpus)
        seconds = int(60 * asked.minutes / len(names))
        limits = [f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_INPUT}"]
        goal = asked.inputs or [f"-max_total_time={seconds}", str(corpus)]
        where = [f"-artifact_prefix={BUILD / name}/", "-print_final_stats=1"]
        command = [sys.executable, __file__, "--only", name, "--child", *limits, *where, *goal]
        print(f"== {name}, {seconds} s", flush=True)
        n_failed += subprocess.run(command, cwd=ROOT).returncode != 0
    print("nothing found" if not n_failed else f"{n_failed} readers failed; see {BUILD}")
    return min(n_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
