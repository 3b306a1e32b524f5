"""The shape of the code base, enforced. Kind: invariant.

LAYERS is the layer table of docs/architecture.md: arrows point down, and siblings never import each other.
"""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
KERNELS = ROOT / "core" / "src" / "kernels"

LAYERS = [
    {"quant"},
    {"config", "packing"},
    {"checkpoint"},
    {"parts"},
    {"formats", "_core"},
    {"nn", "engine"},
    {"train", "llm", "conversion"},
    {"results"},
    {"eval", "serve", "bench", "readings"},
    {"doctor", "report"},
    {"cli"},
]
# onebit/__init__.py only forwards names, on first use, and __main__.py only calls the CLI.
TOP = len(LAYERS)

# Who may import what from outside the standard library. numpy is the common tongue; the rest has an owner.
OWNERS = {
    "torch": {"nn", "train", "bench"},
    "transformers": {"bench"},
    "llama_cpp": {"bench"},
    "onnxruntime": {"bench"},
    "matplotlib": {"train", "bench", "report"},
    "safetensors": {"train"},
    "tokenizers": {"engine", "train"},
    "jinja2": {"engine", "report"},
    "typer": {"cli"},
    "rich": {"cli", "train"},
    "huggingface_hub": {"formats"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "llguidance": {"serve"},
    "lm_eval": {"eval"},
    "datasets": {"eval"},
    "ray": {"serve"},
}

MAX_LINES = 700
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc", "base"}
# The last is no setting: torchrun says by it that this is one of its processes.
ENVIRONMENT = {"ONEBIT_ISA", "ONEBIT_THREADS", "TORCHELASTIC_RUN_ID"}
HELP_SECONDS = 0.6


def python_files() -> list[Path]:
    return sorted((SRC / "onebit").rglob("*.py"))


def source_files() -> list[Path]:
    roots = [ROOT / name for name in ("src", "core", "tests", "benchmarks")]
    return sorted(f for r in roots for f in r.rglob("*") if f.suffix in {".py", ".cpp", ".h", ".inl"})


def module_name(path: Path) -> str:
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in python_files()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imports(module: str) -> tuple[set[str], set[str]]:
    """What a module imports at run time, anywhere in the file: modules of ours, and top names of others."""
    path = modules()[module]
    ours, others = set(), set()
    nodes: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        nodes += [] if is_type_checking(node) else ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "onebit":
                ours.add(name)
            else:
                others.add(name.split(".")[0])
    return ours, others


def target(name: str) -> str:
    """The module that an imported dotted name lives in: the longest prefix that is one."""
    while name not in modules() and name not in ("onebit._core", "onebit"):
        name = name.rpartition(".")[0]
    return name


def part(module: str) -> str:
    """The piece of the layer table that a module belongs to."""
    return module.removesuffix("__main__").partition(".")[2].partition(".")[0]


def layer(piece: str) -> int:
    return next((i for i, pieces in enumerate(LAYERS) if piece in pieces), TOP)


def test_every_module_stands_in_the_layer_table():
    pieces = {part(module) for module in modules()} - {""}
    assert pieces <= set().union(*LAYERS), "a new piece needs a place in LAYERS and docs/architecture.md"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module):
    for name in imports(module)[0]:
        other = target(name)
        if part(other) == part(module) or name == "onebit.__version__":
            continue
        assert layer(part(other)) < layer(part(module)), f"{module} imports {name}"


def test_only_the_engine_model_imports_the_core():
    users = {module for module in modules() if any(target(n) == "onebit._core" for n in imports(module)[0])}
    assert users == {"onebit.engine.model"}


def test_no_cycles_between_files():
    graph = {
        module: {target(name) for name in imports(module)[0]} - {"onebit", "onebit._core"} - {module}
        for module in modules()
    }
    while leaves := {module for module, uses in graph.items() if not uses}:
        graph = {module: uses - leaves for module, uses in graph.items() if module not in leaves}
    assert not graph, "these files import each other in a circle"


@pytest.mark.parametrize("module", sorted(modules()))
def test_dependencies_stay_with_their_owners(module):
    for name in imports(module)[1] - set(sys.stdlib_module_names) - {"numpy"}:
        assert part(module) in OWNERS.get(name, ()), f"{module} imports {name}"


