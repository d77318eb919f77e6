"""Permission to use AMX tiles.

vLLM's bfloat16 CPU kernels die with SIGILL when the first forward of a process has exactly one token, because only
other paths ask the kernel for the tile registers. A decode instance hits that with its first request: all it computes
is one token. So each process asks for itself; asking twice does no harm.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import sys

log = logging.getLogger(__name__)

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def request_amx() -> bool:
    """Ask Linux for the use of AMX tile data in this process; True if granted. Does nothing on other machines."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    granted: int = ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    log.debug("AMX tile data granted=%s", granted == 0)
    return granted == 0
