"""Expands a path of the configuration to files: number ranges, globs and folders, local or remote."""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator

from fbitrain.base.errors import UserError
from fbitrain.data.sources.remote import list_remote
from fbitrain.data.sources.transport import protocol_of, require_file_system

MAX_EXPANDED = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WILDCARD = re.compile(r"[*?\[]")

Sizes = dict[str, int]  # absolute path or URL -> bytes, -1 where nobody has asked


def is_url(path: str) -> bool:
    return "://" in path


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """Whether the file's name ends in one of `suffixes`; of a URL without its query."""
    return file_part(path).endswith(suffixes)


def file_part(path: str) -> str:
    """A local path as it is, a URL without query and fragment."""
    return re.split(r"[?#]", path, maxsplit=1)[0] if is_url(path) else path


def expand_ranges(pattern: str) -> list[str]:
    """`a_{08..11}` as `a_08`, `a_09`, `a_10`, `a_11`, for any number of ranges; zeros in front set the width.

    Raises UserError for a range that runs backwards, or for more than MAX_EXPANDED names.
    """
    spans = []
    n_names = 1
    for low, high in _RANGE.findall(pattern):
        n_names *= int(high) - int(low) + 1
        if n_names <= 0:
            raise UserError(f"the range {{{low}..{high}}} of {pattern!r} runs backwards")
        if n_names > MAX_EXPANDED:
            raise UserError(f"{pattern!r} stands for more than {MAX_EXPANDED:,} files")
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 1
        spans.append([f"{number:0{width}d}" for number in range(int(low), int(high) + 1)])
    between = _RANGE.sub("\0", pattern).split("\0")
    return [
        between[0] + "".join(number + text for number, text in zip(numbers, between[1:], strict=True))
        for numbers in itertools.product(*spans)
    ]


def find(pattern: str, suffixes: tuple[str, ...]) -> Sizes:
    """The files that one path, glob, folder or URL without ranges stands for; empty if there are none.

    A folder stands for every file below it that has one of `suffixes` and is not hidden. A URL of a single file is
    taken at its word: asking for each of thousands would delay every start. Raises UserError for an empty pattern, a
    file of another kind, a name that is not UTF-8, for what cannot be listed, and for a file system that is not
    installed.
    """
    if not pattern.strip():
        raise UserError(f"the path {pattern!r} is empty; correct or drop it")
    if is_url(pattern):
        found = _find_remote(pattern, suffixes)
    else:
        try:
            found = _find_local(pattern, suffixes)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); mend or remove it") from None
    _require_utf8(found)
    return found


def each_file_once(sizes: Sizes) -> Sizes:
    """Without the doubles: of several local paths of one file, only one stays, one without a link if there is any.

    Hard links and copies are files of their own.
    """
    real_folder = functools.cache(os.path.realpath)  # thousands of files lie in a few folders

    def real_path(path: str) -> str:
        if is_url(path):
            return path
        if os.path.islink(path):
            return os.path.realpath(path)
        return os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path))

    real = {path: real_path(path) for path in sizes}
    by_file: dict[str, str] = {}
    for path in sorted(sizes, key=lambda path: (path != real[path], path)):
        by_file.setdefault(real[path], path)
    return {path: sizes[path] for path in by_file.values()}


def _find_local(pattern: str, suffixes: tuple[str, ...]) -> Sizes:
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.exists(path) and not os.path.isdir(path):
        _require_suffix(pattern, suffixes)
        return {path: _size(path)}
    if os.path.isdir(path):
        return dict(_below(path, suffixes))
    found: Sizes = {}
    for match in _matches(_absolute_pattern(pattern)):
        if os.path.isdir(match):
            found.update(_below(match, suffixes))
        elif match.endswith(suffixes):
            found[match] = _size(match)
    return found


def _absolute_pattern(pattern: str) -> str:
    """The pattern from the root on: of the home and working folders that go before it, no character is a wildcard."""
    expanded = os.path.expanduser(pattern)
    if expanded != pattern:
        first, slash, rest = pattern.partition("/")
        expanded = glob.escape(os.path.expanduser(first)) + slash + rest
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), expanded))


def _matches(pattern: str) -> Iterator[str]:
    """As glob.iglob(recursive=True), whose ** would go round in a loop of links until the path is too long."""
    top, recursive, rest = pattern.partition("/**/")
    if not recursive:
        yield from glob.iglob(pattern)
        return
    for match in filter(os.path.isdir, glob.iglob(top or "/")):
        for folder, _ in _folders(match):
            yield from _matches(f"{glob.escape(folder)}/{rest}")


def _below(folder: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for parent, names in _folders(folder):
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                path = os.path.join(parent, name)
                yield path, _size(path)


def _size(path: str) -> int:
    """Bytes of the file. Raises UserError for a pipe, a socket or a device, which reading may wait for for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no file but a pipe, a socket or a device; remove it, or name the shards one by one")
    return status.st_size


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """`top` and the folders below it that are not hidden, with the names of their files.

    Links are followed, and each real folder is visited once, by a path without a link if there is one: links may form
    loops, or lead to the same folder twice. Raises OSError for a folder that cannot be listed.
    """
    seen: set[str] = set()
    waiting = [top]
    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = [os.path.join(parent, name) for name in folders]
            waiting += [folder for folder in below if os.path.islink(folder)]
            yield parent, names


def _raise(error: OSError) -> None:
    raise error


def _require_utf8(paths: Iterable[str]) -> None:
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            # Reports, checkpoints and lists of duplicates hold names as text.
            raise UserError(f"{os.fsencode(path)!r} has a name that is not UTF-8; rename it") from None


def _find_remote(url: str, suffixes: tuple[str, ...]) -> Sizes:
    require_file_system(url)
    web = protocol_of(url) in ("http", "https")
    # In a web address a question mark begins the query.
    wildcard = _WILDCARD.search(file_part(url) if web else url)
    if web and (wildcard or url.endswith("/")):
        raise UserError(f"{url!r} cannot be listed; name the files, use a range like {{000..359}}, or url_lists")
    if web or (has_suffix(url, suffixes) and not wildcard):
        _require_suffix(url, suffixes)
        return {url: -1}
    return {
        found: size
        for found, size in list_remote(url, is_glob=wildcard is not None).items()
        if found.endswith(suffixes) and not os.path.basename(found).startswith(".")
    }


def _require_suffix(path: str, suffixes: tuple[str, ...]) -> None:
    if not has_suffix(path, suffixes):
        raise UserError(f"{path!r} is not a shard; its name must end in {', '.join(suffixes)}")
