"""Pages of weight files are given back while a model is looked at.

Weights in safetensors are mapped, not read: the kernel loads a page when it is first touched and
keeps it for as long as nobody else wants the memory, so one run of a model leaves all of it
resident. While a model is only looked at, a thread asks the kernel to take these pages back now
(madvise(2), MADV_PAGEOUT: nothing is lost whatever other threads do); those that are still in use
are mapped again by the next touch.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: bytes of file pages above those at the start from which pages are given back
MOST = 256 << 20
_PERIOD_S = 0.05
_PAGEOUT = 21


@contextmanager
def given_back(most: int = MOST) -> Iterator[None]:
    """Inside, weight files hold about `most` bytes of memory at most. Linux; nothing elsewhere."""
    if not sys.platform.startswith("linux"):
        yield
        return
    done = threading.Event()
    keeper = threading.Thread(target=_keep, args=(done, most), name="weight pages", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()


def _keep(done: threading.Event, most: int) -> None:
    limit = file_bytes() + most
    while not done.wait(_PERIOD_S):
        if file_bytes() > limit:
            give_back()
            limit = max(limit, file_bytes() + most)  # the rest are files of another kind


def file_bytes() -> int:
    """Resident bytes of this process that are pages of files."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Take back the pages of every weight file that nobody wrote to; their addresses stay valid."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _unwritten():
        madvise(start, end - start, _PAGEOUT)


def _unwritten() -> Iterator[tuple[int, int]]:
    """Address ranges of weight files. A range with a page that was written to is left alone: such
    a page is a copy that the file does not have, and would go to the swap.
    """
    place: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # a new range: addresses, rights, .., file
            start, _, end = first.partition("-")
            place = (int(start, 16), int(end, 16)) if rest.endswith(".safetensors") else None
        elif first == "Anonymous:" and place is not None and rest.split()[0] == "0":
            yield place
