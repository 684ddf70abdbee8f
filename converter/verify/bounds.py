"""How far a converted block's output can be from the original's: a bound from what was discarded.

With p, v the probabilities and values of the original, ^ those of the converted block, and W the
output projection, the outputs of one query differ by

    W sum_j p_j v_j - W^ sum_j p_j v^_j          the values' part, taken as it is
    + sum_h W^_h sum_j (p_hj - p^_hj) v^_hj      the scores' part, bounded

Probabilities sum to one, so the second sum may be taken around any centre c, and is at most
2 TV(p, p^) max_j |W^_h v^_j - c|. The total variation follows from the error d_j = s^_j - s_j of
the scores: TV <= tanh((max d - min d) / 4), and by Pinsker TV <= sqrt(KL(p || p^) / 2) with
KL = log sum p e^d - sum p d. The smaller one counts. So the bound is a theorem about the
discarded parts of keys and values (v - v^, and k - k^ as the queries weigh it) on the tokens
measured, in exact arithmetic; it promises nothing for other tokens. docs/math/mla.md section 14.

Layout letters: B batch, N queries, M keys, H heads, D outputs, e value width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.capture import Call, watch
from reattend.inputs import without_cache
from reattend.install.adapter import Adapter, install
from reattend.mixers import dense as dense_module
from reattend.mixers import latent as latent_module
from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import DenseAttention
from reattend.mixers.scores import shown, visibility
from reattend.preflight import Choice
from reattend.rewriting import Rewritten, normal_forms
from reattend.running import evaluation
from reattend.verify.parity import real_positions


@dataclass
class Asked:
    """The arguments of one `attend`: queries [B, H, N, *], keys and values per kv head."""

    q: Tensor
    k: Tensor
    v: Tensor
    core: CoreConfig
    mask: Tensor | None
    bias: Tensor | None

    def head(self, row: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, *], k [M, *], v [M, e] of one head, float64."""
        heads = self.q.shape[1]
        group = head * self.k.shape[1] // heads
        taken = self.q[row, head], self.k[row, group], self.v[row, group]
        q, k, v = (t.double() for t in taken)
        return q, k, v

    def scores(self, row: int, head: int) -> Tensor:
        """[N, M] before masking, float64."""
        q, k, _ = self.head(row, head)
        s = q @ k.t() * self.core.scale
        if self.core.softcap:
            s = self.core.softcap * torch.tanh(s / self.core.softcap)
        return s if self.bias is None else s + self.bias[0, head].double()


@torch.no_grad()
def block_bounds(
    original: nn.Module,
    done: Rewritten,
    choices: list[Choice],
    inputs: dict[str, Any],
    levels: frozenset[str] = frozenset({"bounded"}),
) -> dict[str, float]:
    """The bound of every converted block on the original's own activations.

    Args:
        original: the whole original.
        done: the converted model, not trained.
        choices: what was decided for every site.
        inputs: the tokens that `block_errors` measures on; the bound is for these.
        levels: the exactness of the blocks to bound.
    """
    if done.graph:
        return {}
    wanted = {p for p, b in done.built.items() if b.exactness in levels}
    forms = normal_forms(original, [c for c in choices if c.site.path in wanted])
    calls = watch(original, wanted, without_cache(original, inputs)) if wanted else {}
    found = {}
    for path, form in forms.items():
        parts = original.get_submodule(path), done.model.get_submodule(path)
        bound = output_bound(*parts, form, calls[path], real_positions(inputs))
        if bound is not None:
            found[path] = bound
    return found


@torch.no_grad()
def output_bound(
    original: nn.Module, converted: nn.Module, form: DenseAttention, call: Call, real: Any
) -> float | None:
    """Bound on |y - y^| / |y| over the real tokens of one call of a block.

    Args:
        original: the module that owns the block.
        converted: the adapter in its place.
        form: the original's normal form.
        call: the owner's arguments on the tokens to measure.
        real: [B, N] bool; None: all.

    Returns:
        None where the mixer does not attend with queries, keys and values of these heads, and
        where the owner does more than the block (the bound is about the block's output, while the
        measured error is about the owner's), and for blocks with sinks or with a gate or the
        model's own steps after the core.
    """
    if not isinstance(converted, Adapter) or form.config.cross or converted.around is not None:
        return None
    if form.config.core.sinks or form.config.gate is not None or form.config.join is not None:
        return None  # probabilities do not sum to one, or the output is not linear in the heads
    before = _asked(install(original, form, converted.binding), call)
    after = _asked(converted, call)
    if before is None or after is None or before.q.shape[:3] != after.q.shape[:3]:
        return None
    if before.v.shape[-1] != after.v.shape[-1] or before.k.shape[2] != after.k.shape[2]:
        return None
    error, size = 0.0, 0.0
    for row in range(before.q.shape[0]):
        bound_N, norm_N = _row(before, after, row, form.o_proj, converted.mixer.o_proj)
        fits = real is not None and real.shape == before.q.shape[::2][:2]
        kept = real[row].to(bound_N.device) if fits else slice(None)
        error += float(bound_N[kept].square().sum())
        size += float(norm_N[kept].square().sum())
    return math.sqrt(error / max(size, 1e-300))


