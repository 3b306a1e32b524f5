"""Fuzzes the readers of models: `make fuzz`. Allowed is a model that runs, or an error of one line; and soon.

    python tests/fuzz/readers.py --minutes 10 [--only gguf]
    python tests/fuzz/readers.py --only gguf build/fuzz/gguf/crash-...     # once more what was found

Each reader is a process of its own, with limits on time and memory. It starts from small models of every kind
(`seeds.py`) and changes them in places that matter (`mutations.py`), led by what of the readers was reached.
"""

import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "fuzz"
SECONDS_PER_INPUT = 10
MEMORY_MB = 2048
MAX_INPUT = 1 << 16
MAX_MESSAGE = 600
# Weights up to which a model is also run or converted, and of how many accepted models one is.
MAX_WEIGHTS = 1 << 17
RUN_ONE_OF = 4
CONVERT_ONE_OF = 16

# This tree first, wherever the package is installed.
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

Files = dict[str, bytes]


def _written(files: Files, name: str, folder: Path) -> Path:
    for other, contents in files.items():
        (folder / other).write_bytes(contents)
    return folder / name


def gguf(files: Files, folder: Path) -> Any:
    from onebit.formats import gguf

    return gguf.read(_written(files, "model.gguf", folder))


def hf(files: Files, folder: Path) -> Any:
    from onebit.formats import hf

    return hf.read(_written(files, "", folder))


def native(files: Files, folder: Path) -> Any:
    from onebit.formats import native

    path = _written(files, "model.onebit", folder)
    checkpoint = native.read(path)
    native.verify(path)
    return checkpoint


def run(files: Files, folder: Path) -> Any:
    from onebit.formats import run

    return run.read(_written(files, "", folder))


def llama2c(files: Files, folder: Path) -> Any:
    from onebit.formats import llama2c

    return llama2c.read(_written(files, "model.bin", folder))


def vocabularies(files: Files, folder: Path) -> None:
    """A vocabulary becomes a tokenizer.json, which encodes and decodes."""
    from onebit.engine.tokenizer import Tokenizer
    from onebit.formats import vocabulary

    if (data := files.get("tokenizer.model")) is not None:
        made = vocabulary.from_sentencepiece(data)
    elif (data := files.get("ranks.tiktoken")) is not None:
        made = vocabulary.from_tiktoken(data, vocabulary.LLAMA3_SPECIAL_TOKENS, vocabulary.LLAMA3_PATTERN)
    elif (data := files.get("tokenizer.bin")) is not None:
        made = vocabulary.from_llama2c(data, 264)
    elif (data := files.get("vocab.json")) is not None:
        made = vocabulary.from_gpt2(data, files.get("merges.txt", b""))
    else:
        made = files.get("tokenizer.json", b"")
        keys = vocabulary.to_gguf(made, 24, None, [0], None)
        made = vocabulary.from_gguf(keys).tokenizer or b""
    tokenizer = Tokenizer(made)
    tokenizer.decode(tokenizer.encode("ab  aba\n\u00e9"))


READERS: dict[str, Callable[[Files, Path], Any]] = {
    "gguf": gguf,
    "hf": hf,
    "native": native,
    "run": run,
    "llama2c": llama2c,
    "vocabularies": vocabularies,
}


def touch(checkpoint: Any) -> None:
    """Read what a checkpoint holds, as a conversion would, if it is small."""
    from onebit.checkpoint import codes, holds_codes, rows

    for name, tensor in list(checkpoint.tensors.items())[:64]:
        if math.prod(tensor.shape) > 1 << 20:
            continue
        if holds_codes(tensor):
            codes(name, tensor, checkpoint.config)
        rows(name, tensor)
    assert checkpoint.label


def run_model(checkpoint: Any) -> None:
    """Pack a small model, and ask it for two tokens and, if it has words, for those of a text."""
    from onebit.llm import LLM

    llm = LLM(checkpoint, threads=1, huge_pages=False)
    llm.logits([0, 1])
    if checkpoint.tokenizer is not None:
        llm.logits("ab a")


