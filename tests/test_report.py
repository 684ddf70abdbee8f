"""`Report` and `Run`: round trip, fixed bytes, schema, escaping, missing parts, other versions.

Every number in `sample` is made up; it only has to look like a real run.
"""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from reattend.errors import EXIT_BAD_INPUT, ArgumentError
from reattend.report import Report, Run, numbers, svg
from reattend.report.fold import fold, ranges
from reattend.report.headline import headline
from reattend.report.run import StageRun

STORED = Path(__file__).parent / "data" / "report-1.json"
HOSTILE = '</title><script>alert("x")</script>|`*_[a](javascript:1)\n# b & <img src=x>'


def site(layer: int, /, **changes: Any) -> dict[str, Any]:
    """One made-up site of a small Llama, converted to latent attention."""
    width, context = 128, 1024
    lost = 0.004 * abs(6 - layer) ** 1.3
    energy = [1 - math.exp(-(rank + 1) / (7 + 1.5 * (5 - layer))) for rank in range(width)]
    entry: dict[str, Any] = {
        "path": f"model.layers.{layer}.self_attn",
        "action": "converted",
        "layer": layer,
        "verified": True,
        "spec": {
            "heads": 8,
            "kv_heads": 2,
            "hidden": 256,
            "qk_width": 32,
            "v_width": 32,
            "rotary_width": 32,
        },
        "conversion": "mla",
        "options": {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "balance": True},
        "exactness": "bounded",
        "cost": {
            "before": _cost(128, 163_840, context),
            "after": _cost(64, 158_720, context),
        },
        "error": {
            "output_relative": lost,
            "output_bound": lost * 2.3,
            "discarded_energy": 1 - energy[47],
            "rank": 48,
            "energy_kept": energy,
            "rotary_energy_kept": 0.93 - 0.01 * layer,
        },
        "owner": {"path": f"model.layers.{layer}.self_attn", "class_name": "LatentAttention"},
    }
    return {**entry, **changes}


def _cost(width: int, parameters: int, context: int) -> dict[str, Any]:
    return {
        "cache_numbers_per_token": width,
        "cache_bytes_per_token": 2 * width,
        "parameters": parameters,
        "flops_per_token": 2.0 * parameters + 4.0 * width * context,
        "context": context,
    }


def kept(layer: int) -> dict[str, Any]:
    """A made-up site that a rule of the plan leaves alone."""
    same = _cost(128, 163_840, 1024)
    return site(
        layer,
        action="kept",
        conversion="",
        options={},
        exactness=None,
        error=None,
        owner=None,
        reason="rule 1 keeps layer 0",
        cost={"before": same, "after": same},
    )


def sample(**changes: Any) -> Report:
    """A made-up but complete report."""
    fields: dict[str, Any] = {
        "reattend_version": "0.1.0",
        "model": {
            "name": "synthetic-llama",
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "parameters_before": 5_573_888,
            "parameters_after": 5_548_288,
            "source_hash": "sha256:" + "0123456789abcdef" * 4,
        },
        "plan": {
            "version": 1,
            "rules": [
                {"layers": [0], "to": "keep"},
                {"sites": "*", "to": "mla", "kv_lora_rank": 48, "qk_rope_head_dim": 16},
            ],
            "verify": {"max_ppl_increase": 0.05},
        },
        "sites": [kept(0), *(site(layer) for layer in range(1, 6))],
        "parity": [
            _parity("identity, float64", "attention output, region / rebuilt", 3e-14, 1e-12, 9e-15),
            _parity("prefill", "logits, expanded / absorbed form", 4.1e-6, 6e-5, 7.5e-6),
            _parity("cached decode", "logits, cached / uncached", 5.0e-6, 6e-5, 7.5e-6),
            _parity("left padding", "logits, padded / unpadded", 3.7e-6, 6e-5, 7.5e-6),
        ],
        "quality": {
            "data": "heldout",
            "tokens": 20_480,
            "context": 512,
            "rows": [
                _row("original", "original", 1536, 27.31, None, None, (0.64, 0.91, 0.55)),
                _row(
                    "mla, statistics only", "intermediate", 896, 33.9, 0.21, 0.79, (0.4, 0.7, 0.3)
                ),
                _row(
                    "mla, 200,000 tokens", "converted", 896, 28.02, 0.032, 0.924, (0.61, 0.88, 0.5)
                ),
                _row("sliding window 298", "yardstick", 896, 29.5, 0.07, 0.9, (0.31, 0.22, 0.1)),
                _row("int8 cache", "yardstick", 816, 27.33, 0.001, 0.991, (0.64, 0.91, 0.55)),
                _row("int4 cache", "yardstick", 432, 28.9, 0.05, 0.9, (0.55, 0.8, 0.42)),
            ],
        },
        "calibration": {
            "data": "calibration",
            "stages": [
                {"name": "statistics", "tokens": 65_536},
                {
                    "name": "layerwise",
                    "tokens": 100_000,
                    "loss_name": "relative squared error",
                    "loss": [[4000 * i, 0.09 * math.exp(-i / 6) + 0.011] for i in range(26)],
                },
                {
                    "name": "end-to-end",
                    "tokens": 100_000,
                    "loss_name": "KL, nats per token",
                    "loss": [
                        [4000 * i, 0.15 * math.exp(-i / 9) + 0.032 + 0.004 * math.sin(2.1 * i)]
                        for i in range(26)
                    ],
                },
            ],
        },
        "gates": [
            {
                "name": "max_ppl_increase",
                "limit": 0.05,
                "value": 0.025998,
                "verdict": "pass",
            },
            {
                "name": "min_recall_copy",
                "limit": 0.6,
                "value": 0.61,
                "relation": ">=",
                "verdict": "pass",
            },
        ],
        "provenance": {
            "weights": {"model.safetensors": "sha256:" + "ab" * 32},
            "plan": "sha256:" + "cd" * 32,
            "data": {"calibration": "sha256:" + "ef" * 32, "heldout": "sha256:" + "12" * 32},
            "seeds": {"calibrate": 0, "verify": 1},
            "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        },
        "notes": ["Synthetic example: every number on this page is made up."],
    }
    return Report.model_validate({**fields, **changes})


def _parity(
    name: str, compared: str, relative: float, limit: float, floor: float
) -> dict[str, Any]:
    return {
        "name": name,
        "compared": compared,
        "verdict": "pass" if relative <= limit else "fail",
        "shape": [2, 67, 4096],
        "max_abs": relative * 8,
        "relative": relative,
        "cosine": 1.0,
        "top1": 1.0,
        "tolerance": limit,
        "noise_floor": floor,
    }


def _row(
    name: str,
    role: str,
    size: int,
    ppl: float,
    kl: float | None,
    top1: float | None,
    recall: tuple[float, float, float],
) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "cache_bytes_per_token": size,
        "ppl": ppl,
        "kl": kl,
        "top1": top1,
        "recall": dict(zip(("copy", "passkey", "multi_key"), recall, strict=True)),
    }


