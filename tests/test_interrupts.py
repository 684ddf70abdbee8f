"""Ctrl-C waits for the end of a durable write, and every handler is put back."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from reattend.durable import durable_write
from reattend.interrupts import interrupts_wait, termination_interrupts
from reattend.workdir import Workdir


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_signal_arrives_after_the_block() -> None:
    done = []
    before = signal.getsignal(signal.SIGINT)

    def block() -> None:
        with interrupts_wait():
            interrupt()
            done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["the rest of the block"]
    assert signal.getsignal(signal.SIGINT) is before


def test_nested_blocks_deliver_once_at_the_outermost_end() -> None:
    done = []

    def block() -> None:
        with interrupts_wait():
            with interrupts_wait():
                interrupt()
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == ["outer"]


def test_the_blocks_own_error_wins_and_nothing_is_left_over() -> None:
    def block() -> None:
        with interrupts_wait():
            interrupt()
            raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        block()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_thread_may_write_too() -> None:
    errors: list[Any] = []

    def work() -> None:
        try:
            with interrupts_wait(), termination_interrupts():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_termination_is_an_interrupt_inside_only() -> None:
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_write_is_finished_before_ctrl_c_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def writer(to: Path) -> None:
        to.write_bytes(b"half")
        interrupt()
        to.write_bytes(b"whole")

    with pytest.raises(KeyboardInterrupt):
        durable_write(path, writer, lambda: None)
    assert path.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_finishing_is_one_step_for_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Workdir, "_at", lambda _s, phase, _n: interrupt() if phase == "renamed" else None
    )
    out = tmp_path / "out"
    with Workdir.open(out, {"plan": "p"}) as work:
        work.publish_bytes("work/scratch", b"x")
        work.publish_bytes("result", b"y")
        with pytest.raises(KeyboardInterrupt):
            work.finish()
    assert sorted(p.name for p in out.iterdir()) == ["fingerprint.json", "result"]
    assert Workdir.open(out, {"plan": "p"}).state == "complete"
