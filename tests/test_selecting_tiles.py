"""Tiles of video and images: VMoBA by its formulas, tiles by layer, the presets."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, dense
from pydantic import ValidationError
from test_selecting import BOTH_WAYS, scores
from torch import Tensor
from zoo_models import build

from reattend import convert
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.base import dense_cost
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.plan import Plan

VIDEO = (4, 4, 6)
VMOBA: dict[str, Any] = {
    "kind": "blocks", "tiles": [[2, 0, 0], [0, 2, 3], [2, 2, 3]], "own": True, "across": "head",
    "topp": 0.25, "measure": "range",
}  # fmt: skip


def options(select: dict[str, Any] = VMOBA, **where: Any) -> SparseOptions:
    return SparseOptions.model_validate({"pattern": {"select": select}, **where})


def vmoba(block: DenseAttention, x: Tensor, tile: tuple[int, ...], share: float) -> Tensor:
    """Pairs of a query and a tile in the order of similarity, until a head has its share."""
    q, k, _ = scores(block, x)
    places = list(product(*map(range, VIDEO)))
    region = [tuple(p // t for p, t in zip(place, tile, strict=True)) for place in places]
    tiles = sorted(set(region))
    members = {t: [n for n, r in enumerate(region) if r == t] for t in tiles}
    seen = torch.zeros(4, len(x), len(x), dtype=torch.bool)
    for h in range(4):
        gate = {
            (i, t): float(q[h, i] @ k[h, members[t]].mean(0)) for i in range(len(x)) for t in tiles
        }
        least = min(gate.values())
        total = sum(value - least for value in gate.values())
        got = 0.0
        for i, t in gate:
            if region[i] == t:
                got += gate[i, t] - least
                seen[h, i, members[t]] = True
        for i, t in sorted((p for p in gate if region[p[0]] != p[1]), key=lambda p: -gate[p]):
            if got >= share * total:
                break
            got += gate[i, t] - least
            seen[h, i, members[t]] = True
    return seen


@pytest.mark.parametrize(("layer", "tile"), [(0, (2, 4, 6)), (4, (4, 2, 3)), (5, (2, 2, 3))])
def test_layers_route_to_tiles_of_one_two_and_three_axes(layer: int, tile: tuple[int, ...]) -> None:
    """As the released code does, by the paper's formulas; and everything where all is asked for."""
    block, made = dense(BOTH_WAYS), ToSparse()
    x = torch.randn(1, 96, HIDDEN, dtype=torch.float64)
    for share in (0.6, 1.0):
        given = made.for_layer(options(VMOBA | {"topp": share}, image_grid=VIDEO), layer, 6)
        assert made.check(block.config, given) is None
        mixer = made.build(block, None, given).mixer
        with torch.no_grad():
            got = mixer(x, Context())
            mask = vmoba(block, x[0], tile, share)
            if share < 1:
                assert bool((block(x, Context()) - got).abs().max() > 1e-3)
            expected = block(x, Context(mask=mask[None]) if share < 1 else Context())
        assert (got - expected).abs().max() < 1e-12


def test_an_image_model_has_tiles_by_layer() -> None:
    select = VMOBA | {"tiles": [[2, 0], [2, 2]]}
    rule = {"sites": "*", "to": "sparse", "pattern": {"select": select}, "image_grid": [4, 4],
            "text_before": 1}  # fmt: skip
    image = {"pixel_values": torch.randn(2, 3, 16, 16)}
    result = convert(build("vit"), plan={"rules": [rule]}, inputs=image)
    with torch.no_grad():
        assert bool(result.model(**image).logits.isfinite().all())
    mixers = [m for m in result.model.modules() if getattr(m, "kind", "") == "sparse"]
    tiles = [m.config.classes[0].pattern.select.tile for m in mixers]
    assert tiles == [(2, 4), (2, 2)]


@pytest.mark.parametrize(
    ("name", "where"),
    [("vmoba", {"image_grid": (20, 28, 52)}), ("biformer", {"image_grid": (14, 14)})],
)
def test_presets_are_published_sizes(name: str, where: dict[str, Any]) -> None:
    made, plain = ToSparse(), Plan.load(name).rules[0].options
    refusal = made.check(BOTH_WAYS, made.for_layer(plain, 0, 6))
    assert refusal is not None and "image_grid" in refusal.reason
    given = SparseOptions.model_validate(plain.model_dump(exclude_unset=True) | where)
    for layer in range(3):
        each = made.for_layer(given, layer, 6)
        assert made.check(BOTH_WAYS, each) is None
        after, before = made.cost(BOTH_WAYS, each), dense_cost(BOTH_WAYS)
        promises = name == "biformer"  # 16 of 49 regions; a share of similarity promises nothing
        assert (after.flops_per_token < before.flops_per_token) == promises


def test_what_cannot_be_is_refused() -> None:
    refusal = ToSparse().check(BOTH_WAYS, options(image_grid=VIDEO))
    assert refusal is not None and "stack of layers" in refusal.reason
    for select, words in (
        (VMOBA | {"tile": [2, 2, 2]}, "give tile"),
        (VMOBA | {"tiles": [[3, 0, 0]]}, "does not divide"),
        (VMOBA | {"tiles": []}, "own is for tiles"),
        ({"kind": "blocks", "topk": 2, "measure": "range"}, "range is for topp"),
    ):
        with pytest.raises(ValidationError, match=words):
            options(select, image_grid=VIDEO)
