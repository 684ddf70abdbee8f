"""Are the kernels of sparse, routed and linear attention, and all gradients, right?

As `correctness.py`: ragged rows, an empty one, NaN wherever nothing may be read, inputs that are
not contiguous, three dtypes. Outputs are compared with the op's formula in fp64 and with a second
oracle: torch's SDPA under a mask, or the recurrence token by token. Gradients are compared with
autograd through the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from correctness import compared, rows_of, transposed, y_limit
from recurrence import recurrence
from torch import Tensor

from reattend.kernels.attention import reference as attention_reference
from reattend.kernels.latent_attention import latent_attention
from reattend.kernels.latent_attention import reference as latent_reference
from reattend.kernels.linear_attention import reference as linear_reference
from reattend.kernels.routed_attention import reference as routed_reference
from reattend.kernels.sparse_attention import BlockLayout
from reattend.kernels.sparse_attention import reference as sparse_reference

GRADIENT = 2.0  # times the error that an output may have


@dataclass(frozen=True)
class Trial:
    """One check: op, sizes as in `cases.Case`, and what else the op is given."""

    name: str
    op: str
    h: int
    g: int
    n: int
    m: int
    d: int
    options: dict[str, Any] = field(default_factory=dict)
    gradient: bool = False


SPARSE, ROUTED, LINEAR = "sparse_attention", "routed_attention", "linear_attention"
LATENT = "latent_attention"  # d is the rank, an option the rotary width
# of linear attention, `times`: what q, k, v and dy are multiplied with; `padded`: there is padding
WHOLE, FEATURED = {"padded": False}, {"decay": "feature"}
TERRACES: dict[str, Any] = {"normalize": True, "lag": 65, "block": 64}
LARGE_MASS: dict[str, Any] = {"times": (1e-3, 200, 200, 1e-2), "normalize": True}
LARGE_FEATURED: dict[str, Any] = {"times": (1e-3, 200, 300, 1e-3)} | FEATURED
SMALL: dict[str, Any] = {"times": (2e-3, 5e-4, 1, 1), "normalize": True}
LONG = 1024  # tokens from which the formula takes too much memory: the op in fp64, in torch
TRIALS = (
    Trial("gradient", "attention", 8, 2, 133, 200, 128, gradient=True),
    Trial("gradient, width 80", "attention", 4, 2, 97, 97, 80, {"softcap": 5.0}, True),
    Trial("gradient, window", "attention", 4, 4, 150, 150, 64, {"sliding_window": 37}, True),
    Trial("gradient, two-way", "attention", 4, 1, 65, 70, 256, {"causal": False}, True),
    Trial("gradient, two widths", "attention", 4, 2, 97, 97, 80, {"values": 48}, True),
    Trial("decode, two widths", "attention", 8, 2, 1, 300, 96, {"values": 64}),
    Trial("gradient", LATENT, 16, 1, 133, 200, 512, {"rope": 64}, True),
    Trial("gradient, rank 200", LATENT, 5, 1, 97, 97, 200, {"rope": 48, "softcap": 5.0}, True),
    Trial("gradient, window", LATENT, 8, 1, 150, 150, 64, {"rope": 32, "sliding_window": 37}, True),
    Trial("gradient, two-way", LATENT, 4, 1, 65, 70, 256, {"rope": 16, "causal": False}, True),
    Trial("prefill", SPARSE, 8, 2, 300, 300, 128, gradient=True),
    Trial("prefill, softcap", SPARSE, 4, 2, 133, 133, 80, {"softcap": 5.0}, True),
    Trial("prefill, blocks of 16", SPARSE, 4, 4, 97, 160, 96, {"block": 16}, True),
    Trial("prefill, blocks of 32", SPARSE, 4, 2, 129, 129, 256, {"block": 32}, True),
    Trial("prefill, two widths", SPARSE, 4, 2, 133, 133, 64, {"values": 128}, True),
    Trial("decode, two widths", SPARSE, 8, 2, 1, 300, 96, {"values": 64}),
    Trial("decode", SPARSE, 8, 2, 1, 777, 128),
    Trial("decode, small chunk", SPARSE, 8, 4, 5, 300, 64),
    Trial("decode, width 32, blocks of 16", SPARSE, 4, 2, 3, 200, 32, {"block": 16}),
    Trial("prefill, heads", ROUTED, 8, 2, 133, 200, 128, {"units": 8}, True),
    Trial("prefill, groups", ROUTED, 8, 2, 200, 200, 80, {"units": 2}, True),
    Trial("prefill, window", ROUTED, 4, 4, 97, 161, 64, {"units": 4, "sliding_window": 37}, True),
    Trial("prefill, two widths", ROUTED, 4, 2, 97, 161, 64, {"units": 2, "values": 96}, True),
    Trial("decode, two widths", ROUTED, 8, 4, 1, 300, 64, {"units": 4, "values": 128}),
    Trial("decode, groups", ROUTED, 32, 8, 1, 999, 128, {"units": 8}),
    Trial("decode, heads", ROUTED, 8, 2, 5, 300, 96, {"units": 8}),
    Trial("causal", LINEAR, 4, 2, 200, 200, 128, gradient=True),
    Trial("decay", LINEAR, 4, 4, 133, 133, 80, {"decay": "head", "state": True}, True),
    Trial("mass", LINEAR, 2, 1, 97, 97, 64, {"normalize": True, "state": True}, True),
    Trial("terraces", LINEAR, 4, 2, 300, 300, 96, {"lag": 65, "block": 64}, True),
    Trial("lag", LINEAR, 2, 2, 150, 150, 256, {"lag": 37, "decay": "head"}, True),
    Trial("featured", LINEAR, 4, 2, 133, 133, 64, {"decay": "feature", "state": True}, True),
    Trial("featured, mass", LINEAR, 2, 2, 70, 70, 96, {"decay": "feature", "normalize": True}),
    Trial("mass, lag", LINEAR, 2, 2, 150, 150, 64, {"normalize": True, "lag": 37} | WHOLE, True),
    Trial("mass, terraces", LINEAR, 4, 2, 200, 200, 96, TERRACES | WHOLE, True),
    Trial("large states", LINEAR, 2, 1, 200, 200, 64, {"times": (1e-4, 200, 200, 1e-3)}, True),
    Trial("large states, mass", LINEAR, 2, 1, 140, 140, 64, LARGE_MASS | WHOLE, True),
    Trial("large states, featured", LINEAR, 2, 2, 70, 70, 64, LARGE_FEATURED, True),
    Trial("small sums", LINEAR, 2, 1, 97, 97, 64, SMALL | WHOLE, True),
    Trial("small sums, featured", LINEAR, 2, 2, 70, 70, 64, SMALL | WHOLE | FEATURED, True),
    Trial("long decay", LINEAR, 1, 1, 2048, 2048, 64, {"decay": "head"}, True),
    Trial("long decay, lag", LINEAR, 1, 1, 2048, 2048, 64, {"decay": "head", "lag": 5}, True),
    Trial("step", LINEAR, 8, 2, 1, 1, 128, {"decay": "head", "state": True, "normalize": True}),
    Trial("step, featured", LINEAR, 4, 4, 1, 1, 80, {"decay": "feature", "state": True}),
)


def _heads(trial: Trial, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Heads inside of tokens, caches between other numbers and with NaN where no key is."""
    make = torch.Generator(device=device).manual_seed(trial.n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device=device).to(dtype)

    latent = trial.op == LATENT
    widths = (trial.d, trial.options["rope"]) if latent else (trial.d,)
    queries = [draw(3, trial.n, trial.h, width).transpose(1, 2) for width in widths]
    e = trial.options.get("values", trial.d)
    shapes = [(w,) for w in widths] if latent else [(trial.g, w) for w in (trial.d, e)]
    caches = [draw(3, *shape[:-1], trial.m, shape[-1]) for shape in shapes]
    start, length = rows_of(3, trial.m, device)
    for cache in caches:
        for b in range(3):
            cache[b, ..., : int(start[b]), :] = float("nan")
            cache[b, ..., int(length[b]) :, :] = float("nan")
    return [*queries, *(transposed(cache) for cache in caches)]


