"""Sparse blocks over a grid of image tokens, told by the options where the image lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import config, dense
from test_sparse import converted, gap, inputs, sparse_presets
from zoo_models import build

from reattend import convert
from reattend.errors import ArgumentError, PlanError, RefusedError
from reattend.mixers.base import Context
from reattend.passes.rewrite.base import dense_cost
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.plan import Plan

LOOKS_BOTH_WAYS = config().model_copy(
    update={"core": config().core.model_copy(update={"causal": False, "pattern": "full"})}
)
SIDE = {"clear": (40, 40), "neighborhood": (20, 20), "radial": (4, 20, 20), "tile": (12, 24, 16)}


@pytest.mark.parametrize("n_side", [3, 16])
def test_a_grid_equals_the_dense_block_under_its_mask(n_side: int) -> None:
    """A class token before, one text token behind; long enough for blocks and short for a mask."""
    n = n_side**2 + 2
    block = dense(LOOKS_BOTH_WAYS)
    pattern = {"grid": {"radius": 1, "norm": "box"}}
    where = {"image_grid": (n_side, n_side), "text_before": 1, "text_after": 1}
    mixer = converted(block, pattern=pattern, **where)
    place = [(k // n_side, k % n_side) for k in range(n_side**2)]
    mask = torch.ones(n, n, dtype=torch.bool)
    for i, a in enumerate(place):
        for j, b in enumerate(place):
            mask[i + 1, j + 1] = abs(a[0] - b[0]) <= 1 and abs(a[1] - b[1]) <= 1
    x, real = inputs(n, (0, 0))
    with torch.no_grad():
        got = mixer(x, Context())
        expected = block(x, Context(mask=mask.expand(2, 1, n, n)))
    assert gap(got, expected, real) <= 1e-12


def test_presets_over_grids_are_published_sizes() -> None:
    assert sparse_presets(grids=True) == sorted(SIDE)
    made = ToSparse()
    for name, side in SIDE.items():
        plain = Plan.load(name).rules[0].options
        refusal = made.check(LOOKS_BOTH_WAYS, plain)
        assert refusal is not None and "image_grid" in refusal.reason
        given = {**plain.model_dump(exclude_unset=True), "image_grid": side}
        options = SparseOptions.model_validate(given)
        assert made.check(LOOKS_BOTH_WAYS, options) is None
        before = dense_cost(LOOKS_BOTH_WAYS)
        assert made.cost(LOOKS_BOTH_WAYS, options).flops_per_token < before.flops_per_token


def test_single_heads_are_told_where_the_image_lies() -> None:
    own = {"kv_heads": [1], "pattern": {"grid": {"radius": 1}}}
    options = SparseOptions.model_validate({"head_patterns": [own], "image_grid": (4, 4)})
    assert options.head_patterns[0].pattern.grids[0].shape == (4, 4)
    assert ToSparse().check(LOOKS_BOTH_WAYS, options) is None
    assert SparseOptions.model_validate(options.model_dump()) == options


def neighbourhood(**where: Any) -> dict[str, Any]:
    rule = {"sites": "*", "to": "sparse", "pattern": {"grid": {"radius": 1}}, **where}
    return {"rules": [rule]}


def test_an_image_model_is_converted() -> None:
    """ViT with 4 x 4 patches and a class token; a window as wide as the image is refused."""
    model = build("vit")
    image = {"pixel_values": torch.randn(2, 3, 16, 16)}
    plan = neighbourhood(image_grid=[4, 4], text_before=1)
    result = convert(model, plan=plan, inputs=image)
    with torch.no_grad():
        moved = result.model(**image).logits - model(**image).logits
    assert float(moved.abs().max()) > 1e-3
    plan["rules"][0]["pattern"]["grid"]["radius"] = 3
    with pytest.raises(RefusedError, match=r"hides nothing.* pattern\.grid\.radius=1"):
        convert(model, plan=plan, inputs=image)


@pytest.mark.slow
def test_grids_that_do_not_fit_are_refused() -> None:
    model = build("vit")
    image = {"pixel_values": torch.randn(2, 3, 16, 16)}
    fits = r"4 x 4 tokens does not fit: the block reads 17; .* \[4, 4\] with text_before: 1"
    with pytest.raises(RefusedError, match=fits):
        convert(model, plan=neighbourhood(image_grid=[4, 4]), inputs=image)
    mixer = converted(dense(LOOKS_BOTH_WAYS), pattern={"grid": {"radius": 1}}, image_grid=(4, 4))
    with pytest.raises(ArgumentError, match=r"grid of 4 x 4 tokens was given 17 tokens"):
        mixer(inputs(17, (0,))[0], Context())
    with pytest.raises(RefusedError, match="image_grid"):
        convert(model, plan=neighbourhood(), inputs=image)
    tiles = neighbourhood(image_grid=[4, 5], text_before=1)
    tiles["rules"][0]["pattern"] = {"tiles": {"tile": [2, 2]}}
    with pytest.raises(PlanError, match="does not divide"):
        convert(model, plan=tiles, inputs=image)
