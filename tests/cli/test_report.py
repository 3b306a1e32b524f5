"""`onebit report`: from a measurement to the page, what it says, what it refuses. Kinds: exact, invariant."""

import json
import sys

import pytest

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its file of results, as `onebit eval` writes it."""
    from onebit.cli.eval import eval as measure

    folder = tmp_path_factory.mktemp("measured")
    formats.write(quantize(tiny.master()), folder / "tiny.onebit")
    (folder / "text.txt").write_text(tiny.TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setattr(sys, "argv", ["onebit", "eval", "tiny.onebit", "--text", "text.txt"])
        measure(
            str(folder / "tiny.onebit"), [folder / "text.txt"], window=64, threads=1, out=folder / "a.json"
        )
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """Run the command line in the folder; returns exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["onebit", "report", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


def test_what_was_measured_becomes_a_page(cli, folder):
    assert cli("a.json") == (0, "", "onebit: report.html: 1 result of 1 file\n")
    page = (folder / "report.html").read_text("utf-8")
    found = json.loads((folder / "a.json").read_text())
    for figure in found["results"][0]["figures"].values():
        assert all(f'<data value="{figure[key]!r}"' in page for key in ("value", "low", "high"))
    assert found["model"]["bytes"] == (folder / "tiny.onebit").stat().st_size
    assert f'<data value="{found["model"]["bytes"]}"' in page
    assert "onebit eval tiny.onebit --text text.txt" in page and "W1.58A8KV16" in page


def test_errors_are_one_line(cli, folder):
    for args, why in [
        (["absent.json"], "absent.json: No such file"),
        (["a.json", "a.json"], "a.json: is given twice"),
        (["text.txt"], "text.txt: is no JSON"),
        (["a.json", "-o", "a.json"], "ends in .html"),
        (["a.json", "-o", "nowhere/r.html"], "there is no folder nowhere"),
        ([], "'runs'"),
    ]:
        code, out, err = cli(*args)
        assert (code, out) == (2, "") and why in err and err.count("\n") == 1


def test_labels_are_mixed_only_on_demand(cli, folder):
    other = json.loads((folder / "a.json").read_text())
    other["model"] |= {"label": "W1A8KV16", "sha256": "00" * 32}
    (folder / "b.json").write_text(json.dumps(other))
    code, _, err = cli("a.json", "b.json", "-o", "mixed.html")
    assert code == 2 and "--mix" in err and not (folder / "mixed.html").exists()
    assert cli("a.json", "b.json", "-o", "mixed.html", "--mix")[0] == 0


def test_without_matplotlib_the_extra_is_named(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("a.json")
    assert (code, err) == (
        2, 'onebit: error: matplotlib is not installed; pictures need it: pip install "onebit[report]"\n',
    )  # fmt: skip
