"""Events: what reaches a terminal, a log file, and a caller's function."""

import dataclasses
import io
import json

import pytest

from reattend.errors import OutputError
from reattend.events import Event, JsonLog, Progress, both

STEP = Event("layerwise", site="m.0.attn", layer=3, done=2, total=8, values={"loss": 0.123456})


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_an_event_is_frozen_and_has_defaults():
    event = Event("find")
    assert dataclasses.astuple(event) == ("find", "", None, 0, None, "", {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.done = 1


def test_progress_is_silent_without_a_terminal():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress(STEP)
    assert stream.getvalue() == ""
    assert not progress.enabled


def test_progress_shows_stage_layer_count_and_values():
    stream = Terminal()
    with Progress(stream) as progress:
        progress(STEP)
        progress(Event("end-to-end", done=1, total=4, message="step [x]"))
    text = stream.getvalue()
    for part in ("layerwise", "2/8", "layer 3", "loss 0.1235", "end-to-end", "1/4", "step [x]"):
        assert part in text


def test_progress_restores_the_cursor_after_an_error():
    stream = Terminal()

    def interrupted():
        with Progress(stream) as progress:
            progress(STEP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().count("\x1b[?25h") == stream.getvalue().count("\x1b[?25l") == 1


def test_json_log_writes_one_strict_object_per_event(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonLog(path) as log:
        log(STEP)
        log(Event("x", message="zwölf\nlines", values={"a": float("nan"), "b": float("-inf")}))
        lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first["seconds"] >= 0
    assert {k: v for k, v in first.items() if k != "seconds"} == dataclasses.asdict(STEP)
    assert second["values"] == {"a": "nan", "b": "-inf"}
    assert second["message"] == "zwölf\nlines"


def test_json_log_appends_and_leaves_a_given_stream_open(tmp_path):
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        with JsonLog(str(path)) as log:
            log(STEP)
    assert len(path.read_text().splitlines()) == 2
    stream = io.StringIO()
    with JsonLog(stream) as log:
        log(STEP)
    assert not stream.closed


def test_json_log_that_cannot_be_opened_is_explained(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        JsonLog(tmp_path / "missing" / "log.jsonl")


def test_both_passes_events_in_order_and_errors_on():
    seen = []

    def stop(event):
        raise RuntimeError("stop")

    both(None, seen.append, lambda e: seen.append(e.stage))(STEP)
    assert seen == [STEP, "layerwise"]
    with pytest.raises(RuntimeError, match="stop"):
        both(seen.append, stop)(STEP)