def convert(checkpoint: Any, folder: Path) -> None:
    """Write a small model in every format that takes it, and read it again: none refuses what it wrote."""
    from onebit.formats import gguf, hf, native
    from onebit.formats.compare import compare

    # What is wrong with the values, or cannot be written, is said here.
    targets: list[tuple[Any, str | None]] = [(native, None)]
    for module in (gguf, hf):
        targets += [
            (module, kind) for kind, refusal in module.refusals(checkpoint).items() if refusal is None
        ]
    for module, kind in targets:
        path = folder / f"made-{module.__name__}-{kind}"
        try:
            module.write(checkpoint, path, *([] if kind is None else [kind]))
        except ValueError as error:
            _checked(error, folder)
            continue
        try:
            compare(checkpoint, module.read(path))
        except ValueError as error:
            raise AssertionError(f"{module.__name__} {kind} was written, but: {error}") from error


def outcome(name: str, data: bytes, folder: Path, always: bool = False) -> str | None:
    """Read one input; None for a model, else the message with which it is refused.

    Args:
        name: of the reader.
        data: a bundle of files.
        folder: what is in it is removed.
        always: run and convert every model that is read, not some.

    Raises:
        BaseException: whatever a reader may not raise.
        AssertionError: a message that is no plain line.
    """
    from fuzz.mutations import unbundle

    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        checkpoint = READERS[name](unbundle(data), folder)
    except (ValueError, OSError) as error:
        return _checked(error, folder)
    if checkpoint is None:
        return None
    try:
        touch(checkpoint)
        if sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) > MAX_WEIGHTS:
            return None
        chance = zlib.crc32(data)
        if always or chance % RUN_ONE_OF == 0:
            run_model(checkpoint)
        if always or chance % CONVERT_ONE_OF == 0:
            convert(checkpoint, folder)
    except (ValueError, OSError, MemoryError) as error:
        return _checked(error, folder)
    return None


def _checked(error: BaseException, folder: Path) -> str:
    message = str(error).replace(str(folder), "")
    if isinstance(error, UnicodeError):
        raise AssertionError(f"a bare {type(error).__name__}: {ascii(message)}") from error
    assert message.isascii() and message.isprintable(), f"no plain line: {ascii(message)}"
    assert 0 < len(message) <= MAX_MESSAGE, f"{len(message)} characters: {message}"
    return message


def fuzz(name: str, arguments: list[str]) -> None:
    """Run one reader in this process until time is up or something is found."""
    import atheris

    # Whatever is imported later is not instrumented: what the readers import on use is imported here.
    with atheris.instrument_imports(include=["onebit"]), contextlib.redirect_stderr(open(os.devnull, "w")):
        import onebit.formats.gguf
        import onebit.formats.hf
        import onebit.formats.llama2c
        import onebit.formats.native
        import onebit.formats.run
        import onebit.formats.vocabulary
        import onebit.llm
    assert Path(onebit.__file__).is_relative_to(ROOT), f"{onebit.__file__} is not of this tree"
    from fuzz import mutations

    warnings.simplefilter("error", RuntimeWarning)
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))

    def once(data: bytes) -> None:
        outcome(name, data, scratch)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.1:
            return bytes(atheris.Mutate(data, max_size))
        mutated = mutations.mutate(data, random)
        return mutated if len(mutated) <= max_size else mutations.some_bytes(data, random)[:max_size]

    try:
        atheris.Setup([sys.argv[0], *arguments], once, custom_mutator=mutator)
        atheris.Fuzz()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def repeat(name: str, paths: list[str]) -> int:
    """Read inputs once more and tell what comes of each."""
    n_failed = 0
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(
                    f"{path}: {outcome(name, Path(path).read_bytes(), Path(folder), always=True) or 'a model'}"
                )
            except BaseException:
                traceback.print_exc()
                n_failed += 1
    return min(n_failed, 1)


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
    if asked.inputs:
        return repeat(asked.only or parser.error("say of which reader, with --only"), asked.inputs)
    names = [asked.only] if asked.only else list(READERS)
    failed = []
    for name in names:
        from fuzz.seeds import seeds

        corpus = BUILD / name / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for seed, data in seeds(name, Path(folder)).items():
                (corpus / f"seed-{seed}").write_bytes(data)
        seconds = int(60 * asked.minutes / len(names))
        limits = [f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_INPUT}"]
        limits += ["-len_control=0", f"-max_total_time={seconds}"]
        where = [f"-artifact_prefix={BUILD / name}/", "-print_final_stats=1", str(corpus)]
        command = [sys.executable, __file__, "--only", name, "--child", *limits, *where]
        print(f"== {name}, {seconds} s", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
    print(f"{', '.join(failed)} failed; see {BUILD}" if failed else "nothing found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
