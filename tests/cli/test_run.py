"""Exact: `onebit run` says what `LLM.generate` returns, and its text alone on stdout."""

import os
import re
import select
import signal
import subprocess
import sys

import pytest

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.llm import LLM

MACHINE = r"(\w+) kernels, (\d+) threads?"
GUESSES = r"(?:\d+ of \d+ guesses right \| )?"
SUMMARY = (
    rf"(\d+) tokens \| [\d.]+ tokens/s \| first token after [\d.]+ s \| {GUESSES}{MACHINE} \| seed (\d+)"
)
MAX_TOKENS = ("--max-tokens", "12")


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny.master(), threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.onebit"
    formats.write(quantize(tiny.master()), path)
    return path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "chat.onebit"
    formats.write(quantize(tiny.master(chat_template=tiny.CHAT_TEMPLATE)), path)
    return path


def command(model, *args):
    return [sys.executable, "-m", "onebit", "run", "-m", str(model), *args]


def run(model, *args, stdin=b""):
    done = subprocess.run(command(model, *args), input=stdin, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(), done.stderr.decode()


def test_text_goes_to_stdout_and_one_line_to_stderr(llm, model):
    out, err = run(model, "Once upon", *MAX_TOKENS, "--seed", "7", "--threads", "1")
    expected = llm.generate("Once upon", max_tokens=12, seed=7)
    assert out == expected.text + "\n"
    assert re.fullmatch(SUMMARY + "\n", err).groups() == (
        str(len(expected.tokens)),
        llm.model.isa,
        "1",
        "7",
    )


def test_every_flag_is_the_argument_of_that_name(llm, model):
    params = {
        "max_tokens": 20,
        "temperature": 1.3,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "min_sigma": 1.2,
        "repetition_penalty": 1.2,
        "seed": 11,
    }
    flags = [text for name, value in params.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    out, _ = run(model, "The dog", *flags, "--ignore-eos", "--stop", "~~", "--stop", "e")
    assert out == llm.generate("The dog", ignore_eos=True, stop=["~~", "e"], **params).text + "\n"


def test_a_text_of_one_token_has_no_rate(model):
    _, err = run(model, "Once upon", "--max-tokens", "1", "--seed", "7")
    assert re.fullmatch(rf"1 token \| first token after [\d.]+ s \| {MACHINE} \| seed 7\n", err)


@pytest.mark.parametrize("stdin", [b"Once upon\n", b"Once upon\r\n", b"Once upon"])
def test_prompt_comes_from_a_pipe(llm, model, stdin):
    out, _ = run(model, *MAX_TOKENS, "--seed", "7", stdin=stdin)
    assert out == llm.generate("Once upon", max_tokens=12, seed=7).text + "\n"


def test_normalize_leaves_out_what_nobody_sees(llm, model):
    out, _ = run(model, *MAX_TOKENS, "--seed", "7", "--normalize", "Once  up\u00adon")
    assert out == llm.generate("Once upon", max_tokens=12, seed=7).text + "\n"
    assert out != run(model, *MAX_TOKENS, "--seed", "7", "Once  up\u00adon")[0]


def test_an_empty_pipe_starts_from_nothing(llm, model):
    out, _ = run(model, *MAX_TOKENS, "--seed", "7")
    assert out == llm.generate("", max_tokens=12, seed=7).text + "\n"


def test_the_seed_that_was_drawn_repeats_the_text(model):
    out, err = run(model, "Once", *MAX_TOKENS, "--temperature", "2")
    seed = re.search(r"seed (\d+)", err)[1]
    assert run(model, "Once", *MAX_TOKENS, "--temperature", "2", "--seed", seed)[0] == out


def test_stdin_that_is_no_text_is_an_error(model):
    done = subprocess.run(command(model), input=b"\xff\xfe", capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"onebit: error: stdin is not UTF-8 text\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_closed_pipe_is_quiet(model):
    args = command(model, "Once", "--ignore-eos", "--max-tokens", "100")
    process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=120)
    process.stderr.close()


class Terminal:
    """A child process on a pseudo terminal."""

    def __init__(self, args):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(args[0], args, os.environ | {"TERM": "dumb"})
        self.text = ""
        self.ended = False

    def wait_for(self, pattern, after=0):
        """Read until the pattern shows up after that many characters; returns where it ends."""
        while not (found := re.compile(pattern).search(self.text, after)):
            assert self.read(60), f"{pattern!r} not in {self.text[after:]!r}"
        return found.end()

    def read(self, timeout_s):
        """Wait for output; False when none came."""
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self.fd, 4096)
        except OSError:  # Linux reports the end of a terminal as an error.
            data = b""
        self.text += data.decode(errors="replace")
        self.ended = not data
        return not self.ended

    def write(self, text):
        os.write(self.fd, text.encode())

    def leave(self, key=""):
        """Read to the end, pressing the key as long as there is no answer; returns the exit code."""
        for _ in range(12):
            self.write(key)
            while self.read(5):
                pass
            if self.ended:
                break
        assert self.ended, self.text
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")


@posix
def test_a_terminal_shows_the_prompt_before_the_text(llm, model):
    terminal = Terminal(command(model, "Once upon", *MAX_TOKENS, "--seed", "7"))
    assert terminal.leave() == 0
    text = llm.generate("Once upon", max_tokens=12, seed=7).text
    assert terminal.text.replace("\r\n", "\n").startswith(f"Once upon{text}\n")


@posix
@pytest.mark.parametrize("goodbye", ["/exit\n", "\x04"])
def test_a_terminal_without_prompt_continues_line_after_line(model, goodbye):
    terminal = Terminal(command(model, *MAX_TOKENS, "--seed", "7"))
    seen = terminal.wait_for("> ")
    for line in ("Once upon", "The dog"):
        terminal.write(line + "\n")
        seen = terminal.wait_for("> ", terminal.wait_for("seed 7", seen))
    assert terminal.leave(goodbye) == 0


@posix
def test_a_chat_sees_its_earlier_messages(chat_model):
    llm = LLM(tiny.master(chat_template=tiny.CHAT_TEMPLATE), threads=1)
    messages, answers = [], []
    for line in ("Hi", "And you?"):
        messages.append({"role": "user", "content": line})
        answers.append(llm.chat(messages, max_tokens=12, seed=7))
        messages.append({"role": "assistant", "content": answers[-1].text})
    terminal = Terminal(command(chat_model, *MAX_TOKENS, "--seed", "7"))
    seen = terminal.wait_for("> ")
    for line, answer in zip(("Hi", "And you?"), answers, strict=True):
        terminal.write(line + "\n")
        seen = terminal.wait_for(re.escape(f"{len(answer.tokens)} tokens |"), seen)
        seen = terminal.wait_for("> ", seen)
    shown = terminal.text.replace("\r\n", "\n")
    assert all(answer.text.rstrip("\n") in shown for answer in answers)
    assert terminal.leave("/exit\n") == 0


@posix
def test_ctrl_c_stops_the_text_and_keeps_the_chat(model, tmp_path):
    slow = tiny.master(tiny.config(n_layers=24, d_model=256, d_ff=1024, max_seq_len=4096))
    formats.write(quantize(slow), tmp_path / "slow.onebit")
    args = ("--ignore-eos", "--max-tokens", "4000", "--threads", "1")
    terminal = Terminal(command(tmp_path / "slow.onebit", *args))
    seen = terminal.wait_for("> ")
    terminal.write("Once upon\n")
    seen = terminal.wait_for("Once upon\r?\n.{3}", seen)
    terminal.write("\x03")
    seen = terminal.wait_for(rf"stopped after \d+ tokens? \| {MACHINE} \| seed \d+", seen)
    seen = terminal.wait_for("> ", seen)
    assert terminal.leave("\x04") == 0


@posix
@pytest.mark.parametrize("typed", ["", "half a li"])
def test_ctrl_c_at_the_question_asks_again(model, typed):
    terminal = Terminal(command(model, *MAX_TOKENS))
    seen = terminal.wait_for("> ")
    terminal.write(typed)
    seen = terminal.wait_for(typed, seen)
    # Python overlooks a signal that comes just before input() waits, so one key press may not do.
    for _ in range(12):
        terminal.write("\x03")
        while not (asked := re.search(r"\n.*> ", terminal.text[seen:])) and terminal.read(2):
            pass
        if asked:
            break
    terminal.wait_for(r"\n.*> ", seen)
    assert "tokens" not in terminal.text[seen:]
    assert terminal.leave("\x04") == 0


@posix
def test_ctrl_c_ends_a_single_text_with_130(tmp_path):
    slow = tiny.master(tiny.config(n_layers=24, d_model=256, d_ff=1024, max_seq_len=4096))
    formats.write(quantize(slow), tmp_path / "slow.onebit")
    args = command(tmp_path / "slow.onebit", "Once", "--ignore-eos", "--max-tokens", "4000", "--threads", "1")
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.fullmatch(rf"stopped after \d+ tokens? \| {MACHINE} \| seed \d+\n", err.decode())
