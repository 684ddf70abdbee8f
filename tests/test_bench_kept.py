"""Measurements that take several calls: rows stay, time is looked at, what is undone is told."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[1] / "kernels" / "bench"
FIELDS = ("shape", "model", "context", "at")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def job(context: int, at: str = "equal batch", model: str = "latent") -> dict[str, Any]:
    return {"shape": "tiny", "model": model, "context": context, "at": at}


def kept(bench: Any, path: Path, minutes: float = 1.0, go_on: bool = False, **head: Any) -> Any:
    report = {"command": "python x.py", "date": "today", "device": "some"} | head
    return bench("kept").Kept(report, path, FIELDS, Namespace(minutes=minutes, go_on=go_on))


def test_rows_of_other_calls_stay_and_equal_ones_are_replaced(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    kept(bench, path).add(job(8) | {"ms": 1})
    second = kept(bench, path, date="tomorrow")
    second.add(job(16) | {"ms": 2})
    second.add(job(8) | {"ms": 3})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["context"], row["ms"]) for row in rows] == [(16, 2), (8, 3)]
    kept(bench, path, device="other").add(job(32))
    assert [row["context"] for row in json.loads(path.read_text())["rows"]] == [32]


def test_going_on_measures_what_is_missing_or_failed(bench: Any, tmp_path: Path) -> None:
    first = kept(bench, tmp_path / "rows.json")
    with first.row(job(8)) as row:
        row["ms"] = 1.0
    with first.row(job(16)):
        raise torch.OutOfMemoryError("too large")
    with first.row(job(32)):
        raise RuntimeError("a driver")
    told = {row["context"]: row.get("refused") for row in first.report["rows"]}
    assert told == {8: None, 16: "out of memory: too large", 32: "RuntimeError: a driver"}
    again = kept(bench, tmp_path / "rows.json", go_on=True)
    assert [again.done(job(n)) for n in (8, 16, 32, 64)] == [True, True, False, False]
    assert not kept(bench, tmp_path / "rows.json").done(job(8))  # asked for anew
    again.add({"shape": "tiny", "model": "latent", "refused": "cannot be made"})
    again.add(job(64) | {"ms": 2})  # now it can
    assert "cannot be made" not in str(again.report["rows"])


def test_a_row_begins_only_if_it_would_end_in_time(bench: Any, tmp_path: Path) -> None:
    one = kept(bench, tmp_path / "rows.json", minutes=1)
    assert one.expected(job(8)) == 0.0
    one.add(job(8) | {"took_s": 10.0})
    one.add(job(8, model="other") | {"took_s": 1.0})
    assert one.expected(job(16)) == 40.0
    assert one.expected(job(4)) == 10.0
    assert one.fits(job(16))
    assert not one.fits(job(16), before=30.0)
    assert not one.fits(job(32))
    assert one.fits(job(32, model="other"))


def test_what_is_undone_is_told_last_with_the_command_that_goes_on(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = kept(bench, tmp_path / "rows.json", minutes=0)
    one.leave(job(8), job(16))
    one.finish(Namespace(contexts=[8, 16], cache_gb=1.5, go_on=False))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "no time for tiny, latent, 8, equal batch",
        "no time for tiny, latent, 16, equal batch",
        "go on with: python x.py --continue --contexts 8 16 --cache-gb 1.5",
    ]


def test_decode_steps_of_models_are_measured_over_two_calls(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of `model.py`, its measurement made up."""
    model, done = bench("model"), []

    def measure(body: Any, row: dict[str, Any], options: Namespace) -> None:
        done.append((row["model"], row["context"], row["at"]))
        row |= {"tokens_per_s": 8.0 if row["model"] == "latent" else 2.0}

    monkeypatch.setattr(model, "measure", measure)
    monkeypatch.setattr(model, "build", lambda *size: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def call(*more: str) -> dict[str, Any]:
        done.clear()
        asked = ["model.py", "--out", str(tmp_path), "--shapes", "llama-2-7b", *more]
        monkeypatch.setattr(sys, "argv", asked)
        assert model.main() == 0
        return json.loads((tmp_path / "model-some-gpu.json").read_text())

    call("--contexts", "8")
    assert len(done) == 6
    report = call("--contexts", "8", "16", "--continue")
    assert len(done) == 6 and {context for _, context, _ in done} == {16}
    assert len(report["rows"]) == 12 and set(report["times_faster"].values()) == {4.0}
    call("--contexts", "32", "--minutes", "0")
    assert not done
    assert bench("model_tables").model_table(report).count("\n| llama-2-7b |") == 12
