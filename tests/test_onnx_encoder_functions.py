"""The bodies of nodes of models without states, and the torch ops they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from test_onnx_sparse_functions import SCALE, B, H, T, one_node, rows  # noqa: E402

from reattend.mixers.config import CoreConfig  # noqa: E402
from reattend.mixers.scores import attend  # noqa: E402
from reattend.patterns.pattern import HeadPattern  # noqa: E402
from reattend.targets.onnx.encoder_band import band_attention  # noqa: E402
from reattend.targets.onnx.encoder_body import ENCODER  # noqa: E402
from reattend.targets.onnx.encoder_observed import observed_attention  # noqa: E402
from reattend.targets.onnx.encoder_ops import (  # noqa: E402
    chosen_attention,
    masked_attention,
    region_attention,
)
from reattend.targets.onnx.encoder_regions import Regions, regions  # noqa: E402


def runs(name: str, feed: dict[str, Any], rules: dict[str, Any], outputs: list[str]) -> Any:
    made = one_node(name, feed, outputs, rules)
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed), ReferenceEvaluator(made).run(None, feed)


@pytest.mark.parametrize(("softcap", "size", "limit"), [(0, 1, 1e-5), (2, 1, 1e-5), (0, 300, 1e-3)])
def test_a_mask_is_read(softcap: float, size: int, limit: float) -> None:
    """Also where hidden scores are the highest by hundreds, and seen ones differ by as much."""
    q, k, v = rows()
    q *= size
    seen = np.random.default_rng(2).random((B, H, T, T)) < 0.3
    feed = {"q": q, "key": k, "value": v, "seen": seen}
    rules = {"scale": SCALE, "softcap": float(softcap)}
    want = masked_attention(*map(torch.from_numpy, feed.values()), **rules).numpy()
    for (y,) in runs("MaskedAttention", feed, rules, ["y"]):
        assert np.abs(y - want).max() <= limit


@pytest.mark.parametrize("shape", [(B, H, T), (1, 1, T), (B, 1, 1), (1, H, T)])
def test_tiles_read_what_their_queries_see(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of few rows, of all, and of none: their outputs mean nothing, but are finite."""
    monkeypatch.setattr("reattend.targets.onnx.fragments.TILE", 8)
    monkeypatch.setattr("reattend.targets.onnx.encoder_masked.LONG", 16)
    q, k, v = rows()
    near = np.abs(np.arange(T)[:, None] - np.arange(T)) < 5
    near[24:32], near[32:40] = True, False
    near = near if shape[2] == T else near[5:6]
    seen = np.random.default_rng(2).random((*shape, T)) < 0.7
    seen &= near
    feed = {"q": q, "key": k, "value": v, "seen": seen}
    rules = {"scale": SCALE, "softcap": 0.0}
    want = masked_attention(*map(torch.from_numpy, feed.values()), **rules).numpy()
    meant = np.broadcast_to(seen.any(-1, keepdims=True), (B, H, T, 1))
    assert meant.any() and (shape[2] == 1 or not meant.all())
    for (y,) in runs("MaskedAttention", feed, rules, ["y"]):
        assert np.isfinite(y).all()
        assert np.abs(np.where(meant, y - want, 0)).max() <= 1e-5


