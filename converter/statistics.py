"""Second moments of keys and values, streamed: memory does not depend on the number of tokens.

One Gram matrix per site holds what the published MLA conversion asks for: y = [k of all groups |
v of all groups] before rotation (after a key norm), bias left out, in float64. Conversions may
ask for more (`Need`), each again of a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reattend.at_once import without_logits
from reattend.attention_moments import AttentionMoments
from reattend.errors import ModelError
from reattend.host import beside
from reattend.inputs import without_cache
from reattend.install.around import Around
from reattend.install.binding import Binding, bound, read
from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import DenseAttention
from reattend.mixers.norm import normed_heads
from reattend.parts import query_heads
from reattend.running import evaluation

#: batch -> hidden and encoder states of sites that no module owns
Inside = Callable[[dict[str, Any]], dict[str, tuple[Tensor, Tensor | None]]]

#: `gram` is always there; the others: second moments of all queries, `AttentionMoments`, second
#: moments of the block's input, a few rows of that input, and rows enough to train on.
Need = Literal["gram", "queries", "attention", "inputs", "sample", "texts"]
#: Rows and tokens per row of a sample, and of texts.
SAMPLE_ROWS, SAMPLE_TOKENS = 4, 256
TEXT_ROWS, TEXT_TOKENS = 64, 1024


@dataclass
class SiteStatistics:
    """Moments of one site, float64.

    Attributes:
        gram: sum of y y^T, [Y, Y] with Y = G (d + e), keys first.
        total: sum of y, [Y].
        query_gram: sum of q q^T over tokens, [H d, H d]; None unless asked for.
        count: tokens.
        attention: moments that weigh tokens by the attention they get; None unless asked for.
        input_gram: sum of x x^T of what keys and values are made from; None unless asked for.
        samples: rows of the block's input without padding, [n, D] each; None unless asked for.
        most: rows, and tokens of each, that `samples` may hold.
        key_sizes: sum of what the key norm divides by, [G], or [1] for a norm over all heads at
            once; None without a norm.
    """

    gram: Tensor
    total: Tensor
    query_gram: Tensor | None
    count: int = 0
    attention: AttentionMoments | None = None
    input_gram: Tensor | None = None
    samples: list[Tensor] | None = field(default=None)
    most: tuple[int, int] = (SAMPLE_ROWS, SAMPLE_TOKENS)
    key_sizes: Tensor | None = None

    @classmethod
    def empty(cls, dense: DenseAttention, needs: Collection[Need] = ()) -> SiteStatistics:
        """Zero moments of the right size."""
        core = dense.config.core
        width = core.kv_heads * (core.qk_head_dim + core.v_head_dim)
        q, wide = core.heads * core.qk_head_dim, torch.float64
        inputs = dense.config.memory_size or dense.config.hidden_size
        return cls(
            gram=torch.zeros(width, width, dtype=wide),
            total=torch.zeros(width, dtype=wide),
            query_gram=torch.zeros(q, q, dtype=wide) if "queries" in needs else None,
            attention=AttentionMoments.empty(dense) if "attention" in needs else None,
            input_gram=torch.zeros(inputs, inputs, dtype=wide) if "inputs" in needs else None,
            samples=[] if {"sample", "texts"} & set(needs) else None,
            most=(TEXT_ROWS, TEXT_TOKENS) if "texts" in needs else (SAMPLE_ROWS, SAMPLE_TOKENS),
            key_sizes=_no_sizes(dense),
        )

    def add(
        self, dense: DenseAttention, x_BND: Tensor, memory: Tensor | None, valid: Tensor | None
    ) -> None:
        """Add the tokens of one call; `valid` [B, N] marks real ones."""
        source = x_BND if memory is None else memory
        k_BNk = keys(dense, source)
        real = valid if memory is None else None
        if self.key_sizes is not None and dense.k_norm is not None:
            each = k_BNk.unflatten(-1, (len(self.key_sizes), -1))
            self.key_sizes += _real(dense.k_norm.size(each), real).sum(0)
        y_BNY = torch.cat([normed(dense, k_BNk), values(dense, source)], -1)
        y = _real(y_BNY, real)
        self.gram += y.t() @ y
        self.total += y.sum(0)
        self.count += y.shape[0]
        if self.attention is not None:
            self.attention.add(dense, x_BND, y_BNY, valid)
        if self.input_gram is not None:
            z = _real(source, real)
            self.input_gram += z.t() @ z
        rows, tokens = self.most
        if self.samples is not None and len(self.samples) < rows:
            for row, x in enumerate(x_BND[: rows - len(self.samples)]):
                x = x if valid is None else x[valid[row].bool()]
                self.samples.append(x[:tokens].cpu().clone())
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
        attention = self.attention
        if attention is not None:
            attention = attention.part(y, query_heads(core, kv_heads), list(kv_heads))
        sizes = self.key_sizes
        if sizes is not None and len(sizes) > 1:
            sizes = sizes[list(kv_heads)]
        return SiteStatistics(
            self.gram[y][:, y], self.total[y], query, self.count, attention, self.input_gram,
            self.samples, key_sizes=sizes,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """For storage beside the run."""
        stored = {"gram": self.gram, "total": self.total, "count": torch.tensor(self.count)}
        if self.query_gram is not None:
            stored["query_gram"] = self.query_gram
        if self.attention is not None:
            stored |= self.attention.tensors()
        if self.input_gram is not None:
            stored["input_gram"] = self.input_gram
        if self.key_sizes is not None:
            stored["key_sizes"] = self.key_sizes
        for number, x in enumerate(self.samples or ()):
            stored[f"sample.{number}"] = x
        return stored

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> SiteStatistics:
        """The inverse of `tensors`."""
        samples = [stored[f"sample.{i}"] for i in range(TEXT_ROWS) if f"sample.{i}" in stored]
        return cls(
            stored["gram"], stored["total"], stored.get("query_gram"), int(stored["count"]),
            AttentionMoments.from_tensors(stored), stored.get("input_gram"), samples or None,
            key_sizes=stored.get("key_sizes"),
        )  # fmt: skip


def _dimensions(heads: Sequence[int], width: int) -> Tensor:
    return torch.tensor([h * width + i for h in heads for i in range(width)], dtype=torch.long)


def keys(dense: DenseAttention, source: Tensor) -> Tensor:
    """Projected keys of all groups [..., G d]: with bias where a norm follows, else without."""
    if dense.k_norm is not None:
        projected: Tensor = dense.k_proj(source)
        return projected
    return torch.nn.functional.linear(source, dense.k_proj.weight)


def normed(dense: DenseAttention, k_BNk: Tensor) -> Tensor:
    """Projected keys as the block rotates them [..., G d]."""
    if dense.k_norm is None:
        return k_BNk
    return normed_heads(k_BNk, dense.config.core.kv_heads, dense.k_norm).flatten(-2)


def _no_sizes(dense: DenseAttention) -> Tensor | None:
    """Zero sizes, one for each stretch of a key that a norm sees at once."""
    norm = dense.config.k.norm
    if norm is None:
        return None
    groups = dense.config.core.kv_heads if norm.scope == "head" else 1
    return torch.zeros(groups, dtype=torch.float64)


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
    needs: Mapping[str, frozenset[Need]] | None = None,
    inside: Inside | None = None,
    around: Mapping[str, Around] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, SiteStatistics]:
    """Run the original model over batches and accumulate each site's moments.

    Args:
        model: the original; not changed.
        sites: site path -> (normal form, binding of its owner, None where it has none).
        batches: keyword arguments of the model; `attention_mask` [B, N] marks real tokens.
        needs: by site, what is wanted beside `gram`.
        inside: reads the inputs of sites without an owner, from a batch.
        around: the programs of owners that do more than their block, by site path.
        progress: called with the number of tokens seen so far.

    Raises:
        ModelError: NaN or infinity in the activations of a site.
    """
    found = {p: SiteStatistics.empty(d, (needs or {}).get(p, ())) for p, (d, _) in sites.items()}
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
            real = valid
            if around is not None and path in around:
                arguments = around[path].prepare(arguments)
            x = read(arguments, binding.hidden)
            if binding.around is not None and valid is not None and valid.shape != x.shape[:2]:
                real = None  # regrouped tokens (windows) are not the batch's
            found[path].add(dense, x, read(arguments, binding.memory), real)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    tokens, spared = 0, without_logits(model)
    try:
        with evaluation(model), torch.no_grad():
            for given in batches:
                batch = beside(model, given)
                mask = batch.get("attention_mask")
                valid = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
                if len(handles) > 0:
                    model(**without_cache(model, {**batch, **spared}))
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
