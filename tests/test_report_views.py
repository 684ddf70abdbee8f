"""The Markdown and HTML views: escaping, self-contained pages, plots, missing parts."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import pytest
from report_samples import HOSTILE, bare, console, sample, site

from reattend.report import Report, svg


def hostile() -> Report:
    """Every string a model, plan or file name could bring in is an attack."""
    entry = site(
        1, path="a." + HOSTILE, conversion=HOSTILE, reason=HOSTILE, options={HOSTILE: HOSTILE}
    )
    entry["spec"]["pattern"] = HOSTILE
    return sample(
        model={"architecture": HOSTILE, "dtype": HOSTILE, "name": HOSTILE},
        plan={HOSTILE: [HOSTILE, "```"]},
        sites=[entry],
        parity=[{"name": HOSTILE, "compared": HOSTILE, "verdict": "pass"}],
        quality={"data": HOSTILE, "rows": [{"name": HOSTILE, "role": "yardstick", "ppl": 2.0}]},
        calibration={
            "data": HOSTILE,
            "note": HOSTILE,
            "stages": [{"name": HOSTILE, "loss_name": HOSTILE, "loss": [[0, 1.0], [1, 0.5]]}],
        },
        gates=[{"name": HOSTILE, "verdict": "pass", "reason": HOSTILE}],
        provenance={"data": {HOSTILE: HOSTILE}},
        notes=[HOSTILE],
    )


def test_html_escapes_every_string() -> None:
    page = hostile().to_html()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("<title>") == 1
    assert "&lt;script&gt;" in page


def test_markdown_escapes_every_string() -> None:
    text = hostile().to_markdown()
    fenced = re.sub(r"(?ms)^(`{3,}).*?^\1$", "", text)
    spans = re.sub(r"(?<![\\`])(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", fenced)
    assert "<" not in spans
    assert "](javascript" not in spans.replace("\\]", "")
    assert not re.search(r"^# b", text, flags=re.MULTILINE)


def test_markdown_tables_have_as_many_cells_as_heads() -> None:
    heads = None
    for line in (sample().to_markdown() + "\n\n" + hostile().to_markdown()).splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line))
        if not line.startswith("|"):
            heads = None
        elif heads is None:
            heads = bars
        else:
            assert bars == heads, line


def test_html_is_self_contained_and_well_formed() -> None:
    page = sample().to_html()
    assert "default-src 'none'" in page
    for attribute in re.findall(r'(?:src|href|srcset|action)="([^"]*)"', page):
        assert attribute == "data:," or attribute.startswith("#"), attribute
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names))
    body = page[page.index("<header>") : page.index("</body>")]
    root = ElementTree.fromstring(f"<body>{body.replace('<wbr>', '')}</body>")
    assert all(table.find("caption") is not None for table in root.iter("table"))
    levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch(r"h[1-6]", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_plots_are_themed_named_and_without_date() -> None:
    used = sample(sites=[site(0, head_use=(0.5, 0.25)), site(1, head_use=(0.375, 0.375))])
    page = used.to_html()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 5
    assert "the busiest 50 %, the idlest 25 %, evenly spread 38 %" in page.replace("\u00a0", " ")
    assert "head_use" not in sample().to_json()
    for drawing in drawings:
        assert re.search(r'role="img" aria-labelledby="(\S+) (\S+)">\s*<title id="\1">', drawing)
        assert "<metadata" not in drawing
        assert not set(re.findall(r"#[0-9a-f]{6}\b", drawing))
        used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", drawing))
        assert used <= set(re.findall(r'id="([^"]*)"', drawing))


def test_plots_leave_the_callers_matplotlib_alone() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 23.0}):
        sample().to_html()
        assert matplotlib.rcParams["font.size"] == 23.0


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svg, "available", lambda: False)
    page = sample().to_html()
    assert "<svg" not in page
    assert "reattend[plots]" in page
    assert page.count("<table") >= 7


@pytest.mark.parametrize(
    "missing", ["plan", "sites", "parity", "quality", "calibration", "gates", "provenance", "notes"]
)
def test_any_optional_part_may_be_absent(missing: str) -> None:
    data = json.loads(sample().to_json())
    del data[missing]
    report = Report.load(data)
    assert Report.load(json.loads(report.to_json())) == report
    for view in (report.to_html(), report.to_markdown(), console(report)):
        assert "synthetic-llama" in view
        assert "None" not in view.replace("None of", "")


def test_the_least_report_renders() -> None:
    for report in (bare(), bare(sites=[{"path": "attention", "action": "unmatched"}])):
        assert "Net" in report.to_html()
        assert "Net" in report.to_markdown()
        assert "Net" in console(report)


def test_a_large_model_draws() -> None:
    sites = [site(layer % 6, path=f"m.{layer}.a", layer=layer) for layer in range(80)]
    page = sample(sites=sites).to_html()
    assert "layers 0–79" in page
    assert page.count("<svg") == 4


def test_odd_values_draw() -> None:
    zero = site(1)
    zero["error"].update(output_relative=0.0, energy_kept=[1.0, 1.0], rank=2)
    wild = site(2)
    wild["error"].update(output_relative=math.inf, energy_kept=[math.nan, 1.0], rank=500)
    loss = [[0, math.nan], [1, 5.0], [2, 1e-7]]
    report = sample(sites=[zero, wild], calibration={"stages": [{"name": "s", "loss": loss}]})
    assert report.to_html().count("<svg") == 4