@pytest.mark.parametrize("padding", ["none", "right", "left", "all"])
@pytest.mark.parametrize(("sinks", "window"), [(0, 3), (3, 5), (9, 1), (2, 40)])
def test_sinks_and_a_window_on_both_sides(
    sinks: int, window: int, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions that do not divide the text; a window of everything; a text that is only padding."""
    monkeypatch.setattr("reattend.targets.onnx.fragments.TILE", 8)
    q, k, v = rows()
    real = np.ones((B, T), bool)
    if padding != "none":
        where = {"right": slice(-9, None), "left": slice(9), "all": slice(None)}[padding]
        real[0, where] = False
    place = np.where(real, real.cumsum(1) - 1, -1)
    core = CoreConfig(
        heads=H, kv_heads=2, qk_head_dim=8, v_head_dim=6, scale=SCALE, softcap=1.5, pattern="full"
    )
    pattern = HeadPattern(sinks=sinks, window=window)
    i, j = torch.from_numpy(place)[:, :, None], torch.from_numpy(place)[:, None]
    seen = pattern.sees(i, j, core) | (i < 0)  # padding stays finite
    want = attend(*map(torch.from_numpy, (q, k, v)), core, seen[:, None]).numpy()
    feed = {"q": q, "key": k, "value": v, "place": place}
    rules = {"scale": SCALE, "softcap": 1.5, "sinks": sinks, "window": window}
    y = band_attention(*map(torch.from_numpy, feed.values()), sinks, window, SCALE, 1.5).numpy()
    for got in (y, *(y for (y,) in runs("BandAttention", feed, rules, ["y"]))):
        assert np.isfinite(got).all()
        assert np.abs(got - want).transpose(0, 2, 1, 3)[real].max() <= 1e-5


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({"grid": {"radius": 2, "norm": "circle", "text_before": 2}}, (7, 6)),
        ({"grid": {"radius": 1, "norm": "neighborhood"}, "sinks": 3}, (6, 8)),
        ({"tiles": {"tile": [3, 2], "radius": 0, "text_before": 5}}, (6, 8)),
        ({"radial": {"block": 2, "text_before": 1, "text_after": 4}}, (3, 4, 4)),
    ],
)
def test_boxes_of_a_grid_read_what_their_queries_see(
    given: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes that do not divide the grid, rows that few of a box see; grids too small to pay."""
    name = next(n for n in ("grid", "tiles", "radial") if n in given)
    pattern = HeadPattern.model_validate({**given, name: {**given[name], "shape": shape}})
    core = CoreConfig(
        heads=H, kv_heads=2, qk_head_dim=8, v_head_dim=6, scale=SCALE, softcap=1.5, pattern="full"
    )
    grid = pattern.grids[0]
    n = grid.text_before + grid.tokens + (grid.text_after or 0)
    q, k, v = (torch.from_numpy(x[:, :, :n]) for x in rows())
    place = torch.arange(n)
    mask = pattern.sees(place[:, None], place, core)[None, None]
    assert regions(pattern, core, n) is None
    monkeypatch.setattr("reattend.targets.onnx.encoder_regions._PAYS", 99.0)
    boxes = regions(pattern, core, n)
    assert isinstance(boxes, Regions)
    inside = slice(boxes.first, boxes.first + boxes.tokens)
    want = attend(q, k, v, core, mask)[:, :, inside]
    rules = {"scale": SCALE, "softcap": 1.5}
    y = region_attention(q[:, :, inside], k, v, *boxes.told, **rules)
    assert float((y - want).abs().max()) <= 1e-5
    values = [x.contiguous().numpy() for x in (q[:, :, inside], k, v, *boxes.told)]
    feed = dict(zip(ENCODER["RegionAttention"], values, strict=True))
    for (got,) in runs("RegionAttention", feed, rules, ["y"]):
        assert np.abs(got - want.numpy()).max() <= 1e-5


@pytest.mark.parametrize("text", [0, 3])
def test_a_region_reads_no_row_that_none_of_its_queries_sees(text: int) -> None:
    """Fewer at the border; each query stands in one region; what is seen is kept once."""
    around = {"text_before": text, "text_after": text}
    given = {"grid": {"shape": (32, 24), "radius": 5, "norm": "circle", **around}}
    pattern, n = HeadPattern.model_validate(given), 32 * 24 + 2 * text
    core = CoreConfig(heads=1, kv_heads=1, qk_head_dim=8, v_head_dim=8, scale=1, pattern="full")
    boxes = regions(pattern, core, n)
    assert isinstance(boxes, Regions)
    assert boxes.query_rows_Rc.flatten()[boxes.at_N].tolist() == list(range(32 * 24))
    counts, pairs = set(), 0
    for queries, (begin, end, sees) in zip(boxes.query_rows_Rc, boxes.spans_R3, strict=True):
        seen = pattern.sees(queries[:, None] + text, torch.arange(n), core)
        rows = boxes.key_rows_L[begin:end]
        assert rows.tolist() == seen.any(0).nonzero()[:, 0].tolist()
        shown = boxes.seen_S[sees : sees + seen[:, rows].numel()].view(len(queries), -1)
        assert torch.equal(shown, seen[:, rows])
        counts.add(len(rows))
        pairs += shown.numel()
    assert max(counts) > 1.5 * min(counts)
    assert len(boxes.seen_S) < pairs


def test_rows_of_each_heads_own_are_read() -> None:
    q, k, v = rows()
    random, r, c, many = np.random.default_rng(2), 5, 3, 7
    queries = random.permutation(r * c).reshape(r, c)
    feed = {
        "q": q[:, :, : r * c], "key": k, "value": v, "query_rows": queries,
        "key_rows": random.integers(0, T, (B, H, r, many)),
        "seen": random.random((B, 1, r, c, many)) < 0.7, "at": queries.flatten().argsort(),
    }  # fmt: skip
    feed = {name: np.ascontiguousarray(x) for name, x in feed.items()}
    feed["seen"][..., 0] = True
    rules = {"scale": SCALE, "softcap": 0.0}
    want = chosen_attention(*map(torch.from_numpy, feed.values()), **rules).numpy()
    for (y,) in runs("ChosenRegionAttention", feed, rules, ["y"]):
        assert np.abs(y - want).max() <= 1e-5


@pytest.mark.parametrize("budget", [{"topk": 2, "ratio": 0.0}, {"topk": 0, "ratio": 0.3}])
def test_blocks_are_observed_and_read(budget: dict[str, Any]) -> None:
    """T is no multiple of the block; the prompt is part of the blocks, none or all."""
    q, k, v = rows()
    rules = {"block": 8, **budget, "scale": SCALE, "softcap": 0.0}
    last = np.zeros((B, H, 1, 1), np.int64)
    kept = {}
    for phase, prompt in ((0, 0), (1, 4), (2, 4), (3, 7), (3, 0)):
        feed = {
            "q": q, "key": k, "value": v, "past_blocks": kept.get("blocks", last),
            "phase": np.array([phase]), "prompt_blocks": np.array([prompt]),
        }  # fmt: skip
        y, blocks = observed_attention(*map(torch.from_numpy, feed.values()), **rules)
        for got, found in runs("ObservedAttention", feed, rules, ["y", "blocks"]):
            assert np.abs(got - y.numpy()).max() <= 1e-5
            np.testing.assert_array_equal(np.sort(found, -1), np.sort(blocks.numpy(), -1))
        if phase == 1:
            kept["blocks"] = blocks.numpy()
