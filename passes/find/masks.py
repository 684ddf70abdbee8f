"""Classify a mask by running it: on small inputs, padded and not, at two lengths.

An additive mask may also carry a learned bias per head and distance (`relative.py` reads it).
ALiBi is read by `alibi.py`; other biases are reported as not understood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.mixers.scores import shown
from reattend.passes.evaluate import Evaluator, ancestors, attribute
from reattend.passes.find.alibi import read_alibi
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.relative import (
    LENGTH,
    from_hidden,
    read_relative,
    tables,
    the_table,
)  # fmt: skip
from reattend.passes.normalize.forms import aten, is_op
from reattend.spec import Alibi, Pattern, RelativeBias

#: Longest length a mask is probed at (a window of w needs 2 w + 3).
LONGEST = 16400


@dataclass(frozen=True)
class FoundMask:
    """The pattern, whether padding in the model's own mask input changes it, and the bias."""

    pattern: Pattern
    follows_padding: bool
    bias: RelativeBias | Alibi | None = None


def classify(allowed_NM: Tensor) -> Pattern:
    """The pattern of one boolean matrix [N, M] (True: visible); `opaque` if none fits."""
    n, m = allowed_NM.shape
    if bool(allowed_NM.all()):
        return Pattern("full")
    if n != m:
        return Pattern("opaque")
    i = torch.arange(n, device=allowed_NM.device)[:, None]
    j = torch.arange(m, device=allowed_NM.device)[None, :]
    causal = j <= i
    if bool((allowed_NM == causal).all()):
        return Pattern("causal")
    window = int(allowed_NM[-1].sum())
    if bool((allowed_NM == (causal & (j > i - window))).all()):
        return Pattern("sliding", window=window)
    first = int(allowed_NM[:, 0].sum())
    if first and bool((allowed_NM == (causal & (i // first == j // first))).all()):
        return Pattern("chunked", chunk=first)
    return Pattern("opaque")


def read_mask(
    gm: fx.GraphModule,
    mask: fx.Node | None,
    is_causal: bool,
    inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]],
) -> FoundMask:
    """Probe the mask argument of a core.

    Args:
        gm: normalised graph.
        mask: the argument, None if there is none.
        is_causal: the core hides later keys itself.
        inputs_at: (length or None for the captured one, padded) -> placeholder values.

    Raises:
        NotUnderstood: it is a bias, or depends on hidden states, or differs between heads.

    A mask of no known kind (images that see each other, prefixes, packed documents) is `opaque`:
    the block takes it from the model call by call, and cannot be used without.
    """
    if mask is None:
        return FoundMask(Pattern("causal" if is_causal else "full"), False)
    if is_causal:
        raise NotUnderstood("a mask beside is_causal")
    if from_hidden(mask):  # short inputs may not show it: the best of all tokens are all tokens
        raise NotUnderstood("the mask is computed from hidden states")
    slice_nodes = ancestors([mask])
    run = Evaluator(gm)

    def at(length: int | None, padded: bool) -> Tensor:
        return shown(run.run([mask], inputs_at(length, padded))[0])

    bias = _bias(gm, mask, inputs_at)
    base = at(None, False)
    pattern = _pattern(base)
    if pattern.kind not in ("full", "opaque"):
        pattern = _at_length(at, _constants(slice_nodes), base.shape[-2]) or pattern
    padded = at(None, True)
    others = [padded] if bias is not None else [padded, *_drawn(gm, mask, inputs_at(None, False))]
    follows = any(not bool((other == base).all()) for other in others)
    if pattern.kind != "opaque" and not all(_only_hides_keys(base, other) for other in others):
        pattern = Pattern("opaque")  # an input decides query by query: it may say anything
    return FoundMask(pattern, follows, bias)


def _drawn(gm: fx.GraphModule, mask: fx.Node, given: dict[fx.Node, Any]) -> list[Tensor]:
    """The mask when an input that it is made of hides at random: who calls may pass any mask."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for node in ancestors([mask], stop=lambda n: is_op(n, aten.sym_size)):
        value = given.get(node)
        if node.op != "placeholder" or not isinstance(value, Tensor) or value.dim() < 2:
            continue
        hidden = torch.rand(value.shape, generator=generator) < 0.5
        if value.dtype == torch.bool:
            drawn = hidden
        elif value.is_floating_point():
            drawn = torch.zeros_like(value).masked_fill(hidden, -torch.inf)
        else:
            continue
        found.append(shown(Evaluator(gm).run([mask], {**given, node: drawn})[0]))
    return found


def _only_hides_keys(base: Tensor, padded: Tensor) -> bool:
    """Whether padding takes keys away from every real query, and does nothing else.

    A chunk may be counted from the first real token, or an input may decide query by query: then
    the pattern is the row's own.
    """
    while base.dim() < 4:
        base, padded = base[None], padded[None]
    base, padded = torch.broadcast_tensors(base, padded)
    n, m = base.shape[-2:]
    if n == m:
        valid_BM = torch.diagonal(padded, dim1=-2, dim2=-1)[:, 0]
        real_BN = valid_BM
    else:
        valid_BM = padded[:, 0].any(1)
        real_BN = torch.ones(padded.shape[0], n, dtype=torch.bool)
    expected = base & valid_BM[:, None, None, :]
    return bool(((padded == expected) | ~real_BN[:, None, :, None]).all())


def _at_length(
    at: Callable[[int | None, bool], Tensor], constants: list[int], base: int
) -> Pattern | None:
    """The pattern at the longest length that tells windows apart and that the mask allows.

    A constant may be a window w (2 w + 3 tokens show it, w + 2 hint at it), or the longest length
    itself.
    """
    lengths = {2 * c + 3 for c in constants} | {c + 2 for c in constants} | {base + 6}
    for length in sorted((n for n in lengths if base < n <= LONGEST), reverse=True):
        try:
            return _pattern(at(length, False))
        except (RuntimeError, IndexError):
            continue
    return None


def _bias(
    gm: fx.GraphModule,
    mask: fx.Node,
    inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]],
) -> RelativeBias | Alibi | None:
    """What an additive mask adds to visible scores; None if nothing."""
    value = Evaluator(gm).run([mask], inputs_at(None, False))[0]
    if value.dtype == torch.bool:
        return None
    names = tables(gm, mask)
    table = len(names) == 1 and attribute(gm, names[0]).dim() == 2
    if not table and not bool((value[shown(value)] != 0).any()):
        return None  # a lone table counts even where this model's numbers happen to be zero
    if not names and value.dim() in (3, 4) and not from_hidden(mask):
        wide = Evaluator(gm, promote=torch.float64).run([mask], inputs_at(None, False))[0]
        return read_alibi(wide, wide.shape[-3])
    name = the_table(gm, mask)
    given = inputs_at(LENGTH, False)

    def masked(weight: Tensor) -> Tensor:
        try:
            out: Tensor = Evaluator(gm, weights={name: weight}).run([mask], given)[0]
        except (RuntimeError, IndexError) as why:
            raise NotUnderstood(f"the mask cannot be computed at {LENGTH} tokens: {why}") from why
        return out

    return read_relative(name, attribute(gm, name).detach(), masked)


def _pattern(allowed: Tensor) -> Pattern:
    """The pattern of a mask; `opaque` where it depends on the row's data or fits none."""
    while allowed.dim() < 4:
        allowed = allowed[None]
    if not bool((allowed == allowed[:, :1]).all()):
        raise NotUnderstood("the mask differs between heads")
    if not bool((allowed == allowed[:1]).all()):
        return Pattern("opaque")
    return classify(allowed[0, 0])


def _constants(nodes: set[fx.Node]) -> list[int]:
    """Positive whole numbers written in the mask's arithmetic: windows and chunks."""
    found = []
    for node in nodes:
        if node.op == "call_function":
            for value in node.args:
                if isinstance(value, int) and 1 < abs(value) <= LONGEST // 2:
                    found.append(abs(value))
    return found
