"""Memory that faults where an array ends."""

from __future__ import annotations

import ctypes
import mmap

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_READ_WRITE, _PRIVATE_ANONYMOUS = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SLACK = b"\xcb"


class Guarded:
    """`n` bytes between two pages that cannot be touched, ending at the second one, or at most 16 bytes before it.

    With `alignment` 16 the address is a multiple of 16, as of torch's own arrays; with less, it is a multiple of that
    and not of 16, as of a slice. A write into the bytes between array and page is found by `check`.
    """

    def __init__(self, n: int, alignment: int) -> None:
        self.n = n
        self._room = -(-n // alignment) * alignment
        if alignment < 16 and self._room % 16 == 0:
            self._room += alignment
        pages = -(-self._room // mmap.PAGESIZE) + 2
        self._length = pages * mmap.PAGESIZE
        base = _libc.mmap(None, self._length, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value), "out of memory"
        self._base: int = base
        for page in (base, base + self._length - mmap.PAGESIZE):
            assert _libc.mprotect(page, mmap.PAGESIZE, 0) == 0
        self.address = base + self._length - mmap.PAGESIZE - self._room
        ctypes.memmove(self.address + n, SLACK * (self._room - n), self._room - n)

    def check(self) -> None:
        after = ctypes.string_at(self.address + self.n, self._room - self.n)
        assert after == SLACK * len(after), "the kernel wrote past the end of an array"

    def close(self) -> None:
        _libc.munmap(self._base, self._length)
