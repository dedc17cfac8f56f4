"""Bytes of remote files through fsspec: opening at an offset, listing, and never waiting for ever."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import fsspec

from fbitrain.base.errors import UserError

CHUNK_BYTES = 4 << 20
BUFFER_BYTES = 1 << 20  # of aiohttp, which forgets what it holds when a connection breaks
LISTING_S = 300.0  # a bucket with 100,000 shards answers page by page
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub", "gs": "gcsfs"}
TRANSIENT_STATUS = (408, 416, 425, 429)
FINAL_ERRORS = ("NoCredentialsError", "InvalidURL", "NonHttpUrlClientError")  # of botocore and aiohttp, by name
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

T = TypeVar("T")


class RemoteError(Exception):
    """What a server did wrong.

    `final`: asking again cannot help; `anew`: what has come so far is worth nothing; `wait_s`: it asked for a pause.
    """

    def __init__(self, reason: str, *, final: bool = False, anew: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.final = final
        self.anew = anew
        self.wait_s = wait_s


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which a server counts as gone."""

    connect_s: float = 30.0
    stall_s: float = 30.0  # without a byte; file systems other than http read CHUNK_BYTES at a time

    @property
    def answer_s(self) -> float:
        """Until the first byte of an answer."""
        return self.connect_s + self.stall_s


class Stream(Protocol):
    """A remote file, open at a byte."""

    start: int  # the offset of the first byte that read() gives: the one asked for, or 0
    total: int  # bytes of the whole file, -1 where the server does not say
    version: str  # equal only for equal content (ETag, date of change); "" where the server gives neither
    ends_itself: bool  # a cut-off transfer is an error even where the total is unknown

    def read(self) -> bytes: ...  # b"" at the end
    def confirm(self) -> None: ...  # raises RemoteError if the file changed while it was read
    def close(self) -> None: ...


def protocol_of(url: str) -> str:
    return url.partition("://")[0].lower()


def require_file_system(url: str) -> None:
    """Raises UserError where fsspec, or the package that it needs, does not know the URL's protocol."""
    protocol = protocol_of(url)
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise UserError(f"{url!r} has an unknown protocol; use https://, s3://, hf:// or a local path") from None
    except ImportError as error:
        package = PACKAGES.get(protocol)
        advice = f"pip install {package}" if package else str(error)
        raise UserError(f"{protocol}:// needs a package that is not installed; {advice}") from None


def open_stream(url: str, start: int, version: str, timeouts: Timeouts) -> Stream:
    """Opens `url` at byte `start` if its content is still `version`, else at 0. Raises RemoteError and UserError."""
    require_file_system(url)
    # fsspec keeps an instance for each thread that asks for one: here, not in the threads of within().
    file_system, path = fsspec.core.url_to_fs(url)
    protocol = protocol_of(url)
    if protocol not in ("http", "https", "hf"):
        return within(timeouts.answer_s, lambda: _FileSystemStream(file_system, path, start, version, timeouts))
    headers: dict[str, str] = {}
    if protocol == "hf":
        url, headers = within(timeouts.answer_s, lambda: _on_the_web(file_system, path))
    web = _http_file_system(url, timeouts)
    return within(timeouts.answer_s, lambda: _HttpStream(web, url, headers, start, version, timeouts))


def list_files(pattern: str, *, is_glob: bool) -> dict[str, int]:
    """URL -> bytes of every file that a glob matches, or that lies below a folder. Raises RemoteError and UserError."""
    require_file_system(pattern)
    file_system, path = fsspec.core.url_to_fs(pattern)

    def work() -> dict[str, Any]:
        if not is_glob:
            return dict(file_system.find(path, detail=True))
        found: dict[str, Any] = {}
        for match, info in file_system.glob(path, detail=True).items():
            below = file_system.find(match, detail=True) if info["type"] == "directory" else {match: info}
            found.update(below)
        return found

    sizes = {name: info.get("size") for name, info in within(LISTING_S, work).items()}
    return {file_system.unstrip_protocol(name): -1 if size is None else int(size) for name, size in sizes.items()}


def within(seconds: float, work: Callable[[], T]) -> T:
    """work(), or RemoteError after `seconds`. What hangs in a library cannot be stopped, only left behind."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise _remote_error(errors[0]) from errors[0]
    if not results:
        raise RemoteError(f"no answer for {seconds:g} s")
    return results[0]


def _remote_error(error: Exception) -> Exception:
    """File systems raise what they like; this keeps what matters, and whether to ask again."""
    if isinstance(error, RemoteError | UserError):
        return error
    if isinstance(error, FileNotFoundError):
        return RemoteError("there is no such file (404)", final=True)
    status, headers = _answer(error)
    if status:
        final = 300 <= status < 500 and status not in TRANSIENT_STATUS
        wait = str(headers.get("Retry-After", ""))
        wait_s = float(wait) if wait.isdigit() else 0.0
        return RemoteError(f"the server answers {status}", final=final, anew=status == 416, wait_s=wait_s)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return RemoteError("the server has gone silent")
    final = isinstance(error, PermissionError) or type(error).__name__ in FINAL_ERRORS
    return RemoteError(" ".join(f"{type(error).__name__}: {error}".split()), final=final)


def _answer(error: Exception) -> tuple[int, Mapping[str, str]]:
    """Status and headers of the answer that an error of aiohttp, requests or httpx speaks of; 0 if of none."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    headers = getattr(response, "headers", None) or getattr(error, "headers", None)
    # aiohttp gives an answer that it cannot parse the status 400, and no headers.
    return (status, headers) if isinstance(status, int) and headers is not None else (0, {})


