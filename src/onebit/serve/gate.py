"""What every request passes on its way in and out: keys, origins, limits of size and time, the log and the counters.

Knows nothing of models. What a request turned out to be is written into its `Record`.
"""

import asyncio
import hmac
import json
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebit.serve.metrics import Metrics
from onebit.serve.protocol import ApiError
from onebit.serve.service import Service

# Open to all: whoever watches over the server has no key.
OPEN = {"/", "/health", "/ready"}
OPEN_FOLDER = "/static/"
MAX_LOG_LINES = 10_000


@dataclass
class Record:
    """What the log says of a request; never its text."""

    id: str
    method: str
    path: str
    status: int = 0
    model: str | None = None
    choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    repetition: float | None = None
    entropy: float | None = None
    duration_s: float = 0.0
    outcome: str = ""
    error: str | None = None


class Log:
    """Lines of JSON, written by a thread of its own: a full disk or a stuck pipe loses lines and nothing else.

    Args:
        path: a file to append to; None: stderr.
        on_loss: called for each line that could not be written.
    """

    def __init__(self, path: Path | None, on_loss: Callable[[], None]) -> None:
        self._file = sys.stderr if path is None else path.open("a", encoding="utf-8")
        self._on_loss = on_loss
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_LOG_LINES)
        self._thread = threading.Thread(target=self._write, name="onebit-log", daemon=True)
        self._thread.start()

    def write(self, values: dict[str, Any]) -> None:
        """Queue a line."""
        try:
            self._lines.put_nowait(json.dumps(values))
        except queue.Full:
            self._on_loss()

    def close(self) -> None:
        """Write what is queued, unless that takes longer than a second."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(1)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except (OSError, ValueError):
                self._on_loss()


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Service, log: Log) -> None:
        self.app = app
        self.service = service
        self.log = log
        self._keys = [key.encode() for key in service.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        record = Record(request_id, scope["method"][:16], scope["path"][:200])
        scope.setdefault("state", {})["record"] = record
        begun_s = scope["state"]["begun_s"] = time.perf_counter()
        options = self.service.options

        async def limited_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            try:
                async with asyncio.timeout(options.write_s):
                    await send(message)
            except TimeoutError:
                record.outcome = "slow_reader"
                raise

        try:
            try:
                self._check(scope["path"], headers)
                await self.app(scope, self._limited(receive, headers), limited_send)
            except ApiError as error:
                if record.status:
                    raise
                await JSONResponse(error.body, error.status_code, error.headers)(scope, receive, limited_send)
        except Exception as error:
            record.outcome = record.outcome or "failed"
            record.error = _where(error)
            if record.status:
                # The connection is closed: an answer that is cut off must not look like one that has ended.
                raise
            failure = ApiError(500, "the server failed; its log says where", "internal_error")
            await JSONResponse(failure.body, 500)(scope, receive, limited_send)
        except asyncio.CancelledError:
            record.outcome = "cancelled"
            raise
        finally:
            record.duration_s = time.perf_counter() - begun_s
            record.outcome = record.outcome or _outcome(record.status)
            self._account(scope, record)

    def _check(self, path: str, headers: Headers) -> None:
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy before this server may go by the other one, and see another request begin.
            raise ApiError(400, "the request has both Content-Length and Transfer-Encoding; send one of them")
        coding = headers.get("content-encoding", "identity")
        if coding != "identity":
            raise ApiError(415, f"the body is coded as {ascii(coding[:100])}; send it plain")
        host, hosts = _host_name(headers.get("host", "")), self.service.options.allow_hosts
        # A web page can have its own name point here, and is then of the same origin as this server.
        if hosts and host not in hosts:
            shown = ascii(host[:100])
            raise ApiError(403, f"this server is not called {shown}; --allow-host names it so")
        origin, allowed = headers.get("origin"), self.service.options.allow_origins
        # The browser of a visitor of another page would otherwise compute for it, even if it may not read the answer.
        if origin is not None and origin not in allowed and "*" not in allowed:
            _, _, host = origin.partition("://")
            if host != headers.get("host"):
                raise ApiError(
                    403, "web pages of other origins are not let in; --allow-origin names those that are"
                )
        is_open = path in OPEN or path.startswith(OPEN_FOLDER)
        if self._keys and not is_open:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            # Every key is compared, in a time that does not depend on where it differs.
            if not sum(hmac.compare_digest(given, key) for key in self._keys):
                raise ApiError(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key"
                )
        if self.service.is_draining and not is_open:
            raise ApiError(503, "the server is shutting down", "shutting_down", retry_after_s=5)

    def _limited(self, receive: Receive, headers: Headers) -> Receive:
        options = self.service.options
        most = options.max_body_bytes
        too_large = ApiError(
            413, f"the request is larger than the {most:,} bytes that are allowed", "too_large"
        )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        end_s = time.monotonic() + options.read_s
        n_bytes, is_read = 0, False

        async def limited() -> Message:
            nonlocal n_bytes, is_read
            if is_read:
                return await receive()
            try:
                async with asyncio.timeout(end_s - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the request did not arrive within {options.read_s:g} s", "timeout"
                ) from None
            n_bytes += len(message.get("body", b""))
            is_read = not message.get("more_body", False)
            if n_bytes > most:
                raise too_large
            return message

        return limited

    def _account(self, scope: Scope, record: Record) -> None:
        metrics: Metrics = self.service.metrics
        path = getattr(scope.get("route"), "path", "other")
        metrics.requests.labels(path, record.model or "", record.outcome).inc()
        if record.model and record.choices:
            metrics.prompt_tokens.labels(record.model).inc(record.prompt_tokens)
            metrics.duration.labels(record.model).observe(record.duration_s)
            if record.first_token_s is not None:
                metrics.first_token.labels(record.model).observe(record.first_token_s)
            if record.repetition is not None:
                metrics.repetition.labels(record.model).observe(record.repetition)
            if record.entropy is not None:
                metrics.entropy.labels(record.model).observe(record.entropy)
        values = {name: value for name, value in asdict(record).items() if value not in (None, 0, "")}
        rounded = {name: round(value, 6) for name, value in values.items() if isinstance(value, float)}
        self.log.write({"time": round(time.time(), 3)} | values | rounded)


def _host_name(host: str) -> str:
    """A Host header without its port."""
    name, _, port = host.lower().rpartition(":")
    return (name if name and port.isdecimal() else host.lower()).strip("[]")


def _outcome(status: int) -> str:
    named = {0: "cancelled", 401: "unauthorized", 403: "unauthorized", 429: "full", 503: "unavailable"}
    return named.get(status, "ok" if status < 400 else "refused" if status < 500 else "failed")


def _where(error: BaseException) -> str:
    """Kind and place of an error; its words may repeat what the user wrote."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    at = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}{at}"
