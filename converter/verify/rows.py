"""The quality table of one conversion: original, converted, and the yardsticks beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from reattend.at_once import rows_at_once
from reattend.errors import ReattendError
from reattend.materials import Materials
from reattend.report.evidence import PeerCell, QualityRow
from reattend.verify.parity import by_call, decodes_apart
from reattend.verify.peers import measured_peers
from reattend.verify.quality import measure, row_of
from reattend.verify.recall import lacking
from reattend.verify.scoring import cached_scorer
from reattend.verify.subject import Subject
from reattend.verify.yardsticks import Yardstick, quantised_cache, sliding_window


def measured_rows(subject: Subject) -> tuple[list[QualityRow], list[PeerCell], list[str]]:
    """Rows measured on the text that was held back (none without it), presets by sizes, and notes.

    With `verify.yardsticks` also what the original does at about the same cache bytes without any
    conversion: a sliding window, an int8 and an int4 cache; with `verify.peers` what other presets
    make of the same sites, at the plan's size as further rows, at sizes of their own as cells.
    """
    source, choices, plan = subject.source, subject.choices, subject.plan
    converted, materials = subject.done.model, subject.materials
    data, notes = materials.held_out, []
    if chosen := by_call(converted):
        notes.append(
            f"what {chosen} leaves out depends on how a text is cut into calls, by design: cached "
            "decoding is not compared with one pass"
        )
    stepwise = decodes_apart(converted) and data is not None
    if chosen:
        notes.append(
            "keys are left out while decoding only: the row `token by token` is the quality then"
            if stepwise
            else "quality is that of one pass"
        )
    if data is None:
        return [], [], notes
    ids, mask = (materials.recall or data).packed
    lacks = lacking(ids[mask.bool().all(-1)])
    settings: dict[str, Any] = {
        "seed": subject.seed,
        "recall_data": materials.recall,
        "with_recall": not lacks,
        "batch_size": rows_at_once(source.model, ids.shape[1], most=8),
    }
    original = measure(source.model, data, **settings)
    ours = measure(converted, data, source.model, **settings)
    size = next(source.model.parameters()).element_size()
    before = size * sum(c.before.cache for c in choices)
    after = size * sum(c.after.cache for c in choices)
    rows = [
        row_of("original", "original", original, before),
        row_of("converted", "converted", ours, after),
    ]
    if stepwise:
        decoding = cached_scorer(converted, chunk=1)
        stepped = measure(converted, data, source.model, scorer=decoding, **settings)
        rows.append(row_of("converted, token by token", "converted", stepped, after))
    if lacks:
        notes.append(f"recall was not measured on the text held back: {lacks}")
    if plan.verify.yardsticks and after < before:
        more, why = _yardstick_rows(source.model, materials, after / before, size, settings)
        rows, notes = rows + more, notes + why
    cells: list[PeerCell] = []
    if plan.verify.peers and materials.statistics is not None:
        cells = measured_peers(subject, settings)
    if not plan.verify.sized:
        rows += [cell.row for cell in cells if cell.row is not None]
        notes = [*notes, *(f"peer {c.preset} left out: {c.refused}" for c in cells if c.refused)]
        cells = []
    return rows, cells, notes


def _yardstick_rows(
    model: nn.Module, materials: Materials, keep: float, size: int, settings: dict[str, Any]
) -> tuple[list[QualityRow], list[str]]:
    data = materials.held_out
    assert data is not None
    context = data.packed[0].shape[1]
    makers: dict[str, Callable[[], Yardstick]] = {
        "sliding window": lambda: sliding_window(
            model, keep=keep, context=context, element_bytes=size
        ),
        "int8 KV cache": lambda: quantised_cache(
            model, bits=8, context=context, element_bytes=size
        ),
        "int4 KV cache": lambda: quantised_cache(
            model, bits=4, context=context, element_bytes=size
        ),
    }
    rows, notes = [], []
    for name, make in makers.items():
        try:
            stick = make()
            quality = stick.measure(data, teacher=model, **settings)
        except ReattendError as problem:
            notes.append(f"yardstick {name} left out: {problem.what}")
            continue
        rows.append(row_of(stick.name, "yardstick", quality, round(stick.cache_bytes_per_token)))
    return rows, notes