class _HttpStream:
    """One GET, from an offset on where the server can and the file is still the same (RFC 9110, If-Range)."""

    def __init__(
        self, file_system: Any, url: str, headers: dict[str, str], start: int, version: str, timeouts: Timeouts
    ) -> None:
        headers = headers | {"Accept-Encoding": "identity"}  # as it is stored: that is what offsets and sizes count
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": version}
        self._stall_s = timeouts.stall_s
        self._file = file_system.open(url, block_size=0, size=1, headers=headers)
        answer = self._file.r  # aiohttp's
        try:
            self._read_headers(answer.status, answer.headers, start, version)
            _require_plain(answer.headers.get("Content-Encoding", ""), url)
        except RemoteError:
            self.close()
            raise

    def _read_headers(self, status: int, headers: Any, start: int, version: str) -> None:
        self.version = _http_version(headers)
        self.ends_itself = headers.get("Transfer-Encoding", "").lower() == "chunked"
        if status == 206 and start:
            part = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
            if part is None or int(part[1]) != start or self.version != version:
                raise RemoteError("the server sent another part of the file than was asked for", anew=True)
            self.start, self.total = start, int(part[2])
        elif status == 200:
            self.start, self.total = 0, int(headers.get("Content-Length", -1))
        else:
            raise RemoteError(f"the server answers {status}, which is no file", final=True)

    def read(self) -> bytes:
        return bytes(within(self._stall_s * 1.5, lambda: self._file.read(CHUNK_BYTES)))

    def confirm(self) -> None:
        """One answer is of one version."""

    def close(self) -> None:
        self._file.close()


def _on_the_web(hub: Any, path: str) -> tuple[str, dict[str, str]]:
    """Address and headers by which the hub gives a file in one answer; its file system would ask for every chunk."""
    from huggingface_hub import get_token

    token = get_token() if hub.token in (None, True) else hub.token
    return hub.url(path), {"Authorization": f"Bearer {token}"} if token else {}


def _http_file_system(url: str, timeouts: Timeouts) -> Any:
    import aiohttp  # slow to import, and only http needs it

    limits = aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s, sock_read=timeouts.stall_s)
    options = {"timeout": limits, "auto_decompress": False, "trust_env": True, "read_bufsize": BUFFER_BYTES}
    # An address that has been quoted stays as it is: signatures cover its spelling.
    return fsspec.filesystem("http", client_kwargs=options, encoded="%" in url)


def _http_version(headers: Any) -> str:
    """What If-Range accepts: an ETag if it is a strong one, else the date of the last change."""
    etag = str(headers.get("ETag", ""))
    return etag if etag.startswith('"') else str(headers.get("Last-Modified", ""))


def _require_plain(encoding: str, url: str) -> None:
    # Stored .gz files are labelled so by some servers; what is sent is then the file.
    stored = encoding == "gzip" and url.partition("?")[0].endswith(".gz")
    if encoding not in ("", "identity") and not stored:
        raise RemoteError(f"the server sends it in Content-Encoding {encoding}, though asked not to", final=True)


class _FileSystemStream:
    """Any other file system of fsspec, in chunks; sizes and versions as it reports them."""

    ends_itself = False

    def __init__(self, file_system: Any, path: str, start: int, version: str, timeouts: Timeouts) -> None:
        self._file_system, self._path, self._timeouts = file_system, path, timeouts
        self.total, self.version = self._look()
        self.start = start if self.version == version else 0
        self._file = self._file_system.open(self._path, "rb", cache_type="none")
        self._file.seek(self.start)

    def _look(self) -> tuple[int, str]:
        self._file_system.invalidate_cache()  # what a listing said some time ago does not count
        info = self._file_system.info(self._path)
        names = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime", "created")
        version = next((str(info[name]) for name in names if info.get(name)), "")
        size = info.get("size")
        return (-1 if size is None else int(size)), version

    def read(self) -> bytes:
        return bytes(within(self._timeouts.stall_s, lambda: self._file.read(CHUNK_BYTES)))

    def confirm(self) -> None:
        now = within(self._timeouts.answer_s, self._look)
        if now != (self.total, self.version):
            raise RemoteError("the file changed while it was fetched", anew=True)

    def close(self) -> None:
        self._file.close()
