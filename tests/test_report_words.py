"""What a report says: headline, folded sites, numbers and the console."""

from __future__ import annotations

from report_samples import bare, console, kept, sample, site

from reattend.report import numbers
from reattend.report.fold import fold, ranges
from reattend.report.headline import headline


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
