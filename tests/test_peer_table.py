"""The table of presets by sizes: the best of each column, and what the reader is told beside it."""

from __future__ import annotations

from typing import Any

from report_samples import sample

from reattend.report import Report
from reattend.report.peer_table import peers_table


def row(ppl: float, copy: float, gain: float) -> dict[str, Any]:
    return {
        "name": "x, untrained", "role": "yardstick", "cache_bytes_per_token": 64, "ppl": ppl,
        "recall": {"copy": copy, "passkey": 0.5}, "gain": {"copy": 1.0, "passkey": gain},
    }  # fmt: skip


def cell(preset: str, size: str, *numbers: float, refused: str = "") -> dict[str, Any]:
    made = {"row": row(*numbers), "widths": [[4, 8]]} if numbers else {"refused": refused}
    return {"preset": preset, "size": size, **made}


PEERS = [
    cell("transmla", "25 %", 21.0, 0.60, 4.0),
    cell("transmla-paper", "25 %", 28.0, 0.59, 4.25),
    cell("care", "25 %", 27.0, 0.60, -0.001),
    cell("transmla", "1/2 of pairs", 19.5, 0.62, 4.5),
    cell("transmla-paper", "1/2 of pairs", 19.0, 0.5, 4.501),
    cell("care", "1/2 of pairs", refused="too wide"),
]


def made() -> Report:
    original = {**row(20.0, 0.625, 5.0), "name": "original", "role": "original"}
    quality = {"rows": [original], "peers": PEERS, "data": "text.txt", "tokens": 512, "context": 64,
               "recall_data": "2 x 128 tokens"}  # fmt: skip
    return sample(quality=quality)


def test_the_table_marks_the_lowest_perplexity_of_each_column() -> None:
    report = made()
    found = peers_table(report.quality)
    assert found is not None
    assert [c.head for c in found.columns] == ["Preset", "25 %", "1/2 of pairs"]
    assert found.rows == (
        ("transmla", "21.00 (60 %; 4.0)", "19.50 (62 %; 4.5)"),
        ("transmla-paper", "28.00 (59 %; 4.2)", "19.00 (50 %; 4.5)"),
        ("care", "27.00 (60 %; 0.0)", "refused"),
    )
    assert found.strong == {(0, 1), (1, 2)}
    assert "| **21.00 (60 %; 4.0)** |" in report.to_markdown()
    assert "<strong>19.00 (50 %; 4.5)</strong>" in report.to_html()
    assert peers_table(sample().quality) is None
    assert "Presets beside it" not in sample().to_markdown() + sample().to_html()


def test_the_caption_says_what_the_numbers_alone_hide() -> None:
    caption = peers_table(made().quality).caption
    for part in (
        "Original: 20.00 (62 %; 5.0). ",
        "transmla-paper over transmla: 25 %: 8.0, 1/2 of pairs: transmla adds nothing. ",
        "Recall above that of the bold cell: transmla-paper at 25 % (key 4.25 for 4.00 nats); "
        "transmla at 1/2 of pairs (copied right 62.0 % for 50.0 %). ",
        "Refused: care at 1/2 of pairs (too wide). ",
        "Measured on text.txt; 512 tokens, 64 per sequence; recall: 2 x 128 tokens.",
    ):
        assert part in caption, caption


def test_it_is_in_the_json_and_only_where_there_is_one() -> None:
    report = made()
    assert Report.model_validate_json(report.to_json()).quality == report.quality
    assert '"peers"' not in sample().to_json() and '"gain"' not in sample().to_json()
