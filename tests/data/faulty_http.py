"""A web server on loopback that misbehaves on purpose."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Fault = Callable[["Handler", bytes, int], bool]  # (request, content, how many requests came before) -> answered?


@contextmanager
def serving() -> Iterator[FaultyServer]:
    """A server, and no proxy between it and this process or its children."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                patch.delenv(name)
        server = FaultyServer()
        yield server
        server.shutdown()
        server.server_close()


class FaultyServer(ThreadingHTTPServer):
    """Serves `files`; `faults[path]` may answer in the place of the proper answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.tokens: dict[str, str] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what the tests are about."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def put(self, path: str, content: bytes, fault: Fault | None = None) -> str:
        self.files[path] = content
        if fault is not None:
            self.faults[path] = fault
        return self.url(path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/").partition("?")[0]
        n_before = self.server.requests[path]
        self.server.requests[path] += 1
        self.server.ranges.append(self.headers.get("Range", ""))
        self.server.tokens[path] = self.headers.get("Authorization", "")
        content = self.server.files.get(path)
        if content is None:
            self.answer(404, b"")
        elif not (path in self.server.faults and self.server.faults[path](self, content, n_before)):
            self.serve(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        """Headers and body as they are given; Content-Length is right unless it is given too."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def serve(self, content: bytes, n_sent: int | None = None) -> None:
        """The file or the range asked for, as RFC 9110 has it; cut off after `n_sent` bytes of the body."""
        etag = etag_of(content)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.headers.get("If-Range", etag) == etag:
            start = int(wanted[1])
            body, status = content[start:], 206
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
        else:
            body, status, place = content, 200, ""
        sent = body if n_sent is None else body[:n_sent]
        self.answer(status, sent, Content_Length=str(len(body)), ETag=etag, Content_Range=place)
        if n_sent is not None:
            self.close_connection = True
            time.sleep(0.05)  # so that the client has read it before it learns that there is no more

    def reset(self) -> None:
        """Ends the connection with RST instead of FIN."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True


def etag_of(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:12]}"'


def first(n: int, fault: Fault) -> Fault:
    """`fault` for the first n requests."""
    return lambda handler, content, n_before: n_before < n and fault(handler, content, n_before)


def half_of_rest(handler: Handler, content: bytes) -> int:
    wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    return (len(content) - int(wanted[1] if wanted else 0)) // 2


def half(handler: Handler, content: bytes, n_before: int) -> bool:
    """Half of what is left, then a clean end."""
    handler.serve(content, n_sent=half_of_rest(handler, content))
    return True


def reset(handler: Handler, content: bytes, n_before: int) -> bool:
    """Half of what is left, then a reset."""
    handler.serve(content, n_sent=half_of_rest(handler, content))
    handler.reset()
    return True


def stall(seconds: float) -> Fault:
    """Half of what is left, then silence."""

    def fault(handler: Handler, content: bytes, n_before: int) -> bool:
        handler.serve(content, n_sent=half_of_rest(handler, content))
        handler.wfile.flush()
        time.sleep(seconds)
        return True

    return fault


def slow(handler: Handler, content: bytes, n_before: int) -> bool:
    """Ten pieces, each well within the time allowed for one, all of them together not."""
    handler.answer(200, b"", Content_Length=str(len(content)))
    step = -(-len(content) // 10)
    for start in range(0, len(content), step):
        handler.wfile.write(content[start : start + step])
        handler.wfile.flush()
        time.sleep(0.05)
    return True


def status(code: int, **headers: str) -> Fault:
    """No file but a status."""

    def fault(handler: Handler, content: bytes, n_before: int) -> bool:
        handler.answer(code, b"sorry", **headers)
        return True

    return fault


def unversioned(handler: Handler, content: bytes, n_before: int) -> bool:
    """Half of it the first time, and nothing by which two versions could be told apart."""
    sent = content if n_before else content[: len(content) // 2]
    handler.answer(200, sent, Content_Length=str(len(content)))
    handler.close_connection = True
    return True


def chunked(handler: Handler, content: bytes, n_before: int) -> bool:
    """Without a length, in chunks; the first time it breaks off."""
    handler.answer(200, b"", Content_Length="", Transfer_Encoding="chunked", ETag=etag_of(content))
    piece = content[: len(content) // 2] if n_before == 0 else content
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) + (b"0\r\n\r\n" if n_before else b""))
    handler.close_connection = True
    return True


def without_length(handler: Handler, content: bytes, n_before: int) -> bool:
    """Half of it, and only the end of the connection says that this was all."""
    handler.answer(200, content[: len(content) // 2], Content_Length="", Connection="close")
    return True


def wrong_range(handler: Handler, content: bytes, n_before: int) -> bool:
    """Half of it; then, asked for the rest, another part than it says."""
    if "Range" not in handler.headers:
        return half(handler, content, n_before) if n_before == 0 else False
    place = f"bytes 0-{len(content) - 1}/{len(content)}"
    handler.answer(206, content, ETag=etag_of(content), Content_Range=place)
    return True


def without_ranges(handler: Handler, content: bytes, n_before: int) -> bool:
    """Half of it; then all of it, whatever part was asked for."""
    sent = content if n_before else content[: len(content) // 2]
    handler.answer(200, sent, Content_Length=str(len(content)), ETag=etag_of(content))
    handler.close_connection = True
    return True


def unsatisfiable(handler: Handler, content: bytes, n_before: int) -> bool:
    """Half of it; then no part at all, though it has just said that the file goes on."""
    if "Range" in handler.headers:
        handler.answer(416, b"")
        return True
    return n_before == 0 and half(handler, content, n_before)


def redirect(handler: Handler, content: bytes, n_before: int) -> bool:
    """To where the file is."""
    handler.server.files["elsewhere"] = content
    handler.answer(302, b"", Location=handler.server.url("elsewhere"))
    return True


def circle(handler: Handler, content: bytes, n_before: int) -> bool:
    """To itself."""
    handler.answer(302, b"", Location=handler.path)
    return True
