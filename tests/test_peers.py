"""Other presets beside a conversion: what a conversion by each of them measures itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from reattend import Plan, convert
from reattend.errors import DataError, PlanError
from reattend.events import Event
from reattend.plan_sections import Verify

SMALL = {"statistics_tokens": 2048, "seq_len": 64}


def plan(preset: str, **verify: Any) -> dict[str, Any]:
    rules = [{"layers": [0], "to": "keep"}, {"sites": "*", "to": "mla", "kv_keep": 0.5}]
    if preset:
        rules[1] = {**Plan.load(preset).rules[0].to_dict(), "sites": "*", "kv_keep": 0.5}
    return {"rules": rules, "calibrate": SMALL, "verify": verify}


def test_a_peer_is_what_its_own_conversion_is(tiny_path: Path, tiny_text: Path) -> None:
    """CARE's, which reads statistics that the plan's own rule does not."""
    report = convert(tiny_path, plan("", peers=["care"]), data=tiny_text).report
    rows = {row.name: row for row in report.quality.rows}
    asked = {"peers": ["mha2mla", "care"], "peer_keep": [0.5, 0.25], "peer_pairs": [0.5]}
    made = convert(tiny_path, plan("care", **asked), data=tiny_text).report
    alone = made.quality.last("converted")
    peer = rows["care, untrained"]
    assert peer.role == "yardstick"
    assert peer.ppl == pytest.approx(alone.ppl, rel=1e-6)
    assert peer.kl == pytest.approx(alone.kl, rel=1e-3)
    assert peer.cache_bytes_per_token == alone.cache_bytes_per_token
    assert rows["converted"].kl != pytest.approx(peer.kl, rel=0.01)
    assert "care, untrained" in report.to_markdown() and not report.quality.peers
    cells = {(cell.preset, cell.size): cell.row for cell in made.quality.peers}
    sizes = ("50 %", "25 %", "1/2 of pairs")
    assert list(cells) == [(name, size) for size in sizes for name in asked["peers"]]
    assert len(made.quality.rows) == 2, "presets at sizes of their own are no rows"
    at_half = cells["care", "50 %"]
    assert at_half.ppl == pytest.approx(alone.ppl, rel=1e-6)
    assert (at_half.recall, at_half.gain) == (alone.recall, pytest.approx(alone.gain))
    whole = made.quality.last("original").cache_bytes_per_token
    half, quarter, pairs = (
        cells[name, size].cache_bytes_per_token
        for name, size in (("care", "50 %"), ("mha2mla", "25 %"), ("care", "1/2 of pairs"))
    )
    assert whole - half == 2 * (half - quarter)  # the first layer stays
    assert half < pairs
    size = next(cell.widths for cell in made.quality.peers if cell.size == "1/2 of pairs")
    converted = [site.options for site in made.sites if site.action == "converted"]
    assert len(size) == len(converted)
    head = next(line for line in made.to_markdown().splitlines() if line.startswith("| Preset |"))
    assert head == "| Preset | 50 % | 25 % | 1/2 of pairs |"


def test_a_killed_table_goes_on_where_it_was(tmp_path: Path) -> None:
    """What was measured is read again; a refused preset stands in the table with its reason."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model, rows = Qwen3ForCausalLM(config).eval(), torch.randint(0, 61, (40, 16))
    chosen = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}],
              "verify": {"peers": ["x-ecomla", "care", "mha2mla"], "peer_pairs": [0.5]},
              "calibrate": {"seq_len": 16, "statistics_tokens": 256}}  # fmt: skip
    told: list[str] = []

    def stop(event: Event) -> None:
        told.append(event.message)
        if event.message.startswith("mha2mla"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, chosen, data=rows, out=tmp_path / "out", on_event=stop)
    again: list[str] = []
    report = convert(
        model, chosen, data=rows, out=tmp_path / "out", on_event=lambda e: again.append(e.message)
    ).report
    assert "care at 1/2 of pairs" in told
    assert [m for m in again if " at " in m] == ["mha2mla at 1/2 of pairs"]
    refused, *measured = report.quality.peers
    assert refused.preset == "x-ecomla" and "at most 8" in refused.refused
    assert [cell.preset for cell in measured] == ["care", "mha2mla"]
    assert measured[0].row.ppl > 1 and measured[0].widths == ((16, 48),)
    assert not (tmp_path / "out" / "work").exists()


def test_quality_is_measured_on_the_text_the_plan_names(
    tiny_path: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Then nothing is held back of the data, and recall may have longer rows."""
    own, text = tmp_path / "own.txt", tiny_text.read_text("utf-8")
    own.write_text(text[-30_000:], "utf-8")
    verify = {"data": str(own), "rows": 4, "recall_tokens": 128}
    few = [text[:400]]
    with pytest.raises(DataError, match="too short to hold rows back"):
        convert(tiny_path, plan("", max_kl=1e9), data=few)
    report = convert(tiny_path, plan("", max_kl=1e9, **verify), data=few).report
    assert report.gates[0].verdict == "pass"
    assert report.quality.tokens == 4 * 64 and "own.txt" in report.quality.data
    assert report.quality.recall_data.startswith("2 x 128 tokens")


def test_only_presets_of_mla_are_peers() -> None:
    with pytest.raises(PlanError, match="transmla-paper"):
        Verify.model_validate({"peers": ["s2"]})
