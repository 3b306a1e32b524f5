"""Whole files or none. Kind: invariant (the folder looks as before after any failure)."""

import errno
import os
import subprocess
import sys

import pytest

from onebit.formats.files import write_file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    return tmp_path


def unchanged(folder) -> bool:
    return [path.name for path in folder.iterdir()] == ["old"] and (folder / "old").read_bytes() == b"old"


def test_a_file_is_made_or_replaced(folder):
    write_file(folder / "old", [b"ne", b"w"])
    write_file(folder / "empty", [])
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "old"]
    assert (folder / "old").read_bytes() == b"new" and (folder / "empty").read_bytes() == b""


def test_permissions_are_those_of_any_new_file(folder):
    write_file(folder / "ours", [b""])
    (folder / "theirs").touch()
    assert (folder / "ours").stat().st_mode == (folder / "theirs").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left on device: .*old") as caught:
        write_file(folder / "old", [b"new"])
    assert caught.value.errno == errno.ENOSPC and unchanged(folder)


def test_a_write_that_the_system_cuts_short_leaves_nothing_behind(folder):
    resource = pytest.importorskip("resource")
    limit = 100_000
    script = (
        "import sys, pathlib; from onebit.formats.files import write_file\n"
        "try: write_file(pathlib.Path(sys.argv[1]), [bytes(1000)] * 1000)\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "old")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in done.stdout and done.stdout.count("\n") == 1 and unchanged(folder)


def test_an_interrupted_write_leaves_nothing_behind(folder):
    def chunks():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(folder / "old", chunks())
    assert unchanged(folder)


def test_impossible_places_are_named(folder):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere; make it first"):
        write_file(folder / "nowhere" / "x", [b""])
    (folder / "sub").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_file(folder / "sub", [b""])
    assert not list((folder / "sub").iterdir())
