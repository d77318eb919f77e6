"""Scatter and gather straight between a socket and process memory.

sendmsg(2) and recvmsg(2) are called with iovec arrays that numpy builds, so there is no Python object per range and the
interpreter lock is free during the copy. The caller guarantees that the memory stays valid.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]

IOV_MAX: Final = 1024
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Message(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


def _bind(name: str) -> Callable[[int, int, int], int]:
    function: Any = getattr(_LIBC, name)
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    function.restype = ctypes.c_ssize_t
    bound: Callable[[int, int, int], int] = function
    return bound


_SENDMSG = _bind("sendmsg")
_RECVMSG = _bind("recvmsg")


def merge_adjacent(addresses: Array, lengths: Array) -> tuple[Array, Array]:
    """Join ranges where the next begins at the end of the one before."""
    if len(addresses) < 2:
        return addresses, lengths
    breaks = np.flatnonzero(addresses[1:] != addresses[:-1] + lengths[:-1]) + 1
    if len(breaks) == len(addresses) - 1:
        return addresses, lengths
    starts = np.concatenate((np.zeros(1, np.int64), breaks))
    return addresses[starts], np.add.reduceat(lengths, starts)


class Vector:
    """Ranges of memory, sent or received from front to back in any number of calls.

    Args:
        addresses: int64[n], where each range lies.
        lengths: int64[n], bytes, > 0.
        prefix: Bytes to send before them, in the same system call.
    """

    def __init__(self, addresses: Array, lengths: Array, prefix: bytes = b"") -> None:
        addresses, lengths = merge_adjacent(addresses, lengths)
        self._prefix = np.frombuffer(prefix, np.uint8) if prefix else None
        if self._prefix is not None:
            addresses = np.concatenate((np.array([self._prefix.ctypes.data], np.int64), addresses))
            lengths = np.concatenate((np.array([len(prefix)], np.int64), lengths))
        self._addresses = addresses
        self._count = len(addresses)
        self._ends = np.cumsum(lengths)
        self._iov = np.empty((self._count, 2), np.int64)
        self._iov[:, 0] = addresses
        self._iov[:, 1] = lengths
        self._base: int = self._iov.ctypes.data
        self._message = _Message()
        self._at: int = ctypes.addressof(self._message)
        self._index = 0
        self.done = 0
        self.total = int(self._ends[-1]) if self._count else 0

    @property
    def remaining(self) -> int:
        """Bytes not moved yet, the prefix included."""
        return self.total - self.done

    def send(self, fd: int, flags: int, limit: int) -> int:
        """Send up to ``limit`` bytes; return how many were taken.

        Raises:
            BlockingIOError: None could be taken now (or within the socket's own timeout).
            OSError: The connection failed.
        """
        return self._call(_SENDMSG, fd, flags | socket.MSG_NOSIGNAL, limit)

    def recv(self, fd: int, flags: int, limit: int) -> int:
        """Receive up to ``limit`` bytes into place; 0 means that the peer has closed. Errors as `send`."""
        return self._call(_RECVMSG, fd, flags, limit)

    def _call(self, function: Callable[[int, int, int], int], fd: int, flags: int, limit: int) -> int:
        first = self._index
        last = min(first + IOV_MAX, self._count) - 1
        surplus = int(self._ends[last]) - self.done - limit
        if surplus > 0:
            last = int(np.searchsorted(self._ends, self.done + limit, "left"))
            surplus = int(self._ends[last]) - self.done - limit
            self._iov[last, 1] -= surplus
        self._message.iov = self._base + 16 * first
        self._message.iov_count = last - first + 1
        moved = function(fd, self._at, flags)
        while moved < 0 and ctypes.get_errno() == errno.EINTR:
            moved = function(fd, self._at, flags)
        code = ctypes.get_errno() if moved < 0 else 0
        if surplus > 0:
            self._iov[last, 1] += surplus
        if moved < 0:
            raise OSError(code, os.strerror(code))
        self._advance(moved)
        return moved

    def _advance(self, moved: int) -> None:
        self.done += moved
        if self.done >= self.total:
            self._index = self._count
            return
        index = int(np.searchsorted(self._ends, self.done, "right"))
        start = int(self._ends[index - 1]) if index else 0
        self._iov[index, 0] = int(self._addresses[index]) + self.done - start
        self._iov[index, 1] = int(self._ends[index]) - self.done
        self._index = index
