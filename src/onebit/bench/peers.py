"""Engines of others: what each needs, and the file that makes it run the same model as we do.

name, file = parse("llama.cpp=model.gguf")
peer = prepare(name, file, checkpoint, folder, threads=2)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onebit import formats
from onebit.bench.fleet import Engine
from onebit.checkpoint import Checkpoint
from onebit.formats import gguf, hf

# Python with its libraries; with PyTorch far more.
SMALL, LARGE = 400_000_000, 2_000_000_000


@dataclass
class Measured:
    """An engine with its file.

    Args:
        engine: how to start it.
        label: bit widths of its file, as in "W1.58A8KV16", or its types; None: not known to onebit.
        file_bytes: size of the file, or of the weights in the folder.
    """

    engine: Engine
    label: str | None
    file_bytes: int


@dataclass(frozen=True)
class Peer:
    """An engine of others.

    Args:
        packages: that must be installed.
        install: how to do that.
        engine: its class, for `onebit.bench.worker`.
        export: writes a model as this engine takes it into a folder, and returns its place; ValueError: it cannot.
        is_large: whether its libraries are.
        options: further arguments of its class.
    """

    packages: tuple[str, ...]
    install: str
    engine: str
    export: Callable[[Checkpoint, Path], Path]
    is_large: bool = False
    options: tuple[tuple[str, str], ...] = ()


def parse(text: str) -> tuple[str, Path | None]:
    """Name and file of "llama.cpp" or "llama.cpp=model.gguf".

    Raises:
        ValueError: no such engine, or an engine that needs a file and has none.
        OSError: there is no such file.
    """
    name, has_file, file = text.partition("=")
    if name not in PEERS:
        near = get_close_matches(name, PEERS, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--against: there is no engine {name!r}{hint}; engines: {', '.join(PEERS)}")
    if has_file and not Path(file).exists():
        raise FileNotFoundError(f"--against {text}: there is no file {file!r}")
    return name, Path(file) if has_file else None


def missing(name: str) -> str | None:
    """Why an engine cannot start here, with the command that helps; None if it is installed."""
    lacking = [package for package in PEERS[name].packages if find_spec(package) is None]
    return f"{' and '.join(lacking)} not installed: {PEERS[name].install}" if lacking else None


def prepare(name: str, file: Path | None, model: Checkpoint, folder: Path, threads: int) -> Measured:
    """The engine with its file, which is made of our model if none is given.

    Args:
        name: one of PEERS.
        file: what it runs, or None for our model.
        model: ours, packed.
        folder: for the file.
        threads: that it loads with.

    Raises:
        ValueError: its formats cannot hold our model; the message says why.
    """
    peer = PEERS[name]
    path = peer.export(model, folder) if file is None else file
    size = sum(f.stat().st_size for f in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
    # Each may keep a second copy, unpacked or in an order that its kernels like better.
    n_weights = sum(math.prod(shape) for shape in model.config.tensor_shapes().values())
    need = max(2 * size, 5 * n_weights // 2) + LARGE if peer.is_large else 2 * size + SMALL
    arguments: dict[str, Any] = {"engine": peer.engine, "path": str(path), "threads": threads}
    arguments |= dict(peer.options)
    # Some compile their functions at first use, for one length and then for all.
    return Measured(Engine(arguments, need, warm_up=2 if peer.is_large else 1), label(path), size)


def label(path: Path) -> str | None:
    """Bit widths of a model's weights, activations and cache, or the types of a GGUF file that onebit would unpack."""
    try:
        checkpoint = formats.read(path)
    except (ValueError, OSError):
        return None
    types = checkpoint.provenance.get("source", {}).get("types", {})
    numbers = {"F32", "F16", "BF16"}
    if checkpoint.config.weights == "dense" and (packed := sorted(set(types) - numbers)):
        return " + ".join(packed)
    return checkpoint.label


def _gguf(model: Checkpoint, folder: Path) -> Path:
    kind = gguf.usual_kind(model)
    if kind == "I2_S":
        raise ValueError("it has no architecture with squared ReLU and sub-norms; only BitNet's fork runs it")
    if reason := gguf.refusals(model)[kind]:
        raise ValueError(f"GGUF {kind}: {reason}")
    path = folder / f"model.{kind.lower()}.gguf"
    formats.write(model, path, kind)
    return path


def _folder(kind: str) -> Callable[[Checkpoint, Path], Path]:
    def write(model: Checkpoint, folder: Path) -> Path:
        chosen = hf.usual_kind(model) if kind == "usual" else kind
        if reason := hf.refusals(model)[chosen]:
            raise ValueError(f"Hugging Face {chosen}: {reason}")
        path = folder / f"model-{chosen}"
        if not path.exists():
            formats.write(model, path, chosen)
        return path

    return write


def _no_onnx(model: Checkpoint, folder: Path) -> Path:
    raise ValueError("onebit writes no ONNX; name a file of the same model: --against onnxruntime=model.onnx")


PEERS = {
    "llama.cpp": Peer(
        ("llama_cpp",), "pip install llama-cpp-python", "onebit.bench.engines.llama:Llama", _gguf
    ),
    # As published: packed, with activations rounded. torch: what the same weights cost in bfloat16.
    "transformers": Peer(
        ("torch", "transformers"),
        "pip install torch transformers accelerate",
        "onebit.bench.engines.hugging:HuggingFace",
        _folder("usual"),
        is_large=True,
        options=(("dtype", "auto"),),
    ),
    "torch": Peer(
        ("torch", "transformers"),
        "pip install torch transformers accelerate",
        "onebit.bench.engines.hugging:HuggingFace",
        _folder("dense"),
        is_large=True,
    ),
    "onnxruntime": Peer(
        ("onnxruntime",), "pip install onnxruntime", "onebit.bench.engines.onnx:Onnx", _no_onnx
    ),
}
