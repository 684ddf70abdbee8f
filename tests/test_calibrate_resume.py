"""Calibration that was interrupted resumes to the same bytes, or starts anew by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calibrated_pair import SHORT, data, fresh, same, state, teacher_and_students
from torch import nn

from reattend.calibrate import calibrate
from reattend.events import Event
from reattend.workdir import Workdir


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, nn.Module]:
    return teacher_and_students()


class StopHereError(Exception):
    """What a test raises in the middle."""


def interrupted(pair: Any, out: Path, stage: str, done: int) -> tuple[nn.Module, dict[str, Any]]:
    def stop(event: Event) -> None:
        if event.stage == stage and event.done >= done:
            raise StopHereError

    student = fresh(pair[1])
    start = state(student)
    with Workdir.open(out, {"a": "b"}) as workdir, pytest.raises(StopHereError):
        calibrate(
            pair[0], student, data(40, 3), SHORT, seed=0, workdir=workdir, inputs_hash="x",
            on_event=stop,
        )  # fmt: skip
    assert same(state(student), start)
    return student, start


@pytest.mark.parametrize(
    ("stage", "done"),
    [("layerwise", 1), ("layerwise", 300), ("end-to-end", 1), ("end-to-end", 700)],
)
def test_resumed_equals_uninterrupted(pair: Any, tmp_path: Path, stage: str, done: int) -> None:
    whole = fresh(pair[1])
    expected = calibrate(pair[0], whole, data(40, 3), SHORT, seed=0)
    interrupted(pair, tmp_path / "out", stage, done)
    student = fresh(pair[1])
    seen: list[Event] = []
    with Workdir.open(tmp_path / "out", {"a": "b"}) as workdir:
        got = calibrate(
            pair[0], student, data(40, 3), SHORT, seed=0, workdir=workdir, inputs_hash="x",
            on_event=seen.append,
        )  # fmt: skip
    assert got == expected
    assert same(state(student), state(whole))
    if done > 1:
        first = next(e.done for e in seen if e.stage == stage)
        assert first > 100, "the stage started anew instead of resuming"
    if stage == "end-to-end":
        assert not [e for e in seen if e.stage == "layerwise" and e.done < (e.total or 0)]


@pytest.mark.parametrize("victim", range(6))
def test_a_kill_inside_a_publish_resumes_to_the_same_bytes(
    pair: Any, tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh(pair[1])
    expected = calibrate(pair[0], whole, data(40, 3), SHORT, seed=0)
    reached = 0

    def die(self: Workdir, phase: str, name: str) -> None:
        nonlocal reached
        if "calibrate" in name:
            reached += 1
            if reached == 5 * victim + 1:
                raise StopHereError

    with monkeypatch.context() as patch, Workdir.open(tmp_path / "out", {}) as workdir:
        patch.setattr(Workdir, "_at", die)
        with pytest.raises(StopHereError):
            calibrate(pair[0], fresh(pair[1]), data(40, 3), SHORT, seed=0, workdir=workdir)
    student = fresh(pair[1])
    with Workdir.open(tmp_path / "out", {}) as workdir:
        got = calibrate(pair[0], student, data(40, 3), SHORT, seed=0, workdir=workdir)
    assert got == expected
    assert same(state(student), state(whole))


def test_a_checkpoint_of_other_inputs_is_not_used(pair: Any, tmp_path: Path) -> None:
    interrupted(pair, tmp_path / "out", "layerwise", 300)
    whole, student = fresh(pair[1]), fresh(pair[1])
    expected = calibrate(pair[0], whole, data(40, 4), SHORT, seed=0)
    with Workdir.open(tmp_path / "out", {"a": "b"}) as workdir:
        got = calibrate(
            pair[0], student, data(40, 4), SHORT, seed=0, workdir=workdir, inputs_hash="x"
        )
    assert got == expected
    assert same(state(student), state(whole))
