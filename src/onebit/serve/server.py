"""The server around the application: its socket, its connections, and how it ends.

with listen("127.0.0.1", 8000) as sock:
    run(app, sock, grace_s=30)
"""

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from onebit.serve.protocol import error_body
from onebit.serve.service import Service

MAX_CONNECTIONS = 800
# Of a request line and its headers.
MAX_HEADER_BYTES = 32768
HEADER_SECONDS = 15.0
IDLE_SECONDS = 30
# For what is left to be written when all requests have ended.
CLOSING_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Args:
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on {host}:{port}: {reason}; --host and --port choose another") from None


class Server(uvicorn.Server):
    """Serves until SIGTERM, SIGINT or SIGHUP; a second signal hurries.

    Args:
        app: of `create_app`.
        grace_s: seconds that running requests have after the first signal.
    """

    def __init__(self, app: FastAPI, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._service: Service = app.state.service
        self._grace_s = grace_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear the signals that end a server, while it runs."""
        with super().capture_signals():
            if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGHUP, self.handle_exit)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        # Unlike its parent it does not raise the signal again: having ended well is no failure.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests end, then close."""
        # The socket stays open meanwhile: who comes now is told to come back.
        await self._service.drain(self._grace_s, hurry=lambda: self.force_exit)
        self.force_exit = False
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """Ends connections that send no request, or do so too slowly, and those beyond the limit."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Headers are measured only while they are incomplete, so they must not come in one piece.
        transport.max_size = MAX_HEADER_BYTES  # type: ignore[attr-defined]
        self._last_cycle: Any = None
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._end_if_silent)
        if len(self.connections) > MAX_CONNECTIONS:
            message = f"the server has {MAX_CONNECTIONS} connections, which is its limit"
            body = json.dumps(error_body(503, message)).encode()
            head = "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            transport.write(head.encode() + body)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._last_cycle = self.cycle
        self._deadline.cancel()
        self._deadline = self.loop.call_later(IDLE_SECONDS + HEADER_SECONDS, self._end_if_silent)
        super().on_response_complete()

    def _end_if_silent(self) -> None:
        if self.cycle is self._last_cycle:
            self.transport.abort()
