"""Second moments of keys and values, streamed: memory does not depend on the number of tokens.

One Gram matrix per site holds everything the MLA conversion asks for: y = [k of all groups | v
of all groups] before rotation (after a key norm), bias left out, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.capture import evaluation
from reattend.errors import ModelError
from reattend.install.binding import Binding, bound, read
from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import DenseAttention
from reattend.parts import query_heads

#: batch -> hidden and encoder states of sites that no module owns
Inside = Callable[[dict[str, Any]], dict[str, tuple[Tensor, Tensor | None]]]


@dataclass
class SiteStatistics:
    """Moments of one site, float64.

    Attributes:
        gram: sum of y y^T, [Y, Y] with Y = G (d + e), keys first.
        total: sum of y, [Y].
        query_gram: sum of q q^T over tokens, [H d, H d]; None unless asked for.
        count: tokens.
    """

    gram: Tensor
    total: Tensor
    query_gram: Tensor | None
    count: int = 0

    @classmethod
    def empty(cls, dense: DenseAttention, queries: bool) -> SiteStatistics:
        """Zero moments of the right size."""
        core = dense.config.core
        width = core.kv_heads * (core.qk_head_dim + core.v_head_dim)
        q = core.heads * core.qk_head_dim
        wide = torch.float64
        query = torch.zeros(q, q, dtype=wide) if queries else None
        return cls(torch.zeros(width, width, dtype=wide), torch.zeros(width, dtype=wide), query)

    def add(
        self, dense: DenseAttention, x_BND: Tensor, memory: Tensor | None, valid: Tensor | None
    ) -> None:
        """Add the tokens of one call; `valid` [B, N] marks real ones."""
        source = x_BND if memory is None else memory
        y = torch.cat([keys(dense, source), values(dense, source)], -1)
        y = _real(y, valid if memory is None else None)
        self.gram += y.t() @ y
        self.total += y.sum(0)
        self.count += y.shape[0]
        if self.query_gram is not None:
            q = _real(torch.nn.functional.linear(x_BND, dense.q_proj.weight), valid)
            self.query_gram += q.t() @ q

    def part(self, core: CoreConfig, kv_heads: Sequence[int]) -> SiteStatistics:
        """The moments of some KV groups of the block that `core` describes."""
        d, e = core.qk_head_dim, core.v_head_dim
        y = _dimensions(kv_heads, d)
        y = torch.cat([y, core.kv_heads * d + _dimensions(kv_heads, e)])
        q = _dimensions(query_heads(core, kv_heads), d)
        query = None if self.query_gram is None else self.query_gram[q][:, q]
        return SiteStatistics(self.gram[y][:, y], self.total[y], query, self.count)

    def tensors(self) -> dict[str, Tensor]:
        """For storage beside the run."""
        stored = {"gram": self.gram, "total": self.total, "count": torch.tensor(self.count)}
        if self.query_gram is not None:
            stored["query_gram"] = self.query_gram
        return stored

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> SiteStatistics:
        """The inverse of `tensors`."""
        return cls(stored["gram"], stored["total"], stored.get("query_gram"), int(stored["count"]))


def _dimensions(heads: Sequence[int], width: int) -> Tensor:
    return torch.tensor([h * width + i for h in heads for i in range(width)], dtype=torch.long)


def keys(dense: DenseAttention, source: Tensor) -> Tensor:
    """Unrotated keys of all groups [..., G d]: normed where the block norms them, else biasless."""
    weight = dense.k_proj.weight
    if dense.k_norm is None:
        return torch.nn.functional.linear(source, weight)
    y = dense.k_proj(source)
    if dense.k_norm.config.scope == "full":
        return dense.k_norm(y)
    groups = dense.config.core.kv_heads
    normed: Tensor = dense.k_norm(y.unflatten(-1, (groups, -1))).flatten(-2)
    return normed


def values(dense: DenseAttention, source: Tensor) -> Tensor:
    """Values of all groups [..., G e], bias left out."""
    return torch.nn.functional.linear(source, dense.v_proj.weight)


def _real(y_BNp: Tensor, valid: Tensor | None) -> Tensor:
    flat = y_BNp.flatten(0, -2)
    if valid is not None:
        flat = flat[valid.flatten().bool()]
    return flat.double().cpu()


def collect(
    model: nn.Module,
    sites: dict[str, tuple[DenseAttention, Binding | None]],
    batches: Iterable[dict[str, Any]],
    *,
    queries: frozenset[str] = frozenset(),
    inside: Inside | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SiteStatistics]:
    """Run the original model over batches and accumulate each site's moments.

    Args:
        model: the original; not changed.
        sites: site path -> (normal form, binding of its owner, None where it has none).
        batches: keyword arguments of the model; `attention_mask` [B, N] marks real tokens.
        queries: sites whose query moments are wanted too.
        inside: reads the inputs of sites without an owner, from a batch.
        progress: called with the number of tokens seen so far.

    Raises:
        ModelError: NaN or infinity in the activations of a site.
    """
    found = {p: SiteStatistics.empty(d, p in queries) for p, (d, _) in sites.items()}
    valid: Tensor | None = None
    handles = []
    for path, (dense, binding) in sites.items():
        if binding is None:
            continue
        module = model.get_submodule(path)

        def hook(
            m: nn.Module, args: Any, kwargs: Any, path: str = path,
            dense: DenseAttention = dense, binding: Binding = binding,
        ) -> None:  # fmt: skip
            arguments = bound(m, args, kwargs)
            x = read(arguments, binding.hidden)
            found[path].add(dense, x, read(arguments, binding.memory), valid)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    tokens = 0
    try:
        with evaluation(model), torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                valid = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
                if len(handles) > 0:
                    model(**batch)
                if inside is not None and len(handles) < len(sites):
                    for path, (x, memory) in inside(batch).items():
                        found[path].add(sites[path][0], x, memory, valid)
                first = next(v for v in batch.values() if isinstance(v, Tensor))
                tokens += int(valid.sum()) if valid is not None else first.shape[0] * first.shape[1]
                if progress is not None:
                    progress(tokens)
    finally:
        for handle in handles:
            handle.remove()
    for path, statistics in found.items():
        if not bool(torch.isfinite(statistics.gram).all()):
            raise ModelError(
                "the model produces NaN or infinity on the calibration data",
                where=path,
                next_step="check the weights and the dtype: float16 overflows in some models",
            )
    return found
