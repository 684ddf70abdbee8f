"""The rows of `sparse_images.py`: what is asked of each field, and the patterns it is read by.

Every preset comes sized to read about a half and about a quarter of all pairs.
"""

from __future__ import annotations

from typing import Any

#: field -> what is asked of tokens and told by those around them
NEAR = {
    "picture": "the shape of a thing in a picture of 16 x 16 tokens",
    "video": "which way a ball moves in a video of 16 frames of 4 x 4 tokens",
    "long video": "how a ball moves in a video of 48 frames of 3 x 3 tokens",
}
#: field -> ends of the distances of keys, in tokens or frames, that are counted apart
APART = {"picture": (4, 8), "video": (4, 8), "long video": (4, 16)}
SHARES = (50, 25)
#: how a row is trained -> the stage of the plan
STAGES = {"trained": "layerwise", "trained end to end": "end-to-end"}


def blocks(**more: Any) -> dict[str, Any]:
    """A pattern of chosen blocks."""
    return {"select": {"kind": "blocks", **more}}


def guess(share: float) -> dict[str, Any]:
    """Sparsifiner as published, but for the share."""
    return {
        "select": {"kind": "low-rank", "reduce_channels": 2, "reduce_tokens": 8, "ratio": share}
    }


def vmoba(share: float, places: list[int]) -> dict[str, Any]:
    """VMoBA as published, but for the tiles' places in a frame and the share of similarity."""
    return blocks(
        tiles=[[2, 0, 0], [0, *places], [4, *places]], own=True, across="head", topp=share,
        measure="range",
    )  # fmt: skip


def observed(share: float, block: int = 16) -> dict[str, Any]:
    """SparseD as published, but for the size of blocks and the share."""
    return {"select": {"kind": "observed", "block": block, "ratio": share, "skip": 0.2}}


#: field -> preset -> patterns that read about a half and a quarter of the pairs
PATTERNS: dict[str, dict[str, tuple[dict[str, Any], ...]]] = {
    "picture": {
        "window": ({"window": 75}, {"window": 35}),
        "clear": tuple({"grid": {"radius": r, "norm": "circle"}} for r in (8, 5)),
        "neighborhood": tuple({"grid": {"radius": r, "norm": "neighborhood"}} for r in (5, 4)),
        "tile": tuple({"tiles": {"tile": [2, 2], "radius": r}} for r in (3, 2)),
        "draft": tuple(blocks(tile=[2, 4], queries="pooled", ratio=r) for r in (0.5, 0.25)),
        "biformer": tuple(blocks(tile=[2, 2], queries="pooled", topk=k) for k in (32, 16)),
        "sparsifiner": (guess(0.5), guess(0.25)),
        "sparsed": (observed(0.5), observed(0.25)),
    },
    "video": {
        "window": ({"window": 75}, {"window": 35}),
        "radial": ({"radial": {"block": 16}},),
        "tile": tuple({"tiles": {"tile": [1, 4, 1], "radius": r}} for r in (4, 2)),
        "draft": tuple(blocks(tile=[2, 2, 2], queries="pooled", ratio=r) for r in (0.5, 0.25)),
        "vmoba": (vmoba(0.5, [2, 2]), vmoba(0.25, [2, 2])),
        "sparsed": (observed(0.5), observed(0.25)),
    },
    "long video": {
        "window": ({"window": 127}, {"window": 58}),
        # the same block; a half, where three frames count as one
        "radial": ({"radial": {"block": 1, "shape": [16, 9, 3]}}, {"radial": {"block": 1}}),
        "tile": tuple({"tiles": {"tile": [1, 3, 1], "radius": r}} for r in (13, 6)),
        "draft": tuple(blocks(tile=[2, 3, 1], queries="pooled", ratio=r) for r in (0.5, 0.25)),
        "vmoba": (vmoba(0.5, [3, 1]), vmoba(0.25, [3, 1])),
        "sparsed": (observed(0.5), observed(0.25)),
    },
}


def _names() -> list[str]:
    """The rows: what reads least of a preset is also trained."""
    names = []
    for field, presets in PATTERNS.items():
        names.append(f"{field}: original")
        for number, share in enumerate(SHARES):
            for preset, found in presets.items():
                if number < len(found):
                    names.append(f"{field}: {preset} {share} %")
                if number + 1 == len(found):
                    names += [f"{field}: {preset} {share} %, {way}" for way in STAGES]
    return names


ORDER = _names()
