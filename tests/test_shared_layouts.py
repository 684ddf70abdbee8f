"""Layouts are built once for all layers, calls and lengths, equal those made alone, are freed."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from decoder_models import decoder

from reattend import convert
from reattend.mixers import shared_layouts
from reattend.mixers.config import CoreConfig
from reattend.mixers.shared_layouts import BLOCK, POOL, Layouts
from reattend.patterns import layouts
from reattend.patterns.pattern import HeadPattern

CPU = torch.device("cpu")
WINDOWS = [HeadPattern(sinks=4, window=20 + 3 * i) for i in range(11)]


def core(pattern: str = "causal", **more: int) -> CoreConfig:
    return CoreConfig(
        heads=2, kv_heads=2, qk_head_dim=8, v_head_dim=8, scale=1.0, pattern=pattern, **more
    )


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first row, rows) of every layout built."""
    real, found = layouts.block_layout, []

    def counted(patterns: Any, heads: Any, core: CoreConfig, n: int, **more: int) -> Any:
        made = real(patterns, heads, core, n, **more)
        found.append((made.first, made.row_ptr.shape[1] - 1))
        return made

    gc.collect()
    monkeypatch.setattr(layouts, "block_layout", counted)
    return found


def same(one: Any, other: Any) -> bool:
    return all(map(torch.equal, one.tensors, other.tensors))


def test_many_head_classes_of_many_layers_are_built_once(built: list) -> None:
    stack, counts = [Layouts() for _ in range(3)], []
    for _call in range(3):
        built.clear()
        for layer in stack:
            for pattern in WINDOWS:
                assert layer.get(pattern, core(), 500, CPU) is not None
        counts.append(len(built))
    assert counts == [len(WINDOWS), 0, 0]
    other = core().model_copy(update={"heads": 8, "scale": 2.0})  # of another model
    assert Layouts().get(WINDOWS[0], other, 500, CPU) is stack[0].get(WINDOWS[0], core(), 500, CPU)
    built.clear()
    assert Layouts().get(WINDOWS[0], core("sliding", window=9), 500, CPU) is not None
    assert len(built) == 1  # it hides more


def test_layouts_of_a_converted_model_are_shared_and_freed(built: list) -> None:
    given = {"sites": "*", "to": "sparse", "pattern": {"sinks": 2, "window": 9, "slashes": [40]}}
    model = convert(decoder("llama", layers=3, groups=2), {"version": 1, "rules": [given]}).model
    built.clear()
    before = len(POOL.grown)
    ids = torch.randint(0, 50, (1, 200))
    with torch.inference_mode():
        model(ids, use_cache=False)
    assert built == [(0, 4)]
    model(ids, use_cache=False).logits.sum().backward()  # what inference mode made serves training
    twin = copy.deepcopy(model)
    twin(ids, use_cache=False)
    assert built == [(0, 4)]
    assert len(POOL.grown) == before + 1
    del model, twin
    gc.collect()
    assert len(POOL.grown) == before


@pytest.mark.parametrize("pattern", [
    HeadPattern(sinks=4, window=30), HeadPattern(window=9, window_slope=0.1, columns=(70, 3)),
    HeadPattern(window=5, stride={"period": 5}), HeadPattern(powers={"block": 16}, slashes=(33,)),
])  # fmt: skip
def test_a_longer_text_lays_out_the_rows_it_adds(
    built: list, pattern: HeadPattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_layouts, "DENSE", 9.0)
    layer = Layouts()
    for n in (200, 300, 470, 471, 230, 1024):
        found = layer.get(pattern, core(), n, CPU)
        alone = layouts.block_layout([pattern], [0], core(), n)
        assert found is not None
        if n != 230:  # a view may list tiles of rows below it
            assert same(found, alone)
        assert torch.equal(found.validate().to_mask(n, n), alone.to_mask(n, n))
    rows = [one for one in built if one[0] or one[1] == 4]
    assert rows[0] == (0, 4) and (4, 1) in rows and (5, 3) in rows and (8, 8) in rows


def test_encoders_hold_a_layout_per_length(built: list) -> None:
    layer, pattern = Layouts(), HeadPattern(window=30)
    for _ in range(2):
        for n in (600, 400, 410):
            found = layer.get(pattern, core("full"), n, CPU)
            assert found is not None
            assert found.row_ptr.shape[1] - 1 == -(-n // BLOCK)
    assert built == [(0, 10), (0, 7)]
    for n in range(400, 2000, BLOCK):
        layer.get(pattern, core("full"), n, CPU)
    assert sum(map(len, layer.kept.values())) == shared_layouts.LENGTHS


def test_what_does_not_pay_is_remembered(built: list) -> None:
    for _ in range(3):
        assert Layouts().get(HeadPattern(window=700), core(), 800, CPU) is None
    layer = Layouts()
    for _ in range(3):
        assert layer.get(HeadPattern(window=701), core(), 800, CPU) is None
    assert len(built) == 4
    assert layer.get(HeadPattern(window=701), core(), 5000, CPU) is not None


def test_memory_is_bounded_and_what_finds_no_room_is_all_that_is_built_again(
    built: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, whole = Layouts(), [p.model_copy(update={"sinks": 7}) for p in WINDOWS]
    for pattern in whole:
        layer.get(pattern, core(), 800, CPU)
    held = sum(one.bytes for one in POOL.grown.values())
    monkeypatch.setattr(shared_layouts, "MOST_BYTES", held)
    more = HeadPattern(sinks=8, window=20)
    built.clear()
    for _call in range(2):
        for pattern in (*whole, more):
            assert layer.get(pattern, core(), 800, CPU) is not None
    assert built == [(0, 13)] * 2  # `more`, each time
    monkeypatch.setattr(shared_layouts, "LATELY", 5)
    layer.get(more, core(), 800, CPU)
    layer.get(more, core(), 800, CPU)
    assert built == [(0, 13)] * 3
    assert sum(one.bytes for one in POOL.grown.values()) <= held


def test_pickles_and_copies_hold_no_layouts() -> None:
    layer = Layouts()
    layer.get(WINDOWS[0], core(), 500, CPU)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert isinstance(other, Layouts)
        assert not other.kept


def test_threads_build_it_once(built: list) -> None:
    layer, pattern = Layouts(), HeadPattern(sinks=3, window=77)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: layer.get(pattern, core(), 900, CPU), range(32)))
    assert len(built) == 1
    assert all(one is found[0] for one in found)


def test_a_default_device_does_not_reach_layouts() -> None:
    with torch.device("meta"):
        found = Layouts().get(HeadPattern(sinks=9, window=31), core(), 500, CPU)
    assert found is not None
    assert {x.device for x in found.tensors} == {CPU}
