"""Read a relative position bias by running it: which table row lands on which distance.

The table the mask is computed from is replaced by tensors that name their own rows and columns,
so every spelling of the bucket arithmetic is the same record. Random numbers prove it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from reattend.mixers.relative import relative_bias
from reattend.mixers.scores import shown
from reattend.passes.evaluate import ancestors, attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.normalize.forms import aten, is_op, is_projection
from reattend.spec import RelativeBias

#: Tokens a bias is probed at: its buckets must have stopped changing before.
LENGTH = 520
#: Operations that read no value of a tensor, only how large it is.
_SIZES = (
    aten.sym_size, aten.new_zeros, aten.new_ones, aten.new_full, aten.zeros_like, aten.ones_like,
    aten.full_like, aten.new_empty, aten.empty_like,
)  # fmt: skip
#: Codes are digits below this base, which every float type holds exactly.
_BASE = 128

#: table -> the mask [B, H, N, M] computed with it, at `LENGTH` tokens
Masked = Callable[[Tensor], Tensor]


def tables(gm: fx.GraphModule, mask: fx.Node) -> list[str]:
    """Names of the float parameters whose values the mask is computed from."""
    behind = ancestors([mask], stop=lambda n: is_op(n, aten.sym_size))
    names = {str(n.target) for n in behind if n.op == "get_attr"}
    found = {name: attribute(gm, name) for name in names}
    return sorted(
        name
        for name, value in found.items()
        if isinstance(value, nn.Parameter) and value.is_floating_point()
    )


def from_hidden(mask: fx.Node) -> bool:
    """Whether a mask is computed from hidden states."""
    return any(is_projection(n) for n in ancestors([mask], stop=lambda n: is_op(n, *_SIZES)))


def the_table(gm: fx.GraphModule, mask: fx.Node) -> str:
    """The one parameter behind a mask that adds a bias.

    Raises:
        NotUnderstood: there is none, there are several, or it is not [buckets, heads].
    """
    names = tables(gm, mask)
    if from_hidden(mask):
        raise NotUnderstood("the mask adds a bias computed from hidden states")
    if not names:
        raise NotUnderstood("the mask adds a constant bias that is not per head and key")
    if len(names) > 1:
        raise NotUnderstood(f"the mask adds a bias of {len(names)} parameters ({', '.join(names)})")
    axes = attribute(gm, names[0]).dim()
    if axes != 2:
        raise NotUnderstood(f"the bias table {names[0]} has {axes} axes, not bucket and head")
    return names[0]


def read_relative(name: str, table: Tensor, masked: Masked) -> RelativeBias:
    """The bucket of every distance.

    Args:
        name: of the table.
        table: [rows, heads], for its shape and dtype.
        masked: computes the mask from another table.

    Raises:
        NotUnderstood: heads, scale or buckets are not those of a relative bias.
    """
    rows, heads = table.shape
    constant = masked(torch.zeros_like(table))
    if constant.dim() != 4 or constant.shape[1] != heads or constant.shape[-1] < 2:
        raise NotUnderstood(f"the bias of {heads} columns has shape {tuple(constant.shape)}")
    if constant.shape[-2] != constant.shape[-1]:
        raise NotUnderstood("a relative bias between different numbers of queries and keys")
    seen_NM = shown(constant)[0, 0]
    if bool((constant[:, :, seen_NM] != 0).any()):
        raise NotUnderstood("the mask adds a constant beside its relative bias")
    if bool((masked(torch.ones_like(table))[:, :, seen_NM] != 1).any()):
        raise NotUnderstood("the bias is computed from its table, not read from it")
    row_HE = _decode(masked, table, seen_NM, 0)
    column_HE = _decode(masked, table, seen_NM, 1)
    if not bool((column_HE == torch.arange(heads)[:, None]).all()):
        raise NotUnderstood("head h of the bias does not read column h of its table")
    if not bool((row_HE == row_HE[:1]).all()):
        raise NotUnderstood("heads read different rows of the bias table")
    buckets = _by_distance(row_HE[0], seen_NM)
    found = RelativeBias(name, rows, tuple(_trimmed(buckets)))
    _prove(found, table, masked, seen_NM)
    return found


def _decode(masked: Masked, table: Tensor, seen_NM: Tensor, axis: int) -> Tensor:
    """Row (axis 0) or column (axis 1) of the table at every visible entry E, [H, E]."""
    index, power = torch.zeros(1, dtype=torch.long), 1
    positions = torch.arange(table.shape[axis])
    while power == 1 or power < table.shape[axis]:
        digits = (positions // power % _BASE + 1).to(table)
        code = digits[:, None] if axis == 0 else digits[None, :]
        value_BHE = masked(code.expand_as(table).contiguous())[:, :, seen_NM].double()
        digit = value_BHE.round()
        if not bool((digit == value_BHE).all()) or not bool(
            (digit >= 1).all() & (digit <= _BASE).all()
        ):
            raise NotUnderstood("the bias is computed from its table, not read from it")
        if not bool((digit == digit[:1]).all()):
            raise NotUnderstood("the bias differs between rows of the batch")
        index = index + (digit[0].long() - 1) * power
        power *= _BASE
    return index


def _by_distance(row_E: Tensor, seen_NM: Tensor) -> list[int]:
    """Row of the distances -(N - 1)..N - 1; hidden ones take their visible neighbour's.

    Raises:
        NotUnderstood: equal distances read different rows, or rows still change far away.
    """
    n = seen_NM.shape[0]
    far = n - 1
    place = torch.arange(n)
    distance_E = (place[None, :] - place[:, None] + far)[seen_NM]
    low = torch.full((2 * n - 1,), torch.iinfo(torch.long).max).scatter_reduce(
        0, distance_E, row_E, "amin"
    )
    high = torch.full((2 * n - 1,), -1).scatter_reduce(0, distance_E, row_E, "amax")
    visible = high >= 0
    if not bool(visible[far]) or not bool((low == high)[visible].all()):
        raise NotUnderstood("the bias does not depend on the distance between query and key alone")
    quarter = far // 4
    for side in (high[: quarter + 1], high[-quarter - 1 :]):
        if bool((side >= 0).all()) and bool((side != side[0]).any()):
            raise NotUnderstood(f"the relative bias still changes {n} tokens away")
    buckets = high.tolist()
    for step in (1, -1):
        for d in range(far + step, 2 * n - 1 if step > 0 else -1, step):
            if buckets[d] < 0:
                buckets[d] = buckets[d - step]
    return buckets


def _trimmed(buckets: list[int]) -> list[int]:
    """The shortest -L..L that says the same, L >= 1."""
    centre = len(buckets) // 2
    far = centre
    while far > 1 and (
        buckets[centre - far] == buckets[centre - far + 1]
        and buckets[centre + far] == buckets[centre + far - 1]
    ):
        far -= 1
    return buckets[centre - far : centre + far + 1]


def _prove(found: RelativeBias, table: Tensor, masked: Masked, seen_NM: Tensor) -> None:
    """With random numbers in the table the mask is exactly what the record says."""
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(3)).to(table)
    n = seen_NM.shape[0]
    expected = relative_bias(noise, found.buckets, n, n)[:, :, seen_NM].double()
    gap = (masked(noise)[:, :, seen_NM].double() - expected).abs().max()
    if float(gap) > 4 * torch.finfo(table.dtype).eps * float(expected.abs().max()):
        raise NotUnderstood("the bias is computed from its table, not read from it")