def bare(**changes: Any) -> Report:
    """The least a report can say."""
    return Report.model_validate({"model": {"architecture": "Net", "dtype": "float32"}, **changes})


def console(report: Report, width: int = 120) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(report.summary())
    return out.getvalue()


# The file


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


def test_importing_the_report_is_light() -> None:
    code = (
        "import sys, reattend.report; "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# The words


def test_headline_says_the_four_things() -> None:
    top = headline(sample())
    assert [fact.figure for fact in top.facts] == ["5 of 6", "−41.7 %", "+2.6 %", "2 of 2"]
    assert top.facts[1].detail == "1,536 B → 896 B per token"
    assert top.sentence == (
        "5 of 6 attention sites were converted to mla. The cache shrinks to 58.3 % of the original "
        "bytes. Perplexity changes by +2.6 %, recall by −5.0 points in the worst task (multi-key). "
        "Every gate passed."
    )
    assert top.state == "good"


def test_a_failed_gate_or_parity_check_is_never_a_success() -> None:
    gate = {"name": "max_ppl_increase", "verdict": "fail", "limit": 0.01, "value": 0.03}
    parity = {"name": "decode", "compared": "logits", "verdict": "fail"}
    for report in (
        sample(gates=[gate]),
        sample(parity=[parity]),
        sample(gates=[], parity=[parity]),
    ):
        top = headline(report)
        assert top.state == "bad"
        assert top.sentence.endswith(("Failed: max_ppl_increase.", "Failed: decode."))
        assert "Every gate passed" not in report.to_html()
        assert "✗ failed" in report.to_html()
        assert "✗ failed" in report.to_markdown()
        assert "✗" in console(report)


def test_a_gate_that_did_not_run_is_not_a_pass() -> None:
    gate = {"name": "max_ppl_increase", "verdict": "not-run", "reason": "no data"}
    top = headline(sample(gates=[gate]))
    assert (top.state, top.facts[3].figure) == ("open", "0 of 1")
    assert "Some checks did not run." in top.sentence


def test_growth_and_nothing_converted_are_said() -> None:
    grown = site(1)
    grown["cost"]["after"]["cache_bytes_per_token"] = 512
    top = headline(sample(sites=[grown]))
    assert "grows to 2 times" in top.sentence
    assert top.facts[1].state == "bad"
    assert headline(sample(sites=[kept(0)])).sentence.startswith("None of the 1 attention site was")
    assert headline(bare()).sentence == "No attention site was found."


def test_folding_joins_equal_treatment_only() -> None:
    sites = sample(sites=[kept(0), *(site(n) for n in range(1, 6))]).sites
    assert [group.layers for group in fold(sites)] == ["layer 0", "layers 1–5"]
    assert fold(sites)[1].path == "model.layers.*.self_attn"
    ranked = [site(n, options={"kv_lora_rank": 40 + 8 * n}) for n in range(3)]
    (group,) = fold(sample(sites=ranked).sites)
    assert group.options == {"kv_lora_rank": "40–56"}
    towers = [site(0), site(0, path="vision.layers.0.self_attn")]
    assert len(fold(sample(sites=towers).sites)) == 2
    assert fold(sample(sites=[site(0, layer=None)]).sites)[0].layers == "1 site"


def test_ranges() -> None:
    assert ranges([5, 3, 4, 0]) == "0, 3–5"
    assert ranges([0, 2, 4, 6]) == "0–6 in steps of 2"
    assert ranges([7]) == "7"


def test_numbers_read_as_a_person_writes_them() -> None:
    assert numbers.signed_percent(-0.0001) == "±0.0 %"
    assert numbers.signed_percent(0.0417) == "+4.2 %"
    assert numbers.plain(None) == "–"
    assert numbers.plain(1_234.5678) == "1,235"
    assert numbers.plain(100.0) == "100"
    assert numbers.tiny(-3.2e-10) == "−3.2e−10"
    assert numbers.size(1536.0) == "1,536 B"
    assert numbers.size(20_480) == "20 KiB"
    assert numbers.count(999_999) == "1 M"
    assert numbers.count(5_573_888) == "5.57 M"


def test_console_folds_and_takes_no_markup() -> None:
    out = console(sample(notes=["[bold]not markup[/bold]"]))
    assert "layers 1–5" in out
    assert "[bold]not markup[/bold]" in out
    assert max(len(line) for line in console(sample(), width=72).splitlines()) <= 72


# The views


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
    page = sample().to_html()
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 4
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
