"""Which components keep their rotation, for every selection but the published one.

`global` keeps those whose loss is largest over all frequencies; `per-frequency` the strongest of
each frequency (of evenly strided ones where there are fewer slots than frequencies, which is the
standard table of width R); `per-head` is MHA2MLA's 2-norm selection (arXiv 2502.14837), the pairs
of each kv head with the largest mean query length times mean key length; `mean-key` is X-EcoMLA's
(arXiv 2503.11132) shared key, the last R dimensions of the mean over kv heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.dense import DenseConfig
from reattend.passes.rewrite.mla_mixing import Component, components
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_phase import Phase
from reattend.passes.rewrite.mla_rotary import RotaryChoice, slot_columns
from reattend.passes.rewrite.mla_sizes import Sizes
from reattend.statistics import SiteStatistics


def select(
    config: DenseConfig,
    key_moment: Tensor,
    statistics: SiteStatistics,
    phase: Phase,
    options: MlaOptions,
    rope: int,
) -> RotaryChoice:
    """Split the stacked key into R rotated rows and the rest.

    Args:
        key_moment: mean of k k^T with bias, [G d, G d].
        rope: R.
    """
    pairs = config.rotary.pairs if config.rotary else 0
    if options.rope_select == "mean-key":
        return mean_key(config, rope)
    found = components(
        config, key_moment, query_energy(config, statistics, pairs), phase, options.mixing
    )
    kept = _kept(config, found, statistics, options, rope // 2)
    rest = [c for c in found if not any(c is k for k in kept)]
    return _choice(config, key_moment, kept, rest)


def query_energy(config: DenseConfig, statistics: SiteStatistics, pairs: int) -> Tensor:
    """Mean |q_h(f)|^2 by what scores cost, [H, P]; 1 where queries were not measured."""
    if statistics.attention is None:
        return torch.ones(config.core.heads, pairs, dtype=torch.float64)
    energy = torch.diagonal(statistics.attention.queries, dim1=1, dim2=2)
    energy = energy / statistics.attention.weight.clamp_min(1e-300)
    return energy[:, :pairs] + energy[:, pairs : 2 * pairs]


def _kept(
    config: DenseConfig,
    found: list[Component],
    statistics: SiteStatistics,
    options: MlaOptions,
    slots: int,
) -> list[Component]:
    """The rotated components, ordered by frequency."""
    groups, pairs = config.core.kv_heads, config.rotary.pairs if config.rotary else 0
    if options.rope_select == "global":
        chosen = sorted(found, key=lambda c: -c.lost)[:slots]
    elif options.rope_select == "per-head":
        assert statistics.attention is not None
        grouped = statistics.attention.query_norms
        grouped = grouped.reshape(groups, config.core.heads // groups, pairs).sum(1)
        score = grouped * statistics.attention.key_norms
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = [c for c in found if int(rank[c.place, c.frequency]) < slots // groups]
    else:
        per, columns = per_frequency(pairs, slots)
        chosen = [c for c in found if c.frequency in columns and c.place < per]
    return sorted(chosen, key=lambda c: (c.frequency, c.place))


def per_frequency(pairs: int, slots: int) -> tuple[int, tuple[int, ...]]:
    """How many components of each frequency stay, and of which frequencies."""
    if slots >= pairs:
        return max(1, slots // max(pairs, 1)), tuple(range(pairs))
    return 1, slot_columns(pairs, slots, pairs // slots) if slots else ()


def planned_columns(
    config: DenseConfig, options: MlaOptions, sizes: Sizes
) -> tuple[int, ...] | None:
    """The frequency of every slot, where no statistics are needed to know it."""
    pairs, slots = config.rotary.pairs if config.rotary else 0, sizes.qk_rope_head_dim // 2
    if not slots:
        return ()
    if options.published:
        return slot_columns(pairs, slots, sizes.fold)
    if options.rope_select == "mean-key":
        return tuple(j * pairs // slots for j in range(slots))
    if options.rope_select == "per-frequency" and options.mixing != "none":
        per, columns = per_frequency(pairs, slots)
        return tuple(column for column in columns for _ in range(per))
    return None


def _choice(
    config: DenseConfig, key_moment: Tensor, kept: list[Component], rest: list[Component]
) -> RotaryChoice:
    """Real maps of the stacked key: a component is a real and an imaginary row."""
    groups, d = config.core.kv_heads, config.core.qk_head_dim
    pairs = config.rotary.pairs if config.rotary else 0
    width = groups * d
    wide = key_moment.dtype
    key_rope = [_rows(c.encode, c.frequency, pairs, d) for c in kept]
    query_rope = [_rows(c.decode.conj(), c.frequency, pairs, d) for c in kept]
    key_nope = [_rows(c.encode, c.frequency, pairs, d) for c in rest]
    nope_up = [_rows(c.decode.conj(), c.frequency, pairs, d) for c in rest]
    never = torch.zeros(groups, d - 2 * pairs, groups, d, dtype=wide)
    for g in range(groups):
        never[g, :, g, 2 * pairs :] = torch.eye(d - 2 * pairs, dtype=wide)
    never = never.reshape(-1, width)

    def slots(rows: list[Tensor]) -> Tensor:
        """[real slots | imaginary slots]."""
        empty = torch.zeros(0, width, dtype=wide)
        return torch.stack(rows, 1).flatten(0, 1) if rows else empty

    total = float(torch.diagonal(key_moment).sum())
    return RotaryChoice(
        key_rope=slots(key_rope),
        query_rope=slots(query_rope),
        key_nope=torch.cat([slots(key_nope), never]),
        nope_up=torch.cat([slots(nope_up), never]).t().contiguous(),
        columns=tuple(c.frequency for c in kept),
        energy=tuple(c.energy / max(total, 1e-300) for c in kept),
    )


def _rows(weights: Tensor, f: int, pairs: int, d: int) -> Tensor:
    """The complex functional `weights` . k(f) as its real and imaginary row, [2, G d]."""
    rows = torch.zeros(2, len(weights), d, dtype=torch.float64)
    rows[0, :, f], rows[0, :, pairs + f] = weights.real, -weights.imag
    rows[1, :, f], rows[1, :, pairs + f] = weights.imag, weights.real
    return rows.flatten(1)


def mean_key(config: DenseConfig, rope: int) -> RotaryChoice:
    """X-EcoMLA's start: one rotated key, the mean over kv heads of their last R dimensions.

    Its dimensions are paired as neighbours and turn with a fresh table of width R, whatever the
    model rotated them with; the same dimensions of the heads' own keys are dropped.
    """
    assert config.rotary is not None or rope == 0
    groups, d = config.core.kv_heads, config.core.qk_head_dim
    pairs = config.rotary.pairs if config.rotary else 0
    last = torch.arange(d - rope, d)
    order = torch.cat([last[0::2], last[1::2]])
    query = torch.zeros(rope, groups, d, dtype=torch.float64)
    query[torch.arange(rope), :, order] = 1.0
    nope = torch.zeros(groups, d - rope, groups, d, dtype=torch.float64)
    for g in range(groups):
        nope[g, :, g, : d - rope] = torch.eye(d - rope, dtype=torch.float64)
    nope = nope.reshape(-1, groups * d)
    slots = rope // 2
    columns = tuple(j * pairs // slots for j in range(slots))
    query = query.flatten(1)
    return RotaryChoice(query / groups, query, nope, nope.t().contiguous(), columns, ())
