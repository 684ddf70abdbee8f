"""What share of the keys a sparse model reads: computed for patterns, counted for choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def noted(share: float, length: int, layers: int, at: int = 0) -> dict[str, Any]:
    """TidalDecode's pattern where one layer chooses for all behind it, sized to read a share.

    Args:
        share: of the causal pairs of a decoded text, of which the layer and those before it read
            all of their own.
        length: tokens of the text.
        layers: of the model.
        at: number of the layer that chooses.
    """
    others = (layers * share - at - 1) / (layers - at - 1)
    topk = round((1 - (1 - others) ** 0.5) * length)
    return {"select": {"kind": "recorded", "at": [at], "topk": topk}}


def densities(model: Any, ids: Any) -> dict[str, float]:
    """Shares of the causal pairs that are attended to, and of the KV heads that see every key.

    What is chosen at run time is counted on these rows in one pass; what chooses only while
    decoding is taken to read its budget.
    """

    def run() -> None:
        for row in ids:
            model(row[None], use_cache=False)

    return shares(model, ids.shape[1], run)


def shares(model: Any, length: int, run: Callable[[], None]) -> dict[str, float]:
    """As `densities`, of the pairs that the blocks see by themselves, causal or not.

    Args:
        model: with or without sparse blocks.
        length: tokens of a row.
        run: runs the model on the rows that are counted.
    """
    import torch

    from reattend.mixers.scores import own_pattern
    from reattend.mixers.sparse import SparseAttention

    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    full, heads, read, counted = 0, 0, 0.0, []
    for mixer in (m for m in model.modules() if isinstance(m, SparseAttention)):
        pairs = int(own_pattern(mixer.config.core, i, j).sum())
        for number, c in enumerate(mixer.config.classes):
            heads += len(c.kv_heads)
            full += len(c.kv_heads) * c.pattern.full
            if c.pattern.select is None:
                shown = c.pattern.sees(i, j, mixer.config.core)
                read += float(shown.sum()) / pairs * len(c.kv_heads)
            elif c.pattern.select.acts == "decode":
                lengths = range(1, length + 1)
                decoded = sum(c.pattern.reads(n, mixer.config.core) for n in lengths)
                read += decoded / pairs * len(c.kv_heads)
            else:
                counted.append(Counted(mixer.selecting[str(number)], c.pattern, len(c.kv_heads)))
    if not heads:
        return {"attention": 1.0, "full_heads": 1.0}
    if counted:
        with torch.no_grad():
            run()
    read += sum(c.finished() for c in counted)
    return {"attention": read / heads, "full_heads": full / heads}


class Counted:
    """Counts what a selecting method chooses beside its pattern's terms, until it is finished."""

    def __init__(self, method: Any, pattern: Any, kv_heads: int) -> None:
        self.method, self.pattern, self.kv_heads = method, pattern, kv_heads
        self.read = self.every = 0
        self.choose, method.choose = method.choose, self._counted

    def _counted(self, asked: Any) -> Any:
        from reattend.mixers.scores import own_pattern

        chosen, (i, j) = self.choose(asked), asked.positions()
        own = own_pattern(asked.core, i, j)
        seen = (chosen.mask() | self.pattern.sees(i, j, asked.core) | (i == j)) & own
        self.read += int(seen.sum())
        self.every += int(own.sum()) * seen[..., 0, 0].numel()
        return chosen

    def finished(self) -> float:
        """The share of the pairs, for each of its KV heads."""
        del self.method.choose
        return self.read / self.every * self.kv_heads
