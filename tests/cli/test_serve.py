"""Exact: `onebit serve` serves what it is told under the names it is told, or says what is wrong before it loads."""

import socket
import subprocess
import sys

import pytest

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli import main
from onebit.formats import adapter as adapter_format


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    formats.write(quantize(tiny.master(chat_template=tiny.CHAT_TEMPLATE)), folder / "one.onebit")
    formats.write(quantize(tiny.master(seed=1)), folder / "two.onebit")
    adapter_format.write(tiny.adapter(), folder / "red", "one")
    (folder / "keys").write_text("first\n\nsecond\n")
    (folder / "none").write_text("\n")
    return folder


class Served(Exception):
    """In place of a server that runs."""


@pytest.fixture
def serve(folder, monkeypatch):
    """Run the command up to where the server would begin; returns its application."""

    def begin(server, sockets):
        raise Served(server.config.app)

    monkeypatch.setattr("onebit.serve.server.Server.run", begin)
    monkeypatch.chdir(folder)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["onebit", "serve", "--port", "0", "--memory", "1MiB", *args])
        with pytest.raises(Served) as caught:
            main()
        return caught.value.args[0].state.service

    return call


def test_models_and_adapters_by_their_names(serve, capsys):
    service = serve(
        "-m",
        "one.onebit",
        "-m",
        "other=two.onebit",
        "--adapter",
        "one:red=red",
        "--kv-cache",
        "int8",
        "--normalize",
    )
    assert [place.name for place in service.all_places()] == ["one", "other", "one:red"]
    assert service.find("red").served.name == "one"
    assert service.find(None).name == "one"
    assert service.served[0].llm.kv_cache == "int8"
    assert all(served.llm.tokenizer.normalize for served in service.served)
    first, curl = capsys.readouterr().err.splitlines()
    assert first.startswith("onebit: http://127.0.0.1:") and "serves one, other" in first
    assert curl.startswith("curl http://127.0.0.1:") and "/v1/chat/completions" in curl


def test_options_reach_the_server(serve):
    service = serve(
        *("-m", "two.onebit", "--api-key-file", "keys", "--api-key", "third", "--context", "100"),
        *("--max-num-seqs", "3", "--max-queue", "4", "--allow-origin", "https://ours.example"),
    )
    assert service.options.api_keys == ["third", "first", "second"]
    assert "first" not in repr(service.options)
    assert service.served[0].context == 100
    assert service.served[0].runner.capacity == 7


def test_an_open_server_on_loopback_knows_its_names(serve):
    def hosts(*args):
        return set(serve("-m", "one.onebit", *args).options.allow_hosts)

    assert hosts() == {"localhost", "127.0.0.1", "::1"}
    assert hosts("--allow-host", "Box") == {"localhost", "127.0.0.1", "::1", "box"}
    assert hosts("--api-key", "key") == hosts("--host", "0.0.0.0") == set()
    assert hosts("--host", "0.0.0.0", "--allow-host", "box") == {"box"}


def test_memory_for_less_than_the_context_shortens_it(serve):
    assert serve("-m", "one.onebit", "--memory", "40K").served[0].context < tiny.CONFIG.max_seq_len


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory", "much"], "--memory is 'much'; expected a size such as 2GiB or 500M"),
        (["--memory", "1K"], "1,024 bytes are too few for keys and values of one"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0; expected at least 1"),
        (["--max-queue", "-1"], "--max-queue is -1; expected at least 0"),
        (["--adapter", "red"], "--adapter is 'red'; expected NAME=DIR"),
        (["--adapter", "three:red=red"], "there is no model 'three'; models: one"),
        (["--adapter", "one=red"], "two models are called 'one'; give the adapter another name"),
        (["-m", "one.onebit"], "two models are called 'one'"),
        (["-m", "two.onebit", "--adapter", "red=red"], "which model is it for? As in one:red=red"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key-file", "none"], "none holds no key; expected one a line"),
        (["--api-key-file", "missing"], "missing: No such file"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1:0"),
        (["--port", "70000"], "cannot listen on 127.0.0.1:70000"),
        (["--kv-cache", "int3"], "kv_cache is 'int3'"),
        (["--log-file", "missing/log"], "missing/log: No such file"),
    ],
)
def test_what_is_wrong_is_said(folder, monkeypatch, capsys, args, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["onebit", "serve", "-m", "one.onebit", "--port", "0", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_taken(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["onebit", "serve", "--port", str(port)])
        with pytest.raises(SystemExit):
            main()
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in error
    assert "--host and --port choose another" in error


def test_without_the_extra_it_says_what_to_install():
    absent = "import sys; sys.modules['fastapi'] = None; sys.argv = ['onebit', 'serve']"
    code = f"{absent}; from onebit.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert 'pip install "onebit[serve]"' in done.stderr
