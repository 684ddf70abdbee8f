"""This process's resident memory: its high-water mark, and how to lower both."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """High-water mark of this process's resident memory, bytes, since the last `forget_peak`.

    On Linux read from /proc: `ru_maxrss` of a child begins at what its parent held when it was
    started.
    """
    if STATUS.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> bool:
    """Begin the high-water mark anew at what is held now; False where the system cannot."""
    try:
        FORGET.write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Return memory that was freed to the system, which the C library otherwise keeps."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
