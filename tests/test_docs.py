"""What the documents say is so: code runs, links lead somewhere, names exist. Kind: invariant."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import onebit
import tiny
from onebit import formats

ROOT = Path(__file__).parent.parent
SKIPPED = {".git", ".venv", ".hypothesis", "build", "dist", "runs"}
# Runs that need a data folder or minutes; their verbs and flags are checked all the same.
SLOW_VERBS = {"train", "tune", "eval", "convert"}
# A path of one machine has no place in a project for all.
LOCAL_PATH = re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|tmp|mnt|scratch)/\w")
TEXT = {".py", ".md", ".h", ".cpp", ".inl", ".toml", ".txt", ".yml", ".json", ".cmake", ""}


def text_files() -> list[Path]:
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.endswith(("cache__", "_cache"))]
        found += [Path(folder) / file for file in files]
    # In a second worktree .git is a file.
    return sorted(f for f in found if f.suffix in TEXT and f.name not in SKIPPED)


def documents() -> list[Path]:
    return [f for f in text_files() if f.suffix == ".md"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def blocks(language: str, text: str | None = None) -> list[str]:
    """The fenced blocks of a text, by default the README, in one language; "" is none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text or readme(), re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands() -> list[str]:
    """Every command of the README: lines of shell blocks, and `onebit ...` in running text."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return lines + [c for c in re.findall(r"`(onebit [a-z][^`\n]*)`", readme()) if c not in lines]


def onebit_words(command: str) -> list[str]:
    """The part of a pipe that calls onebit, as words; empty if none does."""
    for part in command.split("|"):
        words = shlex.split(part, comments=True)
        if words[:1] == ["onebit"]:
            return words[: words.index(">")] if ">" in words else words
    return []


@cache
def help_of(verb: str) -> str:
    call = f"import sys; sys.argv = ['onebit', '{verb}', '--help']; from onebit.cli import main; main()"
    wide = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    result = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=wide)
    assert result.returncode == 0, f"onebit {verb}: {result.stderr}"
    return result.stdout


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n")[2][:40])
def test_readme_python_runs(block, tmp_path):
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)


@pytest.mark.parametrize("command", [c for c in commands() if onebit_words(c)])
def test_readme_verbs_and_flags_exist(command):
    verb, *words = onebit_words(command.replace("[", "").replace("]", ""))[1:]
    text = help_of(verb)
    for word in words:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text), f"onebit {verb} has no {word}"


@pytest.mark.parametrize(
    "command", [c for b in blocks("bash") for c in b.splitlines() if re.match(r"onebit train \w", c)]
)
def test_readme_recipes_exist(command):
    recipes = pytest.importorskip("onebit.train.recipes")
    words = onebit_words(command)
    recipes.build(words[2], [words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_readme_run_flags_exist():
    row = next(line for line in readme().splitlines() if line.startswith("| `onebit run [PROMPT]"))
    flags = re.findall(r"(?<!\w)--[a-z-]+", row)
    assert flags and not [flag for flag in flags if flag not in help_of("run")]


def is_cheap(command: str) -> bool:
    words = onebit_words(command)
    return bool(words) and words[1] not in SLOW_VERBS and "-m" not in words


@pytest.mark.parametrize("command", [c for b in blocks("bash") for c in b.splitlines() if is_cheap(c)])
def test_readme_cheap_commands_run(command, tmp_path):
    words = onebit_words(command)
    if "model.gguf" in words:
        formats.write(
            tiny.master(tiny.config(sub_norm=False, activation="silu")), tmp_path / "model.gguf", "F32"
        )
    call = [shlex.quote(sys.executable), "-m", "onebit"]
    line = command.replace(" ".join(["onebit", words[1]]), " ".join([*call, words[1]]))
    result = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout or (tmp_path / "story.txt").read_text("utf-8")


def test_the_proofs_of_families_exist():
    text = (ROOT / "docs" / "families.md").read_text("utf-8")
    file, n_found = None, 0
    for path, test in re.findall(r"`((?:[a-z]+/)?test_\w+\.py)?(?:::(test_\w+)(?:\[[^\]`]*\])?)?`", text):
        file = ROOT / "tests" / path if path else file
        if path or test:
            assert f"def {test}" in file.read_text("utf-8"), f"{path or file} {test}"
            n_found += 1
    assert n_found > 30


def test_make_targets_in_documents_exist():
    rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for path in documents():
        text = path.read_text("utf-8")
        for code in [*blocks("bash", text), *re.findall(r"`([^`\n]+)`", text)]:
            for name in re.findall(r"^make ([a-z]+)", code, re.MULTILINE):
                assert name in rules, f"{relative(path)}: make {name}"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=relative)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(place), f"{link}: no such heading"


def tree() -> set[str]:
    """Paths of the README's file tree: two spaces a level, folders end in a slash, names may share a line."""
    block = next(block for block in blocks("") if "src/onebit/" in block)
    paths, parents = set(), {}
    for line in block.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {2,}", line.strip())[0].split()
        for name in names:
            path = parents.get(level - 1, "") + name
            paths.add(path)
            parents[level] = path
    return paths


def test_readme_tree_is_true():
    assert not [path for path in sorted(tree()) if not (ROOT / path).exists()]


def test_readme_tree_is_complete():
    ours = [f for f in text_files() if f.suffix in {".py", ".cpp", ".h", ".inl"} and f.name != "__main__.py"]
    shown = {relative(f) for f in ours if relative(f).startswith(("src/", "core/"))}
    missing = {f for f in shown if f not in tree() and not f.endswith("/__init__.py")}
    assert not missing


def test_no_local_paths():
    texts = {relative(path): path.read_text("utf-8", errors="ignore") for path in text_files()}
    assert not [(name, found.group()) for name, text in texts.items() if (found := LOCAL_PATH.search(text))]


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == onebit.__version__
    assert f"## {onebit.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
