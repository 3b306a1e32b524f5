"""Tool calls in what a model writes, as Hermes and Qwen are trained to: JSON between <tool_call> and </tool_call>.

reader = ToolReader()
reader.push('Let me see. <tool_call>{"name": "weather", ')    # ("Let me see.", [])
reader.push('"arguments": {"city": "Oslo"}}</tool_call>')     # ("", [Call("weather", '{"city": "Oslo"}')])
reader.flush()                                                # ("", [])
"""

import json
from typing import Any, NamedTuple

BEGIN, END = "<tool_call>", "</tool_call>"


class Call(NamedTuple):
    """A call that a model asks for.

    Args:
        name: of the tool.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


class ToolReader:
    """Divides a text that comes in pieces into content and calls.

    Text that may belong to a call is held back until that is known; what turns out to be none is content, to the
    letter. White space before a call is neither, nor is all that follows the last one.
    """

    def __init__(self) -> None:
        # Either without a begin mark, or white space and a begin mark come first.
        self._held = ""
        self._is_after_call = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take more text; returns the content and the calls that are certain since."""
        held = self._held + text
        content = ""
        calls: list[Call] = []
        while (begin := held.find(BEGIN)) >= 0:
            n_certain = len(held[:begin].rstrip())
            content += self._content(held[:n_certain])
            held = held[n_certain:]
            inside, end, rest = held.partition(END)
            if not end:
                break
            if call := _parse(inside.lstrip().removeprefix(BEGIN)):
                calls.append(call)
                self._is_after_call = True
            else:
                content += self._content(inside + end)
            held = rest
        else:
            n_certain = len(held[: len(held) - _n_possible(held)].rstrip())
            content += self._content(held[:n_certain])
            held = held[n_certain:]
        self._held = held
        return content, calls

    def flush(self) -> tuple[str, list[Call]]:
        """What is left when the text has ended; the last call may lack its end mark."""
        held, self._held = self._held, ""
        if BEGIN in held and (call := _parse(held.lstrip().removeprefix(BEGIN))):
            return "", [call]
        return "" if self._is_after_call and held.isspace() else held, []

    def _content(self, text: str) -> str:
        self._is_after_call = self._is_after_call and not text
        return text


def _n_possible(text: str) -> int:
    """Characters at the end of a text that may be the beginning of a begin mark."""
    return next((n for n in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:n])), 0)


def _parse(text: str) -> Call | None:
    try:
        told = json.loads(text)
        name, arguments = told["name"], told.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        # What JSON or UTF-8 cannot tell is no call either.
        call = Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        "".join(call).encode()
        return call
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call as a client repeats it, as chat templates want it: with arguments that are an object, not its text."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call
