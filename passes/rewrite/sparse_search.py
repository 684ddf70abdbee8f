"""Which KV heads need every key: each is made sparse alone, and the model's output is compared.

The rows are calibration text whose second half repeats its first, so that heads which look things
up show it: perplexity of plain text hardly moves without them (DuoAttention, Xiao et al., arXiv
2410.10819; retrieval heads, Wu et al., arXiv 2404.15574). No gradient and no label is needed. The
divergences of single heads are added up as if they were independent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.errors import PlanError
from reattend.passes.rewrite.base import Conversion, Measure, Subject


def repeated(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every row's second half replaced by its first; other inputs as they are."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return batch
    half = ids.shape[1] // 2
    changed = {**batch, "input_ids": torch.cat([ids[:, :half], ids[:, :half]], 1)}
    for name in ("attention_mask", "position_ids", "token_type_ids"):
        if isinstance(batch.get(name), Tensor) and batch[name].shape[:2] == ids.shape:
            changed[name] = batch[name][:, : 2 * half]
    return changed


def search(conversion: Conversion, sites: list[Subject], measure: Measure) -> list[Any]:
    """Options for every site that leave `keep_full` of all KV heads, the most needed, as they are.

    Raises:
        PlanError: no divergence can be measured, or the pattern hides nothing in rows this short.
    """
    found: list[tuple[float, int, int]] = []
    for number, site in enumerate(sites):
        heads = site.dense.config.core.kv_heads
        for head in range(heads):
            others = tuple(h for h in range(heads) if h != head)
            options = site.options.decided(others)
            moved = measure(site.path, conversion.build(site.dense, None, options).mixer)
            if moved is None:
                raise PlanError(
                    "keep_full needs a model that can run with one of its blocks replaced",
                    where=site.path,
                    next_step="name the heads that stay in heads_full",
                )
            found.append((moved, number, head))
    if max(moved for moved, _, _ in found) <= 0:
        raise PlanError(
            "keep_full cannot tell the heads apart: the pattern hides nothing in the calibration "
            "rows",
            where="sparse",
            next_step="raise calibrate.seq_len to more than twice the window, or narrow the window",
        )
    keep = round(sites[0].options.keep_full * len(found))
    kept = sorted(found, key=lambda f: (-f[0], f[1], f[2]))[:keep]
    return [
        site.options.decided(tuple(sorted(head for _, n, head in kept if n == number)))
        for number, site in enumerate(sites)
    ]