def test_files_are_chapters():
    files = source_files()
    assert not [str(f) for f in files if len(f.read_text("utf-8").splitlines()) > MAX_LINES]
    assert not [str(f) for f in files if f.stem.strip("_") in VAGUE_NAMES]


def test_no_hidden_settings():
    """Every reading of the environment names its variable on the spot, and two of them are settings."""
    for path in [*python_files(), *(ROOT / "core").rglob("*.cpp"), *(ROOT / "core").rglob("*.h")]:
        for line in path.read_text("utf-8").splitlines():
            if re.search(r"\b(environ|getenv|putenv|setenv)\b", line):
                names = set(re.findall(r"[\"']([A-Z][A-Z0-9_]+)[\"']", line))
                assert names and names <= ENVIRONMENT, f"{path.relative_to(ROOT)}: {line.strip()}"


def run_help(code: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.argv = ['onebit', '--help']; {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_is_fast():
    seconds = []
    for _ in range(3):
        before = os.times()
        run_help("from onebit.cli import main; main()")
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    print(f"onebit --help: {statistics.median(seconds):.3f} s of CPU time")
    # CPU time, so that a busy machine fails nobody. The promise is 0.3 s; a slow CPU may take twice that.
    assert statistics.median(seconds) < HELP_SECONDS


def test_help_imports_nothing_heavy():
    code = """
from onebit.cli import main
try:
    main()
except SystemExit:
    pass
print("heavy:", *sorted({"numpy", "torch", "tokenizers", "jinja2", "matplotlib"} & set(sys.modules)))
"""
    assert run_help(code).splitlines()[-1].strip() == "heavy:"


def isa_flags(isa: str) -> list[str]:
    """The flags that core/CMakeLists.txt gives to one kernel file."""
    text = (ROOT / "core" / "CMakeLists.txt").read_text("utf-8")
    found = re.search(rf'src/kernels/{isa}\.cpp PROPERTIES COMPILE_OPTIONS\s+"([^"]+)"', text)
    return found.group(1).split(";") if found else []


def compiler(isa: str) -> str | None:
    """The compiler of a kernel file: that of this machine, or one for the CPU that the file is for."""
    native = os.environ.get("CXX", "c++")
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(os.uname().machine, os.uname().machine)
    target = "aarch64" if isa.startswith("neon") else "x86_64" if isa_flags(isa) else machine
    return native if target == machine else shutil.which(f"{target}-linux-gnu-g++")


def object_file(isa: str, folder: Path) -> Path:
    """The newest object of a kernel file in the build folder, or a fresh one where there is none."""
    sources = [*KERNELS.iterdir(), *(ROOT / "core" / "include" / "onebit").iterdir()]
    built = [f for f in (ROOT / "build").glob(f"*/**/{isa}.cpp.o") if "sanitize" not in f.parts]
    newest = max(built, key=lambda f: f.stat().st_mtime, default=None)
    if newest and newest.stat().st_mtime > max(f.stat().st_mtime for f in sources):
        return newest
    command = [compiler(isa), "-std=c++20", "-O3", "-ffp-contract=off", *isa_flags(isa)]
    command += ["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-I", ROOT / "core" / "include"]
    out = folder / f"{isa}.o"
    subprocess.run([*command, "-c", KERNELS / f"{isa}.cpp", "-o", out], check=True)
    return out


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF objects with nm")
@pytest.mark.parametrize("isa", sorted(f.stem for f in KERNELS.glob("*.cpp") if f.stem != "dispatch"))
def test_isa_object_exports_one_symbol(isa, tmp_path):
    """A std:: function compiled for AVX-512 here, and picked by the linker, would crash older CPUs."""
    if not compiler(isa):
        pytest.skip(f"no compiler for the CPUs of {isa}")
    command = ["nm", "--defined-only", "--extern-only", "--demangle", object_file(isa, tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[2] for line in lines if line.strip()]
    # The compiler's pointer to the exception handler is data, alike in every file.
    symbols = [symbol for symbol in symbols if not symbol.startswith("DW.ref.")]
    assert len(symbols) == 1, symbols