def _row(
    before: Asked, after: Asked, row: int, out: nn.Module, new_out: nn.Module
) -> tuple[Tensor, Tensor]:
    """Bound on the output's error, and the output's norm, of every query of one row."""
    heads, n = before.q.shape[1:3]
    seen_NM = _seen(before, row)
    e = before.v.shape[-1]
    wide: dict[str, Any] = {"dtype": torch.float64, "device": before.q.device}
    old, new = torch.zeros(n, heads * e, **wide), torch.zeros(n, heads * e, **wide)
    moved_N = torch.zeros(n, **wide)
    for head in range(heads):
        s, change = before.scores(row, head), after.scores(row, head)
        change = (change - s).masked_fill(~seen_NM, 0)
        p_NM = torch.nan_to_num(s.masked_fill(~seen_NM, float("-inf")).softmax(-1))
        part = slice(head * e, (head + 1) * e)
        v, new_v = before.head(row, head)[2], after.head(row, head)[2]
        old[:, part], new[:, part] = p_NM @ v, p_NM @ new_v
        w_MD = new_v
        if isinstance(new_out, nn.Linear):
            w_MD = new_v @ new_out.weight[:, part].double().t()
        radius_M = (w_MD - w_MD.mean(0)).norm(dim=-1)
        radius_N = torch.where(seen_NM, radius_M, 0.0).amax(-1)
        moved_N += 2 * variation(p_NM, change, seen_NM) * radius_N
    y = _apply(out, old)
    return (y - _apply(new_out, new)).norm(dim=-1) + moved_N, y.norm(dim=-1)


def variation(p_NM: Tensor, change_NM: Tensor, seen_NM: Tensor) -> Tensor:
    """Bound [N] on the total variation between softmax(s) = p and softmax(s + change)."""
    top = change_NM.masked_fill(~seen_NM, float("-inf")).amax(-1)
    low = change_NM.masked_fill(~seen_NM, float("inf")).amin(-1)
    spread = torch.nan_to_num((top - low).clamp_min(0), posinf=0.0)
    shifted = torch.where(seen_NM, change_NM - torch.nan_to_num(top, neginf=0.0)[:, None], 0.0)
    kl = (p_NM * shifted.exp()).sum(-1).clamp_min(1e-300).log() - (p_NM * shifted).sum(-1)
    return torch.minimum(torch.tanh(spread / 4), (kl.clamp_min(0) / 2).sqrt())


def _seen(asked: Asked, row: int) -> Tensor:
    """Which keys every query may look at, [N, M] bool."""
    n, m = asked.q.shape[2], asked.k.shape[2]
    mask = visibility(asked.mask, asked.core, n, m, asked.q)
    if mask is None:
        return torch.ones(n, m, dtype=torch.bool, device=asked.q.device)
    whole = shown(mask).expand(asked.q.shape[0], -1, n, m)
    return whole[row, 0]


def _apply(layer: nn.Module, y: Tensor) -> Tensor:
    if not isinstance(layer, nn.Linear):
        return y
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(y, layer.weight.double(), bias)


def _asked(block: nn.Module, call: Call) -> Asked | None:
    found: list[Asked] = []
    with evaluation(block), torch.no_grad(), recorded(found):
        block(*call.args, **call.kwargs)
    return found[0] if len(found) == 1 else None


@contextmanager
def recorded(into: list[Asked]) -> Iterator[None]:
    """Note the arguments of every `attend` of our mixers; they compute as before."""
    modules: tuple[Any, ...] = (dense_module, latent_module)
    old = [module.attend for module in modules]

    def watching(attend: Any) -> Any:
        def attend_and_note(
            q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, mask: Any, bias: Any = None,
            sinks: Any = None,
        ) -> Any:  # fmt: skip
            into.append(Asked(q, k, v, core, mask, bias))
            return attend(q, k, v, core, mask, bias, sinks)

        return attend_and_note

    for module, attend in zip(modules, old, strict=True):
        module.attend = watching(attend)
    try:
        yield
    finally:
        for module, attend in zip(modules, old, strict=True):
            module.attend = attend
