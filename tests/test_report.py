"""`Report` and `Run`: round trip, fixed bytes, schema, other versions, damaged files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from report_samples import _row, kept, sample, site

from reattend.errors import EXIT_BAD_INPUT, ArgumentError
from reattend.report import Report, Run
from reattend.report.headline import headline
from reattend.report.run import StageRun

STORED = Path(__file__).parent / "data" / "report-1.json"


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    report = sample()
    paths = report.save(tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    for source in (tmp_path, paths[0], str(paths[0]), json.loads(paths[0].read_text("utf-8"))):
        again = Report.load(source)
        assert again == report
        assert again.to_json() == report.to_json()


def test_bytes_do_not_depend_on_process_or_order(tmp_path: Path) -> None:
    data = sample().model_dump(mode="json", by_alias=True)
    shuffled = json.loads(json.dumps(data), object_pairs_hook=lambda p: dict(reversed(p)))
    shuffled["sites"].reverse()
    (tmp_path / "report.json").write_text(json.dumps(shuffled), "utf-8")
    code = (
        "import sys; from reattend.report import Report; Report.load(sys.argv[1]).save(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"}
    )
    here = tmp_path / "here"
    here.mkdir()
    sample().save(here)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (here / name).read_bytes(), name


def test_sites_are_sorted_with_numbers_as_numbers() -> None:
    report = sample(sites=[site(10), site(9), site(1)])
    assert [entry.layer for entry in report.sites] == [1, 9, 10]
    with pytest.raises(ValidationError, match="listed twice"):
        sample(sites=[site(1), site(1)])


def test_totals_add_up_and_are_not_read_from_the_file() -> None:
    refused = site(6, action="refused", reason="cache would grow", cost=None, error=None)
    unknown = site(7, action="not-understood", verified=False, cost=None, error=None)
    totals = sample(
        sites=[kept(0), site(1), site(2), refused, unknown], totals={"found": 99}
    ).totals
    assert (totals.found, totals.verified, totals.converted) == (4, 4, 2)
    assert (totals.kept, totals.refused, totals.not_understood) == (1, 1, 1)
    assert (totals.cache_bytes_per_token_before, totals.cache_bytes_per_token_after) == (768, 512)
    assert totals.cache_ratio == pytest.approx(512 / 768)


def test_a_site_that_was_not_changed_saves_nothing() -> None:
    with pytest.raises(ValidationError, match="is refused, so its cost after is its cost before"):
        sample(sites=[site(1, action="refused", reason="cache would grow")])


def test_infinity_and_nan_survive_as_strict_json() -> None:
    row = _row("original", "original", 10, 4.0, None, None, (0, 0, 0))
    broken = _row("mla", "converted", 5, math.inf, math.nan, 0.0, (0, 0, 0))
    report = sample(quality={"rows": [row, broken]})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    data = json.loads(report.to_json(), parse_constant=refuse)
    again = Report.load(data)
    assert again.quality is not None
    assert again.quality.rows[1].ppl == math.inf
    assert math.isnan(again.quality.rows[1].kl or 0.0)
    assert headline(report).facts[2].state == "bad"
    assert "∞" in report.to_html()


def test_unknown_keys_are_errors_in_python_and_on_loading() -> None:
    with pytest.raises(ValidationError, match="qualty"):
        sample(qualty=None)
    data = json.loads(sample().to_json())
    data["sites"][2]["error"]["colour"] = 1
    with pytest.raises(ArgumentError, match=r"sites\.2\.error\.colour") as caught:
        Report.load(data)
    assert caught.value.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 2, "reattend_version": "0.9.0"}', "reattend 0.9.0 or newer"),
        (b'{"schema": "x"}', "schema number is 'x'"),
        (b'{"schema": true}', "schema number is True"),
        (b"[]", "not a JSON object"),
        (b'{"schema": 1', "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"schema": 1}', "model: Field required"),
    ],
)
@pytest.mark.parametrize("cls", [Report, Run])
def test_bad_files_say_what_is_wrong(
    cls: Any, content: bytes, message: str, tmp_path: Path
) -> None:
    if cls is Run and "model" in message:
        pytest.skip("a run has no required field")
    path = tmp_path / f"{cls.__name__.lower()}.json"
    path.write_bytes(content)
    with pytest.raises(ArgumentError) as caught:
        cls.load(tmp_path)
    assert message in str(caught.value)
    assert path.name in str(caught.value)


def test_missing_file_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no report.json") as caught:
        Report.load(tmp_path)
    assert "reattend convert --out" in str(caught.value)


def test_the_committed_schema_is_the_generated_one() -> None:
    from importlib.resources import files

    committed = json.loads((files("reattend.report") / "schema-1.json").read_text("utf-8"))
    assert committed == Report.json_schema(), (
        "the schema changed: a change that old files survive is written to "
        "converter/report/schema-1.json, any other needs a new schema number"
    )


def test_the_stored_sample_of_schema_1_keeps_loading() -> None:
    report = Report.load(STORED)
    assert report.schema_version == 1
    assert report.totals.converted == 5
    assert report.quality is not None
    assert report.quality.last("converted") == report.quality.rows[2]
    assert report.sites[1].error is not None
    assert len(report.sites[1].error.energy_kept) == 128
    assert lost(json.loads(STORED.read_text("utf-8")), json.loads(report.to_json())) == []


def lost(old: Any, new: Any, at: str = "") -> list[str]:
    """What a stored document says and its reading does not; the reading may say more."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [w for k, v in old.items() for w in lost(v, new.get(k, "missing"), f"{at}.{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [w for i, v in enumerate(old) for w in lost(v, new[i], f"{at}[{i}]")]
    return [] if old == new else [at]


def test_a_run_round_trips(tmp_path: Path) -> None:
    run = Run(
        started="2001-02-03T04:05:06Z",
        host="synthetic",
        threads=2,
        paths={"out": "somewhere"},
        stages=(
            StageRun(name="statistics", seconds=1.5, peak_bytes=10),
            StageRun(name="layerwise", seconds=9.0, reused=True),
        ),
    )
    run.save(tmp_path)
    assert Run.load(tmp_path) == run
    assert Run.load(tmp_path).seconds == 1.5


def test_the_stored_sample_of_run_1_keeps_loading() -> None:
    """Made by `stored_samples.py`."""
    stored = STORED.with_name("run-1.json")
    run = Run.load(stored)
    assert [(stage.name, stage.reused) for stage in run.stages] == [
        ("statistics", False), ("layerwise", True),
    ]  # fmt: skip
    assert (run.seconds, run.stages[0].peak_bytes) == (1.5, 1100)
    assert lost(json.loads(stored.read_text("utf-8")), json.loads(run.to_json())) == []


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, reattend.report; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
