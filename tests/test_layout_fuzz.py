"""Layouts of drawn patterns are the ones that the compiler of masks makes, tensor for tensor."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reattend.kernels.sparse_attention import BlockLayout
from reattend.mixers.config import CoreConfig
from reattend.patterns.layouts import block_layout
from reattend.patterns.pattern import HeadPattern

LENGTH = 400
places = st.lists(st.integers(0, LENGTH), min_size=1, max_size=6)
TERMS: dict[str, st.SearchStrategy[Any]] = {
    "sinks": st.integers(1, 130),
    "window": st.integers(1, 300),
    "stride": st.fixed_dictionaries(
        {"period": st.integers(1, 9), "offset": st.integers(0, 9), "block": st.integers(1, 130)}
    ),
    "powers": st.fixed_dictionaries({"block": st.integers(1, 130)}),
    "columns": places,
    "slashes": st.lists(st.integers(-LENGTH, LENGTH), min_size=1, max_size=6)
    | st.builds(
        lambda begin, n: list(range(begin, begin + n)), st.integers(0, 90), places.map(max)
    ),
    "window_slope": st.sampled_from([0.01, 0.137, 0.5, 1.0]),
    "grid": st.fixed_dictionaries(
        {
            "shape": st.sampled_from([[12, 16], [3, 8, 8]]),
            "radius": st.integers(1, 5),
            "text_before": st.integers(0, 70),
            "norm": st.sampled_from(["box", "circle", "neighborhood"]),
        }
    ),
    "tiles": st.just({"shape": [12, 16], "tile": [4, 4], "radius": 1, "text_before": 5}),
    "radial": st.just({"shape": [6, 4, 8], "block": 16, "text_before": 9}),
}
some = st.sampled_from(sorted(TERMS))
drawn = st.sets(some, min_size=1, max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: TERMS[name] for name in sorted(names)})
)
own = st.one_of(
    st.just({"pattern": "causal"}),
    st.just({"pattern": "full"}),
    st.builds(lambda n: {"pattern": "sliding", "window": n}, st.integers(1, 300)),
    st.builds(lambda n: {"pattern": "chunked", "chunk": n}, st.integers(1, 300)),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(drawn | st.just({"full": True}), min_size=1, max_size=2), own,
       st.sampled_from([16, 32, 64]), st.integers(1, LENGTH), st.integers(0, LENGTH))  # fmt: skip
@example([{"sinks": 4, "window": 64}], {"pattern": "causal"}, 64, 384, 0)
@example([{"window": 1, "window_slope": 1.0}], {"pattern": "full"}, 16, 333, 0)
@example([{"columns": list(range(64, 128))}], {"pattern": "causal"}, 64, 300, 70)
def test_layouts_equal_those_of_masks(
    patterns: list[dict[str, Any]], own: dict[str, Any], block: int, n: int, start: int
) -> None:
    core = CoreConfig(heads=2, kv_heads=2, qk_head_dim=8, v_head_dim=8, scale=1.0, **own)
    heads = [HeadPattern(**given) for given in patterns]
    first = min(start, n - 1) // block
    layout = block_layout(
        heads, [0, len(heads) - 1], core, n, start=min(start, n - 1), block=block
    ).validate()
    whole = -(-n // block) * block
    i, j = torch.arange(first * block, whole)[:, None], torch.arange(whole)
    mask = torch.stack([p.sees(i, j, core).expand(len(i), whole) for p in heads])
    other = BlockLayout.from_mask(mask, layout.head_layout, block, first=first)
    for name in ("row_ptr", "col", "tile", "tiles"):
        assert torch.equal(getattr(layout, name), getattr(other, name)), name
