"""Exact: exit codes, what goes to stdout and stderr, and that a verb imports no more than it needs."""

import os
import shlex
import subprocess
import sys

import pytest

import onebit
import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a packed model, its run folder, and a full-precision twin."""
    folder = tmp_path_factory.mktemp("models")
    formats.write(quantize(tiny.master()), folder / "tiny.onebit")
    formats.run.write(tiny.master(), folder / "run")
    formats.run.write(tiny.master(tiny.config(weights="dense", activations="none")), folder / "dense")
    return folder


def cli(*args, stdin=b"", folder=None, **environment):
    """Run a command line; returns exit code, stdout, stderr."""
    env = {"COLUMNS": "120", "PYTHONUTF8": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-m", "onebit", *map(str, args)],
        input=stdin,
        capture_output=True,
        cwd=folder,
        env=os.environ | env,
        timeout=120,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_version():
    assert cli("--version") == (0, f"onebit {onebit.__version__}\n", "")


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_shows_every_verb(args):
    code, out, err = cli(*args)
    assert (code, err) == (0, "")
    for verb, line in {
        "run": "Continue a text",
        "train": "Train",
        "convert": "Convert",
        "info": "Show",
    }.items():
        assert any(verb in row and line in row for row in out.splitlines())


@pytest.mark.parametrize("verb", ["run", "train", "convert", "info"])
def test_help_of_a_verb_has_an_example(verb):
    code, out, err = cli(verb, "--help")
    assert (code, err) == (0, "")
    assert f"Example: onebit {verb}" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rum"], "did you mean 'run'?"),
        (["run", "x", "--treads", "2"], "--threads"),
        (["run", "x", "--max-tokens", "many"], "--max-tokens"),
        (["run", "x", "--temperature", "-1"], "temperature is -1.0; expected a number at least 0"),
        (["run", "x", "-m", "nowhere"], "nowhere: no such file"),
        (["run", "x", "-m", "run/.."], "folder without a model"),
        (["run", "x", "-m", "tiny.onebit", "--kv-cache", "int3"], "expected bf16, int8, fp8"),
        (["run", "x", "-m", "tiny.onebit", "--threads", "0"], "threads is 0"),
        (["run", "Lily " * 300, "-m", "tiny.onebit"], "context of this model holds 192"),
        (["convert", "run", "out.txt"], ".onebit"),
        (["convert", "run", "out.onebit", "--encoding", "t81"], "t80"),
        (["convert", "run"], "dst"),
        (["info", "nowhere"], "nowhere: no such file"),
        (["info", "run", "--verify"], "only .onebit files"),
        (["train"], "RECIPE is missing"),
        (["train", "tiny", "--data", "texts"], "--out is missing"),
        (["train", "tinny", "--data", "texts", "--out", "out"], "did you mean 'tiny'"),
        (["train", "tiny", "--data", "texts", "--out", "out", "--set", "stepz=3"], "did you mean 'steps'"),
        (["train", "tiny", "--data", "texts", "--out", "out"], "texts"),
    ],
)
def test_errors_of_the_user_are_one_line_and_code_2(models, args, message, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", ["onebit", *args])
    before = sorted(models.iterdir())
    # In this process, which has paid for its imports; other tests here start one.
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert err.startswith("onebit: error: ") and err.count("\n") == 1, err
    assert message in err
    assert out == ""
    assert sorted(models.iterdir()) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_an_error_of_the_user(error, monkeypatch, capsys):
    def refuse(*args):
        raise error

    monkeypatch.setattr("onebit.formats.convert", refuse)
    monkeypatch.setattr("sys.argv", ["onebit", "convert", "a", "b.onebit"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "onebit: error: this machine has not enough memory for that\n"


def test_a_context_that_does_not_fit_says_what_to_do(models, monkeypatch, capsys):
    monkeypatch.setattr("onebit.llm.available_bytes", lambda: 1)
    monkeypatch.setattr("sys.argv", ["onebit", "run", "x", "--max-tokens", "9"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "lower max_tokens or shorten the prompt" in capsys.readouterr().err


def test_a_bad_isa_is_an_error_of_the_user(models):
    code, out, err = cli("run", "x", "-m", "tiny.onebit", folder=models, ONEBIT_ISA="sse9")
    assert (code, out) == (2, "")
    assert "sse9" in err and "scalar" in err and err.count("\n") == 1


def test_train_without_torch_names_the_extra(models):
    (models / "blocked").mkdir(exist_ok=True)
    (models / "blocked" / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    args = ["train", "tiny", "--data", "texts", "--out", "out"]
    code, out, err = cli(*args, folder=models, PYTHONPATH=python_path(models / "blocked"))
    assert (code, out) == (2, "")
    assert err == 'onebit: error: torch is not installed; training needs it: pip install "onebit[train]"\n'


@pytest.mark.parametrize("has_run", [True, False])
def test_ctrl_c_in_training_says_how_to_go_on(has_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")

    def stop(recipe, data, out, resume):
        out.mkdir()
        if has_run:
            (out / "recipe.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("onebit.train.train", stop)
    out = str(tmp_path / "my run")
    monkeypatch.setattr("sys.argv", ["onebit", "train", "tiny", "--data", "texts", "--out", out])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    hint = f"onebit: stopped; go on with: onebit train --out {shlex.quote(out)} --resume"
    shown, err = capsys.readouterr()
    assert (shown, err.strip()) == ("", hint if has_run else "")


def python_path(first):
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))


def test_run_imports_neither_rich_nor_jinja_nor_torch(models):
    code = f"""
import sys
from onebit.cli import main
sys.argv = ["onebit", "run", "Once", "-m", {str(models / "tiny.onebit")!r}, "--max-tokens", "1"]
try:
    main()
except SystemExit as end:
    print(end.code, *sorted({{"rich", "jinja2", "torch", "matplotlib", "pydantic"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


def test_import_onebit_imports_nothing():
    code = "import sys, onebit; print(*sorted({'numpy', 'torch', 'tokenizers', 'typer'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
