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
SLACK = 16 << 20  # bytes


def peak_memory() -> int:
    """High-water mark of this process's resident memory, bytes, since the last `forget_peak`.

    On Linux read from /proc: `ru_maxrss` of a child begins at what its parent held when it was
    started.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> bool:
    """Begin the high-water mark anew at what is held now; False where the system cannot."""
    try:
        FORGET.write_text("5")
    except OSError:
        return False
    return True


def give_back(held: int | None = None) -> int | None:
    """Return memory that was freed to the system, which the C library otherwise keeps.

    Args:
        held: what the last call returned. Looking for garbage in a large process takes a good part
            of a second; where the process has grown by less than `SLACK` since, it is left.

    Returns:
        Resident memory now, bytes; None where the system does not tell.
    """
    now = _status("VmRSS")
    if held is not None and now is not None and now < held + SLACK:
        return held
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int | None:
    """A line of the process's status on Linux, bytes."""
    if not STATUS.is_file():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
