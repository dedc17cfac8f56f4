"""A server on a socket until a signal ends it: it takes no more, and what is there has a while to be finished."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import uvicorn
from starlette.applications import Starlette

from fbitrain.base.errors import UserError
from fbitrain.serving.worker import Worker

SPARE_CONNECTIONS = 64  # beyond those whose requests may wait
AFTERMATH_S = 5  # for the last error messages to leave


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to `host` and `port`; 0 lets the system choose. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"port {port} of {host} cannot be had: {reason}; choose others with --host and --port"
        ) from error


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    return ip_address(listening.getsockname()[0]).is_loopback


class Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM and Ctrl-C: after `grace_s` seconds what still generates gets an error."""

    def __init__(self, app: Starlette, worker: Worker, most_waiting: int, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                loop="asyncio",
                http="h11",
                ws="none",
                proxy_headers=False,
                limit_concurrency=most_waiting + SPARE_CONNECTIONS,
                timeout_graceful_shutdown=int(grace_s) + AFTERMATH_S,
            )
        )
        self._worker, self._grace_s = worker, grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace_s, self._worker.abort)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, as if the server had not ended in order."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
