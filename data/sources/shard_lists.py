"""Reads lists of shards' URLs, and lists of their checksums."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from fbitrain.base.errors import UserError
from fbitrain.data.sources.patterns import is_url
from fbitrain.data.sources.remote import FetchPolicy, fetch_small, too_large
from fbitrain.data.sources.transport import PACKAGES, protocol_of

AT_START = FetchPolicy(attempts=4)  # somebody is waiting: seconds, not minutes
MAX_LIST_BYTES = 64 << 20  # half a million long URLs
THIS_MACHINE = ("file", "local", "memory")  # protocols by which fsspec reads what the user has here
_answers: dict[str, bytes | UserError] = {}
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def read_url_list(path: str) -> list[str]:
    """The URLs of a local or remote file with one per line, as RedPajama's urls.txt; # begins a comment line.

    Raises UserError if the file cannot be read, names none, or holds a line that is no URL; and if it came from a
    server and names a file of this machine, which whoever writes the list has no say in.
    """
    urls = []
    foreign = is_url(path) and protocol_of(path) not in THIS_MACHINE
    for number, line in _lines(path):
        if not is_url(line) or " " in line:
            raise UserError(f"{path!r}, line {number}: {line[:60]!r} is not a URL; give a file with one URL per line")
        # fsspec chains file systems by ::, and others than those below may lead back here too.
        if foreign and (protocol_of(line) not in (*PACKAGES, protocol_of(path)) or "::" in line):
            raise UserError(
                f"{path!r}, line {number}: {line[:60]!r} is not on a server that such a list may name ("
                f"{', '.join(f'{name}://' for name in PACKAGES)}); name it in the source's paths, if you trust it"
            )
        urls.append(line)
    if not urls:
        raise UserError(f"{path!r} lists no URL; correct or drop it")
    return urls


def read_checksums(paths: Iterable[str]) -> dict[str, str]:
    """name -> SHA-256 of all lines `HASH  name` of the files, as sha256sum writes them.

    Raises UserError for another line, and for a name that has two sums.
    """
    sums: dict[str, str] = {}
    for path in paths:
        for number, line in _lines(path):
            match = _SUM.fullmatch(line)
            if match is None:
                raise UserError(f"{path!r}, line {number}: {line[:60]!r} is not `SHA256  name`, as sha256sum writes it")
            name = match[2].removeprefix("./")
            if sums.setdefault(name, match[1].lower()) != match[1].lower():
                raise UserError(f"{path!r}, line {number}: {name} has another sum further up; keep the right one")
    return sums


def sum_of(path: str, sums: dict[str, str]) -> str:
    """The sum whose name is the end of `path`, the longest such name; "" if there is none."""
    start = 0
    while start >= 0:
        if path[start:] in sums:
            return sums[path[start:]]
        slash = path.find("/", start)
        start = slash + 1 if slash >= 0 else -1
    return ""


def _fetched(url: str) -> bytes:
    """The bytes of a remote list. Several sources share one: it is asked for once, and so is one that cannot be had."""
    if url not in _answers:
        try:
            _answers[url] = fetch_small(url, MAX_LIST_BYTES, AT_START)
        except UserError as error:
            _answers[url] = error
    answer = _answers[url]
    if isinstance(answer, UserError):
        raise answer
    return answer


def _local(path: str) -> bytes:
    with open(path, "rb") as file:
        content = file.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise too_large(path, MAX_LIST_BYTES)
    return content


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that say something; a byte order mark is no part of the first."""
    try:
        text = (_fetched(path) if is_url(path) else _local(path)).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path!r} cannot be read ({reason}); correct it in data.sources") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()