def _scale(trial: Trial) -> float:
    return 1 / math.sqrt(trial.d + trial.options.get("rope", 0))


def _under_mask(trial: Trial, wide: list[Tensor], seen_HNM: Tensor, scale: float) -> Tensor:
    """The first row of the batch by torch's SDPA in fp64; NaN where a query sees nothing."""
    repeat = trial.h // trial.g
    if trial.op == LATENT:  # a row with its rotary key is the key, without it the value
        q, k = torch.cat(wide[:2], -1), torch.cat(wide[2:], -1)[:, None]
        wide = [q, k, wide[2][:, None]]
    q, k, v = (wide[0][:1], *(x[:1].repeat_interleave(repeat, 1) for x in wide[1:]))
    made: Tensor = F.scaled_dot_product_attention(q, k, v, seen_HNM, scale=scale)[0]
    return made


Run = Callable[..., tuple[Tensor, Tensor]]
OPS = torch.ops.reattend


def _softmax(
    trial: Trial, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Run, Run, Tensor]:
    """Inputs, op and formula as functions of them, and what each query of the first row sees."""
    start, length = rows_of(3, trial.m, device)
    options, scale = dict(trial.options), _scale(trial)
    options.pop("values", None)
    make = torch.Generator().manual_seed(trial.m)
    pos = trial.m - trial.n + torch.arange(trial.n, device=device)[:, None]
    j = torch.arange(trial.m, device=device)
    seen = (j <= pos) if options.get("causal", True) else (j >= 0).expand(trial.n, -1)
    seen = seen & (pos - j < (options.get("sliding_window") or trial.m + 1))
    inputs = _heads(trial, dtype, device)
    if trial.op == SPARSE:
        block, softcap = options.get("block", 64), options.get("softcap", 0.0)
        mask = torch.rand(3, trial.m, trial.m, generator=make) < 0.4
        mask &= torch.ones(trial.m, trial.m, dtype=torch.bool).tril()
        mask[:, :, :2] |= torch.rand(3, trial.m, 1, generator=make) < 0.9
        head_layout = torch.arange(trial.h) * 3 // trial.h
        layout = BlockLayout.from_mask(mask, head_layout, block).to(device)
        rest = (*layout.tensors, start, length, block, 0, scale, softcap)
        formula_sparse: Run = sparse_reference.sparse_attention
        shown = mask[head_layout].to(device)[:, -trial.n :]
        return (
            inputs,
            lambda *x: OPS.sparse_attention(*x, *rest),
            lambda *x: formula_sparse(*x, *rest),
            shown,
        )
    given: tuple[Tensor, ...] = (start, length)
    op: Run = OPS.attention
    formula: Run = attention_reference.attention
    shown = seen.expand(trial.h, -1, -1)
    if trial.op == LATENT:
        options.pop("rope")
        op, formula = latent_attention, latent_reference.latent_attention
    if trial.op == ROUTED:
        units = options.pop("units")
        active = torch.rand(3, units, trial.n, generator=make) < 0.6
        active[0, 0] = False
        given = (active.to(device), *given)
        op, formula = OPS.routed_attention, routed_reference.routed_attention
        used = active[0].to(device).repeat_interleave(trial.h // units, 0)
        shown = shown & used[..., None]
    return (
        inputs,
        lambda *x: op(*x, *given, scale=scale, **options),
        lambda *x: formula(*x, *given, scale=scale, **options),
        shown,
    )


def softmax_error(trial: Trial, dtype: torch.dtype, device: str) -> float:
    """Error of one trial of softmax attention, in units of the allowed one."""
    inputs, op, formula, shown = _softmax(trial, dtype, device)
    narrow = [x.detach().requires_grad_(trial.gradient) for x in inputs]
    wide = [x.detach().double().requires_grad_(trial.gradient) for x in inputs]
    y, lse = op(*narrow)
    want, want_lse = formula(*wide)
    error = compared(y.detach(), lse.detach(), want.detach(), want_lse.detach(), dtype)
    if not trial.options.get("softcap"):
        finite = [torch.nan_to_num(x.detach()) for x in wide]
        other = _under_mask(trial, finite, shown, _scale(trial))
        seen = shown.any(-1)
        apart = (y.detach()[0].double() - other)[seen].abs().max() / want.detach().abs().max()
        error = max(error, float(apart) / y_limit(dtype))
    if trial.gradient:
        dy, dlse = torch.randn_like(y), torch.randn_like(lse)
        finite_lse = torch.isfinite(want_lse)
        loss = (want * dy.double()).sum() + (want_lse * dlse)[finite_lse].sum()
        wanted = torch.autograd.grad(loss, wide)
        found = torch.autograd.grad((y, lse), narrow, (dy, dlse))
        error = max(error, *_gradient_errors(found, wanted, dtype))
    return error


def _gradient_errors(
    found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype
) -> list[float]:
    errors = []
    for made, want in zip(found, wanted, strict=True):
        apart = float((made.double() - want).abs().max() / want.abs().max().clamp_min(1e-9))
        errors.append(apart / (GRADIENT * y_limit(dtype)) if apart == apart else float("inf"))
    return errors


def linear_error(trial: Trial, dtype: torch.dtype, device: str) -> float:
    """Error of one trial of linear attention, in units of the allowed one."""
    o: dict[str, Any] = {
        "lag": 0,
        "block": 1,
        "normalize": False,
        "decay": "",
        "state": False,
        "times": (1, 1, 1, 1),
        "padded": True,
    } | trial.options
    make = torch.Generator(device=device).manual_seed(trial.n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device=device, dtype=torch.float64)

    n, d = trial.n, trial.d
    shapes = (2, n, trial.h, d), (2, trial.g, n, d), (2, trial.g, n, d)
    q, k, v = (by * draw(*shape) for shape, by in zip(shapes, o["times"][:3], strict=True))
    q, k, v = q.abs().transpose(1, 2).to(dtype), k.abs().to(dtype), v.to(dtype)
    if o["padded"]:
        k[-1, :, : n // 4] = 0
    shape = {"head": (2, trial.g, n), "feature": (2, trial.g, n, d)}.get(o["decay"])
    decay = None if shape is None else -draw(*shape).abs().float() * 0.2
    state = draw(2, trial.g, d, d + o["normalize"]).abs().float() if o["state"] else None
    rules = (o["lag"], o["block"], o["normalize"])
    given = [q, transposed(k), transposed(v), decay, state]
    leaves = [None if x is None else x.detach().requires_grad_(trial.gradient) for x in given]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in given]
    found = OPS.linear_attention(*leaves, *rules)
    formula: Run = OPS.linear_attention if n > LONG else linear_reference.linear_attention
    want = formula(*wide, *rules)
    errors = _gradient_errors(found, want, dtype)
    if (o["lag"], o["block"]) == (0, 1):
        other = recurrence([None if x is None else x.double() for x in given], o["normalize"])
        errors += _gradient_errors(found, other, dtype)
    errors = [GRADIENT * error for error in errors]
    if trial.gradient:
        grads = tuple(torch.randn_like(x) * o["times"][3] for x in found)
        wanted = torch.autograd.grad(
            want, [x for x in wide if x is not None], tuple(g.double() for g in grads)
        )
        made = torch.autograd.grad(found, [x for x in leaves if x is not None], grads)
        errors += _gradient_errors(made, wanted, dtype)
        if decay is not None:  # long sums of differences: the largest says little of the others
            drift = float((made[3].double() - wanted[3]).norm() / wanted[3].norm())
            errors.append(drift / y_limit(dtype))
    return max(errors)


def trial_error(trial: Trial, dtype: torch.dtype, device: str) -> float:
    """Error of one trial, in units of the allowed one."""
    kind = linear_error if trial.op == LINEAR else softmax_error
    return kind(trial, dtype, device)
