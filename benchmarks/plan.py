"""What a run measures: the engines and how to start them, the measurements and their order."""

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapes
import twins

from onebit import formats
from onebit.bench import peers
from onebit.bench.fleet import Engine
from onebit.bench.peers import LARGE, SMALL
from onebit.checkpoint import Checkpoint
from onebit.config import ModelConfig
from onebit.engine.memory import position_bytes
from onebit.formats import native
from onebit.parts import token_bytes

OURS, FRESH, MACHINE = "onebit", "onebit, fresh process", "limits of the machine"
LLAMA, PACKED, DENSE = "llama.cpp", "transformers, packed", "torch, bf16 Llama"
PEERS = {
    "llama": [f"{LLAMA} {kind}" for kind in twins.GGUF_TYPES],
    "transformers": [PACKED],
    "torch": [DENSE],
}

CONTEXTS = (2048, 8192)
CACHES = ("bf16", "int8")
PROMPTS = (128, 512, 2048)
# Where the worker finds engines that are no part of the package.
FOLDERS = [str(Path(__file__).parent)]

# A value as an engine gives it times this, and the unit of that.
UNITS = {
    "read": (1e-9, "GB/s"), "dot": (1e-9, "GMAC/s"), "amx": (1e-9, "GMAC/s"),
    "decode": (1, "tok/s"), "linear": (1, "tok/s"), "prefill": (1, "tok/s"), "batch": (1, "tok/s"),
    "overhead": (1, "%"), "footprint": (1e-6, "MB"), "load": (1, "s"),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One measurement of one engine.

    Args:
        engine: its name.
        what: the method that measures, a key of UNITS.
        threads: that compute.
        options: further arguments of the method.
    """

    engine: str
    what: str
    threads: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """In words, without engine and threads."""
        options = dict(self.options)
        match self.what:
            case "decode":
                context = options.get("context")
                words = f"decode, position {context:,}" if context else "decode, short context"
                if kv_cache := options.get("kv_cache"):
                    words += f", {kv_cache} cache"
                return words + (", int4 shortlist" if options.get("shortlist") else "")
            case "prefill":
                isa = options.get("isa")
                return f"prefill, {options['tokens']:,} tokens" + (f", {isa} kernels" if isa else "")
            case what:
                return {
                    "read": "memory read", "dot": "int8 dot products", "amx": "int8 matrix tiles (AMX)",
                    "linear": "decode without the head", "batch": "decode, 8 texts together",
                    "overhead": "shipped model: step outside forward",
                    "footprint": "resident set - file - keys and values", "load": "load, warm file",
                }[what]  # fmt: skip


def task(engine: str, what: str, threads: int, **options: Any) -> Task:
    """A Task; options in order of their names."""
    return Task(engine, what, threads, tuple(sorted(options.items())))


@dataclass
class Facts:
    """What is known without measuring.

    Args:
        shape: name of the shape.
        config: the model.
        encoding: layout of the linear layers.
        isa: kernels of onebit.
        threads: of the largest measurements.
        linear_weights: weights in the linear layers.
        linear_bytes: their bytes, scales included.
        token_bytes: bytes of weights that a step reads, exact 8-bit head included.
        file_bytes: size of each engine's file.
    """

    shape: str
    config: ModelConfig
    encoding: str
    isa: str
    threads: int
    linear_weights: int
    linear_bytes: int
    token_bytes: int
    file_bytes: dict[str, int] = field(default_factory=dict)


def facts(shape: str, checkpoint: Checkpoint, encoding: str, isa: str, threads: int) -> Facts:
    """Count weights and bytes of a packed model."""
    config = checkpoint.config
    linear = [checkpoint.tensors[name] for name in checkpoint.tensors if config.is_linear(name)]
    return Facts(
        shape,
        config,
        encoding,
        isa,
        threads,
        sum(tensor.shape[0] * tensor.shape[1] for tensor in linear),
        sum(tensor.data.nbytes + tensor.scale.nbytes for tensor in linear),
        token_bytes(checkpoint),
    )


def make_ours(config: ModelConfig, name: str, encoding: str, folder: Path) -> Path:
    """The synthetic .onebit file of a shape, made once."""
    path = folder / f"{name}-{encoding}.onebit"
    if not path.exists():
        native.write(shapes.synthetic(config, encoding), path)
    return path


def make_twin(name: str, shape: str, path: Path, folder: Path) -> Path:
    """The file of a peer with the same shape, made once.

    Raises:
        ValueError: a shape that the peer's format cannot hold.
    """
    if name == DENSE:
        target = folder / f"{shape}-llama.json"
        config = twins.hugging_face_config(formats.read(path).config, ternary=False)
        target.write_text(json.dumps(config, indent=1))
    elif name == PACKED:
        target = folder / f"{shape}-packed"
        if not (target / "model.safetensors").exists():
            twins.write_hugging_face(formats.read(path), target)
    else:
        kind = name.split()[-1]
        target = folder / f"{shape}-{kind.lower()}.gguf"
        if not target.exists():
            twins.write_gguf(formats.read(path), target, kind)
    return target


def own_engines(known: Facts, path: Path) -> dict[str, Engine]:
    """The machine, and onebit twice: once kept, once anew for each measurement of load time and memory."""
    config, file_bytes = known.config, path.stat().st_size
    known.file_bytes[OURS] = file_bytes
    arguments = {
        "engine": "engines.ours:Ours",
        "folders": FOLDERS,
        "path": str(path),
        "threads": known.threads,
        "isa": known.isa,
    }
    caches = 2 * max(CONTEXTS) * position_bytes(config)
    shortlists = config.vocab_size * config.d_model
    return {
        MACHINE: Engine(
            {
                "engine": "engines.machine:Machine",
                "folders": FOLDERS,
                "n_bytes": known.token_bytes,
                "threads": known.threads,
            },
            known.token_bytes + SMALL,
        ),
        OURS: Engine(arguments, file_bytes + caches + shortlists + SMALL),
        FRESH: Engine(arguments, file_bytes + SMALL, fresh=True),
    }


def peer_engine(name: str, known: Facts, path: Path) -> Engine:
    """How to start a peer."""
    config = known.config
    n_weights = known.linear_weights + config.vocab_size * config.d_model * (1 if config.tied_head else 2)
    if name.startswith(LLAMA):
        known.file_bytes[name] = path.stat().st_size
        # It may keep a second copy, in an order that its kernels like better.
        return Engine(
            {"engine": peers.PEERS["llama.cpp"].engine, "path": str(path), "threads": known.threads},
            2 * path.stat().st_size + SMALL,
        )
    if name == PACKED:
        known.file_bytes[name] = (path / "model.safetensors").stat().st_size
    arguments = {"engine": peers.PEERS["torch"].engine, "path": str(path), "threads": known.threads}
    # Its functions are compiled at first use, for one length and then for all.
    return Engine(arguments, 2 * n_weights * 5 // 4 + LARGE, warm_up=2)


def own_tasks(known: Facts, has_amx: bool, quick: bool) -> list[Task]:
    """What is measured of the machine and of onebit."""
    several = sorted({1, known.threads})
    most = known.threads
    tasks = [task(MACHINE, "read", t) for t in several]
    for t in several:
        tasks += [task(OURS, "decode", t), task(OURS, "linear", t), task(OURS, "decode", t, shortlist=True)]
        tasks += [task(OURS, "decode", t, context=n, kv_cache=c) for n in CONTEXTS for c in CACHES]
    tasks += [task(OURS, "batch", most), task(OURS, "overhead", most)]
    tasks += [task(MACHINE, "dot", t) for t in several]
    tasks += [task(MACHINE, "amx", t) for t in several if has_amx]
    for tokens in PROMPTS:
        for t in several:
            if not quick or (t == most and tokens <= 512):
                tasks.append(task(OURS, "prefill", t, tokens=tokens))
    if known.isa == "amx":
        tasks.append(task(OURS, "prefill", most, tokens=512, isa="avx512vnni"))
    return [*tasks, task(FRESH, "footprint", most)]


def peer_tasks(name: str, known: Facts, quick: bool) -> list[Task]:
    """What is measured of a peer: decode of a text that begins, and prompts that it takes in bearable time."""
    several = sorted({1, known.threads})
    tasks = [task(name, "decode", t) for t in several]
    for t in several:
        tasks += [
            task(name, "prefill", t, tokens=tokens)
            for tokens in PROMPTS[:2]
            if t == known.threads or (tokens == 128 and not quick)
        ]
    return tasks


def machine_facts() -> dict[str, Any]:
    """CPU, cores and system, as far as the system tells."""
    cpu, lines = platform.processor() or platform.machine(), []
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        pass
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return {
        "cpu": found.get("model name", cpu),
        "family_model_stepping": [found.get(k) for k in ("cpu family", "model", "stepping")],
        "cache": found.get("cache size", "unknown size"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
