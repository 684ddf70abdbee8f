"""Ctrl-C never falls inside a durable write: it waits for the end of the block.

Only the main thread receives signals in Python, so elsewhere these blocks change nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Hold back Ctrl-C (and SIGTERM, where Python handles it) until the block has ended.

    The signal is then delivered to the handler that was there, which usually raises
    `KeyboardInterrupt`; if the block itself fails, its own error wins. Blocks may be nested.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        waiting.append(number)

    before: dict[signal.Signals, Any] = {}
    for one in _SIGNALS:
        if callable(signal.getsignal(one)):
            before[one] = signal.signal(one, note)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    for number in waiting[:1]:
        before[signal.Signals(number)](number, None)


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Let SIGTERM stop the block as Ctrl-C does, by `KeyboardInterrupt`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
